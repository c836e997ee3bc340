"""Is a backend right on this machine? Values and every gradient against the definition in fp64.

An error counts as rounding when it is no larger than that of plain torch in the same dtype, with room:

    largest error   <= 2 x (gradients, and what has no norm: 3 x) torch's + one rounding step of the largest true value,
                       at least 1e-5 of it
    relative norm   <= 2.4 x torch's + a quarter of a step, at least 1e-5  (tensors of 64 elements or more)

The first is the rule of flash-attention's own tests (Dao 2023); the second finds small errors that are everywhere, such
as a wrong factor of 1%, which the first would let pass in bf16. The 1e-5 are for fp32, where an order of summation
that differs from the definition's costs a few steps, and where tensor cores cut what they add, always toward zero (3 x
TF32 is then off by 6e-7 in norm, and a sum of the gradients by 2e-6). However wrong torch is, the norm, and the largest
error of fewer elements, stays below FACTOR_FOUND of the truth, so that a factor of 1% is found everywhere
(tests/kernels/interpreter/test_limits.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from kernels.bench.case import Check, Tensors
from kernels.bench.measure import Run, as_list

ENOUGH_FOR_A_NORM = 64
SMALLEST_STEP = 1e-5
ROOM_FORWARD, ROOM_GRADIENT, ROOM_NORM = 2.0, 3.0, 2.4
FACTOR_FOUND = 9.5e-3
Numbers = dict[str, torch.Tensor]


def numbers(call: Callable[[Tensors], Any], tensors: Tensors, weights: list[torch.Tensor] | None = None) -> Numbers:
    """Outputs and gradients by name: "output 0", "gradient of q". `weights`: the gradients of the outputs."""
    leaves = {name: each for name, each in tensors.items() if each.requires_grad}
    run = Run(lambda: call(tensors), list(leaves.values()))
    outputs = as_list(run.forward())
    given = [torch.ones_like(each) for each in outputs] if weights is None else weights
    given = [each.to(output.dtype) for each, output in zip(given, outputs, strict=True)]
    found = {f"output {place}": each.detach() for place, each in enumerate(outputs)}
    for name, gradient in zip(leaves, run.gradients(outputs, given), strict=True):
        found[f"gradient of {name}"] = torch.zeros_like(leaves[name]) if gradient is None else gradient
    return found


def widened(tensors: Tensors) -> Tensors:
    """The same numbers as fp64 leaves."""
    wide = {}
    for name, each in tensors.items():
        wide[name] = each.detach().double() if each.is_floating_point() else each
        wide[name].requires_grad_(each.requires_grad)
    return wide


def errors(found: torch.Tensor, truth: torch.Tensor) -> tuple[float, float]:
    """Largest absolute error, and the norm of the error over that of the truth; nan counts as infinite."""
    off = torch.nan_to_num((found.double() - truth).abs(), nan=torch.inf)
    if not off.numel():
        return 0.0, 0.0
    return float(off.max()), float(off.norm() / truth.norm().clamp(min=1e-300))


def judge(name: str, found: torch.Tensor, peer: torch.Tensor, truth: torch.Tensor) -> dict[str, Any]:
    """One quantity of one backend: its errors, what is allowed, and whether it passes."""
    step = max(torch.finfo(found.dtype).eps, SMALLEST_STEP)
    error, norm = errors(found, truth)
    torch_error, torch_norm = errors(peer, truth)
    largest = float(truth.abs().max()) if truth.numel() else 0.0
    few = truth.numel() < ENOUGH_FOR_A_NORM
    allowed = (ROOM_GRADIENT if few or name.startswith("gradient") else ROOM_FORWARD) * torch_error + step * largest
    allowed_norm = min(ROOM_NORM * torch_norm + max(step / 4, SMALLEST_STEP), FACTOR_FOUND)
    if few:
        allowed = min(allowed, FACTOR_FOUND * largest)
    passed = error <= allowed and (few or norm <= allowed_norm)
    return {
        "quantity": name,
        "error": error,
        "torch_error": torch_error,
        "allowed": allowed,
        "norm": norm,
        "torch_norm": torch_norm,
        "allowed_norm": allowed_norm,
        "passed": passed,
    }


class Judge:
    """The truth and plain torch's answer to a check, made once for all backends."""

    def __init__(self, check: Check, device: torch.device) -> None:
        self._check = check
        self._tensors = check.draw(device)
        shapes = as_list(check.plain(self._tensors))
        generator = torch.Generator(device).manual_seed(99)
        self._weights = [
            torch.randn(each.shape, device=device, generator=generator).to(each.dtype) if each.ndim else
            torch.ones((), device=device, dtype=each.dtype)
            for each in shapes
        ]  # fmt: skip
        self._plain = numbers(check.plain, self._tensors, self._weights)
        self._truth = numbers(check.truth, widened(self._tensors), self._weights)

    def rows(self, call: Callable[[Tensors], Any]) -> list[dict[str, Any]]:
        """One a quantity."""
        found = numbers(call, self._tensors, self._weights)
        return [judge(name, each, self._plain[name], self._truth[name]) for name, each in found.items()]
