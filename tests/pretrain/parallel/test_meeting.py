"""Ranks that meet before there are process groups: who is missing or has failed is named, within the patience."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable

import pytest
import torch.distributed as dist

from pretrain.errors import RequestError, WeftError
from pretrain.job import Job
from pretrain.parallel.meeting import meet, telling_others


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], Job]:
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return lambda rank, world: Job(rank, world, rank, world, "srun", "127.0.0.1", port)


def together(*acts: Callable[[], object]) -> list[object]:
    """What each act gave or raised, all run at once."""
    results: list[object] = [None] * len(acts)

    def run(number: int) -> None:
        try:
            results[number] = acts[number]()
        except Exception as error:
            results[number] = error.with_traceback(None)  # whose frames would keep a store open

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(acts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return results


def fail(job: Job) -> None:
    with telling_others(job, 20):
        raise FileNotFoundError("no data set at x")


def test_all_that_come_meet(job: Callable[[int, int], Job]) -> None:
    stores = together(*(lambda rank=rank: meet(job(rank, 3), 30) for rank in range(3)))  # type: ignore[misc]
    assert not [each for each in stores if isinstance(each, Exception)]


def tells(told: object, failing: int) -> None:
    assert isinstance(told, WeftError)
    assert f"rank {failing} on " in str(told)
    assert "no data set at x" in str(told)


@pytest.mark.parametrize("failing", [0, 1])
def test_a_rank_that_fails_tells_those_that_wait(job: Callable[[int, int], Job], failing: int) -> None:
    waiting = 1 - failing
    _, told = together(lambda: fail(job(failing, 2)), lambda: meet(job(waiting, 2), 40))
    tells(told, failing)


def test_who_keeps_the_store_stays_until_a_slow_rank_has_read(
    job: Callable[[int, int], Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    get = dist.PrefixStore.get

    def slow(store: dist.PrefixStore, key: str) -> bytes:
        time.sleep(1)
        return get(store, key)

    monkeypatch.setattr(dist.PrefixStore, "get", slow)
    _, told = together(lambda: fail(job(0, 2)), lambda: meet(job(1, 2), 40))
    tells(told, 0)


def test_a_rank_that_comes_when_the_others_know_is_told_too(job: Callable[[int, int], Job]) -> None:
    others_know = threading.Event()

    def first() -> None:
        try:
            meet(job(0, 3), 40)
        finally:
            others_know.set()

    def late() -> None:
        others_know.wait(40)
        time.sleep(1)
        meet(job(2, 3), 40)

    _, by_the_keeper, by_the_late = together(lambda: fail(job(1, 3)), first, late)
    tells(by_the_keeper, 1)
    tells(by_the_late, 1)


@pytest.mark.parametrize("other", [0, 1, 2])
def test_what_differs_is_said_on_every_rank(job: Callable[[int, int], Job], other: int) -> None:
    each = [{"the layout": "dp3 x tp1" if rank == other else "dp1 x tp3"} for rank in range(3)]
    told = together(*(lambda rank=rank: meet(job(rank, 3), 40, each[rank]) for rank in range(3)))  # type: ignore[misc]
    [sentence] = {str(error) for error in told if isinstance(error, WeftError)}
    assert "the ranks differ in the layout: dp" in sentence
    assert f"dp3 x tp1 on rank {other}" in sentence
    assert "layout.memory_gib" in sentence
    assert all(isinstance(error, WeftError) for error in told)


def test_a_rank_that_does_not_come_is_named(job: Callable[[int, int], Job]) -> None:
    with pytest.raises(WeftError, match=r"ranks 1, 2 of 3 did not come within 0 s \(train.watchdog, or 120 s"):
        meet(job(0, 3), 0.3)
    with pytest.raises(WeftError, match=r"no rank 0 was found at 127.0.0.1:1 within 0 s"):
        meet(Job(1, 2, 1, 2, "srun", "127.0.0.1", 1), 0.3)


def test_a_place_that_nobody_named() -> None:
    with pytest.raises(RequestError, match="WORLD_SIZE is 2, but MASTER_ADDR is not set"):
        meet(Job(0, 2), 1)
    with pytest.raises(RequestError, match="MASTER_PORT is not set"):
        meet(Job(0, 2, address="127.0.0.1"), 1)


def test_a_port_that_is_taken(job: Callable[[int, int], Job]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(WeftError, match="set another MASTER_PORT"):
            meet(Job(0, 2, 0, 2, "srun", "127.0.0.1", taken.getsockname()[1]), 2)
