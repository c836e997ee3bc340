"""InfoNCE over the global batch: each picture finds its caption among all of them, and each caption its picture.

    L = 1/2N sum_i [ logsumexp_j s_ij - s_ii ] + 1/2N sum_j [ logsumexp_i s_ij - s_jj ],    s_ij = scale x_i . y_j

Source: Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision", figure 3.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist

from kernels import contrastive_loss
from pretrain.sections import Objective


def contrastive(
    outputs: Mapping[str, torch.Tensor], settings: Objective, group: dist.ProcessGroup, backend: str = "auto"
) -> torch.Tensor:
    """The loss of "image" and "text" [n, E] with "logit_scale" []; the same scalar on every rank."""
    return contrastive_loss(
        outputs["image"],
        outputs["text"],
        outputs["logit_scale"],
        label_smoothing=settings.label_smoothing,
        group=group,
        backend=backend,
    )
