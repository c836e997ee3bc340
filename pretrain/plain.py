"""The same dual encoder in plain torch: the peer that `weft bench step` measures against, and an independent check.

Written as one would by hand for a single GPU: `nn.Linear`, `scaled_dot_product_attention`, the usual CLIP loss with its
whole N x N matrix, AdamW. `from_weft` copies the parameters of ours, and then both give the same embeddings.

Axes: B batch, S sequence, D width, H heads, K size of a head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from data_pipeline.tokenizer import EOS
from pretrain.models.dual import DualEncoder
from pretrain.models.pieces import parameters_by_name
from pretrain.models.towers import cut_into_patches, sincos_2d
from pretrain.sections import Model, Tower


class PlainBlock(nn.Module):
    """A pre-norm transformer layer."""

    def __init__(self, tower: Tower, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = tower.heads, causal
        hidden = int(tower.width * tower.mlp_ratio)
        self.norm1, self.norm2 = nn.LayerNorm(tower.width), nn.LayerNorm(tower.width)
        self.qkv, self.out = nn.Linear(tower.width, 3 * tower.width), nn.Linear(tower.width, tower.width)
        self.up, self.down = nn.Linear(tower.width, hidden), nn.Linear(hidden, tower.width)

    def forward(self, x_BSD: torch.Tensor) -> torch.Tensor:
        batch, length, width = x_BSD.shape
        q, k, v = self.qkv(self.norm1(x_BSD)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x_BSD = x_BSD + self.out(attended.transpose(1, 2).reshape(batch, length, width))
        return x_BSD + self.down(F.gelu(self.up(self.norm2(x_BSD))))


class PlainDualEncoder(nn.Module):
    """A vision tower with a mean or a class token, a causal text tower pooled at the end mark."""

    def __init__(self, config: Model) -> None:
        super().__init__()
        vision, text = config.vision, config.text
        if not text.causal:
            raise ValueError("the plain twin is written for model.text.causal=true only")
        grid = vision.image_size // vision.patch
        self.patch = vision.patch
        self.patches = nn.Linear(3 * vision.patch**2, vision.width)
        if vision.positions == "learned":
            self.grid = nn.Parameter(torch.empty(grid**2, vision.width))
        else:
            self.register_buffer("grid", sincos_2d(grid, grid, vision.width), persistent=False)
        self.class_token = nn.Parameter(torch.empty(vision.width)) if vision.pool == "class" else None
        self.vision = nn.Sequential(
            *(PlainBlock(vision, False) for _ in range(vision.layers)), nn.LayerNorm(vision.width)
        )
        self.tokens = nn.Embedding(text.token_rows, text.width)
        self.positions = nn.Parameter(torch.empty(text.context, text.width))
        self.text = nn.Sequential(*(PlainBlock(text, True) for _ in range(text.layers)), nn.LayerNorm(text.width))
        self.vision_projection = nn.Linear(vision.width, config.embed_dim, bias=False)
        self.text_projection = nn.Linear(text.width, config.embed_dim, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(config.logit_scale_init).log())

    def forward(self, image: torch.Tensor, text_BS: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(image [B, E], text [B, E], logit scale []), embeddings of unit length."""
        image_BSD = self.patches(cut_into_patches(image.float() / 127.5 - 1, self.patch)) + self.grid
        if self.class_token is not None:
            image_BSD = torch.cat([self.class_token.to(image_BSD).expand(len(image_BSD), 1, -1), image_BSD], 1)
        hidden_BSD = self.vision(image_BSD)
        pooled = hidden_BSD.mean(1) if self.class_token is None else hidden_BSD[:, 0]
        hidden_BSD = self.text(self.tokens(text_BS) + self.positions[: text_BS.shape[1]])
        end_B = (text_BS == EOS).int().argmax(1)
        last = hidden_BSD[torch.arange(len(end_B)), end_B]
        return (
            F.normalize(self.vision_projection(pooled), dim=-1),
            F.normalize(self.text_projection(last), dim=-1),
            self.log_scale.exp(),
        )

    @classmethod
    @torch.no_grad()
    def from_weft(cls, model: DualEncoder, config: Model) -> PlainDualEncoder:
        """The twin with the parameters of `model`."""
        plain = cls(config)
        theirs = dict(parameters_by_name(model))
        for name, parameter in plain.named_parameters():
            parameter.copy_(_of_weft(name, theirs, config))
        return plain


def plain_contrastive_loss(image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The usual InfoNCE of one process, both ways."""
    logits = scale * image @ text.T
    own = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


_LAYER = {
    "norm1": "input_layernorm",
    "qkv": "self_attention.linear_qkv",
    "out": "self_attention.linear_proj",
    "norm2": "pre_mlp_layernorm",
    "up": "mlp.linear_fc1",
    "down": "mlp.linear_fc2",
}


def _of_weft(name: str, theirs: dict[str, nn.Parameter], config: Model) -> torch.Tensor:
    """The parameter of ours that has this name in the twin."""
    top = {
        "log_scale": "logit_scale.log",
        "patches.weight": "vision.patches.linear.weight",
        "patches.bias": "vision.patches.linear.bias",
        "grid": "vision.patches.positions",
        "class_token": "vision.class_token",
        "tokens.weight": "text.tokens.weight",
        "positions": "text.positions",
    }
    if name == "log_scale":
        return theirs[top[name]][0]
    if name.endswith("_projection.weight"):
        return theirs[name.replace("_projection", ".projection")]
    if name in top:
        return theirs[top[name]]
    tower_name, number, *rest = name.split(".")
    tower: Tower = config.vision if tower_name == "vision" else config.text
    if int(number) == tower.layers:
        return theirs[f"{tower_name}.block.final_layernorm.{rest[0]}"]
    part, kind = rest
    parameter = theirs[f"{tower_name}.block.layers.{number}.{_LAYER[part]}.{kind}"]
    if part == "qkv":  # Megatron-core orders rows by head, then q, k, v; here q, k, v, then head
        return parameter.reshape(tower.heads, 3, -1, *parameter.shape[1:]).transpose(0, 1).reshape(parameter.shape)
    return parameter
