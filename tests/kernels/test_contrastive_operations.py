"""What the contrastive losses owe as custom operations, whatever they compute (tests/kernels/test_contrastive.py): fake
results, torch.compile, O(N) memory, no gradients where none are wanted, autocast, 16-bit products.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kernels import contrastive, contrastive_loss, contrastive_squares, reference, sigmoid_loss

Numbers = list[torch.Tensor]  # loss, then the gradients of x, y, scale and, for the sigmoid loss, bias


def draw(pairs: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 unit x and y that belong together but for some noise."""
    generator = torch.Generator().manual_seed(1000 * pairs + size)
    x = torch.randn(pairs, size, generator=generator)
    y = x + torch.randn(pairs, size, generator=generator)
    return F.normalize(x, dim=1), F.normalize(y, dim=1)


def numbers(loss_of: Callable[..., torch.Tensor], *inputs: torch.Tensor, **options: Any) -> Numbers:
    """The loss and its gradients."""
    leaves = [each.detach().clone().requires_grad_() for each in inputs]
    loss = loss_of(*leaves, **options)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def assert_same(mine: Numbers, truth: Numbers, tolerance: float) -> None:
    """Each number within `tolerance` of the truth, relative to its norm; below 1e-12 no digits are asked for."""
    assert len(mine) == len(truth)
    for name, a, b in zip(("loss", "dx", "dy", "dscale", "dbias"), mine, truth, strict=False):
        error = float((a.double() - b.double()).norm())
        assert error <= tolerance * max(1e-12, float(b.double().norm())), f"{name}: {error} of {float(b.norm())}"


# --- memory


class Allocations(TorchDispatchMode):
    """The largest tensor any operation returned, and the most bytes alive at once in storages seen."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.alive = self.most_alive = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for each in tree_leaves(out):
            if isinstance(each, torch.Tensor):
                self._see(each)
        return out

    def _see(self, tensor: torch.Tensor) -> None:
        self.largest = max(self.largest, tensor.numel())
        storage = tensor.untyped_storage()
        if storage._cdata in self._known:
            return
        self._known.add(storage._cdata)
        self.alive += storage.nbytes()
        self.most_alive = max(self.most_alive, self.alive)
        weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())

    def _freed(self, address: int, size: int) -> None:
        self._known.discard(address)
        self.alive -= size


def watch(monkeypatch: pytest.MonkeyPatch, mode: TorchDispatchMode) -> None:
    """From outside a mode sees a custom operation as one call, so it is entered inside."""
    for original in (contrastive.infonce, contrastive.sigmoid):

        def watched(*inputs: Any, original: Callable[..., Any] = original, **options: Any) -> Any:
            with mode:
                return original(*inputs, **options)

        monkeypatch.setattr(contrastive, original.__name__, watched)


@pytest.mark.parametrize("scale", [20.0, 2000.0])
def test_no_matrix_of_all_logits_is_ever_made(monkeypatch: pytest.MonkeyPatch, scale: float) -> None:
    pairs, size, side = 4096, 64, 512
    monkeypatch.setattr(contrastive_squares, "SIDE", side)
    exact, exact_calls = contrastive_squares.exact_sums, []
    monkeypatch.setattr(contrastive_squares, "exact_sums", lambda *inputs: (exact_calls.append(1), exact(*inputs))[1])
    x, y = draw(pairs, size)
    for loss_of, others in ((contrastive_loss, [scale]), (sigmoid_loss, [scale, -10.0])):
        leaves = [each.requires_grad_() for each in (x.clone(), y.clone(), *map(torch.tensor, others))]
        seen = Allocations()
        with monkeypatch.context() as patch:
            watch(patch, seen)
            with seen:
                loss_of(*leaves).backward()
        assert side**2 <= seen.largest <= max(pairs * size, 2 * side**2)
        # two squares and the temporaries of one, and four gradients; the whole matrix would be 64 MiB
        assert seen.most_alive <= 4 * 4 * side**2 + 5 * pairs * size * 4
    assert bool(exact_calls) == (scale == 2000.0), "the fallback is no different"


def test_the_allocation_count_sees_a_whole_matrix() -> None:
    """The check above, checked on a loss that does make it."""
    x, y = draw(512, 8)
    with Allocations() as seen:
        F.cross_entropy(20 * x @ y.T, torch.arange(512))
    assert seen.largest == 512 * 512
    assert seen.most_alive >= 2 * 512 * 512 * 4


# --- what custom operations owe


def cases_for_operations() -> list[tuple[Callable[..., torch.Tensor], list[torch.Tensor], dict[str, Any]]]:
    """Small fp32 leaves with and without negatives."""
    x, y = draw(9, 5)
    negatives = draw(4, 5)[0]
    cases = []
    for loss_of, scalars in ((contrastive_loss, [8.0]), (sigmoid_loss, [8.0, -3.0])):
        for options in ({}, {"negatives_MD": negatives.clone().requires_grad_()}):
            leaves = [each.clone().requires_grad_() for each in (x, y, *map(torch.tensor, scalars))]
            cases.append((loss_of, leaves, options))
    return cases


@pytest.mark.parametrize("case", range(4))
@pytest.mark.parametrize("gradients", [True, False])
def test_the_operation_keeps_its_promises(case: int, gradients: bool) -> None:
    loss_of, leaves, options = cases_for_operations()[case]
    operation = contrastive._contrastive_loss if loss_of is contrastive_loss else contrastive._sigmoid_loss
    leaves = [each.detach().requires_grad_(gradients) for each in (*leaves, *options.values())]
    scalars, negatives = leaves[2 : 4 if loss_of is sigmoid_loss else 3], leaves[-1] if options else None
    smoothing = [0.1] if loss_of is contrastive_loss else []
    torch.library.opcheck(
        operation, (*leaves[:2], *scalars, negatives, *smoothing, "", "gather", None, "auto", gradients)
    )


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_whole(backend: str) -> None:
    for loss_of, leaves, options in cases_for_operations() if backend == "aot_eager" else cases_for_operations()[1:4:2]:
        inputs = [*leaves, *options.values()]
        compiled = torch.compile(loss_of, fullgraph=True, backend=backend)
        results = []
        for each in (loss_of, compiled):
            loss = 3 * each(*leaves, **options)
            results.append([loss.detach(), *torch.autograd.grad(loss, inputs)])
            with torch.no_grad():
                results[-1].append(each(*leaves, **options))
        torch.testing.assert_close(results[1], results[0])


class Calls(TorchDispatchMode):
    """Counts calls of some of torch's operations."""

    def __init__(self, *counted: Any) -> None:
        super().__init__()
        self.counted, self.calls = counted, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += func.overloadpacket in self.counted
        return func(*args, **(kwargs or {}))


def test_without_gradients_only_the_loss_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """The products of the gradients are most of the work."""
    seen = Calls(torch.ops.aten.mm, torch.ops.aten.addmm_)
    watch(monkeypatch, seen)
    for loss_of, leaves, options in cases_for_operations():
        losses = []
        for wanted in (True, False):
            seen.calls = 0
            with torch.set_grad_enabled(wanted):
                losses.append(loss_of(*leaves, **options))
            assert seen.calls == (1 if not wanted else 4 if loss_of is contrastive_loss else 3)
        assert torch.equal(*losses)


@pytest.mark.parametrize("side", [0, 1])
def test_the_backward_leaves_out_a_frozen_tower(side: int) -> None:
    for loss_of, leaves, options in cases_for_operations():
        leaves, options = [each.detach() for each in leaves], {name: each.detach() for name, each in options.items()}
        loss = loss_of(*leaves[:side], leaves[side].requires_grad_(), *leaves[side + 1 :], **options)
        with Calls(torch.ops.aten.mul) as seen:
            loss.backward()
        assert seen.calls == 1, "the one gradient that is wanted, times that of the loss"
        assert [each.grad is not None for each in leaves[:2]] == [side == 0, side == 1]


def test_a_second_derivative_is_refused() -> None:
    for loss_of, leaves, options in cases_for_operations():
        weight = torch.tensor(2.0, requires_grad=True)
        (dx,) = torch.autograd.grad(weight * loss_of(*leaves, **options), leaves[:1], create_graph=True)
        with pytest.raises(RuntimeError, match="differentiate twice"):
            dx.sum().backward()


def test_autocast_changes_nothing() -> None:
    for loss_of, leaves, options in cases_for_operations():
        expected = numbers(loss_of, *leaves, **options)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mine = numbers(loss_of, *leaves, **options)
        for one, other in zip(mine, expected, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("half", [False, True])
def test_products_of_bf16_are_those_of_rounded_embeddings(half: bool) -> None:
    """fp32 embeddings are rounded once; what comes as bf16 is taken as it is, and so are its gradients' dtypes."""
    x, y = draw(257, 33)
    rounded = [each.bfloat16() for each in (x, y)]
    for loss_of, truth, others in (
        (contrastive_loss, reference.contrastive_loss, [torch.tensor(14.3)]),
        (sigmoid_loss, reference.sigmoid_loss, [torch.tensor(14.3), torch.tensor(-4.0)]),
    ):
        mine = numbers(loss_of, *(rounded if half else (x, y)), *others, products=torch.bfloat16)
        assert [each.dtype for each in mine[1:3]] == [torch.bfloat16 if half else torch.float32] * 2
        expected = numbers(truth, *(each.double() for each in rounded), *(each.double() for each in others))
        assert_same([mine[0], *mine[3:]], [expected[0], *expected[3:]], 5e-6)
        assert_same(mine[1:3], expected[1:3], 2.0**-8 if half else 5e-6)
        exact = numbers(loss_of, x, y, *others)
        assert not torch.equal(exact[0], mine[0])
        torch.testing.assert_close(mine[0], exact[0], rtol=1e-2, atol=0)
