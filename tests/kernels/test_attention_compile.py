"""The operator weft::attention to torch: opcheck, torch.compile without a graph break, changing shapes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from kernels import attention
from kernels.attention_operator import attend, attend_backward

LENGTHS, STARTS = torch.tensor([3, 7]), torch.tensor([0, 3, 9], dtype=torch.int32)
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "lengths": {"key_lengths_B": LENGTHS},
    "causal and lengths": {"key_lengths_B": LENGTHS, "causal": True},
    "window": {"window": 3, "causal": True},
    "soft cap": {"soft_cap": 3.0, "return_lse": True},
    "seed": {"dropout": 0.3, "seed": 7},
    "seed in a tensor": {"dropout": 0.3, "seed": torch.tensor(7)},
    "seed drawn": {"dropout": 0.3},
    "documents": {"query_starts": STARTS},
    "blocked": {"backend": "blocked"},
}


def draw(batch: int, length: int = 9) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(length)
    return [torch.randn(batch, heads, length, 8, generator=generator).requires_grad_() for heads in (4, 2, 2)]


def block(options: dict[str, Any]) -> Any:
    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        result = attention(q * 2, k, v, **options)
        return result[0].sin() + result[1][..., None] if isinstance(result, tuple) else result.sin()

    return run


def assert_same(compiled: Any, plain: Any, leaves: list[torch.Tensor]) -> None:
    results = []
    for function in (compiled, plain):
        torch.manual_seed(0)
        out = function(*leaves)
        results.append([out.detach(), *torch.autograd.grad(out.sum(), leaves)])
    torch.testing.assert_close(*results, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("name", CASES)
def test_compiles_without_a_graph_break(name: str) -> None:
    torch._dynamo.reset()
    function = block(CASES[name])
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert_same(compiled, function, draw(1 if name == "documents" else 2))


def test_inductor_compiles_the_operator() -> None:
    torch._dynamo.reset()
    function = block(CASES["window"])
    assert_same(torch.compile(function, fullgraph=True), function, draw(2))


@pytest.mark.parametrize("name", ["causal", "window"])
def test_one_compilation_serves_all_lengths(name: str) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    function = block(CASES[name])
    compiled = torch.compile(function, fullgraph=True, backend=counter, dynamic=True)
    assert_same(compiled, function, draw(2, 9))
    once = counter.frame_count
    for length in (17, 130):
        assert_same(compiled, function, draw(2, length))
    assert counter.frame_count == once


@pytest.mark.parametrize(
    ("tensors", "settings"),
    [
        ((None, None, None, None), (0.3, True, 0, 0.0, 0.0, "blocked")),
        ((LENGTHS, None, None, None), (0.3, True, 3, 2.0, 0.0, "blocked")),
        ((None, STARTS, STARTS, torch.tensor(3)), (0.3, False, 4, 0.0, 0.4, "blocked")),
    ],
)
def test_operators_pass_opcheck(tensors: tuple[torch.Tensor | None, ...], settings: tuple[Any, ...]) -> None:
    leaves = draw(1 if tensors[1] is not None else 2)
    torch.library.opcheck(attend, (*leaves, *tensors, *settings))
    plain = [each.detach() for each in leaves]
    out, lse = attend(*plain, *tensors, *settings)
    torch.library.opcheck(attend_backward, (torch.ones_like(out), *plain, out, lse, *tensors, *settings))


def test_outputs_are_laid_out_as_the_inputs() -> None:
    """As register_fake promises, whatever the strides; for the outputs and for the gradients."""
    packed = torch.randn(9, 2, 4, 3 * 8)
    leaves = [each.permute(1, 2, 0, 3).detach().requires_grad_() for each in packed.split(8, -1)]
    nothing = (None, None, None, None)
    settings = (0.3, True, 0, 0.0, 0.0, "blocked")
    torch.library.opcheck(attend, (*leaves, *nothing, *settings))
    scattered = [each.detach().mT.contiguous().mT.requires_grad_() for each in leaves]  # elements of a head, that is
    torch.library.opcheck(attend, (*scattered, *nothing, *settings))
    assert attend(*scattered, *nothing, *settings)[0].is_contiguous()
    out = attention(*leaves, causal=True, window=4)
    assert out.permute(2, 0, 1, 3).is_contiguous()
    # a view of the [S, B, H, K] that the next layer wants: no copy
    assert out.permute(2, 0, 1, 3).flatten(2).data_ptr() == out.data_ptr()


def test_log_sum_exp_carries_no_gradient() -> None:
    _, lse = attention(*draw(2), return_lse=True)
    assert lse.shape == (2, 4, 9)
    assert lse.dtype == torch.float32
    assert not lse.requires_grad


def test_a_second_derivative_is_an_error() -> None:
    leaves = draw(1)
    out = attention(*leaves, window=3)
    (dq,) = torch.autograd.grad(out.sum(), leaves[:1], create_graph=True)
    with pytest.raises(RuntimeError, match=r"no autograd formula|does not require grad"):
        dq.sum().backward()
