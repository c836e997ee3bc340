"""The Triton norms, interpreted, against the fp64 definitions: values, every gradient, the operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from kernels import dispatch, reference
from kernels.gpu.norm import WIDEST, tile_of
from kernels.norm import _norm, _norm_backward, _trial, layer_norm, rms_norm

CLOSE = 5e-6  # relative error allowed to fp32
NORMS = (layer_norm, rms_norm)
SHORT = ("test_schema", "test_faketensor")  # of opcheck; what needs no gradient


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """x, residual, weight, bias, and the gradients of both outputs."""
    generator = torch.Generator().manual_seed(sum(shape))
    shapes = (shape, shape, shape[-1:], shape[-1:], shape, shape)
    return [torch.randn(each, generator=generator, dtype=torch.float64).to(dtype) for each in shapes]


def run(norm: Any, tensors: list[torch.Tensor], residual: bool, plain: bool = False, **options: Any) -> list[Any]:
    """Outputs, then gradients of x, residual, weight and bias as far as there are such."""
    x, second, weight, bias = (each.detach().clone().requires_grad_() for each in tensors[:4])
    affine = (weight, bias) if norm is layer_norm else (weight,)
    leaves = [x, *([second] if residual else []), *affine]
    if plain:  # what is normalised is the sum as it was rounded for the caller
        total = x + second if residual else x
        rounded = (total.to(tensors[0].dtype) - total).detach() + total
        out = getattr(reference, norm.__name__)(rounded, *affine)
        outputs = [out, total] if residual else [out]
    else:
        result = norm(x, *affine, residual=second if residual else None, **options)
        outputs = list(result) if residual else [result]
    above = [each.to(out.dtype) for each, out in zip(tensors[4:], outputs, strict=False)]
    return [each.detach() for each in (*outputs, *torch.autograd.grad(outputs, leaves, above))]


def errors(norm: Any, tensors: list[torch.Tensor], residual: bool, **options: Any) -> list[float]:
    """Relative, by norm."""
    mine = run(norm, tensors, residual, **options)
    truth = run(norm, [each.double() for each in tensors], residual, plain=True)
    return [float((a.double() - b).norm() / b.norm().clamp(min=1e-3)) for a, b in zip(mine, truth, strict=True)]


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", [(7, 3), (131, 7), (2, 5, 129), (3, 1023), (300, 64), (2, 4099)])
def test_values_and_gradients(shape: tuple[int, ...], norm: Callable[..., Any], residual: bool) -> None:
    found = errors(norm, draw(*shape), residual, backend="triton")
    assert max(found) <= CLOSE, found


def test_a_single_element_is_the_bias_and_has_no_gradient() -> None:
    tensors = draw(5, 1)
    out, dx, _, _ = run(layer_norm, tensors, False, backend="triton")
    assert torch.equal(out, tensors[3].expand(5, 1))
    assert torch.count_nonzero(dx) == 0
    assert max(errors(rms_norm, tensors, False, backend="triton")) <= 1e-3  # its gradient is eps times x^-3


def test_the_widest_row() -> None:
    assert max(errors(layer_norm, draw(2, WIDEST - 1), True, backend="triton")) <= CLOSE


def test_fp64_is_exact() -> None:
    for norm in NORMS:
        assert max(errors(norm, draw(5, 37, dtype=torch.float64), True, backend="triton")) <= 1e-14


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_good_as_torch(dtype: torch.dtype, norm: Callable[..., Any]) -> None:
    """No more than twice the error of torch in the same dtype."""
    tensors = draw(67, 129, dtype=dtype)
    mine, torchs = (errors(norm, tensors, True, backend=backend) for backend in ("triton", "torch"))
    assert all(own <= 2 * other + 1e-6 for own, other in zip(mine, torchs, strict=True)), (mine, torchs)


def test_a_large_mean_costs_no_digits() -> None:
    """A variance from E[x^2] - E[x]^2 would have none left."""
    tensors = draw(9, 257)
    tensors[0] += 1000
    assert errors(layer_norm, tensors, False, backend="triton")[0] <= 5e-5  # x itself is rounded to 6e-8 * 1000


def test_weights_of_another_dtype() -> None:
    x, residual, weight, bias, *above = draw(5, 33)
    found = errors(layer_norm, [x.bfloat16(), residual.bfloat16(), weight, bias, *above], True, backend="triton")
    assert max(found) <= 5e-3, found


def test_strides() -> None:
    """Rows with a stride, columns with one, and gradients without memory of their own."""
    base, _, weight, bias, *_ = draw(6, 10, 40)
    for x in (base[:, :, :17], base[..., ::2], base.transpose(0, 1)):
        d = x.shape[-1]
        mine, plain = (layer_norm(x, weight[:d], bias[:d], backend=each) for each in ("triton", "torch"))
        torch.testing.assert_close(mine, plain, atol=2e-6, rtol=2e-6)
    leaf = base.clone().requires_grad_()
    layer_norm(leaf, weight, bias, backend="triton").sum().backward()
    other = base.clone().requires_grad_()
    layer_norm(other, weight, bias, backend="torch").sum().backward()
    torch.testing.assert_close(leaf.grad, other.grad, atol=2e-6, rtol=1e-5)


def test_only_the_sum_is_used() -> None:
    x, residual, weight, *_ = draw(3, 8)
    leaf = x.requires_grad_()
    rms_norm(leaf, weight, residual=residual, backend="triton")[1].sum().backward()
    assert torch.equal(leaf.grad, torch.ones_like(x))


def test_no_rows() -> None:
    x, _, weight, bias, *_ = draw(0, 8)
    weight.requires_grad_()
    out = layer_norm(x, weight, bias, backend="triton")
    out.sum().backward()
    assert out.shape == (0, 8)
    assert torch.equal(weight.grad, torch.zeros(8))


def test_repeats_bit_for_bit_and_rows_do_not_mix() -> None:
    tensors = draw(150, 70)
    first, second = (run(layer_norm, tensors, True, backend="triton") for _ in range(2))
    assert all(map(torch.equal, first, second))
    order = torch.randperm(150, generator=torch.Generator().manual_seed(0))
    turned = [each[order] if each.ndim == 2 else each for each in tensors]
    for before, after in zip(first[:4], run(layer_norm, turned, True, backend="triton")[:4], strict=True):
        assert torch.equal(before[order], after)


@pytest.mark.parametrize("norm", NORMS)
def test_more_rows_change_no_row_and_equal_rows_count_twice(norm: Callable[..., Any]) -> None:
    """Rows behind a tile's end are another program's: outputs and dx keep their bits."""
    tensors = draw(61, 65)
    alone = run(norm, tensors, True, backend="triton")
    twice = run(norm, [torch.cat([each, each]) if each.ndim == 2 else each for each in tensors], True, backend="triton")
    for a, b in zip(alone[:4], twice[:4], strict=True):
        assert torch.equal(torch.cat([a, a]), b)
    for a, b in zip(alone[4:], twice[4:], strict=True):
        torch.testing.assert_close(2 * a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("norm", NORMS)
def test_a_scale_of_100_falls_out(norm: Callable[..., Any]) -> None:
    tensors = draw(7, 1023)
    larger = [tensors[0] * 100, *tensors[1:]]
    assert max(errors(norm, larger, False, backend="triton")) <= CLOSE
    (out, dx, *_), (larger_out, larger_dx, *_) = (
        run(norm, each, False, backend="triton") for each in (tensors, larger)
    )
    torch.testing.assert_close(out, larger_out, atol=1e-4, rtol=1e-4)  # but for eps
    torch.testing.assert_close(dx, 100 * larger_dx, atol=1e-4, rtol=1e-4)


def test_every_width_has_a_tile() -> None:
    for columns in (1, 2, 63, 64, 1152, 4097, WIDEST):
        tile = tile_of(columns)
        assert tile.width >= columns
        assert 1 <= tile.warps <= 16
        assert tile.rows * tile.width <= max(4096, tile.width)


def test_operators_and_finite_differences() -> None:
    x, residual, weight, bias, *_ = (each.requires_grad_() for each in draw(2, 3, dtype=torch.float64))
    torch.library.opcheck(_norm, (x, residual, weight, bias, 1e-5))
    torch.library.opcheck(_norm, (x.detach(), None, weight.detach(), None, 1e-5), test_utils=SHORT)
    assert torch.autograd.gradcheck(
        lambda *four: layer_norm(four[0], *four[2:], residual=four[1], backend="triton"), (x, residual, weight, bias)
    )
    assert torch.autograd.gradcheck(lambda *two: rms_norm(*two, backend="triton"), (x, weight))
    assert torch.autograd.gradcheck(
        lambda x, residual, weight: rms_norm(x, weight, residual=residual, backend="triton"), (x, residual, weight)
    )
    plain = [each.detach() for each in (x, x, x, weight, bias)]
    torch.library.opcheck(_norm_backward, (*plain, torch.ones(2, 2, dtype=torch.float64)), test_utils=SHORT)


def test_compiles_into_one_graph() -> None:
    tensors = draw(5, 19)[:4]

    def twice(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        out, total = layer_norm(x, weight, bias, residual=residual, backend="triton")
        return rms_norm(out, weight, backend="triton").sin().sum() + total.cos().sum()

    gradients = []
    for function in (twice, torch.compile(twice, backend="aot_eager", fullgraph=True)):
        leaves = [each.clone().requires_grad_() for each in tensors]
        gradients.append(torch.autograd.grad(function(*leaves), leaves))
    torch.testing.assert_close(*gradients)


def test_the_trial_passes_and_would_catch_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    import kernels.gpu.norm as gpu

    cpu = torch.device("cpu")
    monkeypatch.setattr(dispatch, "_trials", {})
    assert _trial(cpu, torch.bfloat16) == _trial(cpu, torch.float16) == _trial(cpu, torch.float32) == ""
    monkeypatch.setattr(dispatch, "_trials", {})
    right = gpu.backward
    monkeypatch.setattr(gpu, "backward", lambda *arguments: [2 * each for each in right(*arguments)])
    with pytest.warns(UserWarning, match="plain torch is used instead"):
        assert "is off by" in _trial(cpu, torch.float32)
