"""Layer norm against its formula in fp64: odd widths, constant rows, gradients, fp32 statistics for bf16."""

from __future__ import annotations

import pytest
import torch

from kernels import layer_norm


def formula(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float = 1e-5) -> torch.Tensor:
    x, weight, bias = x.double(), weight.double(), bias.double()
    mean = x.mean(-1, keepdim=True)
    variance = (x - mean).square().mean(-1, keepdim=True)
    return (x - mean) / (variance + eps).sqrt() * weight + bias


def draw(*shape: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(sum(shape))
    sizes = (shape, shape[-1:], shape[-1:])
    return [torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes]


@pytest.mark.parametrize("shape", [(1, 1), (7, 3), (2, 5, 129), (257, 1023), (0, 8)])
def test_is_its_formula_with_gradients(shape: tuple[int, ...]) -> None:
    mine, truth = ([each.clone().requires_grad_() for each in draw(*shape)] for _ in range(2))
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    out, expected = layer_norm(*mine), formula(*truth)
    torch.testing.assert_close(out, expected, atol=1e-11, rtol=1e-11)
    out.backward(gradient)
    expected.backward(gradient)
    torch.testing.assert_close([x.grad for x in mine], [x.grad for x in truth], atol=1e-10, rtol=1e-10)


def test_a_constant_row_gives_the_bias() -> None:
    x = torch.full((3, 11), 1234.5)
    weight, bias = torch.full((11,), 2.0), torch.linspace(-1, 1, 11)
    torch.testing.assert_close(layer_norm(x, weight, bias), bias.expand(3, 11))


def test_eps_is_used_as_given() -> None:
    x, weight, bias = draw(4, 6)
    torch.testing.assert_close(layer_norm(x, weight, bias, 0.5), formula(x, weight, bias, 0.5))


def test_bf16_keeps_its_dtype_and_statistics_of_fp32() -> None:
    """With a mean of 100, statistics in bf16 (step 0.5 there) would be wrong by tenths."""
    x, weight, bias = (each.bfloat16() for each in draw(5, 1023))
    x = x + 100
    out = layer_norm(x, weight, bias)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), formula(x, weight, bias), atol=2e-2, rtol=1e-2)


def test_strided_input() -> None:
    x, weight, bias = draw(9, 4, 7)
    turned = x.transpose(0, 1)
    torch.testing.assert_close(layer_norm(turned, weight, bias), layer_norm(turned.contiguous(), weight, bias))
