"""Pairwise sigmoid loss over the global batch: each pair of picture and caption is judged alone, matching or not.

    L = 1/N sum_ij log(1 + exp(-z_ij t_ij)),    t_ij = scale x_i . y_j + bias,    z_ij = 1 if i = j else -1

Source: Zhai et al. 2023, "Sigmoid Loss for Language Image Pre-Training", algorithm 1.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist

from kernels import sigmoid_loss
from pretrain.sections import Objective


def sigmoid(
    outputs: Mapping[str, torch.Tensor], settings: Objective, group: dist.ProcessGroup, backend: str = "auto"
) -> torch.Tensor:
    """The loss of "image" and "text" [n, E] with "logit_scale" and "logit_bias" []; the same scalar on every rank."""
    return sigmoid_loss(
        outputs["image"], outputs["text"], outputs["logit_scale"], outputs["logit_bias"], group=group, backend=backend
    )
