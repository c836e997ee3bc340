"""Layer norm and RMS norm, alone and with the residual added: what is checked and measured. Bound by memory.

Bytes at least: forward reads x (and the residual) and writes the result (and the sum); backward reads x and the
gradient (or gradients) and writes one gradient (with a residual, both inputs have the same one).

Axes: N rows, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from kernels.bench.case import Case, Check, Implementation, Operation, Outputs, Tensors, compiled, normal_draw, plain
from kernels.bench.measure import BACKWARD, FORWARD
from kernels.bench.peers import imported

LAYER, RMS = Operation("kernels.norm", "layer_norm"), Operation("kernels.norm", "rms_norm")
LAYER_EPS, RMS_EPS = 1e-5, 1e-6


def cases(device: torch.device, quick: bool) -> list[Case]:
    """The rows of the table."""
    if device.type != "cuda":
        rows, width = (512, 768) if quick else (4096, 768)
        shapes, dtype = [(rows, width)], torch.float32
    else:
        shapes, dtype = [(16384, 4096), (65536, 1152)], torch.bfloat16
        if quick:
            shapes = shapes[:1]
    return [
        _case(operation, rows, width, dtype, residual, brief=quick and device.type != "cuda")
        for rows, width in shapes
        for operation in (LAYER, RMS)
        for residual in (True, False)
    ]


def checks(device: torch.device) -> list[Check]:
    """Odd widths. On a GPU also those of the table, with so many rows that a program of the backward has several
    blocks to add up."""
    found = [
        _check(operation, rows, width, dtype, residual)
        for dtype in (torch.float32, torch.bfloat16)
        for operation in (LAYER, RMS)
        for rows, width, residual in ((257, 1023, False), (67, 768, True), (5, 129, True))
    ]
    if device.type == "cuda":
        found += [
            _check(operation, rows, width, torch.bfloat16, residual)
            for operation in (LAYER, RMS)
            for rows, width in ((1601, 4096), (3001, 1152))
            for residual in (False, True)
        ]
    return found


def _shapes(operation: Operation, rows: int, width: int, residual: bool) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"x": (rows, width), "weight": (width,)}
    if operation is LAYER:
        shapes["bias"] = (width,)
    if residual:
        shapes["residual"] = (rows, width)
    return shapes


def call(function: Callable[..., Any], tensors: Tensors) -> Outputs:
    bias = [tensors["bias"]] if "bias" in tensors else []
    named = {"residual": tensors["residual"]} if "residual" in tensors else {}
    eps = LAYER_EPS if bias else RMS_EPS
    return function(tensors["x"], tensors["weight"], *bias, eps, **named)  # type: ignore[no-any-return]


def by_torch(tensors: Tensors) -> Outputs:
    """torch's own function, after an addition where there is a residual."""
    x, weight = tensors["x"], tensors["weight"]
    if "residual" in tensors:
        x = x + tensors["residual"]
    if "bias" in tensors:
        normed = F.layer_norm(x, weight.shape, weight, tensors["bias"], LAYER_EPS)
    else:
        normed = F.rms_norm(x, weight.shape, weight, RMS_EPS)
    return (normed, x) if "residual" in tensors else normed


def _check(operation: Operation, rows: int, width: int, dtype: torch.dtype, residual: bool) -> Check:
    name = f"{rows} x {width}{' + residual' if residual else ''}"
    draw = normal_draw(_shapes(operation, rows, width, residual), dtype)
    return Check(operation, name, dtype, draw, call, by_torch, by_torch)


def _case(operation: Operation, rows: int, width: int, dtype: torch.dtype, residual: bool, brief: bool) -> Case:
    """`brief`: without torch.compile, which takes most of the time of a small run."""
    matrix = float(rows * width * dtype.itemsize)
    peers = {"torch": plain(by_torch)}
    if not brief:
        peers["torch.compile"] = compiled(by_torch)
    if not residual:
        peers["Liger"] = Implementation(partial(_liger, operation))
        peers["Apex"] = Implementation(partial(_apex, operation))
        if operation is RMS:
            peers["quack"] = Implementation(_quack)
    return Case(
        operation,
        f"{rows} x {width}{' + residual' if residual else ''}",
        f"N{rows} D{width}",
        (FORWARD, BACKWARD),
        normal_draw(_shapes(operation, rows, width, residual), dtype),
        call,
        peers,
        {},
        {FORWARD: matrix * (4 if residual else 2), BACKWARD: matrix * (4 if residual else 3)},
        {FORWARD: {"": 1.0}, BACKWARD: {"": 1.0}},
    )


def _liger(operation: Operation) -> Callable[[Tensors], torch.Tensor]:
    if operation is LAYER:
        layer = imported("liger_kernel.ops.layer_norm").LigerLayerNormFunction
        return lambda t: layer.apply(t["x"], t["weight"], t["bias"], LAYER_EPS)  # type: ignore[no-any-return]
    rms = imported("liger_kernel.ops.rms_norm").LigerRMSNormFunction
    # offset, casting mode, in place: a gradient written over its input would spoil the next repetition
    return lambda t: rms.apply(t["x"], t["weight"], RMS_EPS, 0.0, "llama", False)  # type: ignore[no-any-return]


def _apex(operation: Operation) -> Callable[[Tensors], torch.Tensor]:
    module = imported("apex.normalization.fused_layer_norm")
    if operation is LAYER:
        layer = module.fused_layer_norm_affine
        return lambda t: layer(t["x"], t["weight"], t["bias"], t["weight"].shape, LAYER_EPS)  # type: ignore[no-any-return]
    rms = module.fused_rms_norm_affine
    return lambda t: rms(t["x"], t["weight"], t["weight"].shape, RMS_EPS)  # type: ignore[no-any-return]


def _quack() -> Callable[[Tensors], torch.Tensor]:
    rms = imported("quack.rmsnorm").rmsnorm
    return lambda t: rms(t["x"], t["weight"], eps=RMS_EPS)  # type: ignore[no-any-return]
