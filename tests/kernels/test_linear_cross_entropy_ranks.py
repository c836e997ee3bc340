"""Linear cross entropy with its vocabulary over ranks, against one process with the whole of it.

One to four ranks and eight, in even and uneven slices, slices of nothing but padding, Megatron-core's loss beside ours.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from linear_cross_entropy_calls import EVERYTHING, Numbers, assert_same, draw, numbers, plain
from ranks import run_ranks

from kernels import linear_cross_entropy_chunks as chunks
from kernels import reference
from kernels.linear_cross_entropy import linear_cross_entropy

WORLD = 8
GROUPS = [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [1, 3], [*range(WORLD)]]
SETTINGS_OF_GROUPS: list[dict[str, Any]] = [{}, EVERYTHING]
SLICES = [[4] * WORLD, [1, 30, 7, 15, 2, 9, 1, 23]]  # columns of each rank
MASKED = 2  # columns of each rank, where all but the first six are padding


def case_of(members: list[int], columns: list[int], settings: dict[str, Any]) -> tuple[Numbers, torch.Tensor]:
    return draw(23, 5, sum(columns[member] for member in members))


def masked() -> tuple[Numbers, torch.Tensor]:
    """Padding has a bias of -inf."""
    inputs, targets = draw(23, 5, MASKED * WORLD)
    inputs[2][6:] = -torch.inf
    return inputs, targets.clamp(max=5)


def masked_on_rank(rank: int) -> tuple[list[Numbers], list[str]]:
    """What this rank gets from its columns, which are padding only from rank 3 on; and what torch warned of."""
    (hidden, weight, bias), targets = masked()
    own = slice(rank * MASKED, (rank + 1) * MASKED)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = [
            numbers(
                linear_cross_entropy, [hidden, weight[own], bias[own]], targets, group=dist.group.WORLD, reduction=each
            )
            for each in ("mean", "none")
        ]
    return found, [str(each.message) for each in told if "distributed" in str(each.message)]


def losses_on_ranks(rank: int, world: int) -> dict[Any, Any]:
    """By (group, slices, settings, reduction), in small chunks: what this rank gets from its own columns."""
    chunks.ROWS_WITH_RANKS["cpu"] = 10
    results: dict[Any, Any] = {"masked": masked_on_rank(rank)}
    for g, members in enumerate(GROUPS):
        group = dist.new_group(members)
        if rank not in members:
            continue
        for c, columns in enumerate(SLICES):
            before = sum(columns[member] for member in members if member < rank)
            own = slice(before, before + columns[rank])
            for s, settings in enumerate(SETTINGS_OF_GROUPS):
                (hidden, weight, bias), targets = case_of(members, columns, settings)
                for reduction in ("mean", "none"):
                    results[g, c, s, reduction] = numbers(
                        linear_cross_entropy,
                        [hidden, weight[own], bias[own]],
                        targets,
                        group=group,
                        reduction=reduction,
                        **settings,
                    )
    return results


@pytest.fixture(scope="module")
def on_ranks() -> list[dict[Any, Any]]:
    return run_ranks(losses_on_ranks, WORLD, timeout=900)


@pytest.mark.parametrize("members", GROUPS, ids=str)
def test_a_group_gives_what_one_process_gives(
    on_ranks: list[dict[tuple[int, int, int, str], Numbers]], members: list[int]
) -> None:
    """Every rank has the loss and the whole gradient of hidden, bit for bit alike, and the gradient of its columns."""
    for c, columns in enumerate(SLICES):
        for s, settings in enumerate(SETTINGS_OF_GROUPS):
            for reduction in ("mean", "none"):
                inputs, targets = case_of(members, columns, settings)
                loss, dhidden, dweight, dbias = numbers(
                    reference.linear_cross_entropy, inputs, targets, reduction=reduction, **settings
                )
                key, start = (GROUPS.index(members), c, s, reduction), 0
                for rank in members:
                    own = slice(start, start + columns[rank])
                    start = own.stop
                    mine = on_ranks[rank][key]
                    assert_same(mine, [loss, dhidden, dweight[own], dbias[own]], 1e-10)
                    assert torch.equal(mine[0], on_ranks[members[0]][key][0])
                    assert torch.equal(mine[1], on_ranks[members[0]][key][1])


def test_slices_that_are_all_padding_have_no_answers(on_ranks: list[dict[Any, Any]]) -> None:
    truths = [numbers(plain, *masked(), reduction=each) for each in ("mean", "none")]
    for rank, results in enumerate(on_ranks):
        own = slice(rank * MASKED, (rank + 1) * MASKED)
        found, warned = results["masked"]
        for mine, (loss, dhidden, dweight, dbias) in zip(found, truths, strict=True):
            assert_same(mine, [loss, dhidden, dweight[own], dbias[own]], 1e-10)
        assert warned == []


def beside_megatron(rank: int, world: int) -> list[Numbers]:
    """[ours, ours compiled, Megatron-core's on whole logits with the gradient of hidden summed as its layers do]."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    parallel_state.initialize_model_parallel(tensor_model_parallel_size=world)
    group = parallel_state.get_tensor_model_parallel_group()
    (hidden, weight, _), targets = draw(24, 5, 16, torch.float32)
    targets = targets.clamp(min=0)
    mine = weight[rank * 8 : rank * 8 + 8]

    def megatron(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return vocab_parallel_cross_entropy((hidden @ weight.T)[:, None], targets[:, None]).mean()

    theirs = numbers(megatron, [hidden, mine], targets)
    dist.all_reduce(theirs[1], group=group)
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    ours = [numbers(loss, [hidden, mine], targets, group=group) for loss in (linear_cross_entropy, compiled)]
    return [*ours, theirs]


def test_megatrons_vocabulary_parallel_loss_is_the_same() -> None:
    pytest.importorskip("megatron.core")
    for ours, compiled, theirs in run_ranks(beside_megatron, 2, timeout=900):
        assert_same(ours, theirs, 2e-6)
        assert_same(compiled, ours, 0.0)
