"""The launcher of distributed tests: results in rank order, failures and hangs told and ended."""

import time
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from ranks import RanksError, run_ranks


@dataclass
class Pair:
    rank: int
    total: torch.Tensor


def add_over_ranks(rank: int, world: int, pair: Pair) -> Pair:
    total = pair.total + rank
    dist.all_reduce(total)
    return Pair(rank, total)


def fail_on_last(rank: int, world: int) -> None:
    if rank == world - 1:
        raise RuntimeError("the last rank is unhappy")
    dist.barrier()


def hang_on_first(rank: int, world: int) -> None:
    if rank == 0:
        time.sleep(600)


def test_results_come_back_in_rank_order() -> None:
    results = run_ranks(add_over_ranks, 3, Pair(-1, torch.tensor(1.0)))
    assert [result.rank for result in results] == [0, 1, 2]
    assert all(result.total.item() == 6.0 for result in results)


def test_failing_rank_is_named_with_its_error() -> None:
    with pytest.raises(RanksError, match="the last rank is unhappy"):
        run_ranks(fail_on_last, 2)


def test_hanging_rank_shows_its_stack_and_ends() -> None:
    with pytest.raises(RanksError, match="in hang_on_first"):
        run_ranks(hang_on_first, 2, timeout=20)


def test_local_function_is_refused() -> None:
    def inner(rank: int, world: int) -> None: ...

    with pytest.raises(ValueError, match="top level"):
        run_ranks(inner, 1)
