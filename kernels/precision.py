"""The dtype that sums are added in, whatever they are sums of."""

from __future__ import annotations

import torch


def accumulator_of(dtype: torch.dtype) -> torch.dtype:
    """fp64 for fp64, fp32 for all narrower ones."""
    return torch.float64 if dtype == torch.float64 else torch.float32
