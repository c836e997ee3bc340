"""The learned scale and bias: values, shapes, and what happens at the limit of the scale."""

from __future__ import annotations

import math

import pytest
import torch

from pretrain.models.heads import LogitBias, LogitScale


def gradient_of_log(scale: LogitScale, upstream: float) -> float:
    scale.log.grad = None
    (scale() * upstream).backward()
    assert scale.log.grad is not None
    return float(scale.log.grad)


def test_the_scale_starts_where_it_is_told_to_and_is_one_number() -> None:
    scale = LogitScale(14.3, 100.0)
    assert scale().shape == ()
    assert float(scale()) == pytest.approx(14.3, rel=1e-6)
    assert [list(parameter.shape) for parameter in scale.parameters()] == [[1]]


def test_below_the_limit_the_gradient_is_that_of_an_exponential() -> None:
    scale = LogitScale(14.3, 100.0)
    for upstream in (2.0, -0.7):
        assert gradient_of_log(scale, upstream) == pytest.approx(14.3 * upstream, rel=1e-6)


@pytest.mark.parametrize("beyond", [1e-3, 0.5, 50.0])
def test_above_the_limit_the_value_stays_and_only_the_way_back_has_a_gradient(beyond: float) -> None:
    scale = LogitScale(14.3, 100.0)
    with torch.no_grad():
        scale.log.fill_(math.log(100.0) + beyond)
    assert float(scale()) == pytest.approx(100.0, rel=1e-6)
    assert gradient_of_log(scale, -3.0) == 0, "a step against a negative gradient leads further out"
    assert gradient_of_log(scale, 3.0) == pytest.approx(300.0, rel=1e-6), "a step against a positive one leads back"


def test_at_the_limit_both_ways_are_open() -> None:
    scale = LogitScale(14.3, 100.0)
    with torch.no_grad():
        scale.log.fill_(scale.log_maximum - 1e-6)
    assert gradient_of_log(scale, -3.0) == pytest.approx(-300.0, rel=1e-4)
    assert gradient_of_log(scale, 3.0) == pytest.approx(300.0, rel=1e-4)


def test_training_against_the_limit_neither_passes_it_nor_sticks_to_it() -> None:
    """A loss that always wants more, then one that wants 20: plain clamping would be stuck with no gradient."""
    scale = LogitScale(50.0, 100.0)
    optimizer = torch.optim.SGD(scale.parameters(), lr=1e-3)
    for _ in range(200):
        optimizer.zero_grad()
        (-scale()).backward()
        optimizer.step()
        assert float(scale()) <= 100.0 * (1 + 1e-6)
    assert float(scale()) == pytest.approx(100.0, rel=1e-6)
    assert float(scale.log) < math.log(100.0) + 0.11, "the parameter stops where the value does, but for one step"
    for _ in range(600):
        optimizer.zero_grad()
        (0.01 * (scale() - 20.0) ** 2).backward()
        optimizer.step()
    assert float(scale()) == pytest.approx(20.0, rel=1e-2)


def test_the_bias_is_its_number() -> None:
    bias = LogitBias(-10.0)
    assert bias().shape == ()
    assert float(bias()) == -10.0
    (bias() * 3).backward()
    assert bias.value.grad is not None
    assert bias.value.grad.tolist() == [3.0]


def test_both_come_out_in_fp32_from_a_bf16_model() -> None:
    scale, bias = LogitScale(14.3, 100.0).bfloat16(), LogitBias(-10.0).bfloat16()
    assert scale().dtype == bias().dtype == torch.float32
    (scale() + bias()).backward()
    assert scale.log.grad is not None
    assert scale.log.grad.dtype == torch.bfloat16
