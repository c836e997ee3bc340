"""bias + GELU, SwiGLU and rotary embedding: what is checked and measured. Bound by memory, and against a compiler that
fuses them too, so parity with torch.compile is what can be hoped for.

Bytes at least. bias_gelu: forward 2 matrices, backward 3; swiglu: 3 and 5; rotary: 2 and 2.

Axes: N rows, F width, B batch, H heads, S positions, K size of a head, R pairs of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from kernels.bench.case import (
    Call,
    Case,
    Check,
    Draw,
    Implementation,
    Layout,
    Operation,
    Outputs,
    Tensors,
    compiled,
    normal_draw,
    plain,
)
from kernels.bench.measure import BACKWARD, FORWARD
from kernels.bench.peers import imported

GELU = Operation("kernels.activation", "bias_gelu")
SWIGLU = Operation("kernels.activation", "swiglu")
ROTARY = Operation("kernels.rotary", "rotary")
BASE = 10000.0  # of the rotary angles


def cases(device: torch.device, quick: bool) -> list[Case]:
    """The rows of the table."""
    if device.type != "cuda":
        rows = 512 if quick else 4096
        return [
            _case(GELU, (rows, 3072), torch.float32, quick),
            _case(SWIGLU, (rows, 2048), torch.float32, quick),
            _case(ROTARY, (4, 12, rows // 4, 64), torch.float32, quick),
        ]
    return [
        _case(GELU, (65792, 4096), torch.bfloat16),
        _case(SWIGLU, (16384, 11008), torch.bfloat16),
        _case(ROTARY, (16, 16, 4096, 128), torch.bfloat16),
    ]


def checks(device: torch.device) -> list[Check]:
    """Odd sizes. On a GPU also the widths of the table, with several blocks of rows for a program to add up."""
    shapes: list[tuple[Operation, tuple[int, ...]]] = [
        (GELU, (67, 1023)),
        (GELU, (3, 5, 129)),
        (SWIGLU, (67, 1023)),
        (ROTARY, (2, 3, 67, 72)),
    ]
    found = [
        _check(operation, shape, dtype) for dtype in (torch.float32, torch.bfloat16) for operation, shape in shapes
    ]
    if device.type == "cuda":
        wide: list[tuple[Operation, tuple[int, ...]]] = [
            (GELU, (801, 4096)),
            (SWIGLU, (67, 11008)),
            (ROTARY, (2, 3, 67, 128)),
        ]
        found += [_check(operation, shape, torch.bfloat16) for operation, shape in wide]
    return found


def _check(operation: Operation, shape: tuple[int, ...], dtype: torch.dtype) -> Check:
    definition = PLAIN[operation]
    draw = _draw(operation, shape, dtype)
    return Check(operation, name(shape), dtype, draw, CALLS[operation], definition, definition)


def name(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _call_gelu(function: Callable[..., Any], tensors: Tensors) -> Outputs:
    return function(tensors["x"], tensors["bias"])  # type: ignore[no-any-return]


def _call_swiglu(function: Callable[..., Any], tensors: Tensors) -> Outputs:
    return function(tensors["gate"], tensors["up"])  # type: ignore[no-any-return]


def _call_rotary(function: Callable[..., Any], tensors: Tensors) -> Outputs:
    return function(tensors["x"], tensors["cos"], tensors["sin"])  # type: ignore[no-any-return]


def gelu(tensors: Tensors) -> torch.Tensor:
    """GELU of x + bias (Hendrycks and Gimpel 2016)."""
    return F.gelu(tensors["x"] + tensors["bias"])


def swiglu(tensors: Tensors) -> torch.Tensor:
    """silu(gate) * up (Shazeer 2020)."""
    return F.silu(tensors["gate"]) * tensors["up"]


def rotary(tensors: Tensors) -> torch.Tensor:
    """Rotate pairs (i, i + R/2) of each head by the position's angles (Su et al. 2021)."""
    x = tensors["x"]
    cos_SR, sin_SR = (tensors[each].to(x.dtype) for each in ("cos", "sin"))
    left, right = x.chunk(2, -1)
    return torch.cat((left * cos_SR - right * sin_SR, right * cos_SR + left * sin_SR), -1)


CALLS: dict[Operation, Callable[[Callable[..., Any], Tensors], Outputs]] = {
    GELU: _call_gelu,
    SWIGLU: _call_swiglu,
    ROTARY: _call_rotary,
}
PLAIN: dict[Operation, Call] = {GELU: gelu, SWIGLU: swiglu, ROTARY: rotary}


def _draw(operation: Operation, shape: tuple[int, ...], dtype: torch.dtype) -> Draw:
    if operation is GELU:
        return normal_draw({"x": shape, "bias": shape[-1:]}, dtype)
    if operation is SWIGLU:
        return normal_draw({"gate": shape, "up": shape}, dtype)

    def draw(device: torch.device) -> Tensors:
        positions, size = shape[2:]
        frequency_R = BASE ** (-torch.arange(0, size, 2, device=device) / size)
        angle_SR = torch.arange(positions, device=device)[:, None] * frequency_R
        return {**normal_draw({"x": shape}, dtype)(device), "cos": angle_SR.cos(), "sin": angle_SR.sin()}

    return draw


def _case(operation: Operation, shape: tuple[int, ...], dtype: torch.dtype, brief: bool = False) -> Case:
    """`brief`: without torch.compile, which takes most of the time of a small run."""
    matrix = float(torch.Size(shape).numel() * dtype.itemsize)
    forward, backward = {GELU: (2, 3), SWIGLU: (3, 5), ROTARY: (2, 2)}[operation]
    peers = {"torch": plain(PLAIN[operation])}
    if not brief:
        peers["torch.compile"] = compiled(PLAIN[operation])
    if operation is SWIGLU:
        peers["Liger"] = Implementation(_liger_swiglu, COPIED)
    return Case(
        operation,
        name(shape),
        name(shape),
        (FORWARD, BACKWARD),
        _draw(operation, shape, dtype),
        CALLS[operation],
        peers,
        {},
        {FORWARD: matrix * forward, BACKWARD: matrix * backward},
        {FORWARD: {"": 1.0}, BACKWARD: {"": 1.0}},
    )


# Liger's backward writes the gradients over its inputs, which must not be everybody's
COPIED = Layout(torch.Tensor.clone, lambda each: each)


def _liger_swiglu() -> Callable[[Tensors], torch.Tensor]:
    function = imported("liger_kernel.ops.swiglu").LigerSiLUMulFunction
    return lambda tensors: function.apply(tensors["gate"], tensors["up"])  # type: ignore[no-any-return]
