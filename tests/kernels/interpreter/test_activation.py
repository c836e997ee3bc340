"""The Triton activations, interpreted, against the fp64 definitions: values, every gradient, the operators."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from kernels import dispatch, reference
from kernels.activation import _bias_gelu, _bias_gelu_backward, _swiglu, _swiglu_backward, _trial, bias_gelu, swiglu

CLOSE = 5e-6  # relative error allowed to fp32
SHORT = ("test_schema", "test_faketensor")  # of opcheck; what needs no gradient
OPERATIONS = {
    "gelu": (bias_gelu, reference.bias_gelu),
    "gelu by tanh": tuple(partial(each, approximate="tanh") for each in (bias_gelu, reference.bias_gelu)),
    "swiglu": (swiglu, reference.swiglu),
}


def draw(name: str, *shape: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """The two inputs and the gradient of the output."""
    generator = torch.Generator().manual_seed(sum(shape))
    shapes = (shape, shape if name == "swiglu" else shape[-1:], shape)
    return [torch.randn(each, generator=generator, dtype=torch.float64).mul(2).to(dtype) for each in shapes]


def run(function: Any, tensors: list[torch.Tensor], **options: Any) -> list[torch.Tensor]:
    """Output and both gradients."""
    leaves = [each.detach().clone().requires_grad_() for each in tensors[:2]]
    out = function(*leaves, **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, tensors[2].to(out.dtype))]


def errors(name: str, tensors: list[torch.Tensor], backend: str = "triton") -> list[float]:
    mine, truth = OPERATIONS[name]
    pairs = zip(run(mine, tensors, backend=backend), run(truth, [each.double() for each in tensors]), strict=True)
    return [float((a.double() - b).norm() / b.norm()) for a, b in pairs]


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("shape", [(1, 1), (7, 3), (2, 5, 129), (131, 17), (5, 1023), (3, 2053)])
def test_values_and_gradients(shape: tuple[int, ...], name: str) -> None:
    found = errors(name, draw(name, *shape))
    assert max(found) <= CLOSE, found


@pytest.mark.parametrize("name", OPERATIONS)
def test_fp64_is_exact(name: str) -> None:
    assert max(errors(name, draw(name, 5, 37, dtype=torch.float64))) <= 1e-14


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_good_as_torch(dtype: torch.dtype, name: str) -> None:
    """No more than twice the error of torch in the same dtype."""
    tensors = draw(name, 33, 129, dtype=dtype)
    mine, torchs = (errors(name, tensors, backend) for backend in ("triton", "torch"))
    assert all(own <= 2 * other + 1e-6 for own, other in zip(mine, torchs, strict=True)), (mine, torchs)


@pytest.mark.parametrize("name", OPERATIONS)
def test_far_out_it_is_zero_or_the_identity_without_nan(name: str) -> None:
    x = torch.tensor([[-1e4, -200.0, 0.0, 200.0, 1e4]])
    second = torch.ones(1, 5) if name == "swiglu" else torch.zeros(5)
    out, dx, _ = run(OPERATIONS[name][0], [x, second, torch.ones(1, 5)], backend="triton")
    torch.testing.assert_close(out, x.clamp(min=0))
    torch.testing.assert_close(dx, torch.tensor([[0, 0, 0.5, 1, 1]]))


def test_halves_of_one_product_and_other_strides() -> None:
    hidden = draw("swiglu", 6, 10, 48)[0]
    for gate, up in (hidden.chunk(2, -1), hidden[..., ::2].chunk(2, -1), hidden.transpose(0, 1).chunk(2, 0)):
        mine, plain = (swiglu(gate, up, backend=each) for each in ("triton", "torch"))
        torch.testing.assert_close(mine, plain, atol=2e-6, rtol=2e-6)
        bias = hidden[0, 0, : gate.shape[-1]]
        mine, plain = (bias_gelu(gate, bias, backend=each) for each in ("triton", "torch"))
        torch.testing.assert_close(mine, plain, atol=2e-6, rtol=2e-6)


def test_gradient_without_memory_of_its_own() -> None:
    x, bias, _ = draw("gelu", 4, 24)
    for backend in ("triton", "torch"):
        x, bias = (each.detach().clone().requires_grad_() for each in (x, bias))
        bias_gelu(x, bias, backend=backend).sum().backward()
        if backend == "triton":
            mine = bias.grad
    torch.testing.assert_close(mine, bias.grad)


def test_no_rows() -> None:
    bias = torch.ones(8, requires_grad=True)
    bias_gelu(torch.empty(0, 8), bias, backend="triton").sum().backward()
    assert torch.equal(bias.grad, torch.zeros(8))
    assert swiglu(torch.empty(3, 0), torch.empty(3, 0), backend="triton").shape == (3, 0)


def test_the_bias_gradient_repeats_bit_for_bit() -> None:
    tensors = draw("gelu", 300, 70)
    first, second = (run(bias_gelu, tensors, backend="triton") for _ in range(2))
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("name", OPERATIONS)
def test_rows_do_not_mix_and_equal_ones_count_twice(name: str) -> None:
    """In another order, and twice: outputs and dx keep their bits, the gradient of a bias is a sum."""
    tensors = draw(name, 67, 31)
    order = torch.randperm(67, generator=torch.Generator().manual_seed(0)).repeat(2)
    again = [each[order] if each.ndim == 2 else each for each in tensors]
    alone, twice = (run(OPERATIONS[name][0], each, backend="triton") for each in (tensors, again))
    for a, b in zip(alone, twice, strict=True):
        if a.ndim == 2:
            assert torch.equal(a[order], b)
        else:
            torch.testing.assert_close(2 * a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_scale_of_100(name: str) -> None:
    x, second, grad = draw(name, 13, 131)
    assert max(errors(name, [x * 100, second, grad])) <= CLOSE


def test_operators_and_finite_differences() -> None:
    x, bias, _ = (each.requires_grad_() for each in draw("gelu", 2, 3, dtype=torch.float64))
    torch.library.opcheck(_bias_gelu, (x, bias, True))
    torch.library.opcheck(_swiglu, (x, x.detach().clone().requires_grad_()))
    x_only, bias_only = x.detach(), bias.detach()
    torch.library.opcheck(_bias_gelu_backward, (x_only, x_only, bias_only, False), test_utils=SHORT)
    torch.library.opcheck(_swiglu_backward, (x_only, x_only, x_only), test_utils=SHORT)
    for name, (function, _) in OPERATIONS.items():
        inputs = (x, x.detach().flip(0).requires_grad_() if name == "swiglu" else bias)
        assert torch.autograd.gradcheck(partial(function, backend="triton"), inputs), name


def test_compiles_into_one_graph() -> None:
    x, bias, _ = draw("gelu", 5, 19)

    def both(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return swiglu(bias_gelu(x, bias, backend="triton"), x, backend="triton").sin().sum()

    gradients = []
    for function in (both, torch.compile(both, backend="aot_eager", fullgraph=True)):
        leaves = [each.clone().requires_grad_() for each in (x, bias)]
        gradients.append(torch.autograd.grad(function(*leaves), leaves))
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("dtype", dispatch.LIMITS, ids=str)
@pytest.mark.parametrize("name", ["bias_gelu", "swiglu"])
def test_the_trial_passes(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_trials", {})
    assert _trial(name, torch.device("cpu"), dtype) == ""
