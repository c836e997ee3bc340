"""Parameters as views of one tensor: what is done to all of it is done to each of them, and to nothing between."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from pretrain.parallel.flat import ALIGNMENT, ROW, Flat

SHAPES = [[(3, 5), (1,), (7, 11, 2)], [(ROW,), (1, 1), (ROW + 1,)]]


def parameters() -> list[list[torch.nn.Parameter]]:
    generator = torch.Generator().manual_seed(0)
    return [[torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes] for shapes in SHAPES]


def test_parameters_keep_their_values_and_become_views() -> None:
    lists = parameters()
    before = [each.detach().clone() for each in itertools.chain(*lists)]
    flat = Flat(lists)
    after = list(itertools.chain(*lists))
    for old, new in zip(before, after, strict=True):
        torch.testing.assert_close(new.detach(), old, atol=0, rtol=0)
        assert new.is_contiguous()
        assert new.data_ptr() % (4 * ALIGNMENT) == flat.weights.data_ptr() % (4 * ALIGNMENT)
    flat.weights *= 2
    for old, new in zip(before, after, strict=True):
        torch.testing.assert_close(new.detach(), 2 * old, atol=0, rtol=0)
    assert float(flat.weights.double().square().sum()) == pytest.approx(
        sum(float((2 * each).double().square().sum()) for each in before), rel=1e-12
    ), "nothing but zeros lies between"


def test_groups_are_the_lists() -> None:
    lists = parameters()
    flat = Flat(lists)
    for number, group in enumerate(flat.groups):
        assert group.grad is not None
        group.grad += number + 1
        for parameter in lists[number]:
            assert (flat.gradient_of(parameter) == number + 1).all()
            found, place = flat.in_group(parameter)
            assert found is group
            torch.testing.assert_close(place.of(group.detach()), parameter.detach(), atol=0, rtol=0)


def test_an_update_of_the_groups_is_that_of_each_parameter() -> None:
    mine, theirs = parameters(), parameters()
    flat = Flat(mine)
    settings = [{"weight_decay": 0.1}, {"weight_decay": 0.0}]
    ours = torch.optim.AdamW(
        [{"params": [group], **more} for group, more in zip(flat.groups, settings, strict=True)], fused=True
    )
    plain = torch.optim.AdamW(
        [{"params": each, **more} for each, more in zip(theirs, settings, strict=True)], fused=True
    )
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        for one, other in zip(itertools.chain(*mine), itertools.chain(*theirs), strict=True):
            other.grad = torch.randn(other.shape, generator=generator)
            flat.gradient_of(one).copy_(other.grad)
        ours.step()
        plain.step()
    for one, other in zip(itertools.chain(*mine), itertools.chain(*theirs), strict=True):
        torch.testing.assert_close(one.detach(), other.detach(), atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e18, 1e25, 1e38])
def test_the_norm_is_right_where_squares_leave_fp32(size: float) -> None:
    lists = parameters()
    flat = Flat(lists)
    for parameter in itertools.chain(*lists):
        flat.gradient_of(parameter).copy_(parameter.detach() / parameter.detach().abs().max() * size)
    truth = float(flat.gradients.double().square().sum().sqrt())
    assert flat.gradient_norm() == pytest.approx(truth, rel=1e-6 if size >= 1 else 1)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_the_norm_of_what_is_not_finite_is_not_either(bad: float) -> None:
    lists = parameters()
    flat = Flat(lists)
    flat.gradient_of(lists[1][2])[3] = bad
    assert not math.isfinite(flat.gradient_norm())
