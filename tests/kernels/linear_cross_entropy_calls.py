"""What the tests of linear cross entropy share: `from linear_cross_entropy_calls import draw, numbers, assert_same`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

EVERYTHING: dict[str, Any] = {"label_smoothing": 0.1, "z_loss": 1e-2, "soft_cap": 3.0}
Numbers = list[torch.Tensor]  # loss, then the gradients of hidden, weight and bias


def draw(rows: int, size: int, vocabulary: int, dtype: torch.dtype = torch.float64) -> tuple[Numbers, torch.Tensor]:
    """[hidden, weight, bias] with logits of a few units, and targets, every fifth of which is ignored."""
    generator = torch.Generator().manual_seed(rows + 100 * size + vocabulary)
    shapes = ((rows, size), (vocabulary, size), (vocabulary,))
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    targets = torch.randint(0, vocabulary, (rows,), generator=generator)
    targets[4::5] = -100
    return inputs, targets


def numbers(
    loss_of: Callable[..., torch.Tensor], inputs: Numbers, targets: torch.Tensor, *, factor: float = 1.0, **options: Any
) -> Numbers:
    """The loss times `factor` (without reduction: with uneven factors of the rows) and its gradients."""
    leaves = [each.detach().clone().requires_grad_() for each in inputs]
    bias = {"bias_V": leaves[2]} if len(leaves) == 3 else {}
    loss = loss_of(leaves[0], leaves[1], targets, **bias, **options)
    rows = torch.linspace(-1, 2, loss.numel(), dtype=loss.dtype) if loss.ndim else torch.ones((), dtype=loss.dtype)
    return [loss.detach(), *torch.autograd.grad((loss * rows).sum() * factor, leaves)]


def assert_same(mine: Numbers, truth: Numbers, tolerance: float) -> None:
    """Each number within `tolerance` of the truth, relative to its norm."""
    assert len(mine) == len(truth)
    for name, a, b in zip(("loss", "dhidden", "dweight", "dbias"), mine, truth, strict=False):
        error = float((a.double() - b.double()).norm())
        assert error <= tolerance * float(b.double().norm()) + 1e-12, f"{name}: {error} of {float(b.norm())}"


def plain(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, *, bias_V: Any = None, **options: Any
) -> torch.Tensor:
    return F.cross_entropy(F.linear(hidden, weight, bias_V), targets, **options)
