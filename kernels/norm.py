"""Layer norm: (x - mean) / sqrt(variance + eps) * weight + bias over the last axis.

Source: Ba, Kiros and Hinton 2016, "Layer Normalization", equation 4. torch's own kernel, which reads and writes
each element once; statistics are fp32 whatever the input.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def layer_norm(x: torch.Tensor, weight_D: torch.Tensor, bias_D: torch.Tensor, eps: float = 1e-5) -> torch.Tensor:
    """Normalise the last axis (D) of x [..., D]; output in the dtype of x."""
    return F.layer_norm(x, weight_D.shape, weight_D, bias_D, eps)
