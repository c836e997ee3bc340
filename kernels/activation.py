"""Activations of a feed-forward layer, with what stands beside them: bias + GELU, and SwiGLU.

    bias_gelu(x, bias) = u Phi(u), u = x + bias, Phi the normal distribution     approximate="none"
                       = u (1 + tanh(sqrt(2 / pi) (u + 0.044715 u^3))) / 2       approximate="tanh"
    swiglu(gate, up)   = silu(gate) * up,  silu(g) = g / (1 + exp(-g))

Source: Hendrycks and Gimpel 2016, "Gaussian Error Linear Units", section 2; Shazeer 2020, "GLU Variants Improve
Transformer", equation 6.

Design choices:
- Backends: "torch" (two of its kernels one after the other) and "triton" (kernels/gpu/activation.py: one pass over
  memory each way, inputs saved and nothing else, deterministic gradient of the bias).
- "auto" on a GPU: triton, which reads and writes fewer bytes; but under torch.compile plain torch, which Inductor fuses
  into as few. On CPU: torch. Counted, not timed: the Triton kernels compile for sm_80/90/100 and gfx942 and have not
  run on a GPU yet.
- The Triton kernels are opaque operators (`weft::bias_gelu`, `weft::swiglu`) for the reason given in kernels/norm.py.

Axes: F features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from kernels import dispatch
from kernels.dispatch import Choice, chosen_by

BACKENDS = ("triton", "torch")
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
APPROXIMATIONS = ("none", "tanh")


def _choice_bias_gelu(
    x: torch.Tensor, bias_F: torch.Tensor, *, approximate: str = "none", backend: str = dispatch.AUTO
) -> Choice:
    return _choice("bias_gelu", x, backend, bias_F.dtype)


def _choice_swiglu(gate: torch.Tensor, up: torch.Tensor, *, backend: str = dispatch.AUTO) -> Choice:
    return _choice("swiglu", gate, backend)


@chosen_by(_choice_bias_gelu)
def bias_gelu(
    x: torch.Tensor, bias_F: torch.Tensor, *, approximate: str = "none", backend: str = dispatch.AUTO
) -> torch.Tensor:
    """GELU of x + bias for x [..., F] and bias [F], in the dtype of x; differentiable in both.

    Raises ValueError for shapes that do not fit, an approximation but "none" and "tanh", and for a named backend that
    cannot do it.
    """
    if x.ndim < 1 or bias_F.shape != x.shape[-1:] or x.dtype not in DTYPES:
        mine, other = f"{x.dtype} {list(x.shape)}", list(bias_F.shape)
        raise ValueError(f"bias_gelu: x is {mine}, bias {other}: need floating-point [..., F] and [F]")
    if approximate not in APPROXIMATIONS:
        raise ValueError(f"bias_gelu: approximate is {approximate!r}, allowed are {', '.join(APPROXIMATIONS)}")
    if dispatch.record(_choice("bias_gelu", x, backend, bias_F.dtype)) == "triton":
        return _bias_gelu(x, bias_F, approximate == "tanh")
    return _torch_bias_gelu(x, bias_F, approximate)


@chosen_by(_choice_swiglu)
def swiglu(gate: torch.Tensor, up: torch.Tensor, *, backend: str = dispatch.AUTO) -> torch.Tensor:
    """silu(gate) * up for two tensors [..., F] of one shape and dtype; differentiable in both.

    They may be the two halves of one product (`hidden.chunk(2, -1)`). Raises ValueError where they do not fit each
    other, and for a named backend that cannot do it.
    """
    if gate.ndim < 1 or gate.shape != up.shape or gate.dtype != up.dtype or gate.dtype not in DTYPES:
        mine, other = f"{gate.dtype} {list(gate.shape)}", f"{up.dtype} {list(up.shape)}"
        raise ValueError(f"swiglu: gate is {mine}, up {other}: need one shape [..., F] and floating-point dtype")
    if dispatch.record(_choice("swiglu", gate, backend)) == "triton":
        return _swiglu(gate, up)
    return _torch_swiglu(gate, up)


def _torch_bias_gelu(x: torch.Tensor, bias_F: torch.Tensor, approximate: str) -> torch.Tensor:
    return F.gelu(x + bias_F.to(x.dtype), approximate=approximate)


def _torch_swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return F.silu(gate) * up


# --- which backend


def _choice(name: str, x: torch.Tensor, backend: str, of_bias: torch.dtype = torch.float32) -> Choice:
    order = BACKENDS if x.is_cuda and not torch.compiler.is_compiling() else ("torch", "triton")
    return dispatch.choose(name, backend, order, lambda each: _refusal(each, name, x, of_bias, backend))


def _refusal(backend: str, name: str, x: torch.Tensor, of_bias: torch.dtype, asked: str) -> str:
    if backend == "torch":
        return ""
    if why_not := dispatch.no_triton(x.device.type, x.dtype):
        return why_not
    if of_bias not in (x.dtype, torch.float32):
        return f"x is {x.dtype}, the bias {of_bias}: need one dtype for both, or a float32 bias"
    return _trial(name, x.device, x.dtype) if asked == dispatch.AUTO else ""


def _trial(name: str, device: torch.device, dtype: torch.dtype) -> str:
    def compare() -> None:
        generator, limit = torch.Generator().manual_seed(0), dispatch.LIMITS[dtype]
        shapes = ((19, 1000), (19, 1000), (1000,))
        x, up, bias_F = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
        if name == "swiglu":
            dispatch.must_agree(_one(_swiglu), _one(_torch_swiglu), [x, up], limit)
            return
        for kind, tanh in (("none", False), ("tanh", True)):
            dispatch.must_agree(_one(_bias_gelu, tanh), _one(_torch_bias_gelu, kind), [x, bias_F], limit)

    return dispatch.trial(f"{name} in {dtype}", device, compare)


def _one(function: Callable[..., torch.Tensor], *settings: Any) -> Callable[..., tuple[torch.Tensor]]:
    return lambda *tensors: (function(*tensors, *settings),)


# --- the Triton kernels as operators


@torch.library.custom_op("weft::bias_gelu", mutates_args=())
def _bias_gelu(x: torch.Tensor, bias_F: torch.Tensor, tanh: bool) -> torch.Tensor:
    from kernels.gpu.activation import bias_gelu_forward

    out = x.new_empty(x.shape)
    bias_gelu_forward(x, bias_F, out, tanh)
    return out


@torch.library.custom_op("weft::bias_gelu_backward", mutates_args=())
def _bias_gelu_backward(
    grad: torch.Tensor, x: torch.Tensor, bias_F: torch.Tensor, tanh: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    from kernels.gpu.activation import bias_gelu_backward

    dx = x.new_empty(x.shape)
    return dx, bias_gelu_backward(grad, x, bias_F, dx, tanh).to(bias_F.dtype)


@torch.library.custom_op("weft::swiglu", mutates_args=())
def _swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    from kernels.gpu.activation import swiglu_forward

    out = gate.new_empty(gate.shape)
    swiglu_forward(gate, up, out)
    return out


@torch.library.custom_op("weft::swiglu_backward", mutates_args=())
def _swiglu_backward(grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    from kernels.gpu.activation import swiglu_backward

    dgate, dup = gate.new_empty(gate.shape), gate.new_empty(gate.shape)
    swiglu_backward(grad, gate, up, dgate, dup)
    return dgate, dup


@_bias_gelu.register_fake
def _(x: torch.Tensor, bias_F: torch.Tensor, tanh: bool) -> torch.Tensor:
    return x.new_empty(x.shape)


@_bias_gelu_backward.register_fake
def _(grad: torch.Tensor, x: torch.Tensor, bias_F: torch.Tensor, tanh: bool) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape), bias_F.new_empty(bias_F.shape)


@_swiglu.register_fake
def _(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return gate.new_empty(gate.shape)


@_swiglu_backward.register_fake
def _(grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return gate.new_empty(gate.shape), gate.new_empty(gate.shape)


def _save_bias_gelu(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, bias_F, ctx.tanh = inputs
    ctx.save_for_backward(x, bias_F)


def _bias_gelu_gradients(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    return *_bias_gelu_backward(grad, *ctx.saved_tensors, ctx.tanh), None


def _save_swiglu(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _swiglu_gradients(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    dgate, dup = _swiglu_backward(grad, *ctx.saved_tensors)
    return dgate, dup


_bias_gelu.register_autograd(_bias_gelu_gradients, setup_context=_save_bias_gelu)
_swiglu.register_autograd(_swiglu_gradients, setup_context=_save_swiglu)
