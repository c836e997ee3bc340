"""The Triton kernels of linear cross entropy in the interpreter, against kernels/reference.py in fp64.

Vocabularies of one column, whole blocks, a block and one, primes; rows left out; a vocabulary in slices.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from kernels import dispatch, reference
from kernels import linear_cross_entropy_chunks as chunks
from kernels.gpu import linear_cross_entropy as gpu
from kernels.linear_cross_entropy import linear_cross_entropy

EVERYTHING: dict[str, Any] = {"label_smoothing": 0.1, "z_loss": 1e-2, "soft_cap": 3.0}
SIZES = [(1, 3, 1), (5, 7, 53), (7, 16, 1023), (4, 8, 8192), (3, 5, 8193), (3, 16, 20011)]  # rows, hidden, vocabulary
Numbers = list[torch.Tensor]  # loss, then the gradients of hidden, weight and bias


def draw(rows: int, size: int, vocabulary: int, dtype: torch.dtype) -> tuple[Numbers, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows + 100 * size + vocabulary)
    shapes = ((rows, size), (vocabulary, size), (vocabulary,))
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    targets = torch.randint(0, vocabulary, (rows,), generator=generator)
    targets[2::3] = -100
    return inputs, targets


def numbers(loss_of: Callable[..., torch.Tensor], inputs: Numbers, targets: torch.Tensor, **options: Any) -> Numbers:
    hidden, weight, bias = (each.detach().clone().requires_grad_() for each in inputs)
    loss = loss_of(hidden, weight, targets, bias_V=bias, **options)
    rows = torch.linspace(-1, 2, loss.numel(), dtype=loss.dtype) if loss.ndim else 1.7
    return [loss.detach(), *torch.autograd.grad((loss * rows).sum(), [hidden, weight, bias])]


def assert_same(mine: Numbers, truth: Numbers, tolerance: float) -> None:
    for name, a, b in zip(("loss", "dhidden", "dweight", "dbias"), mine, truth, strict=True):
        error = float((a.double() - b.double()).norm())
        assert error <= tolerance * float(b.double().norm()) + 1e-12, f"{name}: {error} of {float(b.norm())}"


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("settings", [{}, EVERYTHING], ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_in_fp32(sizes: tuple[int, int, int], settings: dict[str, Any], reduction: str) -> None:
    inputs, targets = draw(*sizes, torch.float32)
    options = {"reduction": reduction, **settings}
    truth = numbers(reference.linear_cross_entropy, inputs, targets, **options)
    assert_same(numbers(linear_cross_entropy, inputs, targets, backend="triton", **options), truth, 5e-6)


@pytest.mark.parametrize("name", EVERYTHING)
@pytest.mark.parametrize("sizes", [(5, 7, 53), (3, 5, 2051)], ids=str)
def test_in_fp64(sizes: tuple[int, int, int], name: str) -> None:
    inputs, targets = draw(*sizes, torch.float64)
    settings = {name: EVERYTHING[name]}
    truth = numbers(reference.linear_cross_entropy, inputs, targets, **settings)
    assert_same(numbers(linear_cross_entropy, inputs, targets, backend="triton", **settings), truth, 1e-8)


@pytest.mark.parametrize("sizes", [(5, 7, 53), (17, 64, 1023)], ids=str)
def test_bf16_is_no_worse_than_twice_torchs_own_error(sizes: tuple[int, int, int]) -> None:
    inputs, targets = draw(*sizes, torch.bfloat16)
    inputs[2] *= 0  # on a GPU the bias is added before the logits are rounded, on CPU after

    def plain(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, *, bias_V: Any) -> torch.Tensor:
        return F.cross_entropy(F.linear(hidden, weight, bias_V), targets)

    truth, torchs = numbers(reference.linear_cross_entropy, inputs, targets), numbers(plain, inputs, targets)
    mine = numbers(linear_cross_entropy, inputs, targets, backend="triton")
    for a, b, exact in zip(mine, torchs, truth, strict=True):
        assert (a.double() - exact).norm() <= 2 * (b.double() - exact).norm() + 1e-5 * exact.norm()


def test_a_small_loss_keeps_its_digits() -> None:
    logits = torch.randn(9, 301, generator=torch.Generator().manual_seed(0))
    places = torch.arange(9) * 30
    logits[torch.arange(9), places] = torch.linspace(8, 30, 9)
    exact = logits.double().requires_grad_()
    losses = F.cross_entropy(exact, places, reduction="none")
    (gradient,) = torch.autograd.grad(losses.sum(), exact)
    mine = gpu.chunk_(logits, places, torch.ones(9), 0.0, 0.0, 0.0, gradient=True)
    assert 1e-12 < losses.min() < 1e-9
    torch.testing.assert_close(mine.double(), losses.detach(), rtol=1e-5, atol=0)
    torch.testing.assert_close(logits.double(), gradient, rtol=1e-5, atol=1e-15)


def test_rows_are_overwritten_in_place_and_nothing_else_is() -> None:
    """Rows 640 apart; one has factor 0 and is cleared whatever it holds; without `gradient` none is touched."""
    memory = torch.full((5, 640), 77.0)
    logits = memory[:, :601]
    logits.copy_(torch.randn(5, 601, generator=torch.Generator().manual_seed(0)))
    logits[3] = torch.nan
    before = memory.clone()
    places, factors = torch.tensor([0, 600, 3, 4, 511]), torch.tensor([1.0, -2.0, 0.5, 0.0, 1.0])
    losses = gpu.chunk_(logits, places, factors, 0.0, 0.0, 0.0, gradient=False)
    torch.testing.assert_close(memory, before, equal_nan=True, rtol=0, atol=0)
    assert torch.equal(gpu.chunk_(logits, places, factors, 0.0, 0.0, 0.0, gradient=True), losses)
    assert (memory[:, 601:] == 77).all()
    assert (memory[3, :601] == 0).all()
    assert losses[3] == 0
    torch.testing.assert_close(memory[:, :601].sum(1), torch.zeros(5), rtol=0, atol=1e-6)


def test_masked_columns_and_what_is_not_a_number() -> None:
    """A whole block of -inf first; nan and inf stay visible."""
    logits = torch.randn(3, 9001, generator=torch.Generator().manual_seed(0))
    logits[:, :8192] = -torch.inf
    places = torch.full((3,), 9000)
    exact = F.cross_entropy(logits.double(), places, reduction="none")
    logits[1, 8500], logits[2, 8500] = torch.nan, torch.inf
    losses = gpu.chunk_(logits, places, torch.ones(3), 0.0, 0.0, 0.0, gradient=True)
    torch.testing.assert_close(losses[0].double(), exact[0], rtol=1e-6, atol=0)
    assert (logits[0, :8192] == 0).all()
    assert losses[1].isnan()
    assert not losses[2].isfinite()
    assert gpu.chunk_(torch.zeros(1, 9), torch.tensor([-1]), torch.ones(1), 0.0, 0.0, 0.0, gradient=True).isinf()


def in_slices(inputs: Numbers, targets: torch.Tensor, columns: tuple[int, ...], **settings: Any) -> Numbers:
    """What ranks do with their slices, one after the other: numbers, the merge, gradients. The sum of the losses."""
    hidden, weight, bias = inputs
    size, factors = sum(columns), (targets != -100).to(hidden.dtype)
    of = chunks.Loss(*(settings.get(name, 0.0) for name in EVERYTHING))
    slices, start = [], 0
    for width in columns:
        vocabulary = chunks._Vocabulary(size, start, width, None)
        own = slice(start, start + width)
        slices.append((F.linear(hidden, weight[own], bias[own]), vocabulary.places(targets)))
        start += width
    parts = torch.stack([gpu.numbers(logits, places, of.soft_cap) for logits, places in slices])
    highest = parts[:, 0].amax(0)
    merged = torch.stack(
        [highest, (parts[:, 1] * (parts[:, 0] - highest).exp()).sum(0), parts[:, 2].amax(0), parts[:, 3].sum(0)]
    )
    for (logits, places), part in zip(slices, parts, strict=True):
        losses, gradient = of.of_rows(merged, part[0], factors, size)
        gpu.gradient_(logits, places, part[0], gradient, of.soft_cap)
    g = torch.cat([logits for logits, _ in slices], 1)
    return [losses.sum(), g @ weight, g.T @ hidden, g.sum(0)]


@pytest.mark.parametrize("settings", [{}, EVERYTHING], ids=str)
def test_slices_of_the_vocabulary(settings: dict[str, Any]) -> None:
    inputs, targets = draw(5, 7, 1023, torch.float32)
    loss, *gradients = numbers(reference.linear_cross_entropy, inputs, targets, reduction="sum", **settings)
    mine = in_slices(inputs, targets, (1, 700, 322), **settings)
    assert_same(mine, [loss, *(each / 1.7 for each in gradients)], 5e-6)


@pytest.mark.parametrize("settings", [{}, {"z_loss": 1e-2}], ids=str)
@pytest.mark.parametrize("columns", [(64, 192, 44), (256, 1, 43)], ids=str)
def test_a_slice_that_is_all_padding_has_no_answers(columns: tuple[int, ...], settings: dict[str, Any]) -> None:
    """A bias of -inf over the first slice, a whole block of it or a part, and the last columns: as without them."""
    (hidden, weight, bias), targets = draw(5, 7, 300, torch.float32)
    there = slice(columns[0], 290)
    bias[: there.start] = bias[there.stop :] = -torch.inf
    kept, places = [hidden, weight[there], bias[there]], targets.clamp(max=there.stop - there.start - 1)
    loss, dhidden, *of_columns = numbers(reference.linear_cross_entropy, kept, places, reduction="sum", **settings)
    dweight, dbias = torch.zeros_like(weight, dtype=torch.float64), torch.zeros_like(bias, dtype=torch.float64)
    dweight[there], dbias[there] = of_columns
    of_whole = torch.where(places < 0, places, places + there.start)
    mine = in_slices([hidden, weight, bias], of_whole, columns, **settings)
    assert_same(mine, [loss, dhidden / 1.7, dweight / 1.7, dbias / 1.7], 5e-6)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck_in_fp64(reduction: str) -> None:
    inputs, targets = draw(3, 2, 5, torch.float64)
    options = {"reduction": reduction, "backend": "triton", **EVERYTHING}
    leaves = [each.requires_grad_() for each in inputs]
    assert torch.autograd.gradcheck(lambda h, w, b: linear_cross_entropy(h, w, targets, bias_V=b, **options), leaves)


def by_triton(inputs: Numbers, targets: torch.Tensor) -> Numbers:
    return numbers(linear_cross_entropy, inputs, targets, reduction="sum", backend="triton", **EVERYTHING)


def test_the_order_of_rows_and_of_the_vocabulary_does_not_matter() -> None:
    inputs, targets = draw(13, 16, 131, torch.float32)
    hidden, weight, bias = inputs
    rows, words = (torch.randperm(n, generator=torch.Generator().manual_seed(n)) for n in (13, 131))
    places = words.argsort()
    renamed = torch.where(targets < 0, targets, places[targets.clamp(min=0)])
    loss, dhidden, dweight, dbias = by_triton(inputs, targets)
    mixed = by_triton([hidden[rows], weight[words], bias[words]], renamed[rows])
    assert_same(mixed, [loss, dhidden[rows], dweight[words], dbias[words]], 5e-6)


def test_rows_left_out_change_nothing_and_equal_rows_count_twice() -> None:
    inputs, targets = draw(13, 16, 131, torch.float32)
    hidden, weight, bias = inputs
    loss, dhidden, dweight, dbias = by_triton(inputs, targets)
    padding = torch.full((5, 16), 50.0)
    padded = by_triton([torch.cat([hidden, padding]), weight, bias], torch.cat([targets, targets.new_full((5,), -100)]))
    assert_same(padded, [loss, torch.cat([dhidden, torch.zeros_like(padding)]), dweight, dbias], 1e-6)
    twice = by_triton([torch.cat([hidden, hidden]), weight, bias], torch.cat([targets, targets]))
    assert_same(twice, [2 * loss, torch.cat([dhidden, dhidden]), 2 * dweight, 2 * dbias], 5e-6)


def test_equal_words_share_their_probability() -> None:
    """Of V equal words each has 1 / V."""
    hidden, targets = draw(5, 16, 131, torch.float32)[0][0], torch.arange(5) * 30
    losses = linear_cross_entropy(hidden, torch.ones(131, 16), targets, reduction="none", backend="triton")
    torch.testing.assert_close(losses, torch.full((5,), 131.0).log())


def test_a_scale_of_100() -> None:
    """Logits of several hundred; what is lost is lost in rounding them."""
    (hidden, weight, bias), targets = draw(7, 16, 1023, torch.float32)
    hidden = 100 * hidden
    logits = F.linear(hidden.double(), weight.double(), bias.double())
    assert logits.abs().max() > 500
    exact = logits.float().double().requires_grad_()
    places, factors = targets.clamp(min=0), (targets >= 0).float()
    losses = F.cross_entropy(exact, places, reduction="none") * factors
    (gradient,) = torch.autograd.grad(losses.sum(), exact)
    mine = logits.float()
    torch.testing.assert_close(
        gpu.chunk_(mine, places, factors, 0.0, 0.0, 0.0, gradient=True).double(), losses.detach(), rtol=5e-6, atol=1e-12
    )
    assert (mine.double() - gradient).norm() <= 5e-6 * gradient.norm()


def test_auto_is_plain_torch_on_cpu_and_the_trial_tells_right_from_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, targets = draw(5, 7, 53, torch.float32)
    assert "torch, the first that can (triton: it takes tensors on a GPU)" in dispatch.why(
        linear_cross_entropy, *inputs[:2], targets
    )
    for dtype in (torch.float32, torch.bfloat16):
        chunks.compare_with_torch(torch.device("cpu"), dtype)
    chunk = gpu.chunk_
    monkeypatch.setattr(gpu, "chunk_", lambda *args, **named: chunk(*args, **named) * 1.01)
    with pytest.raises(ArithmeticError, match=r"with a soft cap of 0\.0: result 0 is off by 1\.0e-02"):
        chunks.compare_with_torch(torch.device("cpu"), torch.float32)


def test_compiled_whole() -> None:
    inputs, targets = draw(5, 7, 53, torch.float32)
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    options = {"backend": "triton", **EVERYTHING}
    assert_same(
        numbers(compiled, inputs, targets, **options), numbers(linear_cross_entropy, inputs, targets, **options), 0.0
    )
