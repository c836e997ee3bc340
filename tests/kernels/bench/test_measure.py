"""Times, repetitions, memory and passes, on a clock that can be told what things take."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from kernels.bench import measure
from kernels.bench.measure import BACKWARD, BOTH, FORWARD, Clock, Run, Timing, ceilings, peak_bytes, take_turns, timing

CPU = torch.device("cpu")


class ToldClock(Clock):
    """An action says how long it took."""

    def __init__(self) -> None:
        self.device = CPU

    def seconds(self, action: Callable[[], Any]) -> float:
        return float(action())


def times_of(took: dict[str, Timing | Exception]) -> list[Timing]:
    return [each for each in took.values() if isinstance(each, Timing)]


def test_median_and_quartiles() -> None:
    took = timing([5.0, 1.0, 4.0, 2.0, 3.0])
    assert (took.best, took.low, took.seconds, took.high, took.n) == (1.0, 2.0, 3.0, 4.0, 5)


@pytest.mark.parametrize(
    ("seconds", "quick", "n"),
    [
        (0.01, False, 30),
        (0.05, False, 15),
        (0.2, False, 8),
        (3.0, False, 3),
        (9.0, False, 1),
        (0.01, True, 5),
    ],
)
def test_slow_ones_are_repeated_less(seconds: float, quick: bool, n: int) -> None:
    took = take_turns(ToldClock(), {"it": lambda: lambda: seconds}, quick, time.monotonic() + 60)
    (it,) = times_of(took)
    assert (it.n, it.seconds) == (n, seconds)


def test_implementations_take_turns_and_the_first_of_each_does_not_count() -> None:
    order: list[str] = []

    def stage(name: str) -> Callable[[], Callable[[], float]]:
        def action() -> float:
            order.append(name)
            return 4.0 if order.count(name) == 1 else 0.5

        return lambda: action

    took = take_turns(ToldClock(), {"a": stage("a"), "b": stage("b")}, False, time.monotonic() + 60)
    assert order == ["a", "b"] * 4
    a, b = times_of(took)
    assert (a.high, b.n) == (0.5, 3)


def test_one_that_raises_is_out_and_the_others_go_on() -> None:
    left = [0.2, 0.2]
    took = take_turns(ToldClock(), {"bad": lambda: left.pop, "good": lambda: lambda: 0.2}, True, time.monotonic() + 60)
    assert isinstance(took["bad"], IndexError)
    assert times_of({"good": took["good"]})[0].n == 3


def test_each_repetition_is_told_before_and_an_exception_at_once() -> None:
    told: list[str] = []
    left = [0.2, 0.2]
    stages = {"bad": lambda: left.pop, "good": lambda: lambda: 0.2}
    take_turns(
        ToldClock(), stages, True, time.monotonic() + 60, told.append, lambda error: told.append(type(error).__name__)
    )
    assert told == ["bad", "good", "bad", "good", "bad", "IndexError", "good", "good"]

    def ends(error: Exception) -> None:
        raise KeyError("the device is lost") from error

    with pytest.raises(KeyError):
        take_turns(ToldClock(), {"bad": lambda: [].pop}, True, time.monotonic() + 60, told.append, ends)


def test_the_cache_is_made_cold_by_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written would be written back to memory while the operation runs."""
    monkeypatch.setitem(measure.COLD_BYTES, "cpu", 1 << 20)
    clock = Clock(CPU)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        clock.seconds(lambda: None)
    large = {event.key for event in profile.key_averages(group_by_input_shape=True) if [1 << 18] in event.input_shapes}
    assert "aten::sum" in large
    assert not {name for name in large if name.endswith(("_", "copy_", "zero_", "fill_"))}


def test_a_deadline_leaves_three() -> None:
    (it,) = times_of(take_turns(ToldClock(), {"it": lambda: lambda: 0.01}, False, deadline=0.0))
    assert it.n == 3


def test_the_clock_measures_the_action_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(measure.COLD_BYTES, "cpu", 1 << 20)
    assert Clock(CPU).seconds(lambda: time.sleep(0.02)) >= 0.02


def test_passes() -> None:
    """Forward alone has no backward in it, and a backward's forward is done before."""
    done: list[str] = []

    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            done.append(FORWARD)
            return 2 * x

        @staticmethod
        def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
            done.append(BACKWARD)
            return 2 * gradients[0]

    x = torch.ones(3, requires_grad=True)
    run = Run(lambda: Double.apply(x), [x])
    given = [torch.full((3,), 5.0)]
    for which, before, within in (
        (FORWARD, [], [FORWARD]),
        (BACKWARD, [FORWARD], [BACKWARD]),
        (BOTH, [], [FORWARD, BACKWARD]),
    ):
        done.clear()
        action = run.stage(which, given)
        assert done == before
        done.clear()
        result = action()
        assert done == within
        if which != FORWARD:
            torch.testing.assert_close(result[0], torch.full((3,), 10.0))


def test_peak_memory_is_the_highest_at_one_time() -> None:
    def action() -> None:
        first = torch.empty(1 << 20, dtype=torch.int8)
        second = torch.empty(2 << 20, dtype=torch.int8)
        del first, second
        torch.empty(1 << 20, dtype=torch.int8)

    assert peak_bytes(action, CPU) == 3 << 20


def test_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(measure.COLD_BYTES, "cpu", 1 << 20)
    found = ceilings(Clock(CPU), quick=True)
    assert found["bytes_per_second"] > 1e7
    assert found["flops_per_second"] > 1e7
    assert found["product"] == "1024^3 float32"
