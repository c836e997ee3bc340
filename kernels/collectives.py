"""What the losses need of torch.distributed, under one name in every torch that we support."""

from __future__ import annotations

from typing import Any, cast

import torch.distributed as dist
from torch.distributed.distributed_c10d import _resolve_process_group

# torch 2.13 has new names for them, and warns of the old ones
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def group_named(name: str) -> dist.ProcessGroup | None:
    """The group that has this `group_name`, which is how a custom operation is told of one; "": none."""
    return _resolve_process_group(cast(Any, name)) if name else None  # newer torch has its own type of str
