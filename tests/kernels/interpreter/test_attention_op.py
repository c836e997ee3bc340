"""attention(backend="triton"): every option through the operator, opcheck, torch.compile, and the trial."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kernels import attention
from kernels.attention_operator import attend, attend_backward
from kernels.attention_trial import compare
from kernels.dispatch import why
from kernels.gpu.attention import dropout_keep
from kernels.reference import attention_mask, attention_with_options

STARTS = torch.tensor([0, 5, 21], dtype=torch.int32)
LENGTHS = torch.tensor([0, 13])
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window": 4},
    "causal window": {"causal": True, "window": 4},
    "soft cap": {"soft_cap": 2.0, "scale": 0.5},
    "lengths": {"key_lengths_B": LENGTHS},
    "documents": {"query_starts": STARTS, "causal": True},
    "dropout": {"dropout": 0.3, "seed": 11},
}


def draw(batch: int, length: int = 21, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """q, k, v, leaves of a graph, and the gradient of the output."""
    generator = torch.Generator().manual_seed(length)
    drawn = [torch.randn(batch, heads, length, 16, generator=generator).to(dtype) for heads in (4, 2, 2, 4)]
    return [*(each.requires_grad_() for each in drawn[:3]), drawn[3]]


@pytest.mark.parametrize("name", CASES)
def test_is_its_definition(name: str) -> None:
    options = dict(CASES[name])
    *leaves, grad = draw(1 if name == "documents" else 2)
    out, lse = attention(*leaves, backend="triton", return_lse=True, **options)
    masks = {each: options.pop(each) for each in tuple(options) if each in attention_mask.__kwdefaults__}
    seed = options.pop("seed", None)
    if seed is not None:
        options["keep"] = dropout_keep((2, 4, 21, 21), options["dropout"], torch.tensor(seed))
    truth, true_lse = attention_with_options(*leaves, attention_mask(21, 21, **masks), **options)
    mine = [out, lse.nan_to_num(neginf=0.0), *torch.autograd.grad(out, leaves, grad)]
    theirs = [truth, true_lse.nan_to_num(neginf=0.0), *torch.autograd.grad(truth, leaves, grad.double())]
    for what, a, b in zip(("out", "log-sum-exp", "dq", "dk", "dv"), mine, theirs, strict=True):
        error = (a.double() - b.double()).norm() / b.double().norm()
        assert error <= 5e-6, f"{what} is off by {error:.1e}"


@pytest.mark.parametrize("name", ["causal window", "dropout"])
def test_compiles_without_a_graph_break(name: str) -> None:
    torch._dynamo.reset()
    *leaves, grad = draw(1 if name == "documents" else 2)

    def block(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return attention(q * 2, k, v, backend="triton", **CASES[name]).sin()

    for function in (compiled := torch.compile(block, fullgraph=True, backend="aot_eager"), block):
        out = function(*leaves)
        results = [out.detach(), *torch.autograd.grad(out, leaves, grad)]
        if function is compiled:
            before = results
    torch.testing.assert_close(before, results, atol=1e-6, rtol=1e-6)


def test_operators_pass_opcheck() -> None:
    *leaves, grad = (each[:1, :1].detach().requires_grad_() for each in draw(1, 7))
    tensors, settings = (torch.tensor([3]), None, None, torch.tensor(3)), (0.3, True, 3, 2.0, 0.2, "triton")
    torch.library.opcheck(attend, (*leaves, *tensors, *settings))
    plain = [each.detach() for each in leaves]
    out, lse = attend(*plain, *tensors, *settings)
    torch.library.opcheck(attend_backward, (grad.detach(), *plain, out, lse, *tensors, *settings))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": True, "window": 2, "soft_cap": 2.0},
        {"key_lengths_B": torch.tensor([2]), "dropout": 0.4, "seed": 3},
        {"query_starts": torch.tensor([0, 1, 3]), "window": 1, "dropout": 0.2, "seed": 4},
    ],
    ids=["plain", "causal capped window", "lengths dropout", "documents window dropout"],
)
def test_gradcheck_in_fp64(options: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, heads, 3, 2) for heads in (2, 1, 1)]
    leaves = [torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_() for shape in shapes]
    assert torch.autograd.gradcheck(lambda *qkv: attention(*qkv, backend="triton", **options), leaves, fast_mode=True)


def test_is_named_only() -> None:
    q, k, v, _ = draw(2)
    assert why(attention, q, k, v, window=3, backend="triton") == "attention: triton, as asked"
    assert why(attention, q, k, v, window=3).startswith("attention: blocked, ")
    with pytest.raises(ValueError, match="'gluon' cannot do this: "):
        attention(q, k, v, backend="gluon")
    with pytest.raises(ValueError, match="'triton' cannot do this: heads of size 300"):
        attention(*(torch.randn(1, 1, 2, 300) for _ in range(3)), backend="triton")


@pytest.mark.parametrize("traits", [("causal", "window"), ("documents", "dropout", "soft cap")])
def test_the_trial_passes_what_is_right(traits: tuple[str, ...]) -> None:
    compare("triton", torch.device("cpu"), torch.float32, 16, traits)


def test_the_trial_catches_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    import kernels.gpu.attention as launchers

    right = launchers.backward

    def wrong(*arguments: Any, **named: Any) -> tuple[torch.Tensor, ...]:
        dq, dk, dv = right(*arguments, **named)
        return dq, dk * 1.02, dv

    monkeypatch.setattr(launchers, "backward", wrong)
    with pytest.raises(ArithmeticError, match="result 2 is off by"):  # output, dq, dk
        compare("triton", torch.device("cpu"), torch.float32, 16, ("causal",))
