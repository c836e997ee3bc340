"""Linear cross entropy on plain torch in one process, against kernels/reference.py in fp64 and the two lines everybody
writes.

Value and every gradient; odd sizes, several chunks, ignored rows, compiled, checked as a custom op, and counted in
memory. test_linear_cross_entropy_ranks.py has the vocabulary over ranks.
"""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from linear_cross_entropy_calls import EVERYTHING, assert_same, draw, numbers, plain
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kernels import dispatch, reference
from kernels import linear_cross_entropy_chunks as chunks
from kernels.linear_cross_entropy import linear_cross_entropy

operation = sys.modules["kernels.linear_cross_entropy"]  # kernels.linear_cross_entropy is the function

SIZES = [(1, 1, 1), (5, 3, 2), (37, 9, 53), (129, 33, 1023)]  # rows, hidden size, vocabulary
SETTINGS: list[dict[str, Any]] = [{}, *({name: value} for name, value in EVERYTHING.items()), EVERYTHING]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_it_is_its_definition_in_fp64(sizes: tuple[int, int, int], settings: dict[str, Any], reduction: str) -> None:
    inputs, targets = draw(*sizes)
    truth = numbers(reference.linear_cross_entropy, inputs, targets, reduction=reduction, factor=-1.7, **settings)
    mine = numbers(linear_cross_entropy, inputs, targets, reduction=reduction, factor=-1.7, **settings)
    assert_same(mine, truth, 1e-11)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_it_is_what_torch_gives(smoothing: float, reduction: str) -> None:
    inputs, targets = draw(37, 9, 53)
    options = {"label_smoothing": smoothing, "reduction": reduction}
    for some in (inputs, inputs[:2]):  # with and without a bias
        assert_same(
            numbers(linear_cross_entropy, some, targets, **options), numbers(plain, some, targets, **options), 1e-11
        )


@pytest.mark.parametrize("settings", [{}, EVERYTHING], ids=str)
@pytest.mark.parametrize("sizes", [*SIZES, (67, 64, 20011)], ids=str)
def test_in_fp32(sizes: tuple[int, int, int], settings: dict[str, Any]) -> None:
    inputs, targets = draw(*sizes, dtype=torch.float32)
    inputs[1] /= sizes[1] ** 0.5
    truth = numbers(reference.linear_cross_entropy, inputs, targets, **settings)
    assert_same(numbers(linear_cross_entropy, inputs, targets, **settings), truth, 5e-6)


def test_a_small_loss_keeps_its_digits_in_fp32() -> None:
    """Tokens that are nearly certain, where lse - z and p - 1 are differences of nearly equal numbers."""
    inputs, _ = draw(61, 32, 211, torch.float32)
    inputs[1] = 4 * F.normalize(inputs[1], dim=1)
    targets = torch.arange(61)
    inputs[0] = 1.5 * inputs[1][targets] + 0.1 * inputs[0]
    inputs = inputs[:2]
    truth = numbers(reference.linear_cross_entropy, inputs, targets)
    assert 1e-9 < truth[0] < 1e-4
    assert_same(numbers(linear_cross_entropy, inputs, targets), truth, 2e-5)  # an fp32 step of logits of 24 is 2e-6
    with pytest.raises(AssertionError):
        assert_same(numbers(plain, inputs, targets), truth, 1e-3)


@pytest.mark.parametrize("sizes", [(37, 9, 53), (129, 64, 1023)], ids=str)
def test_bf16_is_no_worse_than_twice_torchs_own_error(sizes: tuple[int, int, int]) -> None:
    inputs, targets = draw(*sizes, dtype=torch.bfloat16)
    truth = numbers(reference.linear_cross_entropy, inputs, targets)
    mine, torchs = numbers(linear_cross_entropy, inputs, targets), numbers(plain, inputs, targets)
    assert mine[0].dtype == torch.float32
    for a, b, exact in zip(mine, torchs, truth, strict=True):
        assert (a.double() - exact).norm() <= 2 * (b.double() - exact).norm() + 1e-5 * exact.norm()


@pytest.mark.parametrize("rows", [1, 2, 12, 36, 200])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch, rows: int, reduction: str) -> None:
    inputs, targets = draw(37, 9, 53)
    truth = numbers(reference.linear_cross_entropy, inputs, targets, reduction=reduction, **EVERYTHING)
    monkeypatch.setitem(chunks.CHUNK_BYTES, "cpu", rows * 64 * 8)  # a row of 53 columns takes the room of 64
    slices = chunks._Chunk(37, 53, torch.float64, targets.device, False).slices()
    assert len(slices) == -(-37 // min(rows, 37))
    assert_same(numbers(linear_cross_entropy, inputs, targets, reduction=reduction, **EVERYTHING), truth, 1e-11)


def test_ignored_rows_have_no_loss_and_no_gradient() -> None:
    inputs, targets = draw(37, 9, 53)
    kept = targets != -100
    loss, dhidden, dweight, dbias = numbers(linear_cross_entropy, inputs, targets, **EVERYTHING)
    assert (dhidden[~kept] == 0).all()
    fewer = [inputs[0][kept], *inputs[1:]]
    without = numbers(linear_cross_entropy, fewer, targets[kept], **EVERYTHING)
    assert_same([loss, dhidden[kept], dweight, dbias], without, 1e-12)
    assert (linear_cross_entropy(*inputs[:2], targets, reduction="none")[~kept] == 0).all()
    other = torch.where(kept, targets, 7)
    again = numbers(linear_cross_entropy, inputs, torch.where(other == 7, -1, other), ignore_index=-1)
    assert_same(again, numbers(linear_cross_entropy, inputs, torch.where(other == 7, -100, other)), 0.0)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("rows", [0, 6])
def test_nothing_but_ignored_rows_is_0_and_no_nan(rows: int, reduction: str) -> None:
    inputs, _ = draw(rows, 9, 53)
    targets = torch.full((rows,), -100)
    for each in numbers(linear_cross_entropy, inputs, targets, reduction=reduction, **EVERYTHING):
        assert (each == 0).all()


def test_the_order_of_the_rows_is_nothing() -> None:
    inputs, targets = draw(129, 33, 53)
    order = torch.randperm(129, generator=torch.Generator().manual_seed(5))
    loss, dhidden, *rest = numbers(linear_cross_entropy, inputs, targets)
    shuffled = numbers(linear_cross_entropy, [inputs[0][order], *inputs[1:]], targets[order])
    assert_same(shuffled, [loss, dhidden[order], *rest], 1e-12)


def test_columns_that_are_masked_out_and_what_is_not_a_number() -> None:
    """A bias of -inf takes a column out, as torch has it; nan stays visible."""
    inputs, targets = draw(37, 9, 53)
    targets[targets >= 40] = 3
    inputs[2][40:] = -torch.inf
    assert_same(numbers(linear_cross_entropy, inputs, targets), numbers(plain, inputs, targets), 1e-11)
    inputs[0][2, 2] = torch.nan
    assert linear_cross_entropy(*inputs[:2], targets).isnan()


def test_strides_types_of_targets_and_precision_of_weights() -> None:
    inputs, targets = draw(37, 9, 53)
    truth = numbers(linear_cross_entropy, inputs, targets)
    turned = [inputs[0].T.contiguous().T, inputs[1].T.contiguous().T, inputs[2]]
    assert_same(numbers(linear_cross_entropy, turned, targets.int()), truth, 1e-12)
    # fp32 master weights beside bf16 hidden states: products as of bf16 weights, the gradient not rounded to bf16
    hidden, weight, bias = (each.bfloat16().float() for each in inputs)
    mixed = numbers(linear_cross_entropy, [hidden.bfloat16(), weight, bias], targets)
    assert [each.dtype for each in mixed] == [torch.float32, torch.bfloat16, torch.float32, torch.float32]
    exact = numbers(reference.linear_cross_entropy, [hidden, weight, bias], targets)
    assert_same([mixed[0], *mixed[2:]], [exact[0], *exact[2:]], 5e-6)


def test_autocast_chooses_the_precision_of_products() -> None:
    inputs, targets = draw(37, 9, 53, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        cast = numbers(linear_cross_entropy, inputs, targets)
    half = [inputs[0].bfloat16(), *inputs[1:]]
    assert_same(
        [cast[0], *cast[2:]],
        [each for i, each in enumerate(numbers(linear_cross_entropy, half, targets)) if i != 1],
        0.0,
    )
    assert cast[2].dtype == torch.float32


def test_gradcheck() -> None:
    inputs, targets = draw(6, 3, 7)
    leaves = [each.requires_grad_() for each in inputs]
    for reduction in ("mean", "none"):
        assert torch.autograd.gradcheck(
            lambda h, w, b, reduction=reduction: linear_cross_entropy(
                h, w, targets, bias_V=b, reduction=reduction, **EVERYTHING
            ),
            leaves,
        )


def test_only_wanted_gradients_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, targets = draw(37, 9, 53)
    asked: list[tuple[bool, ...]] = []
    run = chunks.run

    def watched(*args: Any) -> Any:
        asked.append(args[-1])
        return run(*args)

    monkeypatch.setattr(operation, "run", watched)
    hidden, weight = inputs[0].requires_grad_(), inputs[1]
    for reduction in ("mean", "none"):
        linear_cross_entropy(hidden, weight, targets, reduction=reduction).sum().backward()
    with torch.no_grad():
        linear_cross_entropy(hidden, weight, targets)
    nothing = (False, False, False)
    assert asked == [(True, False, False), nothing, (True, False, False), nothing]


def test_twice_backward_is_twice_the_gradient_and_second_derivatives_are_refused() -> None:
    inputs, targets = draw(37, 9, 53)
    weight = inputs[1].requires_grad_()
    loss = linear_cross_entropy(inputs[0], weight, targets)
    (loss * 3).backward(retain_graph=True)
    assert weight.grad is not None
    once = weight.grad.clone()
    (loss * 3).backward()
    torch.testing.assert_close(weight.grad, 2 * once)
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(
        linear_cross_entropy(inputs[0], weight, targets) * scale, weight, create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


class Largest(TorchDispatchMode):
    """Elements of the largest tensor any operation returned."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.elements = max(
            [self.elements, *(each.numel() for each in tree_leaves(out) if isinstance(each, torch.Tensor))]
        )
        return out


def test_no_matrix_of_all_logits_is_ever_made(monkeypatch: pytest.MonkeyPatch) -> None:
    (hidden, weight, bias), targets = draw(1023, 16, 5003, torch.float32)
    monkeypatch.setitem(chunks.CHUNK_BYTES, "cpu", 1 << 20)
    kept = (targets != -100).float()
    loss = chunks.Loss(0.1, 1e-4, 30.0)
    with Largest() as seen:
        chunks.run(hidden, weight, bias, targets, kept, loss, "", "torch", (True, True, True))
    assert 5003 * 16 <= seen.elements <= (1 << 18)
    with Largest() as seen:  # the count does see one that is made
        plain(hidden, weight, targets)
    assert seen.elements == 1023 * 5003


class Zeros(TorchDispatchMode):
    """Elements of the largest tensor of zeros that was made."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.zeros, torch.ops.aten.zeros_like, torch.ops.aten.new_zeros):
            self.elements = max(self.elements, out.numel())
        return out


def test_the_backward_makes_no_zeros_for_results_that_have_no_gradient() -> None:
    """torch would, for the gradients the operation returns beside the loss: one more tensor as large as the weight."""
    (hidden, weight, _), targets = draw(37, 9, 53)
    loss = linear_cross_entropy(hidden.requires_grad_(), weight.requires_grad_(), targets)
    with Zeros() as seen:
        loss.backward()
    assert weight.grad is not None
    assert seen.elements <= 1


def test_what_does_not_fit_is_refused() -> None:
    (hidden, weight, bias), targets = draw(8, 3, 5)
    refused: list[tuple[str, dict[str, Any]]] = [
        (r"hidden \[8, 2\] and weight \[5, 3\]", {"hidden_ND": hidden[:, :2]}),
        (r"targets torch.int64 \[7\]", {"targets_N": targets[:7]}),
        (r"targets torch.float64 \[8\]", {"targets_N": targets.double()}),
        (r"bias \[4\]: weight has 5", {"bias_V": bias[:4]}),
        ("weight has no rows", {"weight_VD": weight[:0]}),
        ("float16: bfloat16, float32 or", {"hidden_ND": hidden.half()}),
        ("label_smoothing 1.0", {"label_smoothing": 1.0}),
        ("soft_cap 0.0: above 0", {"soft_cap": 0.0}),
        ("reduction 'max'", {"reduction": "max"}),
        ("backend 'cuda' is none of auto, torch, triton", {"backend": "cuda"}),
        ("backend 'triton' cannot do this", {"backend": "triton"}),
        (
            "target 5 of row 2 is outside the vocabulary, 0 to 4",
            {"targets_N": targets.clone().index_fill(0, torch.tensor([2]), 5)},
        ),
        ("target -1 of row 2", {"targets_N": targets.clone().index_fill(0, torch.tensor([2]), -1)}),
    ]
    for message, wrong in refused:
        with pytest.raises(ValueError, match=message):
            linear_cross_entropy(**{"hidden_ND": hidden, "weight_VD": weight, "targets_N": targets} | wrong)


def test_why() -> None:
    (hidden, weight, _), targets = draw(8, 3, 5)
    assert dispatch.why(linear_cross_entropy, hidden, weight, targets).startswith("linear_cross_entropy: torch, ")
    linear_cross_entropy(hidden, weight, targets)
    assert "linear_cross_entropy: torch, " in dispatch.why()


# --- as an op


def test_opcheck() -> None:
    inputs, targets = draw(6, 3, 7, torch.float32)
    leaves = [each.requires_grad_() for each in inputs]
    factors = (targets != -100).float()
    settings = (0.1, 1e-2, 3.0, "", "auto")
    torch.library.opcheck(operation._each, (*leaves, targets, factors, *settings))
    torch.library.opcheck(operation._each, (*leaves[:2], None, targets, factors, *settings))
    torch.library.opcheck(operation._total, (*leaves, targets, factors, *settings, True, True, True))
    torch.library.opcheck(
        operation._total, (leaves[0], inputs[1].detach(), None, targets, factors, *settings, True, False, False)
    )


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiled_whole(reduction: str, compiler: str) -> None:
    inputs, targets = draw(37, 9, 53)
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend=compiler)
    options = {"reduction": reduction, **EVERYTHING}
    assert_same(
        numbers(compiled, inputs, targets, **options), numbers(linear_cross_entropy, inputs, targets, **options), 1e-12
    )
