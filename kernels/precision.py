"""The dtype that sums are added in, whatever they are sums of, and whether fp32 products may be of TF32."""

from __future__ import annotations

import torch


def accumulator_of(dtype: torch.dtype) -> torch.dtype:
    """fp64 for fp64, fp32 for all narrower ones."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def tf32_is_allowed() -> bool:
    """Torch's own switch for products of fp32 on a GPU, by whichever of its two interfaces it was set.

    `torch.get_float32_matmul_precision()` raises where it was the newer one (`torch.backends...fp32_precision`).
    """
    return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")
