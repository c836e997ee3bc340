"""The contrastive losses' Triton kernels in the interpreter, against kernels/reference.py in fp64.

The loss and its gradients are put together from the parts as kernels/contrastive.py does. Odd sizes, short embeddings,
large scales, several squares, rows of a rank among all columns, equal pairs, sums out of range.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from kernels import contrastive_triton, reference

Numbers = list[torch.Tensor]  # loss, then the gradients of x, y, scale and, for the sigmoid loss, bias
EXPONENT = 60.0  # as LARGEST_EXPONENT in kernels/contrastive.py
FP32_STEP = 2.0**-23


def draw(pairs: int, size: int, noise: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 unit x and y that belong together but for some noise."""
    generator = torch.Generator().manual_seed(1000 * pairs + size)
    x = torch.randn(pairs, size, generator=generator)
    y = x + noise * torch.randn(pairs, size, generator=generator)
    return F.normalize(x, dim=1), F.normalize(y, dim=1)


def truth(loss_of: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> Numbers:
    leaves = [each.double().requires_grad_() for each in inputs]
    loss = loss_of(*leaves)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def assert_same(mine: Numbers, expected: Numbers, tolerance: float) -> None:
    """Each number within `tolerance` of the truth, relative to its norm."""
    for name, a, b in zip(("loss", "dx", "dy", "dscale", "dbias"), mine, expected, strict=False):
        error = float((a.double() - b).norm())
        assert error <= tolerance * max(1e-12, float(b.norm())), f"{name}: {error} of {float(b.norm())}"
    assert len(mine) == len(expected)


def reference_of(x: torch.Tensor, y: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    longest = x.float().norm(dim=1).max() * y.float().norm(dim=1).max()
    return (scale.abs() * longest - EXPONENT).clamp(min=0)


def infonce(
    x: torch.Tensor, y: torch.Tensor, scale: torch.Tensor, shares: tuple[int, ...] = (), atomic: bool = False
) -> Numbers:
    """InfoNCE of a group whose ranks hold `shares` of the rows, put together from the sums and gradients of each."""
    total, reference_ = len(x), reference_of(x, y, scale)
    ranks, start = [], 0
    for share in shares or (total,):
        ranks.append(slice(start, start + share))
        start += share
    assert start == total
    parts = [contrastive_triton.sums(x[rank], y, scale, reference_, rank.start, atomic=atomic) for rank in ranks]
    own, row_wrong = (torch.cat([part[place] for part in parts]) for place in (0, 1))
    column_wrong = torch.stack([part[2] for part in parts]).sum(0)
    row_odds, column_odds = row_wrong.log() - own, column_wrong.log() - own
    loss = (F.softplus(row_odds) + F.softplus(column_odds)).mean() / 2
    own_gradient = -row_odds.sigmoid() - column_odds.sigmoid()
    row_sum, column_sum = row_wrong + own.exp(), column_wrong + own.exp()
    gradients = [
        contrastive_triton.gradients(
            x[rank], y, scale, reference_, row_sum[rank], column_sum, own_gradient[rank], rank.start
        )
        for rank in ranks
    ]
    dx = torch.cat([gradient[0] for gradient in gradients]) / (2 * total)
    dy = torch.stack([gradient[1] for gradient in gradients]).sum(0) / (2 * total)
    return [loss, dx * scale, dy * scale, (x.float() * dx).sum()]


def sigmoid(
    x: torch.Tensor, y: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor, shares: tuple[int, ...] = ()
) -> Numbers:
    """The sigmoid loss, likewise."""
    parts, start = [], 0
    for share in shares or (len(x),):
        parts.append(contrastive_triton.sigmoid(x[start : start + share], y, scale, bias, start))
        start += share
    loss, dbias, dy = (torch.stack([part[place] for part in parts]).sum(0) / len(x) for place in (0, 1, 3))
    dx = torch.cat([part[2] for part in parts]) / len(x)
    return [loss, dx * scale, dy * scale, (x.float() * dx).sum(), dbias]


@pytest.mark.parametrize("scale", [14.3, 100.0])
@pytest.mark.parametrize(
    ("pairs", "size"), [(1, 16), (7, 48), (63, 64), (200, 16), (200, 512), (257, 48), (257, 64), (63, 512), (7, 80)]
)
def test_infonce_in_fp32(pairs: int, size: int, scale: float) -> None:
    x, y = draw(pairs, size, noise=4.0)  # with less, the fp64 truth itself has no digits at scale 100
    expected = truth(reference.contrastive_loss, x, y, torch.tensor(scale))
    assert pairs == 1 or expected[0] > 1e-4
    assert_same(infonce(x, y, torch.tensor(scale)), expected, 5e-6)


@pytest.mark.parametrize(("scale", "bias"), [(10.0, -10.0), (14.3, 0.0), (100.0, -10.0)])
@pytest.mark.parametrize(("pairs", "size"), [(1, 16), (7, 48), (63, 64), (200, 512), (257, 16)])
def test_sigmoid_in_fp32(pairs: int, size: int, scale: float, bias: float) -> None:
    inputs = (*draw(pairs, size), torch.tensor(scale), torch.tensor(bias))
    assert_same(sigmoid(*inputs), truth(reference.sigmoid_loss, *inputs), 5e-6)


def test_a_small_sigmoid_loss_keeps_its_digits() -> None:
    """log(1 + e) of e = 1e-9, which 1 + e has no digits for."""
    inputs = (*draw(63, 64, noise=0.1), torch.tensor(5.0), torch.tensor(-20.0))
    x, y, scale, bias = inputs
    wrong = (scale * x.double() @ y.double().T + bias).fill_diagonal_(-torch.inf)
    loss, *_ = contrastive_triton.sigmoid(x, y, scale, bias, start=1000)  # true pairs elsewhere: only wrong answers
    own = F.softplus((scale * x.double() * y.double()).sum(1) + bias).sum()
    torch.testing.assert_close(loss.double(), F.softplus(wrong).sum() + own, rtol=1e-6, atol=0)
    assert 0 < loss < 63 * 63 * 1e-6


@pytest.mark.parametrize("shares", [(100, 100), (1, 150, 49), (0, 200), (130, 0, 70)])
def test_ranks_hold_rows_among_all_columns(shares: tuple[int, ...]) -> None:
    x, y = draw(200, 48)
    scale, bias = torch.tensor(14.3), torch.tensor(-4.0)
    assert_same(infonce(x, y, scale, shares), truth(reference.contrastive_loss, x, y, scale), 5e-6)
    assert_same(sigmoid(x, y, scale, bias, shares), truth(reference.sigmoid_loss, x, y, scale, bias), 5e-6)


@pytest.mark.parametrize("side", [128, 256])
def test_squares_change_nothing(monkeypatch: pytest.MonkeyPatch, side: int) -> None:
    """300 rows in squares of 128 and 256, with true pairs in squares on and off the diagonal."""
    x, y = draw(300, 16)
    scale, bias = torch.tensor(14.3), torch.tensor(-4.0)
    monkeypatch.setattr(contrastive_triton, "SIDE", side)
    monkeypatch.setattr(contrastive_triton, "SQUARE_BYTES", 4 * side * side)
    for shares in ((), (90, 210)):
        assert_same(infonce(x, y, scale, shares), truth(reference.contrastive_loss, x, y, scale), 5e-6)
        assert_same(sigmoid(x, y, scale, bias, shares), truth(reference.sigmoid_loss, x, y, scale, bias), 5e-6)


def test_atomic_sums_are_the_same_sums() -> None:
    x, y = draw(257, 48)
    scale = torch.tensor(14.3)
    assert_same(infonce(x, y, scale, (100, 157), True), truth(reference.contrastive_loss, x, y, scale), 5e-6)


def test_equal_pairs_and_a_negative_scale() -> None:
    x, y = draw(20, 32)
    rows = torch.tensor([0, 3, 3, 3, 5, 0, 19, 1, 2] * 3)
    for scale in (torch.tensor(4.0), torch.tensor(-14.0), torch.tensor(0.0)):
        inputs = (x[rows], y[rows], scale)
        assert_same(infonce(*inputs), truth(reference.contrastive_loss, *inputs), 5e-6)
    same = torch.zeros(11, dtype=torch.int64)
    loss, *_ = infonce(x[same], y[same], torch.tensor(50.0))
    torch.testing.assert_close(loss, torch.tensor(11.0).log())


@pytest.mark.parametrize(("noise", "scale"), [(0.3, 14.3), (0.9, 100.0)])
def test_a_small_loss_keeps_its_digits(noise: float, scale: float) -> None:
    x, y = draw(257, 64, noise)
    expected = truth(reference.contrastive_loss, x, y, torch.tensor(scale))
    assert 1e-12 < expected[0] < 1e-2
    assert_same(infonce(x, y, torch.tensor(scale)), expected, 5e-6 + FP32_STEP * scale)


@pytest.mark.parametrize("scale", [14.3, 100.0])
@pytest.mark.parametrize(("pairs", "size"), [(1, 16), (63, 64), (257, 48), (200, 512)])
def test_bf16_is_exact_but_for_the_stored_gradients(pairs: int, size: int, scale: float) -> None:
    """Products of bf16 are exact in fp32, so the loss keeps fp32's digits; gradients of logits are stored in bf16.

    The interpreter cuts fp32 to bf16 (2^-7) where a GPU rounds to nearest (2^-8).
    """
    x, y = (each.bfloat16() for each in draw(pairs, size, noise=3.0))
    bias = torch.tensor(-10.0)
    for mine, loss_of, others in (
        (infonce, reference.contrastive_loss, [torch.tensor(scale)]),
        (sigmoid, reference.sigmoid_loss, [torch.tensor(scale), bias]),
    ):
        loss, dx, dy, *rest = mine(x, y, *others)
        loss_truth, dx_truth, dy_truth, *rest_truth = truth(loss_of, x, y, *others)
        assert_same([loss, dx, dy, *rest], [loss_truth, dx_truth, dy_truth, *rest_truth], 2.0**-7)
        assert_same([loss], [loss_truth], 5e-6)
        assert_same(rest[1:], rest_truth[1:], 5e-6)  # the bias's gradient is summed before the rounding
        assert dx.dtype == dy.dtype == torch.float32


def test_a_sum_out_of_range_is_seen() -> None:
    """What kernels/contrastive.py falls back on: every true pair the farthest, and logits far below the reference."""
    x, _ = draw(63, 64)
    scale = torch.tensor(300.0)
    own, row_wrong, column_wrong = contrastive_triton.sums(x, -x, scale, reference_of(x, -x, scale))
    assert ((row_wrong + own.exp()) < 1e-30).any()
    assert (column_wrong < 1e-30).any()
    _, row_wrong, _ = contrastive_triton.sums(x, x, scale, torch.tensor(-200.0))
    assert row_wrong.isinf().any()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_a_number_stays_visible(bad: float) -> None:
    x, y = draw(9, 16)
    x[4, 2] = bad
    _, row_wrong, column_wrong = contrastive_triton.sums(x, y, torch.tensor(10.0), torch.tensor(0.0))
    for sums in (row_wrong[4:5], column_wrong):
        assert not sums.isfinite().all()
    assert row_wrong[[0, 1, 2, 3, 5, 6, 7, 8]].isfinite().all(), "the last row is not read for rows behind it"
    loss, *_ = contrastive_triton.sigmoid(x, y, torch.tensor(10.0), torch.tensor(-10.0))
    assert not loss.isfinite()


def test_the_gradients_of_a_square_are_written_inside_it_only() -> None:
    x, y = draw(70, 16)
    scale, zero = torch.tensor(5.0), torch.tensor(0.0)
    own, row_wrong, column_wrong = contrastive_triton.sums(x, y, scale, zero)
    memory = torch.full((70, 128), 77.0)
    contrastive_triton.gradient_chunk(
        x, y, scale, zero, 1 / row_wrong, 1 / column_wrong, torch.full((70,), -3.0), 0, memory[:, :70]
    )
    assert (memory[:, 70:] == 77).all()
    logits = scale * x.double() @ y.double().T
    torch.testing.assert_close(own.double(), logits.diagonal(), rtol=1e-6, atol=1e-6)
    expected = logits.exp() * (1 / row_wrong[:, None] + 1 / column_wrong)
    torch.testing.assert_close(memory[:, :70].double(), expected.fill_diagonal_(-3.0), rtol=5e-6, atol=1e-9)


def test_supports_gpu_tensors_only() -> None:
    assert not contrastive_triton.supports(torch.zeros(4, 16))
