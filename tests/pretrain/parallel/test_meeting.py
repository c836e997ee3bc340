"""Ranks that meet before there are process groups: who is missing or has failed is named, within the patience."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable

import pytest

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
            results[number] = error

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


@pytest.mark.parametrize("failing", [0, 1])
def test_a_rank_that_fails_tells_those_that_wait(job: Callable[[int, int], Job], failing: int) -> None:
    waiting = 1 - failing
    _, told = together(lambda: fail(job(failing, 2)), lambda: meet(job(waiting, 2), 40))
    assert isinstance(told, WeftError)
    assert f"rank {failing} on " in str(told)
    assert "no data set at x" in str(told)


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
