"""The towers of a dual encoder: pixels or tokens in, one embedding a sample out.

Axes: B batch, C channels, R and Q patch rows and columns of the grid, P pixels of a patch side, S sequence, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import VocabParallelEmbedding
from megatron.core.transformer.transformer_config import TransformerConfig

from data_pipeline.tokenizer import EOS
from pretrain.models.packing import Packing
from pretrain.models.pieces import Build, Chunk, Piece
from pretrain.models.transformer import build_block, cut_sequence, join_sequence, through
from pretrain.sections import Text, Vision


class VisionTower(Chunk):
    """Vision transformer (Dosovitskiy et al. 2021): uint8 picture [B, 3, H, W] -> fp32 [B, E] of unit length.

    A chunk that is not the first takes hidden states instead of the picture; one that is not the last gives them.
    """

    def __init__(self, config: Vision, embed_dim: int, piece: Piece, build: Build) -> None:
        super().__init__()
        self.pool, self.piece, self.build = config.pool, piece, build
        if piece.first:
            self.patches = Patches(config, build.dtype)
            self.class_token: torch.nn.Parameter | None = None
            if config.pool == "class":
                self.class_token = torch.nn.Parameter(torch.empty(config.width, dtype=build.dtype))
        self.block = build_block(config, piece, build, causal=False)
        if piece.last:
            self.projection = torch.nn.Linear(config.width, embed_dim, bias=False, dtype=build.dtype)

    def forward(self, image_BCHW: torch.Tensor) -> torch.Tensor:
        hidden_SBD = self._embed(image_BCHW) if self.piece.first else None
        hidden_SBD = through(self.block, hidden_SBD, self.build)
        if not self.piece.last:
            return hidden_SBD
        hidden_SBD = join_sequence(hidden_SBD, self.build)
        return normalise(self.projection(hidden_SBD[0] if self.pool == "class" else hidden_SBD.mean(0)))

    def _embed(self, image_BCHW: torch.Tensor) -> torch.Tensor:
        hidden_SBD = self.patches(image_BCHW)
        if self.class_token is not None:
            first = self.class_token.expand(1, hidden_SBD.shape[1], -1)
            hidden_SBD = torch.cat([first, hidden_SBD])
        return cut_sequence(hidden_SBD, self.build)


class TextTower(Chunk):
    """Text transformer pooled at the end mark (Radford et al. 2021): tokens [B, S] -> fp32 [B, E] of unit length."""

    def __init__(self, config: Text, embed_dim: int, piece: Piece, build: Build) -> None:
        super().__init__()
        self.piece, self.build = piece, build
        if piece.first:
            self.tokens = token_table(config, build)
            self.positions = torch.nn.Parameter(torch.empty(config.context, config.width, dtype=build.dtype))
        # no padding is computed, and one row a caption of the last layer; ranks that cut the sequence or the layers do
        # all of both
        self.packed = build.batch_first
        self.block = build_block(config, piece, build, causal=config.causal, pooled=self.packed)
        if piece.last:
            self.projection = torch.nn.Linear(config.width, embed_dim, bias=False, dtype=build.dtype)

    def forward(self, text_BS: torch.Tensor) -> torch.Tensor:
        end_B = end_marks(text_BS)
        if self.packed:
            return self._embed_tokens(text_BS, Packing.of(end_B + 1, text_BS.shape[1]))
        hidden_SBD = None
        if self.piece.first:
            hidden_SBD = self.tokens(text_BS).transpose(0, 1) + self.positions[: text_BS.shape[1], None]
            hidden_SBD = cut_sequence(hidden_SBD, self.build)
        hidden_SBD = through(self.block, hidden_SBD, self.build, end_B + 1)  # behind the end mark is only padding
        if not self.piece.last:
            return hidden_SBD
        hidden_SBD = join_sequence(hidden_SBD, self.build)
        return normalise(self.projection(hidden_SBD[end_B, torch.arange(len(end_B), device=end_B.device)]))

    def _embed_tokens(self, text_BS: torch.Tensor, packing: Packing) -> torch.Tensor:
        words_ND = self.tokens(text_BS.flatten()[packing.rows])
        hidden_ND = words_ND + F.embedding(packing.rows % text_BS.shape[1], self.positions)
        last_1BD = through(self.block, hidden_ND.unsqueeze(1), self.build, packing.places)
        return normalise(self.projection(last_1BD[0]))


class Patches(torch.nn.Module):
    """uint8 picture [B, 3, H, W] -> [S, B, D]: a linear map of each patch, and its position.

    H and W are whole patches. In pictures that are not the square of the recipe, fixed positions count on from the same
    corner, and learned ones are resized to the grid (Dosovitskiy et al. 2021, section 3.2).
    """

    def __init__(self, config: Vision, dtype: torch.dtype, width: int | None = None) -> None:
        super().__init__()
        self.patch, self.side, width = config.patch, config.image_size, width or config.width
        self.square = grid = config.image_size // config.patch
        self.linear = torch.nn.Linear(3 * config.patch**2, width, dtype=dtype)
        self.grid: torch.Tensor
        self.positions: torch.nn.Parameter | None = None
        if config.positions == "learned":
            self.positions = torch.nn.Parameter(torch.empty(grid**2, width, dtype=dtype))
        else:
            self.register_buffer("grid", sincos_2d(grid, grid, width).to(dtype), persistent=False)

    def forward(self, image_BCHW: torch.Tensor) -> torch.Tensor:
        pixels = cut_into_patches(image_BCHW, self.patch).to(self.linear.weight.dtype) / 127.5 - 1
        hidden_SBD = self.linear(pixels).transpose(0, 1)
        rows, columns = (side // self.patch for side in image_BCHW.shape[2:])
        return hidden_SBD + self._positions(rows, columns).to(hidden_SBD)[:, None]

    def _positions(self, rows: int, columns: int) -> torch.Tensor:
        """[rows * columns, D]."""
        is_square = rows == columns == self.square
        if self.positions is None:
            return self.grid if is_square else sincos_2d(rows, columns, self.grid.shape[1])
        if is_square:
            return self.positions
        table_1DRQ = self.positions.unflatten(0, (self.square, self.square)).permute(2, 0, 1)[None]
        return F.interpolate(table_1DRQ, (rows, columns), mode="bilinear")[0].flatten(1).T


def token_table(config: Text, build: Build) -> VocabParallelEmbedding:
    """Embeddings of token ids [V, D], V rounded up so that it divides over tensor parallel ranks."""
    return VocabParallelEmbedding(
        config.token_rows,
        config.width,
        init_method=torch.nn.init.zeros_,
        config=TransformerConfig(
            num_layers=1,
            hidden_size=config.width,
            num_attention_heads=config.heads,
            tensor_model_parallel_size=build.tp,
            params_dtype=build.dtype,
            perform_initialization=False,
            use_cpu_initialization=True,
        ),
    )


def end_marks(text_BS: torch.Tensor) -> torch.Tensor:
    """Where the end mark of each caption is, [B]."""
    return (text_BS == EOS).int().argmax(1)


def cut_into_patches(pixels_BCHW: torch.Tensor, patch: int) -> torch.Tensor:
    """[B, C, H, W] -> [B, patches, C * patch * patch], rows of the grid first."""
    batch, channels, height, width = pixels_BCHW.shape
    rows, columns = height // patch, width // patch
    grid = pixels_BCHW.reshape(batch, channels, rows, patch, columns, patch)
    return grid.permute(0, 2, 4, 1, 3, 5).reshape(batch, rows * columns, channels * patch * patch)


def sincos_2d(rows: int, columns: int, width: int) -> torch.Tensor:
    """Fixed positions [rows * columns, width]: sines and cosines of row and column (MoCo v3, Chen et al. 2021)."""
    frequencies = 10_000 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = torch.arange(max(rows, columns), dtype=torch.float64)[:, None] * frequencies
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)
    of_row = axis[:rows, None].expand(rows, columns, -1)
    of_column = axis[None, :columns].expand(rows, columns, -1)
    return torch.cat([of_row, of_column], dim=2).reshape(rows * columns, width).float()


def normalise(embedding_BD: torch.Tensor) -> torch.Tensor:
    """Unit length in fp32, whatever the precision of the tower."""
    return F.normalize(embedding_BD.float(), dim=-1)
