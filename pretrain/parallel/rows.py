"""The loss once over all ranks of a stage: those that hold the same embeddings share the rows among them."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


def own_rows(value: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """This rank's part of rows [n, E] that all ranks of `group` hold, or a scalar of all; differentiable.

    A loss over the group of all rows gives each rank the gradient of its own rows, and a share of each scalar's, such
    that the mean over that group is right. Backward puts the rows together and takes the mean of the scalars over
    `group`, so that the mean over the data parallel ranks alone is right.
    """
    if dist.get_world_size(group) == 1:
        return value
    result: torch.Tensor = _OwnRows.apply(value, group)
    return result


class _OwnRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group, ctx.shape = group, value.shape
        return _part(value, group).clone() if value.ndim else value.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        (gradient,) = gradients
        whole = gradient.new_zeros(ctx.shape)
        (_part(whole, ctx.group) if whole.ndim else whole).copy_(gradient)
        dist.all_reduce(whole, group=ctx.group)
        return whole / dist.get_world_size(ctx.group), None


def _part(rows: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    return rows.tensor_split(dist.get_world_size(group))[dist.get_rank(group)]
