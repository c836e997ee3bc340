"""Ranks with the same embeddings share the rows: the loss and all gradients are those of ranks that do not."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from kernels import sigmoid_loss
from pretrain.parallel.rows import own_rows


def gradients(rank: int, world: int, rows: int, copies: int) -> dict[str, torch.Tensor]:
    """A loss over world / copies shares of rows, each on `copies` ranks; averaged over the data parallel ranks."""
    share, copy = divmod(rank, copies)
    groups = [dist.new_group(range(first, first + copies)) for first in range(0, world, copies)]
    data_parallel = [dist.new_group(range(first, world, copies)) for first in range(copies)]
    generator = torch.Generator().manual_seed(share)
    x, y = (torch.randn(rows, 5, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(2))
    scale, bias = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (2.0, -1.0))
    inputs = {"x": x, "y": y, "scale": scale, "bias": bias}
    mine = {name: own_rows(each, groups[share]) for name, each in inputs.items()}
    loss = sigmoid_loss(mine["x"], mine["y"], mine["scale"], mine["bias"], group=dist.group.WORLD)
    loss.backward()
    found = {name: each.grad for name, each in inputs.items() if each.grad is not None}
    for name in ("scale", "bias"):
        dist.all_reduce(found[name], group=data_parallel[copy])
    shares = world // copies
    # each row's gradient counts once, among as many ranks as the mean is taken over
    return {"loss": loss.detach(), "x": found["x"] / shares, "y": found["y"] / shares} | {
        name: found[name] / shares for name in ("scale", "bias")
    }


@pytest.mark.parametrize(("world", "copies", "rows"), [(2, 2, 4), (4, 2, 5), (3, 3, 2), (4, 4, 1)])
def test_sharing_rows_changes_nothing(world: int, copies: int, rows: int) -> None:
    shared = run_ranks(gradients, world, rows, copies)
    apart = run_ranks(gradients, world // copies, rows, 1)
    for rank, found in enumerate(shared):
        for name, expected in apart[rank // copies].items():
            torch.testing.assert_close(found[name], expected, atol=1e-12, rtol=1e-10, msg=f"{name} of rank {rank}")
