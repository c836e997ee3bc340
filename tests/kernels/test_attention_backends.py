"""Which backend attention runs and why, what each refuses, the errors, and what the blocked one keeps in memory."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import attention, attention_blocked, attention_sdpa, attention_trial, reference
from kernels.attention_spec import Spec
from kernels.dispatch import why

public = importlib.import_module("kernels.attention")  # `kernels.attention` is the function
Q, K, V = (torch.randn(1, 2, 6, 4) for _ in range(3))
STARTS, LENGTH = torch.tensor([0, 2, 6]), torch.tensor([3])


@pytest.mark.parametrize(
    ("options", "backend", "reason"),
    [
        ({}, "sdpa", "the preferred one"),
        ({"causal": True, "scale": 0.3}, "sdpa", "the preferred one"),
        ({"key_lengths_B": torch.tensor([3])}, "sdpa", "the preferred one"),
        ({"key_lengths_B": torch.tensor([3]), "causal": True}, "blocked", "a mask of B x Q x S"),
        ({"window": 3}, "blocked", "takes no window"),
        ({"soft_cap": 3.0}, "blocked", "takes no soft cap"),
        ({"query_starts": STARTS}, "blocked", "takes no packed documents"),
        ({"dropout": 0.5, "seed": 3}, "blocked", "not from a seed"),
        ({"return_lse": True}, "blocked", "returns no log-sum-exp"),
        ({"backend": "blocked"}, "blocked", "as asked"),
    ],
    ids=str,
)
def test_choice_on_cpu(options: dict[str, Any], backend: str, reason: str) -> None:
    line = why(attention, Q, K, V, **options)
    assert line.startswith(f"attention: {backend}, ")
    assert reason in line
    attention(Q, K, V, **options)
    assert line in why()


@pytest.mark.parametrize("backend", ["cudnn", "flash", "efficient"])
@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({}, "it needs a GPU"),
        ({"window": 3}, "no window"),
        ({"soft_cap": 3.0}, "no soft cap"),
        ({"query_starts": STARTS}, "no packed documents"),
        ({"dropout": 0.5}, "not from a seed"),
        ({"return_lse": True}, "no log-sum-exp"),
    ],
    ids=str,
)
def test_a_named_backend_that_cannot_says_why(backend: str, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=f"backend '{backend}' cannot do this: .*{reason}"):
        attention(Q, K, V, backend=backend, **options)


def test_triton_and_gluon_need_a_gpu() -> None:
    for backend in ("triton", "gluon"):
        with pytest.raises(ValueError, match=r"Triton needs a GPU|triton is not installed"):
            attention(Q, K, V, backend=backend)
    with pytest.raises(ValueError, match="'tritton' is none of auto, blocked, cudnn"):
        attention(Q, K, V, backend="tritton")


def test_to_ask_why_draws_no_seed() -> None:
    torch.manual_seed(0)
    why(attention, Q, K, V, dropout=0.5)
    after = torch.rand(())
    torch.manual_seed(0)
    assert torch.equal(after, torch.rand(()))


# --- on a GPU, with tensors that only pretend


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """A trusted Hopper GPU, on which torch's kernels take whatever our own reasons let through."""
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(public, "trust", lambda *facts: "")
    monkeypatch.setattr(attention_sdpa, "torchs_word", lambda *facts: "")
    with FakeTensorMode():
        yield monkeypatch


def on_gpu(dtype: torch.dtype = torch.bfloat16, queries: int = 64) -> list[torch.Tensor]:
    return [torch.empty(1, 2, length, 64, device="cuda", dtype=dtype) for length in (queries, 64, 64)]


def chosen(*tensors: torch.Tensor, **options: Any) -> str:
    return why(attention, *tensors, **options).removeprefix("attention: ").split(",")[0]


def test_order_on_a_gpu(pretend: pytest.MonkeyPatch) -> None:
    qkv = on_gpu()
    assert chosen(*qkv) == chosen(*qkv, causal=True) == "cudnn"
    starts = torch.empty(3, device="cuda", dtype=torch.int32)
    lengths = torch.empty(1, device="cuda", dtype=torch.int64)
    for options in (
        {"window": 5}, {"soft_cap": 5.0}, {"dropout": 0.1}, {"return_lse": True}, {"query_starts": starts},
        {"key_lengths_B": lengths}, {"key_lengths_B": lengths, "causal": True},
    ):  # fmt: skip
        # plain log-sum-exp is the one thing of these that the Gluon kernel has too
        assert chosen(*qkv, **options) == "triton", options
    assert chosen(*on_gpu(queries=32), causal=True) == "triton"  # torch would align it to the top left
    assert chosen(qkv[0].mT, *qkv[1:]) == "triton"  # elements of a head do not lie side by side
    assert chosen(*on_gpu(torch.float32)) == "efficient"
    assert chosen(*on_gpu(queries=1)) == "flash"  # cuDNN's backward of one query has given nan
    assert chosen(*on_gpu(torch.float64)) == "sdpa"  # ours were compiled for up to 32 bits there
    with pytest.raises(ValueError, match=r"backend 'triton' cannot do this: torch.float64 on a GPU"):
        chosen(*on_gpu(torch.float64), backend="triton")
    pretend.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    assert chosen(*qkv) == "flash"


def test_what_fails_its_trial_is_left_out_of_auto(pretend: pytest.MonkeyPatch) -> None:
    pretend.setattr(public, "trust", lambda backend, *facts: f"its trial failed, {facts[-1]}")
    qkv = on_gpu()
    line = why(attention, *qkv, causal=True)
    assert line.startswith(
        "attention: sdpa, the first that can (cudnn: its trial failed, ('causal',); flash: its trial"
    )
    shared = [torch.empty(1, heads, 64, 64, device="cuda", dtype=torch.bfloat16) for heads in (2, 1, 1)]
    assert "cudnn: its trial failed, ('shared keys',); " in why(attention, *shared)
    assert chosen(*qkv, backend="cudnn") == "cudnn"
    line = why(attention, *qkv, window=5, causal=True)
    assert line.startswith("attention: blocked, the first that can")
    assert "triton: its trial failed, ('causal', 'window')" in line
    assert chosen(*qkv, key_lengths_B=torch.empty(1, device="cuda", dtype=torch.int64)) == "sdpa"
    assert chosen(*qkv, window=5, backend="triton") == "triton"  # who names it wants it


@pytest.mark.parametrize("backend", attention_sdpa.FUSED)
def test_the_trial_of_torchs_kernels(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    """A nan of cuDNN's, where a log-sum-exp is far below 0, would be found; what is right passes, in all dtypes."""
    cpu = torch.device("cpu")

    def by_math(_: str, *qkv_spec: Any) -> torch.Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return run("sdpa", *qkv_spec)

    run, truth = attention_sdpa.run, reference.attention_with_options
    monkeypatch.setattr(attention_sdpa, "run", by_math)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for traits in ((), ("causal",), ("shared keys",)):
            attention_trial.compare(backend, cpu, dtype, 64, traits)
    low: list[float] = []

    def seen(*arguments: Any, **named: Any) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = truth(*arguments, **named)
        low.append(float(lse.detach().max()))
        return out, lse

    def spoiled(_: str, q: torch.Tensor, *rest: Any) -> torch.Tensor:
        return by_math("", q, *rest) * (1 + 0 * (q * torch.inf).sum()).detach()

    monkeypatch.setattr(reference, "attention_with_options", seen)
    monkeypatch.setattr(attention_sdpa, "run", spoiled)
    with pytest.raises(ArithmeticError, match="result 0 is off by nan"):
        attention_trial.compare(backend, cpu, torch.bfloat16, 64, ())
    assert max(low) < -100


def test_a_mask_never_goes_to_cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its backward has given nan (pytorch #196678)."""
    enabled: list[tuple[bool, ...]] = []

    def look(q: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        cuda = torch.backends.cuda
        on = cuda.cudnn_sdp_enabled, cuda.flash_sdp_enabled, cuda.mem_efficient_sdp_enabled, cuda.math_sdp_enabled
        enabled.append(tuple(each() for each in on))
        return q

    monkeypatch.setattr(F, "scaled_dot_product_attention", look)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    attention_sdpa.run("sdpa", Q, K, V, Spec(0.5), torch.tensor([3]))
    attention_sdpa.run("sdpa", Q[:, :, 3:], K, V, Spec(0.5, causal=True), None)
    assert enabled == [(False, True, True, True)] * 2
    attention_sdpa.run("sdpa", Q, K, V, Spec(0.5, causal=True), None)
    assert enabled[2] == (True, True, True, True)


def test_a_choice_among_torchs_kernels_compiles_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """That around a masked call, entered as on a GPU."""

    def chosen() -> Any:
        return sdpa_kernel(attention_sdpa.WITH_MASK)

    monkeypatch.setattr(attention_sdpa, "contextlib", SimpleNamespace(nullcontext=chosen))

    def masked(q: torch.Tensor) -> torch.Tensor:
        return attention_sdpa.run("sdpa", q, K, V, Spec(0.5), LENGTH)

    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(masked, fullgraph=True, backend="aot_eager")(Q), masked(Q))


def test_torchs_word_is_a_reason(pretend: pytest.MonkeyPatch) -> None:
    pretend.setattr(attention_sdpa, "torchs_word", lambda backend, *facts: "torch: old" if backend == "cudnn" else "")
    assert why(attention, *on_gpu()) == "attention: flash, the first that can (cudnn: torch: old)"


def test_torchs_word_where_there_is_no_gpu() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    facts = (torch.device("cpu"), torch.float32, 64, True, False)
    assert all(attention_sdpa.torchs_word(backend, *facts).startswith("torch") for backend in attention_sdpa.FUSED)


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def test_deterministic_mode(pretend: pytest.MonkeyPatch, deterministic: None) -> None:
    assert "cudnn: deterministic mode: its backward adds in no fixed order" in why(attention, *on_gpu())
    assert chosen(*on_gpu()) == "flash"
    with pytest.raises(ValueError, match="'cudnn' cannot do this: deterministic mode"):
        attention(*on_gpu(), backend="cudnn")


@pytest.mark.parametrize("options", [{}, {"causal": True, "window": 3}, {"dropout": 0.3, "seed": 1}], ids=str)
def test_runs_are_bit_equal_in_deterministic_mode(deterministic: None, options: dict[str, Any]) -> None:
    results = []
    for _ in range(3):
        leaves = [each.clone().requires_grad_() for each in (Q, K, V)]
        out = attention(*leaves, **options)
        results.append([out.detach(), *torch.autograd.grad(out.sum(), leaves)])
    for again in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], again, strict=True))


# --- errors


@pytest.mark.parametrize(
    ("tensors", "options", "reason"),
    [
        ((Q[0], K, V), {}, r"need q \[B, H, Q, K\]"),
        ((Q, K, V[:, :, :3]), {}, r"need q \[B, H, Q, K\]"),
        ((Q, K[..., :3], V[..., :3]), {}, r"need q \[B, H, Q, K\]"),
        ((Q[:, :1], K, V), {}, "H a multiple of G"),
        ((Q, K, V), {"window": 0}, "window is 0: it must be 1 or more"),
        ((Q, K, V), {"soft_cap": 0.0}, "soft_cap is 0.0: it must be positive"),
        ((Q, K, V), {"dropout": 1.0}, "dropout is 1.0: it must be at least 0 and below 1"),
        ((Q, K, V), {"dropout": 0.5, "seed": torch.tensor(0.5)}, "seed is torch.float32"),
        ((Q, K, V), {"key_lengths_B": torch.tensor([1, 2])}, "2 key lengths for a batch of 1"),
        ((Q, K, V), {"key_lengths_B": torch.tensor([1.0])}, "need a vector of int32 or int64"),
        ((Q, K, V), {"key_lengths_B": torch.tensor([1]), "query_starts": STARTS}, "leave the unseen keys out"),
        ((Q, K, V), {"key_starts": STARTS}, "key_starts without query_starts"),
        ((Q, K, V), {"query_starts": STARTS, "key_starts": STARTS[1:]}, "need one more than there are documents"),
        ((Q, K, V), {"query_starts": STARTS[:1]}, "need one more than there are documents"),
        ((Q, K, V), {"query_starts": torch.tensor([0, 4, 2])}, r"query_starts \[0, 4, 2\] must rise from 0 to 6"),
        ((Q, K, V), {"query_starts": torch.tensor([0, 7])}, r"query_starts \[0, 7\] must rise from 0 to 6"),
        (
            (Q.expand(2, -1, -1, -1), K.expand(2, -1, -1, -1), V.expand(2, -1, -1, -1)),
            {"query_starts": STARTS},
            "B is 2",
        ),
        ((Q, K.double(), V), {"window": 3}, "need one dtype"),
        ((Q.int(), K.int(), V.int()), {"window": 3}, "need a floating dtype"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_errors_say_what_is_wrong(tensors: tuple[torch.Tensor, ...], options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        attention(*tensors, **options)


@pytest.mark.parametrize("options", [{}, {"window": 3, "causal": True}, {"soft_cap": 3.0}], ids=str)
def test_under_autocast_every_backend_takes_what_torchs_does(options: dict[str, Any]) -> None:
    """A norm leaves q and k in fp32 there, and v comes from a linear layer (diffusers #14104, xformers #1046)."""
    half = [each.bfloat16() for each in (Q, K, V)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = attention(half[0].float(), half[1].float(), half[2], **options)
    assert mixed.dtype == torch.bfloat16
    torch.testing.assert_close(mixed, attention(*half, **options), atol=0, rtol=0)


# --- memory


class Largest(TorchDispatchMode):
    """The largest tensor that any operation makes, in bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for each in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(each, torch.Tensor):
                self.bytes = max(self.bytes, each.numel() * each.element_size())
        return result


@pytest.mark.parametrize(
    ("spec", "limit"),
    [
        (Spec(0.5, causal=True), attention_blocked.BLOCK_BYTES),
        (Spec(0.5, soft_cap=5.0), attention_blocked.BLOCK_BYTES),
        # a window holds what it sees: a block of rows and the keys of its window, for as many heads as fit
        (Spec(0.5, causal=True, window=64), attention_blocked.BLOCK_BYTES),
    ],
    ids=str,
)
def test_blocked_makes_no_matrix_of_queries_and_keys(spec: Spec, limit: int) -> None:
    """2 x 2048 x 3000 scores are 49 MB."""
    q, grad = (torch.randn(1, 2, 2048, 4) for _ in range(2))
    k, v = (torch.randn(1, 1, 3000, 4) for _ in range(2))
    with Largest() as forward:
        out, lse = attention_blocked.forward(q, k, v, spec)
    with Largest() as backward:
        attention_blocked.backward(grad, q, k, v, out, lse, spec)
    assert max(forward.bytes, backward.bytes) <= limit
    assert forward.bytes > q.numel() * 4  # it has seen the scores


def test_blocks_on_a_gpu_are_worth_their_launches() -> None:
    """16 x 16 heads of 4096 queries and keys: a block has 256 MiB of scores there, and 8 MiB on a CPU."""

    def count(device: str) -> int:
        q = torch.empty(16, 16, 1, 4096, 128, device=device)
        whole = attention_blocked.Segment(slice(0, 16), slice(0, 4096), slice(0, 4096), 0)
        return len(list(attention_blocked._blocks([whole], q, 16, Spec(0.1))))

    with FakeTensorMode():
        assert (count("cuda"), count("meta")) == (64, 2048)


def test_saves_inputs_output_and_log_sum_exp_alone() -> None:
    leaves = [each.clone().requires_grad_() for each in (Q, K, V)]
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        attention(*leaves, window=3, dropout=0.1, seed=2)
    sizes = [each.numel() for each in saved]
    assert sorted(sizes) == sorted([*(each.numel() for each in leaves), Q.numel(), Q.numel() // 4, 1])


def test_fused_kernels_are_torchs_own() -> None:
    """On CPU the plain call is torch's function itself, bit for bit."""
    assert torch.equal(attention(Q, K, V, causal=True), F.scaled_dot_product_attention(Q, K, V, is_causal=True))
