"""Layer norm and RMS norm on CPU against their fp64 definitions, and which backend is chosen where."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from kernels import dispatch, reference
from kernels.norm import WIDEST, layer_norm, rms_norm

NORMS = (layer_norm, rms_norm)


def draw(*shape: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """x, residual, weight, bias and the gradients of both outputs."""
    generator = torch.Generator().manual_seed(sum(shape))
    shapes = (shape, shape, shape[-1:], shape[-1:], shape, shape)
    return [torch.randn(size, generator=generator, dtype=torch.float64).to(dtype) for size in shapes]


def affine(norm: Callable[..., Any], tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    return tensors[2:4] if norm is layer_norm else tensors[2:3]


def run(function: Callable[..., Any], tensors: list[torch.Tensor], above: list[torch.Tensor]) -> list[torch.Tensor]:
    """Outputs and the gradients of all tensors."""
    leaves = [each.detach().clone().requires_grad_() for each in tensors]
    out = function(*leaves)
    outputs = list(out) if isinstance(out, tuple) else [out]
    return [*outputs, *torch.autograd.grad(outputs, leaves, [g.to(o) for g, o in zip(above, outputs, strict=False)])]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", [(1, 1), (7, 3), (2, 5, 129), (257, 1023), (0, 8)])
def test_is_its_formula_with_gradients(shape: tuple[int, ...], norm: Callable[..., Any]) -> None:
    tensors = draw(*shape)
    inputs = [tensors[0], *affine(norm, tensors)]
    mine, truth = (run(each, inputs, tensors[4:]) for each in (norm, getattr(reference, norm.__name__)))
    torch.testing.assert_close(mine, truth, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("norm", NORMS)
def test_residual_is_added_first_and_returned(norm: Callable[..., Any]) -> None:
    tensors = draw(3, 5, 33)
    inputs = [tensors[0], tensors[1], *affine(norm, tensors)]
    plain = getattr(reference, norm.__name__)
    mine = run(lambda x, residual, *rest: norm(x, *rest, residual=residual), inputs, tensors[4:])
    truth = run(lambda x, residual, *rest: (plain(x + residual, *rest), x + residual), inputs, tensors[4:])
    torch.testing.assert_close(mine, truth, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("norm", NORMS)
def test_bf16_weight_gradients_are_added_in_fp32(norm: Callable[..., Any]) -> None:
    """torch's own layer norm on CPU adds them in bf16: after 20,000 rows the bias's is wrong by 97 %."""
    tensors = draw(20_000, 16, dtype=torch.bfloat16)
    tensors[4] = tensors[4].abs()  # a sum that grows
    inputs = [tensors[0], *affine(norm, tensors)]
    mine = run(norm, inputs, tensors[4:])
    truth = run(getattr(reference, norm.__name__), inputs, tensors[4:])
    for own, exact in zip(mine, truth, strict=True):
        assert own.dtype == torch.bfloat16
        assert (own.double() - exact).norm() <= 4e-3 * exact.norm()


def test_a_constant_row_gives_the_bias() -> None:
    x = torch.full((3, 11), 1234.5)
    weight, bias = torch.full((11,), 2.0), torch.linspace(-1, 1, 11)
    torch.testing.assert_close(layer_norm(x, weight, bias), bias.expand(3, 11))


def test_eps_is_used_as_given() -> None:
    x, _, weight, bias, *_ = draw(4, 6)
    torch.testing.assert_close(layer_norm(x, weight, bias, 0.5), reference.layer_norm(x, weight, bias, 0.5))
    torch.testing.assert_close(rms_norm(x, weight, 0.5), reference.rms_norm(x, weight, 0.5))


def test_bf16_keeps_its_dtype_and_statistics_of_fp32() -> None:
    """With a mean of 100, statistics in bf16 (step 0.5 there) would be wrong by tenths."""
    x, _, weight, bias, *_ = draw(5, 1023, dtype=torch.bfloat16)
    x = x + 100
    out = layer_norm(x, weight, bias)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), reference.layer_norm(x, weight, bias), atol=2e-2, rtol=1e-2)


@pytest.mark.parametrize("norm", NORMS)
def test_weights_of_another_dtype(norm: Callable[..., Any]) -> None:
    tensors = draw(5, 17, dtype=torch.float32)
    x, rest = tensors[0].bfloat16(), affine(norm, tensors)
    out = norm(x, *rest)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(
        out.double(), getattr(reference, norm.__name__)(x, *rest), atol=1e-2, rtol=1e-2, check_dtype=False
    )


def test_strided_input() -> None:
    x, _, weight, bias, *_ = draw(9, 4, 7)
    turned = x.transpose(0, 1)
    torch.testing.assert_close(layer_norm(turned, weight, bias), layer_norm(turned.contiguous(), weight, bias))


def test_finite_differences() -> None:
    x, residual, weight, bias, *_ = (each.requires_grad_() for each in draw(3, 5))
    assert torch.autograd.gradcheck(lambda x, r, *rest: layer_norm(x, *rest, residual=r), (x, residual, weight, bias))
    assert torch.autograd.gradcheck(lambda x, r, weight: rms_norm(x, weight, residual=r), (x, residual, weight))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_into_one_graph(backend: str) -> None:
    tensors = draw(5, 19, dtype=torch.float32)

    def both(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        out, total = layer_norm(x, weight, bias, residual=residual)
        return rms_norm(out, weight) + total

    compiled = torch.compile(both, backend=backend, fullgraph=True)
    mine, plain = (run(each, tensors[:4], tensors[4:]) for each in (compiled, both))
    torch.testing.assert_close(mine, plain)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"residual": torch.ones(3, 9)}, r"residual is torch.float32 \[3, 9\], x torch.float32 \[3, 8\]"),
        ({"residual": torch.ones(3, 8).double()}, "one shape and dtype"),
        ({"weight_D": torch.ones(9)}, r"weight is \[9\]"),
        ({"bias_D": torch.ones(3, 8)}, r"bias is \[3, 8\]"),
        ({"x": torch.ones(3, 8).int()}, "floating-point"),
        ({"backend": "cudnn"}, "none of auto, apex, torch, triton"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    fitting = {"x": torch.ones(3, 8), "weight_D": torch.ones(8), "bias_D": torch.ones(8)}
    with pytest.raises(ValueError, match=message):
        layer_norm(**(fitting | change))


# --- which backend


def on_gpu(*shape: int, **options: Any) -> list[torch.Tensor]:
    """x, weight and bias that say they are on a GPU; inside FakeTensorMode."""
    return [torch.empty(each, device="cuda", **options) for each in (shape, shape[-1:], shape[-1:])]


def test_cpu_takes_torch_and_says_so() -> None:
    x, _, weight, bias, *_ = draw(3, 8)
    assert dispatch.why(layer_norm, x, weight, bias, residual=x) == "layer_norm: torch, the preferred one"
    with pytest.raises(ValueError, match=r"backend 'triton' cannot do this: (the tensors are on cpu|triton is not)"):
        rms_norm(x, weight, backend="triton")


def test_a_gpu_takes_triton_for_a_residual_once_the_trial_has_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "has_triton", lambda: True)
    monkeypatch.setattr(dispatch, "_trials", {("norm in torch.float32", "cuda:0"): ""})
    with FakeTensorMode():
        x, weight, bias = on_gpu(3, 8)
        assert dispatch.why(layer_norm, x, weight, bias, residual=x) == "layer_norm: triton, the preferred one"
        assert dispatch.why(rms_norm, x, weight, residual=x) == "rms_norm: triton, the preferred one"
        assert dispatch.why(layer_norm, x, weight, bias) == "layer_norm: torch, the preferred one"
        dispatch._trials[("norm in torch.float32", "cuda:0")] = "its trial failed"
        assert "torch, the first that can (triton: its trial failed)" in dispatch.why(rms_norm, x, weight, residual=x)
        half, other = torch.bfloat16, torch.float16
        for of_weight, of_bias, taken in ((torch.float32,) * 2 + (True,), (half, half, True), (half, other, False)):
            gpu = [each.to(dtype) for each, dtype in ((x, half), (weight, of_weight), (bias, of_bias))]
            dispatch._trials[("norm in torch.bfloat16", "cuda:0")] = ""
            told = dispatch.why(layer_norm, *gpu, residual=gpu[0])
            assert ("layer_norm: triton" in told) == taken == ("need one dtype for all, or float32" not in told)
        x, weight, _ = on_gpu(2, WIDEST + 1)
        assert f"up to {WIDEST} fit" in dispatch.why(rms_norm, x, weight, residual=x)


def test_without_triton_a_gpu_takes_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "has_triton", lambda: False)
    with FakeTensorMode():
        x, weight, _ = on_gpu(3, 8)
        assert "(triton: triton is not installed)" in dispatch.why(rms_norm, x, weight, residual=x)
        assert rms_norm(x, weight, residual=x)[0].shape == (3, 8)


def install_apex(monkeypatch: pytest.MonkeyPatch, **functions: Any) -> None:
    for name in ("apex", "apex.normalization", "apex.normalization.fused_layer_norm", "fused_layer_norm_cuda"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    for name, function in functions.items():
        setattr(sys.modules["apex.normalization.fused_layer_norm"], name, function)


def test_apex_is_reached_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []

    def layer(x: torch.Tensor, weight: Any, bias: Any, shape: Any, eps: float) -> torch.Tensor:
        calls.append(("layer", tuple(shape), eps))
        return x + 0

    def rms(x: torch.Tensor, weight: Any, shape: Any, eps: float) -> torch.Tensor:
        calls.append(("rms", tuple(shape), eps))
        return x + 0

    install_apex(monkeypatch, fused_layer_norm_affine=layer, fused_rms_norm_affine=rms)
    with FakeTensorMode():
        x, weight, bias = on_gpu(3, 8)
        layer_norm(x, weight, bias, backend="apex")
        out, total = rms_norm(x, weight, 0.25, residual=x, backend="apex")
    assert calls == [("layer", (8,), 1e-5), ("rms", (8,), 0.25)]
    assert out.shape == total.shape == (3, 8)
    with pytest.raises(ValueError, match="need bfloat16, float16 or float32 on a GPU"):
        rms_norm(torch.ones(3, 8), torch.ones(8), backend="apex")


def test_another_package_called_apex_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = torch.ones(3, 8), torch.ones(8)
    install_apex(monkeypatch)
    with pytest.raises(ValueError, match="the apex that is installed has no fused_rms_norm_affine"):
        rms_norm(*arguments, backend="apex")
    monkeypatch.delitem(sys.modules, "apex.normalization")
    monkeypatch.delitem(sys.modules, "apex.normalization.fused_layer_norm")
    with pytest.raises(ValueError, match="NVIDIA Apex with its fused norms is not installed"):
        rms_norm(*arguments, backend="apex")
