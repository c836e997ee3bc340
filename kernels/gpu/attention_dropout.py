"""The mask of attention's dropout, for those who want to see it; the attention kernels draw it block by block."""

# mypy: disable-error-code="no-untyped-def"
# (what a kernel takes are pointers, numbers and tiles of its own language)

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.gpu.attention_blocks import keeps


def dropout_keep(shape: tuple[int, int, int, int], dropout: float, seed: torch.Tensor) -> torch.Tensor:
    """The weights that a call with this seed (int64 [], on the device) keeps: bool of shape (B, H, Q, S).

    With documents: of all queries and keys of the batch of one, seen or not.
    """
    batch, heads, queries, keys = shape
    keep = torch.empty(shape, dtype=torch.int8, device=seed.device)
    if keep.numel():
        with torch.cuda.device_of(keep):
            dropout_keep_kernel[(batch * heads, triton.cdiv(queries, 64), triton.cdiv(keys, 64))](
                keep, seed, queries, keys, threshold(dropout), ROWS=64, KEYS=64
            )
    return keep.bool()


def threshold(dropout: float) -> int:
    """What the kernels' 24 random bits must reach for a weight to be kept; some always do."""
    return min(round(dropout * 2**24), 2**24 - 1)


@triton.jit(do_not_specialize=["queries", "keys", "threshold"])
def dropout_keep_kernel(KEEP, SEED, queries, keys, threshold, ROWS: tl.constexpr, KEYS: tl.constexpr):
    """ROWS x KEYS of one head's mask."""
    stream = tl.program_id(0)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None]
    columns = tl.program_id(2) * KEYS + tl.arange(0, KEYS)[None, :]
    kept = keeps(tl.load(SEED), stream, rows, columns, threshold)
    places = (stream.to(tl.int64) * queries + rows) * keys + columns
    tl.store(KEEP + places, kept.to(tl.int8), mask=(rows < queries) & (columns < keys))
