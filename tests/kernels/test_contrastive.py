"""The contrastive losses and all their gradients against two definitions of the truth: kernels/reference.py in fp64,
and the lines that public CLIP and SigLIP libraries train with, written here anew.

Odd sizes, one pair alone, equal pairs, extra negatives, squares of any size, the fallback for logits out of range.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from kernels import contrastive_loss, contrastive_squares, reference, sigmoid_loss
from kernels.dispatch import why

SIZES = [(1, 3), (2, 1), (7, 5), (257, 33), (1023, 65)]
SCALES = [1.0, 14.3, 100.0, 300.0]
FP32_STEP = 2.0**-23
Numbers = list[torch.Tensor]  # loss, then the gradients of x, y, scale and, for the sigmoid loss, bias


def draw(
    pairs: int, size: int, noise: float = 1.0, unit: bool = True, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """fp64 x and y that belong together but for some noise."""
    generator = torch.Generator().manual_seed(1000 * pairs + size + seed)
    x = torch.randn(pairs, size, generator=generator, dtype=torch.float64)
    y = x + noise * torch.randn(pairs, size, generator=generator, dtype=torch.float64)
    return (F.normalize(x, dim=1), F.normalize(y, dim=1)) if unit else (x, y)


def number(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


def numbers(
    loss_of: Callable[..., torch.Tensor], *inputs: torch.Tensor, factor: float = 1.0, **options: Any
) -> Numbers:
    """The loss and its gradients, times `factor`."""
    leaves = [each.detach().clone().requires_grad_() for each in inputs]
    loss = loss_of(*leaves, **options)
    (loss * factor).backward()
    return [loss.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def library_clip(
    x: torch.Tensor, y: torch.Tensor, scale: torch.Tensor, *, label_smoothing: float = 0.0
) -> torch.Tensor:
    """As CLIP's reference code and open_clip's ClipLoss."""
    logits_per_image = scale * x @ y.T
    logits_per_text = scale * y @ x.T
    labels = torch.arange(len(x))
    return (
        F.cross_entropy(logits_per_image, labels, label_smoothing=label_smoothing)
        + F.cross_entropy(logits_per_text, labels, label_smoothing=label_smoothing)
    ) / 2


def library_siglip(x: torch.Tensor, y: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """As SigLIP's pseudocode and open_clip's SigLipLoss."""
    logits = x @ y.T * scale + bias
    labels = -torch.ones_like(logits)
    labels.fill_diagonal_(1)
    return -F.logsigmoid(labels * logits).sum() / len(x)


def assert_same(mine: Numbers, truth: Numbers, tolerance: float) -> None:
    """Each number within `tolerance` of the truth, relative to its norm; below 1e-12 no digits are asked for."""
    assert len(mine) == len(truth)
    for name, a, b in zip(("loss", "dx", "dy", "dscale", "dbias"), mine, truth, strict=False):
        error = float((a.double() - b.double()).norm())
        assert error <= tolerance * max(1e-12, float(b.double().norm())), f"{name}: {error} of {float(b.norm())}"


@pytest.fixture
def exact_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one each time the fallback for logits out of range is taken."""
    calls: list[int] = []
    exact = contrastive_squares.exact_sums

    def counted(*args: Any) -> Any:
        calls.append(1)
        return exact(*args)

    monkeypatch.setattr(contrastive_squares, "exact_sums", counted)
    return calls


# --- InfoNCE, one process


@pytest.mark.parametrize("truth", [reference.contrastive_loss, library_clip])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize(("pairs", "size"), SIZES)
def test_infonce_is_its_definition_in_fp64(
    pairs: int, size: int, scale: float, truth: Callable[..., torch.Tensor]
) -> None:
    x, y = draw(pairs, size)
    expected = numbers(truth, x, y, number(scale))
    mine = numbers(contrastive_loss, x, y, number(scale))
    if pairs == 1:
        assert all(torch.count_nonzero(each) == 0 for each in mine), "one pair has nothing to be told from"
    torch.testing.assert_close(mine, expected, atol=1e-11, rtol=1e-9)


@pytest.mark.parametrize("smoothing", [0.1, 0.37])
@pytest.mark.parametrize("scale", [1.0, 100.0, 300.0])
@pytest.mark.parametrize(("pairs", "size"), [(1, 3), (7, 5), (257, 33)])
def test_infonce_with_smoothed_labels(pairs: int, size: int, scale: float, smoothing: float) -> None:
    x, y = draw(pairs, size)
    for truth in (reference.contrastive_loss, library_clip):
        expected = numbers(truth, x, y, number(scale), label_smoothing=smoothing)
        mine = numbers(contrastive_loss, x, y, number(scale), label_smoothing=smoothing)
        torch.testing.assert_close(mine, expected, atol=1e-10, rtol=1e-9)


def test_the_fallback_is_taken_only_when_a_sum_leaves_the_range(exact_calls: list[int]) -> None:
    x, y = draw(257, 33)
    for scale in (1.0, 14.3, 100.0):
        numbers(contrastive_loss, x, y, number(scale))
    assert exact_calls == []
    numbers(contrastive_loss, x, y, number(300.0))
    assert exact_calls == [1]
    numbers(contrastive_loss, x, -x, number(300.0))  # every true pair is the farthest of all
    assert exact_calls == [1, 1]


def test_a_batch_of_equal_pairs_at_a_large_scale_needs_no_fallback(exact_calls: list[int]) -> None:
    """Towers that have collapsed: 9000 e^60, the largest that a sum can be, is inside fp32."""
    ones = torch.ones(9000, 1)
    loss = contrastive_loss(ones, ones, torch.tensor(100.0))
    torch.testing.assert_close(loss, torch.tensor(9000.0).log())
    assert exact_calls == []


@pytest.mark.parametrize(("length", "scale"), [(1e-3, 5.0), (3.0, 10.0), (30.0, 10.0), (0.0, 7.0)])
def test_infonce_of_embeddings_of_any_length(length: float, scale: float) -> None:
    x, y = draw(61, 17, unit=False)
    x, y = x * length, y * length * torch.linspace(0.1, 2, 61, dtype=torch.float64)[:, None]
    expected = numbers(library_clip, x, y, number(scale))
    torch.testing.assert_close(numbers(contrastive_loss, x, y, number(scale)), expected, atol=1e-9, rtol=1e-9)


def test_infonce_with_equal_pairs() -> None:
    """Duplicates share the probability, and a batch of one pair repeated knows nothing: log N."""
    x, y = draw(20, 7)
    rows = torch.tensor([0, 3, 3, 3, 5, 0, 19, 1, 2])
    expected = numbers(library_clip, x[rows], y[rows], number(30.0))
    torch.testing.assert_close(
        numbers(contrastive_loss, x[rows], y[rows], number(30.0)), expected, atol=1e-11, rtol=1e-9
    )
    same = torch.zeros(11, dtype=torch.int64)
    loss = contrastive_loss(x[same], y[same], number(50.0))
    torch.testing.assert_close(loss, number(11.0).log())


@pytest.mark.parametrize("negative", [-1.0, -40.0])
def test_a_negative_scale_is_a_scale_too(negative: float) -> None:
    x, y = draw(37, 5)
    expected = numbers(library_clip, x, y, number(negative))
    torch.testing.assert_close(numbers(contrastive_loss, x, y, number(negative)), expected, atol=1e-10, rtol=1e-9)


@pytest.mark.parametrize("noise", [1.0, 10.0])
@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
@pytest.mark.parametrize(("pairs", "size"), [(2, 1), (7, 5), (257, 33), (1023, 65)])
def test_infonce_in_fp32(pairs: int, size: int, scale: float, noise: float) -> None:
    x, y = (each.float() for each in draw(pairs, size, noise))
    expected = numbers(reference.contrastive_loss, x, y, number(scale))
    # where the wrong answers are e^-12 and less, an fp32 step of the logits themselves is what shows
    tolerance = 5e-6 if expected[0] > 1e-4 else 5e-6 + FP32_STEP * scale
    assert_same(numbers(contrastive_loss, x, y, torch.tensor(scale)), expected, tolerance)


@pytest.mark.parametrize(("noise", "scale", "most"), [(0.3, 14.3, 1e-2), (0.03, 14.3, 1e-2), (0.9, 100.0, 1e-5)])
def test_a_small_loss_keeps_its_digits_in_fp32(noise: float, scale: float, most: float) -> None:
    """Where logsumexp - s_ii and exp(.) - 1 are differences of nearly equal numbers, which plain torch gets wrong."""
    x, y = (each.float() for each in draw(1023, 65, noise))
    expected = numbers(reference.contrastive_loss, x, y, number(scale))
    assert 1e-12 < expected[0] < most
    tolerance = 5e-6 + FP32_STEP * scale
    assert_same(numbers(contrastive_loss, x, y, torch.tensor(scale)), expected, tolerance)
    with pytest.raises(AssertionError):
        assert_same(numbers(library_clip, x, y, torch.tensor(scale)), expected, tolerance)


def test_the_fallback_in_fp32(exact_calls: list[int]) -> None:
    """Logits to 300 have an fp32 step of 3e-5, which is what a probability can be wrong by."""
    x, y = (each.float() for each in draw(257, 33))
    expected = numbers(reference.contrastive_loss, x, y, number(300.0))
    assert_same(numbers(contrastive_loss, x, y, torch.tensor(300.0)), expected, 3e-5)
    assert exact_calls


def test_what_is_not_a_number_stays_visible() -> None:
    """A loss that hid a broken embedding would train on."""
    for bad in (torch.nan, torch.inf):
        x, y = draw(9, 5)
        x[4, 2] = bad
        assert not contrastive_loss(x, y, number(10.0)).isfinite()
        assert not sigmoid_loss(x, y, number(10.0), number(-10.0)).isfinite()


# --- sigmoid, one process


@pytest.mark.parametrize("truth", [reference.sigmoid_loss, library_siglip])
@pytest.mark.parametrize(("scale", "bias"), [(1.0, 0.0), (10.0, -10.0), (100.0, -10.0), (300.0, 7.5)])
@pytest.mark.parametrize(("pairs", "size"), SIZES)
def test_sigmoid_is_its_definition_in_fp64(
    pairs: int, size: int, scale: float, bias: float, truth: Callable[..., torch.Tensor]
) -> None:
    x, y = draw(pairs, size)
    expected = numbers(truth, x, y, number(scale), number(bias))
    mine = numbers(sigmoid_loss, x, y, number(scale), number(bias))
    torch.testing.assert_close(mine, expected, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("noise", [1.0, 10.0])
@pytest.mark.parametrize(("scale", "bias"), [(1.0, 0.0), (10.0, -10.0), (100.0, -10.0)])
@pytest.mark.parametrize(("pairs", "size"), [(1, 3), (7, 5), (257, 33), (1023, 65)])
def test_sigmoid_in_fp32(pairs: int, size: int, scale: float, bias: float, noise: float) -> None:
    x, y = (each.float() for each in draw(pairs, size, noise))
    expected = numbers(reference.sigmoid_loss, x, y, number(scale), number(bias))
    assert_same(numbers(sigmoid_loss, x, y, torch.tensor(scale), torch.tensor(bias)), expected, 5e-6)


def test_sigmoid_with_equal_pairs_and_any_length() -> None:
    x, y = draw(20, 7, unit=False)
    rows = torch.tensor([0, 3, 3, 3, 5, 0, 19, 1, 2])
    inputs = (4 * x[rows], 3 * y[rows], number(12.0), number(-3.0))
    expected = numbers(library_siglip, *inputs)
    torch.testing.assert_close(numbers(sigmoid_loss, *inputs), expected, atol=1e-9, rtol=1e-9)


# --- both


def test_gradcheck() -> None:
    x, y = draw(6, 3, unit=False)
    leaves = [each.requires_grad_() for each in (x, y, number(3.0), number(-1.5))]
    assert torch.autograd.gradcheck(sigmoid_loss, leaves)
    for smoothing in (0.0, 0.2):
        assert torch.autograd.gradcheck(
            lambda x, y, scale, smoothing=smoothing: contrastive_loss(x, y, scale, label_smoothing=smoothing),
            leaves[:3],
        )
    far = number(200.0).requires_grad_()  # through the fallback
    assert torch.autograd.gradcheck(contrastive_loss, [leaves[0], leaves[1], far], atol=1e-4)


@pytest.mark.parametrize("scale", [14.3, 300.0])
@pytest.mark.parametrize("side", [7, 31, 32, 100])
def test_squares_change_nothing(monkeypatch: pytest.MonkeyPatch, side: int, scale: float) -> None:
    """101 rows and columns in squares with true pairs in those on the diagonal."""
    x, y = draw(101, 13)
    inputs = (x, y, number(scale))
    whole = numbers(contrastive_loss, *inputs, label_smoothing=0.1), numbers(sigmoid_loss, *inputs, number(-2.0))
    monkeypatch.setattr(contrastive_squares, "SIDE", side)
    torch.testing.assert_close(
        numbers(contrastive_loss, *inputs, label_smoothing=0.1), whole[0], atol=1e-12, rtol=1e-10
    )
    torch.testing.assert_close(numbers(sigmoid_loss, *inputs, number(-2.0)), whole[1], atol=1e-12, rtol=1e-10)


def test_the_order_of_the_pairs_is_nothing() -> None:
    x, y = draw(127, 11)
    order = torch.randperm(127, generator=torch.Generator().manual_seed(5))
    for loss_of, others in ((contrastive_loss, [number(20.0)]), (sigmoid_loss, [number(20.0), number(-5.0)])):
        loss, dx, dy, *rest = numbers(loss_of, x, y, *others)
        shuffled_loss, shuffled_dx, shuffled_dy, *shuffled_rest = numbers(loss_of, x[order], y[order], *others)
        torch.testing.assert_close([shuffled_loss, *shuffled_rest], [loss, *rest])
        torch.testing.assert_close([shuffled_dx, shuffled_dy], [dx[order], dy[order]])


def test_picture_and_text_are_alike() -> None:
    """L(x, y) = L(y, x), and the gradients change places."""
    x, y = draw(53, 9)
    for loss_of, others in ((contrastive_loss, [number(20.0)]), (sigmoid_loss, [number(20.0), number(-5.0)])):
        loss, dx, dy, *rest = numbers(loss_of, x, y, *others)
        turned_loss, turned_dx, turned_dy, *turned_rest = numbers(loss_of, y, x, *others)
        torch.testing.assert_close([turned_loss, turned_dy, turned_dx, *turned_rest], [loss, dx, dy, *rest])


def test_the_factor_on_a_loss_reaches_every_gradient() -> None:
    x, y = draw(23, 5)
    for loss_of, truth, others in (
        (contrastive_loss, library_clip, [number(9.0)]),
        (sigmoid_loss, library_siglip, [number(9.0), number(-4.0)]),
    ):
        expected = numbers(truth, x, y, *others, factor=-2.5)
        torch.testing.assert_close(numbers(loss_of, x, y, *others, factor=-2.5), expected, atol=1e-12, rtol=1e-9)


def test_strides_and_a_scale_of_another_precision() -> None:
    """Transposed and expanded inputs; the learned scale stays fp32 beside fp64 embeddings."""
    x, y = draw(31, 5)
    expected = numbers(library_clip, x, y, number(14.0))
    turned = [each.T.contiguous().T for each in (x, y)]
    torch.testing.assert_close(numbers(contrastive_loss, *turned, number(14.0)), expected)
    row = x[:1].expand(31, 5)
    torch.testing.assert_close(contrastive_loss(row, y, number(14.0)), library_clip(row, y, number(14.0)))
    scale = torch.tensor(14.0, requires_grad=True)
    contrastive_loss(x, y, scale).backward()
    assert scale.grad is not None
    assert scale.grad.dtype == torch.float32
    torch.testing.assert_close(scale.grad.double(), expected[3], atol=1e-8, rtol=1e-6)


def test_what_does_not_fit_is_refused_with_both_shapes() -> None:
    x, y = draw(4, 3)
    one = number(1.0)
    for wrong in (y[:3], y[:, :2], y.float(), y[0]):
        with pytest.raises(ValueError, match=r"x is torch\.float64 \[4, 3\] and y"):
            contrastive_loss(x, wrong, one)
        with pytest.raises(ValueError, match="paired row by row"):
            sigmoid_loss(x, wrong, one, one)
    with pytest.raises(ValueError, match=r"bfloat16: sums over the global batch need.*say products=torch\.bfloat16"):
        contrastive_loss(x.bfloat16(), y.bfloat16(), one)
    with pytest.raises(ValueError, match=r"float16: .*; give x and y in float32$"):
        contrastive_loss(x.half(), y.half(), one)
    for wrong in (x, x.half()):
        with pytest.raises(ValueError, match=r"float(64|16): products=torch\.bfloat16 takes x and y in float32"):
            contrastive_loss(wrong, wrong, one, products=torch.bfloat16)
    with pytest.raises(ValueError, match=r"x is on cpu and y on meta"):
        sigmoid_loss(x, y.to("meta"), one, one)
    for smoothing in (-0.1, 1.0):
        with pytest.raises(ValueError, match=rf"label_smoothing {smoothing}: at least 0, below 1"):
            contrastive_loss(x, y, one, label_smoothing=smoothing)
    with pytest.raises(ValueError, match=r"products=torch\.float16: either None"):
        sigmoid_loss(x.half(), y.half(), one, one, products=torch.float16)
    with pytest.raises(ValueError, match=r"negatives are torch\.float64 \[5, 2\] and x torch\.float64 \[4, 3\]"):
        contrastive_loss(x, y, one, negatives_MD=torch.zeros(5, 2, dtype=torch.float64))
    with pytest.raises(ValueError, match="exchange='star' is none of auto, replicate, gather, ring"):
        sigmoid_loss(x, y, one, one, exchange="star")
    for number_, what in ((one[None], r"\[1\]"), (10.0, "float")):
        with pytest.raises(ValueError, match=f"scale or bias is {what}: they must be scalar tensors"):
            contrastive_loss(x, y, number_)
        with pytest.raises(ValueError, match=f"scale or bias is {what}: they must be scalar tensors"):
            sigmoid_loss(x, y, one, number_)
    with pytest.raises(ValueError, match="backend 'cuda' is none of"):
        contrastive_loss(x, y, one, backend="cuda")
    with pytest.raises(ValueError, match=r"backend 'triton' cannot do this: (triton is not|the tensors are on cpu)"):
        contrastive_loss(x, y, one, backend="triton")
    assert why(sigmoid_loss, x, y, one, one) == "sigmoid_loss: torch, the preferred one"


# --- extra negatives


def with_negatives(loss_of: Callable[..., torch.Tensor], **options: Any) -> Callable[..., torch.Tensor]:
    """The negatives as the last of the inputs, for `numbers`."""
    return lambda *inputs: loss_of(*inputs[:-1], negatives_MD=inputs[-1], **options)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("scale", [14.3, 100.0, 300.0])
@pytest.mark.parametrize(("pairs", "count", "size"), [(1, 1, 3), (7, 0, 5), (61, 130, 17), (130, 1, 9)])
def test_more_negatives(pairs: int, count: int, size: int, scale: float, smoothing: float) -> None:
    x, y = draw(pairs, size)
    negatives = draw(count, size, seed=7)[0]
    inputs = x, y, number(scale), negatives
    expected = numbers(with_negatives(reference.contrastive_loss, label_smoothing=smoothing), *inputs)
    mine = numbers(with_negatives(contrastive_loss, label_smoothing=smoothing), *inputs)
    torch.testing.assert_close(mine, expected, atol=1e-11, rtol=1e-9)
    inputs = x, y, number(scale), number(-3.0), negatives
    expected = numbers(with_negatives(reference.sigmoid_loss), *inputs)
    torch.testing.assert_close(numbers(with_negatives(sigmoid_loss), *inputs), expected, atol=1e-11, rtol=1e-9)


@pytest.mark.parametrize("scale", [14.3, 300.0])
def test_negatives_that_are_far_away_are_no_answers(scale: float) -> None:
    """Padding: rows opposite to every x add nothing, in any number."""
    x, y = draw(37, 8)
    x, y = (torch.cat([each, torch.ones(37, 1, dtype=torch.float64)], 1) for each in (x, y))
    far = torch.zeros(50, 9, dtype=torch.float64)
    far[:, 8] = -60.0
    for loss_of, others in ((contrastive_loss, []), (sigmoid_loss, [number(-3.0)])):
        loss, dx, dy, *scalars = numbers(loss_of, x, y, number(scale), *others)
        padded = numbers(with_negatives(loss_of), x, y, number(scale), *others, far)
        torch.testing.assert_close(padded[:-1], [loss, dx, dy, *scalars], atol=1e-12, rtol=1e-12)
        assert padded[-1].abs().max() < 1e-20
