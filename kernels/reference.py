"""Plain fp64 definitions of the operations, for tests: short, slow, the whole matrix in memory, and obviously right.

Axes: N samples, D embedding size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor | None = None) -> torch.Tensor:
    """softmax(q k^T / sqrt(K)) v in fp64; `seen` (bool, broadcast to [B, H, Q, S]) says which keys a query sees."""
    q, k, v = q.double(), k.double(), v.double()
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    if seen is not None:
        scores = scores.masked_fill(~seen, -torch.inf)
    return torch.nan_to_num(scores.softmax(-1)) @ v


def contrastive_loss(
    x_ND: torch.Tensor, y_ND: torch.Tensor, scale: torch.Tensor, label_smoothing: float = 0.0
) -> torch.Tensor:
    """InfoNCE both ways (Radford et al. 2021, figure 3)."""
    logits = scale.double() * x_ND.double() @ y_ND.double().T
    own = torch.arange(len(logits), device=logits.device)
    one_way = F.cross_entropy(logits, own, label_smoothing=label_smoothing)
    return (one_way + F.cross_entropy(logits.T, own, label_smoothing=label_smoothing)) / 2


def sigmoid_loss(x_ND: torch.Tensor, y_ND: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Pairwise sigmoid loss (Zhai et al. 2023, algorithm 1)."""
    logits = scale.double() * x_ND.double() @ y_ND.double().T + bias.double()
    signs = 2 * torch.eye(len(logits), dtype=torch.float64, device=logits.device) - 1
    return -F.logsigmoid(signs * logits).sum() / len(logits)
