"""What our backends of attention have in common: the settings, and how results lie in memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Spec:
    """Query i of Q stands at place p = i + S - Q among the S keys, so the last query stands at the last key.

    causal      it sees keys up to p
    window      0: no limit. Causal: it sees keys p - window + 1 to p; else those with |p - key| < window
    soft_cap    0: none. Scaled scores s become soft_cap * tanh(s / soft_cap)
    dropout     the probability that a weight is zeroed after the softmax; those kept are divided by 1 - dropout
    scale       of q k^T
    """

    scale: float
    causal: bool = False
    window: int = 0
    soft_cap: float = 0.0
    dropout: float = 0.0


def laid_out_as(tensor: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Empty memory for a result: its axes lie as the tensor's do, but the elements of a head always side by side."""
    side_by_side = tensor.stride(-1) == 1
    kept = torch.preserve_format if side_by_side else torch.contiguous_format
    return torch.empty_like(tensor, dtype=dtype, memory_format=kept)
