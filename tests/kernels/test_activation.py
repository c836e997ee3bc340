"""bias + GELU and SwiGLU on CPU against their fp64 definitions, and which backend is chosen where."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from kernels import dispatch, reference
from kernels.activation import bias_gelu, swiglu

OPERATIONS = {
    "gelu": (bias_gelu, reference.bias_gelu),
    "gelu by tanh": tuple(partial(each, approximate="tanh") for each in (bias_gelu, reference.bias_gelu)),
    "swiglu": (swiglu, reference.swiglu),
}


def draw(name: str, *shape: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """The two inputs and the gradient of the output."""
    generator = torch.Generator().manual_seed(sum(shape))
    shapes = (shape, shape if name == "swiglu" else shape[-1:], shape)
    return [torch.randn(each, generator=generator, dtype=torch.float64).mul(2).to(dtype) for each in shapes]


def run(function: Any, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    leaves = [each.detach().clone().requires_grad_() for each in tensors[:2]]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, tensors[2].to(out.dtype))]


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("shape", [(1, 1), (2, 5, 129), (131, 17), (5, 1023), (0, 8)])
def test_is_its_formula_with_gradients(shape: tuple[int, ...], name: str) -> None:
    mine, truth = (run(each, draw(name, *shape)) for each in OPERATIONS[name])
    torch.testing.assert_close(mine, truth, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("name", OPERATIONS)
def test_bf16_is_close_and_its_bias_gradient_is_added_in_fp32(name: str) -> None:
    tensors = draw(name, 20_000, 8, dtype=torch.bfloat16)
    tensors[2] = tensors[2].abs()  # a sum that grows
    mine, truth = (run(each, tensors) for each in OPERATIONS[name])
    for own, exact in zip(mine, truth, strict=True):
        assert own.dtype == torch.bfloat16
        assert (own.double() - exact).norm() <= 6e-3 * exact.norm()


def test_finite_differences() -> None:
    for name, (function, _) in OPERATIONS.items():
        assert torch.autograd.gradcheck(function, [each.requires_grad_() for each in draw(name, 3, 5)[:2]]), name


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_into_one_graph(backend: str) -> None:
    def both(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return swiglu(bias_gelu(x, bias), x)

    compiled = torch.compile(both, backend=backend, fullgraph=True)
    mine, plain = (run(each, draw("gelu", 5, 19, dtype=torch.float32)) for each in (compiled, both))
    torch.testing.assert_close(mine, plain)


def test_what_does_not_fit_is_refused() -> None:
    x = torch.ones(3, 8)
    with pytest.raises(ValueError, match=r"x is torch.float32 \[3, 8\], bias \[7\]"):
        bias_gelu(x, torch.ones(7))
    with pytest.raises(ValueError, match="approximate is 'sigmoid', allowed are none, tanh"):
        bias_gelu(x, torch.ones(8), approximate="sigmoid")
    with pytest.raises(ValueError, match=r"gate is torch.float32 \[3, 8\], up torch.float64"):
        swiglu(x, x.double())
    with pytest.raises(ValueError, match="none of auto, torch, triton"):
        swiglu(x, x, backend="apex")
    with pytest.raises(ValueError, match=r"backend 'triton' cannot do this: (the tensors are on cpu|triton is not)"):
        swiglu(x, x, backend="triton")


def test_a_gpu_takes_triton_once_the_trial_has_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "has_triton", lambda: True)
    monkeypatch.setattr(
        dispatch,
        "_trials",
        {("bias_gelu in torch.float32", "cuda:0"): "", ("swiglu in torch.float32", "cuda:0"): "its trial failed"},
    )
    with FakeTensorMode():
        x, bias = torch.empty(3, 8, device="cuda"), torch.empty(8, device="cuda")
        assert dispatch.why(bias_gelu, x, bias, approximate="tanh") == "bias_gelu: triton, the preferred one"
        assert "need one dtype for both, or a float32 bias" in dispatch.why(bias_gelu, x, bias.bfloat16())
        assert dispatch.why(swiglu, x, x) == "swiglu: torch, the first that can (triton: its trial failed)"
        assert swiglu(x, x).shape == (3, 8)
    assert dispatch.why(bias_gelu, torch.ones(3, 8), torch.ones(8)) == "bias_gelu: torch, the preferred one"
