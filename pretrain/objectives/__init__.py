"""Objectives by name. One loss a file, all of the same shape: (outputs, settings, group) -> scalar loss.

`outputs` is what the model returns for the rows of this rank; `group` holds the ranks that share the global batch.
To add one: write its file, name it in `pretrain.config.Objective` and in this table, and test it in
tests/pretrain/objectives under the same name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist

from pretrain.config import Objective
from pretrain.objectives.contrastive import contrastive
from pretrain.objectives.sigmoid import sigmoid

Outputs = Mapping[str, torch.Tensor]
Loss = Callable[[Outputs, Objective, dist.ProcessGroup], torch.Tensor]

OBJECTIVES: dict[str, Loss] = {"contrastive": contrastive, "sigmoid": sigmoid}
