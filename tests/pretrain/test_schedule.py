"""The learning rate: warm-up, cosine, floor; a pure function of the step."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from pretrain.schedule import learning_rate
from pretrain.sections import Train


def rates(**settings: float) -> list[float]:
    train = Train.model_validate(settings)
    return [learning_rate(train, step) for step in range(train.steps)]


def test_warms_up_in_equal_steps_to_the_peak() -> None:
    found = rates(steps=97, warmup=13, lr=2.6)
    assert found[:13] == pytest.approx([0.2 * step for step in range(1, 14)])
    assert found[12] == pytest.approx(2.6)
    assert max(found) == pytest.approx(2.6)
    assert found[13] == pytest.approx(2.6)


def test_goes_down_half_a_cosine() -> None:
    found = rates(steps=110, warmup=10, lr=1.0, min_lr=0.2)
    assert found[60] == pytest.approx(0.6)  # half way, half way between
    assert found[10 + 25] == pytest.approx(0.2 + 0.8 * (1 + math.sqrt(0.5)) / 2)
    assert all(a > b for a, b in pairwise(found[10:]))
    assert 0.2 < found[-1] < 0.201


@pytest.mark.parametrize("min_lr", [0.0, 1e-4])
def test_ends_at_the_floor_and_stays_there(min_lr: float) -> None:
    train = Train(steps=50, warmup=7, lr=1e-3, min_lr=min_lr)
    assert learning_rate(train, 50) == pytest.approx(min_lr, abs=1e-12)
    assert learning_rate(train, 5000) == pytest.approx(min_lr, abs=1e-12)


def test_without_warmup_begins_at_the_peak() -> None:
    assert rates(steps=5, warmup=0, lr=3.0)[0] == 3.0
    assert rates(steps=1, warmup=0, lr=3.0) == [3.0]


def test_no_step_trains_at_zero() -> None:
    """The first step of a warm-up from 0 would be a step for nothing."""
    assert min(rates(steps=1000, warmup=100, lr=1.0)) > 0


def test_stop_at_does_not_change_the_schedule() -> None:
    assert rates(steps=100, warmup=10, lr=1.0, stop_at=20) == rates(steps=100, warmup=10, lr=1.0)
