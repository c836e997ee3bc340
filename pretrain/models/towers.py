"""The towers: pixels or tokens in, one vector a sample out.

Axes: B batch, C channels, R and Q patch rows and columns of the grid, P pixels of a patch side, S sequence, D width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import VocabParallelEmbedding
from megatron.core.transformer.transformer_config import TransformerConfig

from data_pipeline.tokenizer import EOS
from pretrain.config import VOCABULARY_MULTIPLE, Text, Vision
from pretrain.models.transformer import build_block


class VisionTower(torch.nn.Module):
    """Vision transformer (Dosovitskiy et al. 2021): uint8 picture [B, 3, size, size] -> [B, D]."""

    def __init__(self, config: Vision, *, tp: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.patch, self.pool = config.patch, config.pool
        grid = config.image_size // config.patch
        self.patches = torch.nn.Linear(3 * config.patch**2, config.width, dtype=dtype)
        self.grid: torch.Tensor
        self.positions: torch.nn.Parameter | None = None
        if config.positions == "learned":
            self.positions = torch.nn.Parameter(torch.empty(grid**2, config.width, dtype=dtype))
        else:
            self.register_buffer("grid", sincos_2d(grid, config.width).to(dtype), persistent=False)
        self.class_token: torch.nn.Parameter | None = None
        if config.pool == "class":
            self.class_token = torch.nn.Parameter(torch.empty(config.width, dtype=dtype))
        self.block = build_block(config, causal=False, tp=tp, dtype=dtype)

    def forward(self, image_BCHW: torch.Tensor) -> torch.Tensor:
        pixels = image_BCHW.to(self.patches.weight.dtype) / 127.5 - 1
        hidden_SBD = self.patches(cut_into_patches(pixels, self.patch)).transpose(0, 1)
        positions = self.grid if self.positions is None else self.positions
        hidden_SBD = hidden_SBD + positions[:, None]
        if self.class_token is not None:
            first = self.class_token.expand(1, hidden_SBD.shape[1], -1)
            hidden_SBD = torch.cat([first, hidden_SBD])
        hidden_SBD = self.block(hidden_SBD.contiguous(), attention_mask=None)
        return hidden_SBD[0] if self.pool == "class" else hidden_SBD.mean(0)


class TextTower(torch.nn.Module):
    """Text transformer pooled at the end mark (Radford et al. 2021): tokens [B, S] -> [B, D]."""

    def __init__(self, config: Text, *, tp: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.causal = config.causal
        self.tokens = VocabParallelEmbedding(
            math.ceil(config.vocab_size / VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE,
            config.width,
            init_method=torch.nn.init.zeros_,
            config=TransformerConfig(
                num_layers=1,
                hidden_size=config.width,
                num_attention_heads=config.heads,
                tensor_model_parallel_size=tp,
                params_dtype=dtype,
                perform_initialization=False,
                use_cpu_initialization=True,
            ),
        )
        self.positions = torch.nn.Parameter(torch.empty(config.context, config.width, dtype=dtype))
        self.block = build_block(config, causal=config.causal, tp=tp, dtype=dtype)

    def forward(self, text_BS: torch.Tensor) -> torch.Tensor:
        end_B = (text_BS == EOS).int().argmax(1)
        hidden_SBD = self.tokens(text_BS).transpose(0, 1) + self.positions[: text_BS.shape[1], None]
        lengths = None if self.causal else end_B + 1  # behind the end mark there is only padding
        hidden_SBD = self.block(hidden_SBD.contiguous(), attention_mask=lengths)
        return hidden_SBD[end_B, torch.arange(len(end_B), device=end_B.device)]


def cut_into_patches(pixels_BCHW: torch.Tensor, patch: int) -> torch.Tensor:
    """[B, C, H, W] -> [B, patches, C * patch * patch], rows of the grid first."""
    batch, channels, height, width = pixels_BCHW.shape
    rows, columns = height // patch, width // patch
    grid = pixels_BCHW.reshape(batch, channels, rows, patch, columns, patch)
    return grid.permute(0, 2, 4, 1, 3, 5).reshape(batch, rows * columns, channels * patch * patch)


def sincos_2d(grid: int, width: int) -> torch.Tensor:
    """Fixed positions [grid * grid, width]: sines and cosines of row and column (MoCo v3, Chen et al. 2021)."""
    frequencies = 10_000 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = torch.arange(grid, dtype=torch.float64)[:, None] * frequencies
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)
    rows = axis[:, None].expand(grid, grid, -1)
    columns = axis[None].expand(grid, grid, -1)
    return torch.cat([rows, columns], dim=2).reshape(grid * grid, width).float()


def normalise(embedding_BD: torch.Tensor) -> torch.Tensor:
    """Unit length in fp32, whatever the precision of the tower."""
    return F.normalize(embedding_BD.float(), dim=-1)
