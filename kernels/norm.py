"""Layer norm and RMS norm over the last axis, with the residual addition in front if wanted.

    h = x + residual
    layer norm    (h - mean(h)) / sqrt(variance(h) + eps) * weight + bias
    RMS norm      h / sqrt(mean(h^2) + eps) * weight

Source: Ba, Kiros and Hinton 2016, "Layer Normalization", equation 4; Zhang and Sennrich 2019, "Root Mean Square Layer
Normalization", equation 4.

Design choices:
- Statistics and the sums of the weight gradients are fp32 whatever the input; h is rounded to its dtype before it is
  normalised, by every backend, because it is what goes on in the residual stream.
- Backends: "torch" (its own fused kernels), "triton" (kernels/gpu/norm.py: residual and norm in one pass over memory,
  deterministic weight gradients), "apex" (NVIDIA Apex's fused norms, where they are installed).
- "auto" on a GPU: triton with a residual, which spares h being written and read again; torch without one, and under
  torch.compile, where Inductor fuses the addition by itself. On CPU: torch. An order from counting bytes: none of these
  has been timed on a GPU by us. The Triton kernels compile for sm_80/90/100 and gfx942 and have not run on a GPU yet.
- The Triton kernels are an opaque operator (`weft::norm`) and not a triton_op: under torch.compile the default is
  plain torch anyway, and who asks for "triton" there gets the very kernel that the tests and the gate have seen.
- On CPU torch adds the weight gradients of a bf16 layer norm in bf16 (torch 2.13: off by 97 % after 20,000 rows), so
  bf16 and fp16 are computed in fp32 there.

Axes: D elements of a row, M rows.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, overload

import torch
import torch.nn.functional as F

from kernels import dispatch
from kernels.dispatch import Choice, chosen_by
from kernels.precision import accumulator_of

BACKENDS = ("triton", "torch", "apex")
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
WIDEST = 16384  # elements of a row for the Triton kernels
APEX = {"layer_norm": "fused_layer_norm_affine", "rms_norm": "fused_rms_norm_affine"}


def _choice_layer(
    x: torch.Tensor,
    weight_D: torch.Tensor,
    bias_D: torch.Tensor,
    eps: float = 1e-5,
    *,
    residual: torch.Tensor | None = None,
    backend: str = dispatch.AUTO,
) -> Choice:
    return _choice("layer_norm", x, weight_D, bias_D, residual, backend)


def _choice_rms(
    x: torch.Tensor,
    weight_D: torch.Tensor,
    eps: float = 1e-6,
    *,
    residual: torch.Tensor | None = None,
    backend: str = dispatch.AUTO,
) -> Choice:
    return _choice("rms_norm", x, weight_D, None, residual, backend)


@overload
def layer_norm(
    x: torch.Tensor,
    weight_D: torch.Tensor,
    bias_D: torch.Tensor,
    eps: float = ...,
    *,
    residual: None = ...,
    backend: str = ...,
) -> torch.Tensor: ...
@overload
def layer_norm(
    x: torch.Tensor,
    weight_D: torch.Tensor,
    bias_D: torch.Tensor,
    eps: float = ...,
    *,
    residual: torch.Tensor,
    backend: str = ...,
) -> tuple[torch.Tensor, torch.Tensor]: ...
@chosen_by(_choice_layer)
def layer_norm(
    x: torch.Tensor,
    weight_D: torch.Tensor,
    bias_D: torch.Tensor,
    eps: float = 1e-5,
    *,
    residual: torch.Tensor | None = None,
    backend: str = dispatch.AUTO,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Layer norm of the last axis (D) of x [..., D], in the dtype of x; with a residual (normed, x + residual).

    Differentiable in x, residual, weight and bias. Raises ValueError for shapes or dtypes that do not fit each other,
    and for a named backend that cannot do it.
    """
    _check("layer_norm", x, residual, weight_D, bias_D)
    choice = dispatch.record(_choice("layer_norm", x, weight_D, bias_D, residual, backend))
    return _run("layer_norm", choice, x, residual, weight_D, bias_D, eps)


@overload
def rms_norm(
    x: torch.Tensor, weight_D: torch.Tensor, eps: float = ..., *, residual: None = ..., backend: str = ...
) -> torch.Tensor: ...
@overload
def rms_norm(
    x: torch.Tensor, weight_D: torch.Tensor, eps: float = ..., *, residual: torch.Tensor, backend: str = ...
) -> tuple[torch.Tensor, torch.Tensor]: ...
@chosen_by(_choice_rms)
def rms_norm(
    x: torch.Tensor,
    weight_D: torch.Tensor,
    eps: float = 1e-6,
    *,
    residual: torch.Tensor | None = None,
    backend: str = dispatch.AUTO,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """RMS norm of the last axis (D) of x [..., D], in the dtype of x; with a residual (normed, x + residual).

    Differentiable in x, residual and weight. Raises ValueError as layer_norm does.
    """
    _check("rms_norm", x, residual, weight_D, None)
    choice = dispatch.record(_choice("rms_norm", x, weight_D, None, residual, backend))
    return _run("rms_norm", choice, x, residual, weight_D, None, eps)


def _check(
    name: str,
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight_D: torch.Tensor,
    bias_D: torch.Tensor | None,
) -> None:
    if x.ndim < 1 or x.shape[-1] < 1 or x.dtype not in DTYPES:
        raise ValueError(f"{name}: x is {x.dtype} {list(x.shape)}: need a floating-point tensor [..., D]")
    for label, each in (("weight", weight_D), ("bias", bias_D)):
        if each is not None and each.shape != x.shape[-1:]:
            raise ValueError(f"{name}: {label} is {list(each.shape)}, x {list(x.shape)}: need [{x.shape[-1]}]")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        mine, other = f"{x.dtype} {list(x.shape)}", f"{residual.dtype} {list(residual.shape)}"
        raise ValueError(f"{name}: residual is {other}, x {mine}: they must be of one shape and dtype")


def _run(
    name: str,
    backend: str,
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight_D: torch.Tensor,
    bias_D: torch.Tensor | None,
    eps: float,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    if backend == "triton":
        out, total, _ = _norm(x, residual, weight_D, bias_D, eps)
        return out if residual is None else (out, total)
    total = x if residual is None else x + residual
    if backend == "apex":
        function, _ = _apex(name)
        assert function is not None
        affine = (weight_D,) if bias_D is None else (weight_D, bias_D)
        out = function(total, *affine, weight_D.shape, eps)
    else:
        out = _torch(total, weight_D, bias_D, eps)
    return out if residual is None else (out, total)


def _torch(x: torch.Tensor, weight_D: torch.Tensor, bias_D: torch.Tensor | None, eps: float) -> torch.Tensor:
    """In fp32 where torch's own kernel would add in bf16 or take no weights of another dtype than x."""
    half = x.dtype in (torch.bfloat16, torch.float16)
    wide = torch.float32 if half else x.dtype
    own = weight_D.dtype == x.dtype and (bias_D is None or bias_D.dtype == x.dtype)
    if not own or (half and not x.is_cuda):
        bias_D = None if bias_D is None else bias_D.to(wide)
        return _torch_kernel(x.to(wide), weight_D.to(wide), bias_D, eps).to(x.dtype)
    return _torch_kernel(x, weight_D, bias_D, eps)


def _torch_kernel(x: torch.Tensor, weight_D: torch.Tensor, bias_D: torch.Tensor | None, eps: float) -> torch.Tensor:
    if bias_D is None:
        return F.rms_norm(x, weight_D.shape, weight_D, eps)
    return F.layer_norm(x, weight_D.shape, weight_D, bias_D, eps)


# --- which backend


def _choice(
    name: str,
    x: torch.Tensor,
    weight_D: torch.Tensor,
    bias_D: torch.Tensor | None,
    residual: torch.Tensor | None,
    backend: str,
) -> Choice:
    fused = residual is not None and x.is_cuda and not torch.compiler.is_compiling()
    order = BACKENDS if fused else ("torch", "triton", "apex")
    return dispatch.choose(name, backend, order, lambda each: _refusal(each, name, x, weight_D, bias_D, backend))


def _refusal(
    backend: str, name: str, x: torch.Tensor, weight_D: torch.Tensor, bias_D: torch.Tensor | None, asked: str
) -> str:
    if backend == "torch":
        return ""
    if backend == "triton":
        if why_not := dispatch.no_triton(x.device.type, x.dtype):
            return why_not
        if x.shape[-1] > WIDEST:
            return f"rows of {x.shape[-1]} elements: up to {WIDEST} fit the registers of a program"
        if weight_D.dtype not in (x.dtype, torch.float32) or (bias_D is not None and bias_D.dtype != weight_D.dtype):
            bias = "" if bias_D is None else f" and the bias {bias_D.dtype}"
            return f"x is {x.dtype}, the weight {weight_D.dtype}{bias}: need one dtype for all, or float32 weights"
        return _trial(x.device, x.dtype) if asked == dispatch.AUTO else ""
    if torch.compiler.is_compiling():
        return "torch.compile cannot look into Apex"
    function, why_not = _apex(name)
    if function is None:
        return why_not
    if not x.is_cuda or x.dtype == torch.float64:
        return f"x is {x.dtype} on {x.device}: need bfloat16, float16 or float32 on a GPU"
    if weight_D.dtype != x.dtype or (bias_D is not None and bias_D.dtype != x.dtype):
        return f"x is {x.dtype}, the weight {weight_D.dtype}: need one dtype for all"
    return ""


def _apex(name: str) -> tuple[Callable[..., torch.Tensor] | None, str]:
    """Apex's function for a norm, or why there is none. The package index has another package called apex."""
    try:
        module = importlib.import_module("apex.normalization.fused_layer_norm")
        importlib.import_module("fused_layer_norm_cuda")  # its kernels; the Python part installs without them
    except ImportError as error:
        return None, f"NVIDIA Apex with its fused norms is not installed ({error})"
    function = getattr(module, APEX[name], None)
    return function, "" if callable(function) else f"the apex that is installed has no {APEX[name]}"


def _trial(device: torch.device, dtype: torch.dtype) -> str:
    def compare() -> None:
        generator = torch.Generator().manual_seed(0)
        shapes = ((19, 1000), (19, 1000), (1000,), (1000,))
        tensors = [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]
        for last in (None, 3):  # layer norm, RMS norm
            dispatch.must_agree(_compared("triton"), _compared("torch"), tensors[:last], dispatch.LIMITS[dtype])

    return dispatch.trial(f"norm in {dtype}", device, compare)


def _compared(backend: str) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    def both(
        x: torch.Tensor, residual: torch.Tensor, weight_D: torch.Tensor, bias_D: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, total = _run("", backend, x, residual, weight_D, bias_D, 1e-5)
        return out, total

    return both


# --- the Triton kernels as operators


@torch.library.custom_op("weft::norm", mutates_args=())
def _norm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight_D: torch.Tensor,
    bias_D: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(normed, x + residual or nothing, statistics); without a bias an RMS norm."""
    from kernels.gpu.norm import forward

    out, total, statistics = _empty_outputs(x, residual, bias_D)
    forward(x, residual, weight_D, bias_D, out, None if residual is None else total, statistics, eps)
    return out, total, statistics


@_norm.register_fake
def _empty(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight_D: torch.Tensor,
    bias_D: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _empty_outputs(x, residual, bias_D)


def _empty_outputs(
    x: torch.Tensor, residual: torch.Tensor | None, bias_D: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    total = x.new_empty(0) if residual is None else x.new_empty(x.shape)
    moments = 1 if bias_D is None else 2  # 1 / deviation and mean of each row
    return x.new_empty(x.shape), total, x.new_empty((moments, x.numel() // x.shape[-1]), dtype=accumulator_of(x.dtype))


@torch.library.custom_op("weft::norm_backward", mutates_args=())
def _norm_backward(
    grad: torch.Tensor,
    total_grad: torch.Tensor | None,
    x: torch.Tensor,
    weight_D: torch.Tensor,
    bias_D: torch.Tensor | None,
    statistics: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x (the sum, where there was a residual), of the weight, and of the bias if there is one."""
    from kernels.gpu.norm import backward

    dx, dweight_D, dbias_D = _empty_gradients(x, weight_D, bias_D)
    dweight, dbias = backward(grad, total_grad, x, weight_D, statistics, dx, bias_D is not None)
    dweight_D.copy_(dweight)
    if dbias is not None:
        dbias_D.copy_(dbias)
    return dx, dweight_D, dbias_D


@_norm_backward.register_fake
def _empty_backward(
    grad: torch.Tensor,
    total_grad: torch.Tensor | None,
    x: torch.Tensor,
    weight_D: torch.Tensor,
    bias_D: torch.Tensor | None,
    statistics: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _empty_gradients(x, weight_D, bias_D)


def _empty_gradients(
    x: torch.Tensor, weight_D: torch.Tensor, bias_D: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dbias_D = x.new_empty(0) if bias_D is None else bias_D.new_empty(bias_D.shape)
    return x.new_empty(x.shape), weight_D.new_empty(weight_D.shape), dbias_D


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
    x, residual, weight_D, bias_D, _ = inputs
    _, total, statistics = output
    ctx.mark_non_differentiable(statistics)
    ctx.set_materialize_grads(False)
    ctx.has_residual = residual is not None
    ctx.save_for_backward(total if ctx.has_residual else x, weight_D, bias_D, statistics)


def _gradients(
    ctx: Any, grad: torch.Tensor | None, total_grad: torch.Tensor | None, _: Any
) -> tuple[torch.Tensor | None, ...]:
    x, weight_D, bias_D, statistics = ctx.saved_tensors
    if not ctx.has_residual:
        total_grad = None  # of the empty tensor that stands for no sum
    if grad is None:  # only the sum was used
        grad = torch.zeros_like(x)
    dx, dweight_D, dbias_D = _norm_backward(grad, total_grad, x, weight_D, bias_D, statistics)
    return dx, dx if ctx.has_residual else None, dweight_D, None if bias_D is None else dbias_D, None


_norm.register_autograd(_gradients, setup_context=_save)
