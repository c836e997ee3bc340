"""The contrastive losses' Triton kernels in the interpreter, against kernels/reference.py in fp64.

The loss and its gradients are put together from the parts as kernels/contrastive.py does. Odd sizes, short embeddings,
large scales, several squares, rows of a rank among all columns, equal pairs, sums out of range.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from kernels import contrastive, contrastive_loss, contrastive_squares, reference, sigmoid_loss
from kernels.contrastive_passes import LARGEST_EXPONENT
from kernels.gpu import contrastive as contrastive_triton

Numbers = list[torch.Tensor]  # loss, then the gradients of x, y, scale and, for the sigmoid loss, bias
FP32_STEP = 2.0**-23


def draw(pairs: int, size: int, noise: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 unit x and y that belong together but for some noise."""
    generator = torch.Generator().manual_seed(1000 * pairs + size)
    x = torch.randn(pairs, size, generator=generator)
    y = x + noise * torch.randn(pairs, size, generator=generator)
    return F.normalize(x, dim=1), F.normalize(y, dim=1)


def truth(loss_of: Callable[..., torch.Tensor], *inputs: torch.Tensor, **options: Any) -> Numbers:
    leaves = [each.detach().double().requires_grad_() for each in inputs]
    if options.pop("negatives", None) is not None:
        options["negatives_MD"] = leaves[-1]
    loss = loss_of(*leaves[: len(inputs) - ("negatives_MD" in options)], **options)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def assert_same(mine: Numbers, expected: Numbers, tolerance: float) -> None:
    """Each number within `tolerance` of the truth, relative to its norm."""
    for name, a, b in zip(("loss", "dx", "dy", "dscale", "dbias"), mine, expected, strict=False):
        error = float((a.double() - b).norm())
        assert error <= tolerance * max(1e-12, float(b.norm())), f"{name}: {error} of {float(b.norm())}"
    assert len(mine) == len(expected)


def infonce(
    x: torch.Tensor, y: torch.Tensor, scale: torch.Tensor, negatives: torch.Tensor | None = None, smoothing: float = 0.0
) -> Numbers:
    return by_triton(contrastive_loss, [x, y, scale], negatives, label_smoothing=smoothing)


def sigmoid(
    x: torch.Tensor, y: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor, negatives: torch.Tensor | None = None
) -> Numbers:
    return by_triton(sigmoid_loss, [x, y, scale, bias], negatives)


def by_triton(
    loss_of: Callable[..., torch.Tensor], inputs: Numbers, negatives: torch.Tensor | None, **options: Any
) -> Numbers:
    leaves = [each.detach().clone().requires_grad_() for each in inputs + ([] if negatives is None else [negatives])]
    if negatives is not None:
        options["negatives_MD"] = leaves[-1]
    if inputs[0].dtype == torch.bfloat16:
        options["products"] = torch.bfloat16
    loss = loss_of(*leaves[: len(inputs)], backend="triton", **options)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def reference_of(x: torch.Tensor, y: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    longest = x.float().norm(dim=1).max() * y.float().norm(dim=1).max()
    return (scale.abs() * longest - LARGEST_EXPONENT).clamp(min=0)


def sums(
    x: torch.Tensor, y: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, offset: int = 0, atomic: bool = False
) -> Numbers:
    """own, and the sums over the wrong answers of rows and columns."""
    own, column_wrong = torch.full([len(x)], torch.nan), torch.zeros(len(y))
    row_wrong = contrastive_triton.sums(x, y, scale, zero, offset, own, column_wrong, atomic)
    return [own, row_wrong, column_wrong]


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
    # true pairs elsewhere: only wrong answers
    loss, *_ = contrastive_triton.sigmoid(x, y, scale, bias, 1000, None, None)
    own = F.softplus((scale * x.double() * y.double()).sum(1) + bias).sum()
    torch.testing.assert_close(loss, F.softplus(wrong).sum() + own, rtol=1e-6, atol=0)
    assert 0 < loss < 63 * 63 * 1e-6


@pytest.mark.parametrize("rows", [slice(0, 100), slice(1, 150), slice(130, 200)])
def test_some_rows_among_all_columns(rows: slice) -> None:
    """As on a rank of a group: each function against that of plain torch, which the other tests hold to the truth."""
    x, y = draw(200, 48)
    scale, bias = torch.tensor(14.3), torch.tensor(-4.0)
    found = []
    for squares in (contrastive_triton, contrastive_squares):
        own, column_wrong = torch.zeros(rows.stop - rows.start), torch.zeros(200)
        row_wrong = squares.sums(x[rows], y, scale, torch.tensor(2.0), rows.start, own, column_wrong)
        changed = [torch.ones(len(each), 48) for each in (own, y, own, y)]  # they are added to
        scale_gradient = squares.gradients(
            x[rows], y, scale, torch.tensor(2.0), 1 / row_wrong, 1 / column_wrong, -own, rows.start, *changed[:2]
        )
        totals = squares.sigmoid(x[rows], y, scale, bias, rows.start, *changed[2:])
        found.append([own, row_wrong, column_wrong, scale_gradient, *totals, *changed])
    for mine, expected in zip(*found, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("side", [128, 256])
def test_squares_change_nothing(monkeypatch: pytest.MonkeyPatch, side: int) -> None:
    """300 rows in squares of 128 and 256, with true pairs in squares on and off the diagonal."""
    x, y = draw(300, 16)
    scale, bias = torch.tensor(14.3), torch.tensor(-4.0)
    monkeypatch.setattr(contrastive_triton, "SIDE", side)
    monkeypatch.setattr(contrastive_triton, "SQUARE_BYTES", 4 * side * side)
    assert_same(infonce(x, y, scale), truth(reference.contrastive_loss, x, y, scale), 5e-6)
    assert_same(sigmoid(x, y, scale, bias), truth(reference.sigmoid_loss, x, y, scale, bias), 5e-6)


@pytest.mark.parametrize("count", [1, 131])
def test_more_negatives(count: int) -> None:
    x, y = draw(70, 48, noise=4.0)
    negatives, _ = draw(count, 48)
    scale, bias = torch.tensor(14.3), torch.tensor(-4.0)
    expected = truth(reference.contrastive_loss, x, y, scale, negatives, negatives=True, label_smoothing=0.1)
    assert_same(infonce(x, y, scale, negatives, 0.1), expected, 5e-6)
    expected = truth(reference.sigmoid_loss, x, y, scale, bias, negatives, negatives=True)
    assert_same(sigmoid(x, y, scale, bias, negatives), expected, 5e-6)


def test_atomic_sums_are_the_same_sums() -> None:
    x, y = draw(257, 48)
    scale, zero = torch.tensor(14.3), torch.tensor(0.0)
    torch.testing.assert_close(sums(x, y, scale, zero, atomic=True), sums(x, y, scale, zero), rtol=1e-6, atol=0)


def test_two_runs_give_the_same_bits() -> None:
    x, y = draw(257, 48)
    for first, second in zip(infonce(x, y, torch.tensor(14.3)), infonce(x, y, torch.tensor(14.3)), strict=True):
        assert torch.equal(first, second)


def test_equal_pairs_and_a_negative_scale() -> None:
    x, y = draw(20, 32)
    rows = torch.tensor([0, 3, 3, 3, 5, 0, 19, 1, 2] * 3)
    for scale in (torch.tensor(4.0), torch.tensor(-14.0), torch.tensor(0.0)):
        inputs = (x[rows], y[rows], scale)
        assert_same(infonce(*inputs), truth(reference.contrastive_loss, *inputs), 5e-6)
    same = torch.zeros(11, dtype=torch.int64)
    loss, *_ = infonce(x[same], y[same], torch.tensor(50.0))
    torch.testing.assert_close(loss, torch.tensor(11.0).log())


def test_equal_pairs_in_the_sigmoid_loss() -> None:
    x, y = draw(20, 32)
    rows = torch.tensor([0, 3, 3, 3, 5, 0, 19, 1, 2] * 3)
    for scale in (torch.tensor(4.0), torch.tensor(-14.0), torch.tensor(0.0)):
        inputs = (x[rows], y[rows], scale, torch.tensor(-3.0))
        assert_same(sigmoid(*inputs), truth(reference.sigmoid_loss, *inputs), 5e-6)


def test_the_order_of_pairs_does_not_matter() -> None:
    x, y = draw(131, 48, noise=4.0)
    order = torch.randperm(131, generator=torch.Generator().manual_seed(0))
    for loss_of, others in ((infonce, [torch.tensor(14.3)]), (sigmoid, [torch.tensor(14.3), torch.tensor(-4.0)])):
        loss, dx, dy, *rest = loss_of(x, y, *others)
        assert_same(loss_of(x[order], y[order], *others), [loss, dx[order], dy[order], *rest], 5e-6)


def test_sizes_of_1023_and_of_a_prime() -> None:
    """Many tiles, the last ones cut off."""
    for pairs, size in ((1023, 16), (509, 32)):
        x, y = draw(pairs, size, noise=4.0)
        scale, bias = torch.tensor(14.3), torch.tensor(-4.0)
        assert_same(infonce(x, y, scale), truth(reference.contrastive_loss, x, y, scale), 5e-6)
        assert_same(sigmoid(x, y, scale, bias), truth(reference.sigmoid_loss, x, y, scale, bias), 5e-6)


def test_negatives_that_are_far_away_change_nothing() -> None:
    """Padding: answers so wrong that their exponentials are 0; only their logits' part of a smoothed label would see
    them."""
    x, y = draw(70, 48, noise=4.0)
    x = F.normalize(x + torch.eye(48)[0] * 3, dim=1)
    scale, bias = torch.tensor(50.0), torch.tensor(-4.0)
    far = -torch.eye(48)[:1].repeat(7, 1) * 4
    for loss_of, others in ((infonce, [scale]), (sigmoid, [scale, bias])):
        plain, padded = loss_of(x, y, *others), loss_of(x, y, *others, far)
        assert_same(padded[: len(plain)], plain, 5e-6)
        assert padded[-1].norm() <= 1e-12


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
        # the gradients of scale and bias are summed before the rounding; single terms of scale's are not as small
        torch.testing.assert_close([each.double() for each in rest], rest_truth, rtol=1e-4, atol=1e-6)
        assert dx.dtype == dy.dtype == torch.bfloat16


@pytest.mark.parametrize("sign", [1, -1])
def test_a_sum_out_of_range_is_seen(monkeypatch: pytest.MonkeyPatch, sign: int) -> None:
    """Every true pair the farthest of all, and logits far below the reference: exact sums in plain torch."""
    calls: list[int] = []
    exact = contrastive_squares.exact_sums
    monkeypatch.setattr(contrastive_squares, "exact_sums", lambda *inputs: (calls.append(1), exact(*inputs))[1])
    x, y = draw(63, 64)
    scale = torch.tensor(500.0)
    mine = infonce(x, sign * y, scale)
    assert calls
    assert_same(mine, truth(reference.contrastive_loss, x, sign * y, scale), 5e-5)
    _, row_wrong, _ = sums(x, x, torch.tensor(300.0), torch.tensor(-200.0))
    assert row_wrong.isinf().any()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_a_number_stays_visible(bad: float) -> None:
    x, y = draw(9, 16)
    x[4, 2] = bad
    _, row_wrong, column_wrong = sums(x, y, torch.tensor(10.0), torch.tensor(0.0))
    for wrong in (row_wrong[4:5], column_wrong):
        assert not wrong.isfinite().all()
    assert row_wrong[[0, 1, 2, 3, 5, 6, 7, 8]].isfinite().all(), "the last row is not read for rows behind it"
    for loss, *_ in (infonce(x, y, torch.tensor(10.0)), sigmoid(x, y, torch.tensor(10.0), torch.tensor(-10.0))):
        assert not loss.isfinite()


def test_the_gradients_of_a_square_are_written_inside_it_only() -> None:
    x, y = draw(70, 16)
    scale, zero = torch.tensor(5.0), torch.tensor(0.0)
    own, row_wrong, column_wrong = sums(x, y, scale, zero)
    memory = torch.full((70, 128), 77.0)
    scale_gradient = contrastive_triton.gradient_square(
        x, y, scale, zero, 1 / row_wrong, 1 / column_wrong, torch.full((70,), -3.0), 0, memory[:, :70]
    )
    assert (memory[:, 70:] == 77).all()
    logits = scale * x.double() @ y.double().T
    torch.testing.assert_close(own.double(), logits.diagonal(), rtol=1e-6, atol=1e-6)
    expected = logits.exp() * (1 / row_wrong[:, None] + 1 / column_wrong)
    torch.testing.assert_close(memory[:, :70].double(), expected.fill_diagonal_(-3.0), rtol=5e-6, atol=1e-9)
    torch.testing.assert_close(scale_gradient, (expected * logits / scale).sum(), rtol=1e-5, atol=1e-5)


def test_what_is_refused_is_said() -> None:
    x, y = draw(4, 24)
    with pytest.raises(ValueError, match="size of 24, which is no multiple of 16"):
        contrastive_loss(x, y, torch.tensor(1.0), backend="triton")
    with pytest.raises(ValueError, match=r"products in torch\.float64"):
        contrastive_loss(x.double(), y.double(), torch.tensor(1.0), backend="triton")


@pytest.mark.parametrize("operation", ["contrastive_loss", "sigmoid_loss"])
def test_the_trial_tells_right_from_wrong(monkeypatch: pytest.MonkeyPatch, operation: str) -> None:
    cpu = torch.device("cpu")
    for dtype in (torch.float32, torch.bfloat16):
        contrastive._try(operation, cpu, dtype)
    original = contrastive_triton._product
    monkeypatch.setattr(contrastive_triton, "_product", lambda a, b: 1.001 * original(a, b))
    with pytest.raises(ArithmeticError, match=r"^result 1 is off by 1\.0e-03"):
        contrastive._try(operation, cpu, torch.float32)
