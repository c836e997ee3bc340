"""Objectives by name. One loss a file, all of the same shape: (outputs, settings, group, backend) -> scalar loss.

`outputs` is what the model returns for the rows of this rank; `group` holds the ranks that share the global batch;
`backend` is the implementation that the recipe asks for (kernels.loss).
To add one: write its file, name it in `pretrain.config.Objective` and in this table, and test it in
tests/pretrain/objectives under the same name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist

from pretrain.objectives.caption import caption
from pretrain.objectives.contrastive import contrastive
from pretrain.objectives.sigmoid import sigmoid
from pretrain.sections import Objective

Outputs = Mapping[str, torch.Tensor]
Loss = Callable[[Outputs, Objective, dist.ProcessGroup, str], torch.Tensor]

OBJECTIVES: dict[str, Loss] = {"contrastive": contrastive, "sigmoid": sigmoid, "caption": caption}
