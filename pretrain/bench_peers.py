"""What `weft bench step` compares with: the same model in plain torch, and open_clip's model with its own loss.

Each at its best: one fused kernel for all of AdamW, blocks compiled by torch.compile, gradients that lie in DDP's
buckets. In bf16 they keep fp32 parameters under autocast, as trainers do; their losses gather all embeddings of the
global batch. open_clip's model has the widths of the recipe and weights of its own; it has one more norm, in front of
the first layer of the image tower.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from data_pipeline import Batch
from data_pipeline.errors import first_line
from pretrain.config import Recipe
from pretrain.errors import RequestError
from pretrain.models.dual import DualEncoder
from pretrain.parallel.groups import Ranks
from pretrain.parallel.updater import adamw, parameter_groups
from pretrain.plain import PlainBlock, PlainDualEncoder, plain_contrastive_loss

Step = Callable[[Batch], torch.Tensor | float]  # trains on this rank's rows; the loss
Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]  # of image, text and scale
Start = dict[str, torch.Tensor]


def no_peer(recipe: Recipe) -> str:
    """Why none of them does what this recipe's step does; "" where they do."""
    if recipe.train.freeze:
        why = "they would train what train.freeze keeps as it is"
    elif recipe.data.aspect > 1:
        why = f"they take square images only, and data.aspect is {recipe.data.aspect:g}"
    elif not recipe.model.text.causal:
        why = "plain torch is written for model.text.causal=true only"
    else:
        return ""
    return f"plain torch and open_clip are not measured: {why}"


def plain_start(model: DualEncoder, recipe: Recipe) -> Start:
    """The parameters of `model` as plain torch has them, on the CPU."""
    return PlainDualEncoder.from_weft(model, recipe.model).state_dict()


def peers(start: Start, recipe: Recipe, ranks: Ranks, compiled: bool) -> dict[str, Callable[[], Step]]:
    """What makes each peer's step, by name. RequestError when it is called: this peer is not to be had here."""

    def plain(fused: bool | None, compile_blocks: bool) -> Step:
        twin = PlainDualEncoder(recipe.model)
        twin.load_state_dict(start)
        if compile_blocks:
            _compile([each for tower in (twin.vision, twin.text) for each in tower if isinstance(each, PlainBlock)])
        return _step(twin.to(ranks.device), partial(_gathered_loss, ranks), recipe, ranks, fused)

    def open_clip(compile_blocks: bool) -> Step:
        model, loss = _open_clip(recipe, ranks)
        if compile_blocks:
            _compile((*model.visual.transformer.resblocks, *model.transformer.resblocks))  # type: ignore[union-attr, misc]
        return _step(model.to(ranks.device), loss, recipe, ranks, True)

    found = {
        "plain torch": lambda: plain(None, False),
        "plain torch, fused AdamW": lambda: plain(True, False),
        "open_clip": lambda: open_clip(False),
    }
    if compiled:
        found["plain torch, compiled"] = lambda: plain(True, True)
        found["open_clip, compiled"] = lambda: open_clip(True)
    return found


def _compile(blocks: Iterable[nn.Module]) -> None:
    """Block by block: they are alike, so each tower compiles one."""
    for block in blocks:
        block.compile(dynamic=False)


def _step(model: nn.Module, loss_of: Loss, recipe: Recipe, ranks: Ranks, fused: bool | None) -> Step:
    train = recipe.train
    wrapped = model
    if ranks.dp_size > 1:
        wrapped = DistributedDataParallel(model, process_group=ranks.dp_group, gradient_as_bucket_view=True)
    optimizer = adamw(parameter_groups(model, train.weight_decay), train, fused)
    half = train.precision == "bf16"

    def step(batch: Batch) -> torch.Tensor:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(ranks.device.type, torch.bfloat16, enabled=half):
            image, text, scale = wrapped(batch.image, batch.text)
        loss = loss_of(image.float(), text.float(), scale.float())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), train.grad_clip or float("inf"))
        optimizer.step()
        return loss.detach()

    return step


def _gathered_loss(ranks: Ranks, image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return plain_contrastive_loss(_gathered(image, ranks), _gathered(text, ranks), scale)


def _gathered(own: torch.Tensor, ranks: Ranks) -> torch.Tensor:
    """All ranks' rows with the gradient of the own ones, as CLIP trainers do."""
    if ranks.dp_size == 1:
        return own
    parts = [torch.empty_like(own) for _ in range(ranks.dp_size)]
    dist.all_gather(parts, own.detach().contiguous(), group=ranks.dp_group)
    parts[ranks.dp_rank] = own
    return torch.cat(parts)


class _Pixels(nn.Module):
    """open_clip's model, for images as weft has them, uint8."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.visual, self.transformer = model.visual, model.transformer

    def forward(self, image: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        found: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = self.model(image.float() / 127.5 - 1, text)
        return found


def _open_clip(recipe: Recipe, ranks: Ranks) -> tuple[nn.Module, Loss]:
    try:
        import open_clip
        from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
    except ImportError as error:
        raise RequestError(f"open_clip is not measured: {first_line(error)} (pip install open_clip_torch)") from error
    except Exception as error:  # torchvision, where it is of another torch, fails with whatever torch raises
        raise RequestError(f"open_clip is not measured: it cannot be imported ({first_line(error)})") from error
    vision, text = recipe.model.vision, recipe.model.text
    model = CLIP(
        recipe.model.embed_dim,
        CLIPVisionCfg(
            layers=vision.layers,
            width=vision.width,
            head_width=vision.width // vision.heads,
            mlp_ratio=vision.mlp_ratio,
            patch_size=vision.patch,
            image_size=vision.image_size,
            pos_embed_type="learnable" if vision.positions == "learned" else "sin_cos_2d",
            pool_type="tok" if vision.pool == "class" else "avg",
        ),
        CLIPTextCfg(
            context_length=text.context,
            vocab_size=text.token_rows,
            width=text.width,
            heads=text.heads,
            layers=text.layers,
            mlp_ratio=text.mlp_ratio,
            no_causal_mask=not text.causal,
        ),
    )
    several = ranks.dp_size > 1
    loss = open_clip.ClipLoss(several, several, cache_labels=True, rank=ranks.dp_rank, world_size=ranks.dp_size)
    return _Pixels(model), loss
