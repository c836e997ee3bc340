"""The Triton rotary kernel, interpreted, against the fp64 definition: pairings, layouts, gradients, the operator."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kernels import dispatch, reference
from kernels.rotary import _rotary, _trial, angles, rotary

CLOSE = 5e-6  # relative error allowed to fp32


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64).to(dtype)


def errors(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, backend: str = "triton", **options: Any
) -> list[float]:
    """Of the output and of the gradient of x, relative by norm."""
    above = draw(*x.shape).to(x.dtype)
    results = []
    for function, leaf, more in ((rotary, x, {"backend": backend}), (reference.rotary, x.double(), {})):
        leaf = leaf.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        out = function(leaf, cos, sin, **options, **more)
        results.append([out.detach(), *torch.autograd.grad(out, leaf, above.to(out.dtype))])
    return [float((a.double() - b).norm() / b.norm()) for a, b in zip(*results, strict=True)]


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    ("shape", "pairs"),
    [
        ((1, 1, 1, 2), 1),
        ((2, 3, 7, 64), 32),
        ((1, 5, 131, 72), 36),
        ((2, 1, 17, 80), 20),
        ((1, 9, 40, 13), 5),
        ((1, 2, 3, 256), 128),
        ((1, 3, 1023, 96), 48),
        ((1, 4, 33, 128), 64),
    ],
)
def test_values_and_gradients(shape: tuple[int, ...], pairs: int, interleaved: bool) -> None:
    found = errors(draw(*shape), *angles(torch.arange(shape[2]), pairs), interleaved=interleaved)
    assert max(found) <= CLOSE, found


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_good_as_torch(dtype: torch.dtype, interleaved: bool) -> None:
    """No more than twice the error of torch in the same dtype."""
    x, table = draw(2, 3, 33, 64, dtype=dtype), angles(torch.arange(33), 32)
    mine, torchs = (errors(x, *table, backend, interleaved=interleaved) for backend in ("triton", "torch"))
    assert all(own <= 2 * other for own, other in zip(mine, torchs, strict=True)), (mine, torchs)


def test_fp64_is_exact() -> None:
    table = angles(torch.arange(19), 8, dtype=torch.float64)
    assert max(errors(draw(1, 2, 19, 20, dtype=torch.float64), *table)) <= 1e-14


def test_positions_by_sample() -> None:
    positions = torch.tensor([[0, 1, 2, 3], [7, 3, 0, 0], [5, 5, 1, 2]])
    table = angles(positions, 8)
    assert max(errors(draw(3, 5, 4, 24), *table)) <= CLOSE
    one_by_one = [rotary(draw(3, 5, 4, 24)[b : b + 1], *angles(positions[b], 8), backend="triton") for b in range(3)]
    assert torch.equal(rotary(draw(3, 5, 4, 24), *table, backend="triton"), torch.cat(one_by_one))


def test_layouts() -> None:
    """As projections leave it, a third of one product, elements apart, heads that share memory."""
    table = angles(torch.arange(6), 4)
    heads_inside = draw(2, 6, 3, 8).transpose(1, 2)
    thirds = draw(2, 6, 3, 3, 8)[:, :, 1].transpose(1, 2)
    for x in (
        heads_inside,
        thirds,
        draw(2, 3, 8, 6).mT,
        draw(2, 3, 6, 16)[..., ::2],
        draw(2, 1, 6, 8).expand(2, 3, 6, 8),
    ):
        mine, plain = (rotary(x, *table, backend=each) for each in ("triton", "torch"))
        torch.testing.assert_close(mine, plain, atol=1e-6, rtol=1e-6)
    assert rotary(heads_inside, *table, backend="triton").stride() == heads_inside.stride()


def test_turning_back_gives_the_input() -> None:
    x, (cos, sin) = draw(1, 4, 21, 72), angles(torch.arange(21), 18)
    for interleaved in (False, True):
        there = rotary(x, cos, sin, interleaved=interleaved, backend="triton")
        torch.testing.assert_close(rotary(there, cos, -sin, interleaved=interleaved, backend="triton"), x)
        assert torch.equal(there[..., 36:], x[..., 36:])


@pytest.mark.parametrize("interleaved", [False, True])
def test_rows_heads_and_samples_do_not_mix(interleaved: bool) -> None:
    """Mixed up with their angles, and with more behind them, each gives the same bits; the length of a pair stays."""
    x, (cos, sin) = draw(2, 5, 67, 24), angles(torch.arange(67), 12)
    out = rotary(x, cos, sin, interleaved=interleaved, backend="triton")
    rows, heads = (torch.randperm(n, generator=torch.Generator().manual_seed(n)) for n in (67, 5))
    mixed = x.flip(0)[:, heads][:, :, rows]
    turned = rotary(mixed, cos[rows], sin[rows], interleaved=interleaved, backend="triton")
    assert torch.equal(out.flip(0)[:, heads][:, :, rows], turned)
    fewer = rotary(x[:1, :3, :41], cos[:41], sin[:41], interleaved=interleaved, backend="triton")
    assert torch.equal(out[:1, :3, :41], fewer)
    torch.testing.assert_close(out.norm(dim=-1), x.norm(dim=-1), atol=1e-5, rtol=1e-5)
    assert max(errors(x * 100, cos, sin, interleaved=interleaved)) <= CLOSE


def test_nothing_to_do() -> None:
    assert rotary(torch.empty(0, 2, 3, 8), *angles(torch.arange(3), 4), backend="triton").shape == (0, 2, 3, 8)


def test_angles_that_want_a_gradient_are_refused() -> None:
    cos, sin = angles(torch.arange(3), 4)
    with pytest.raises(ValueError, match="the angles require a gradient"):
        rotary(draw(1, 1, 3, 8), cos.requires_grad_(), sin, backend="triton")


def test_operator_and_finite_differences() -> None:
    x = draw(1, 1, 2, 3, dtype=torch.float64).requires_grad_()
    table = angles(torch.arange(2), 1, dtype=torch.float64)
    torch.library.opcheck(_rotary, (x, *table, True, False))
    for interleaved in (False, True):

        def turned(x: torch.Tensor, interleaved: bool = interleaved) -> torch.Tensor:
            return rotary(x, *table, interleaved=interleaved, backend="triton")

        assert torch.autograd.gradcheck(turned, (x,))
    assert torch.autograd.gradgradcheck(lambda x: rotary(x, *table, backend="triton"), (x,))


def test_compiles_into_one_graph() -> None:
    x, table = draw(2, 3, 5, 8), angles(torch.arange(5), 4)

    def turned(x: torch.Tensor) -> torch.Tensor:
        return rotary(x, *table, backend="triton").sin().sum()

    gradients = []
    for function in (turned, torch.compile(turned, backend="aot_eager", fullgraph=True)):
        leaf = x.clone().requires_grad_()
        gradients.append(torch.autograd.grad(function(leaf), leaf))
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("dtype", dispatch.LIMITS, ids=str)
def test_the_trial_passes(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_trials", {})
    assert _trial(torch.device("cpu"), dtype) == ""
