"""Attention against its fp64 definition: every combination of options, odd shapes, properties, precision."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from kernels import attention, attention_blocked
from kernels.reference import attention as textbook
from kernels.reference import attention_mask, attention_with_options

# batch, heads, heads of keys, queries, keys, size of a head
SHAPES = [
    (1, 1, 1, 1, 1, 1),
    (2, 3, 3, 7, 7, 5),
    (1, 2, 1, 65, 65, 13),
    (3, 4, 2, 5, 17, 8),
    (2, 2, 2, 17, 5, 16),
    (1, 1, 1, 1, 33, 3),
    (1, 1, 1, 1023, 1023, 4),
    (2, 2, 1, 257, 131, 8),
]
MASKS: list[dict[str, Any]] = [
    {},
    {"causal": True},
    {"window": 1},
    {"window": 3},
    {"window": 3, "causal": True},
    {"window": 40, "causal": True},
    {"soft_cap": 1.5},
    {"soft_cap": 1.5, "causal": True, "window": 9, "scale": 0.7},
]
NAMES = ("out", "log-sum-exp", "dq", "dk", "dv")


def draw(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """q, k, v and the gradient of the output."""
    batch, heads, kv_heads, queries, keys, size = shape
    generator = torch.Generator().manual_seed(sum(shape))
    shapes = ((heads, queries), (kv_heads, keys), (kv_heads, keys), (heads, queries))
    return [torch.randn(batch, *each, size, generator=generator, dtype=torch.float64).to(dtype) for each in shapes]


def run(function: Any, tensors: list[torch.Tensor], **options: Any) -> list[torch.Tensor]:
    """Output, log-sum-exp if it is returned, and gradients of q, k and v."""
    leaves = [each.detach().clone().requires_grad_() for each in tensors[:3]]
    result = function(*leaves, **options)
    values = list(result) if isinstance(result, tuple) else [result]
    values[0].backward(tensors[3].to(values[0].dtype))
    return [*(each.detach() for each in values), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def truth_of(tensors: list[torch.Tensor], **options: Any) -> list[torch.Tensor]:
    masks = ("causal", "window", "key_lengths_B", "query_starts", "key_starts")
    seen = attention_mask(
        tensors[0].shape[2], tensors[1].shape[2], **{name: options.pop(name) for name in masks if name in options}
    )
    return run(attention_with_options, tensors, seen=seen, **options)


def assert_close(mine: list[torch.Tensor], truth: list[torch.Tensor], limit: float) -> None:
    """The relative error (norm) of each; of one key, dq is exactly 0."""
    names = NAMES if len(mine) == 5 else (NAMES[0], *NAMES[2:])
    for name, a, b in zip(names, mine, truth, strict=True):
        assert not a.isnan().any(), name
        assert torch.equal(a == -torch.inf, b == -torch.inf), name
        a, b = (each.double().nan_to_num(neginf=0.0) for each in (a, b))
        error = (a - b).norm() / b.norm().clamp(min=1)
        assert error <= limit, f"{name} is off by {error:.2e}"


@pytest.mark.parametrize("options", MASKS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_is_its_definition(shape: tuple[int, ...], options: dict[str, Any]) -> None:
    tensors = draw(shape)
    truth = truth_of(tensors, **options)
    assert_close(run(attention, tensors, return_lse=True, **options), truth, 1e-13)
    del truth[1]
    assert_close(run(attention, tensors, **options), truth, 1e-12)
    single = [each.float() for each in tensors]
    truth = truth_of(single, **options)
    assert_close(run(attention, single, return_lse=True, **options), truth, 5e-6)
    del truth[1]
    assert_close(run(attention, single, **options), truth, 5e-6)


@pytest.mark.parametrize("options", MASKS, ids=str)
@pytest.mark.parametrize("lengths", [[7, 1, 4], [0, 12, 3], [0, 0, 0], [13, 13, 13]], ids=str)
def test_key_lengths(lengths: list[int], options: dict[str, Any]) -> None:
    tensors = draw((3, 4, 2, 11, 13, 5))
    lengths_B = torch.tensor(lengths)
    truth = truth_of(tensors, key_lengths_B=lengths_B, **options)
    assert_close(run(attention, tensors, key_lengths_B=lengths_B, return_lse=True, **options), truth, 1e-13)
    del truth[1]
    out, dq, dk, dv = mine = run(attention, tensors, key_lengths_B=lengths_B, **options)
    assert_close(mine, truth, 1e-12)
    for sample, length in enumerate(lengths):
        assert torch.count_nonzero(dk[sample, :, length:]) == 0, "a hidden key has no gradient"
        assert torch.count_nonzero(dv[sample, :, length:]) == 0, "a hidden value has no gradient"
        if length == 0:
            assert torch.count_nonzero(out[sample]) == torch.count_nonzero(dq[sample]) == 0


@pytest.mark.parametrize("options", MASKS, ids=str)
@pytest.mark.parametrize(
    ("queries", "keys"),
    # one document; empty ones at each end; one without keys; rows before and behind them all
    [
        ([0, 23], [0, 29]),
        ([0, 0, 9, 9, 23, 23], [0, 0, 4, 4, 29, 29]),
        ([0, 5, 23], [0, 20, 20]),
        ([2, 3, 20], [1, 9, 27]),
    ],
)
def test_documents(queries: list[int], keys: list[int], options: dict[str, Any]) -> None:
    tensors = draw((1, 4, 2, 23, 29, 5))
    starts = {"query_starts": torch.tensor(queries, dtype=torch.int32), "key_starts": torch.tensor(keys)}
    truth = truth_of(tensors, **starts, **options)
    assert_close(run(attention, tensors, return_lse=True, **starts, **options), truth, 1e-13)


def test_documents_are_separate_calls() -> None:
    tensors = draw((1, 2, 1, 31, 31, 4))
    starts = [0, 7, 8, 31]
    packed = run(attention, tensors, query_starts=torch.tensor(starts), causal=True, window=5)
    apart = [
        run(attention, [each[:, :, start:stop] for each in tensors], causal=True, window=5)
        for start, stop in pairwise(starts)
    ]
    for mine, *theirs in zip(packed, *apart, strict=True):
        torch.testing.assert_close(mine, torch.cat(theirs, 2), atol=1e-14, rtol=1e-12)


@pytest.mark.parametrize("causal", [False, True])
def test_a_window_as_wide_as_the_keys_is_none(causal: bool) -> None:
    tensors = draw((2, 2, 1, 19, 19, 4))
    assert_close(run(attention, tensors, causal=causal, window=19), run(attention, tensors, causal=causal), 1e-14)


def test_a_wide_soft_cap_is_none() -> None:
    tensors = draw((1, 2, 2, 9, 9, 4))
    assert_close(run(attention, tensors, soft_cap=1e8), run(attention, tensors), 1e-12)


def test_heads_are_independent() -> None:
    q, k, v, grad = draw((2, 6, 3, 9, 11, 4))
    before = run(attention, [q, k, v, grad], causal=True, window=4)
    pairs = torch.tensor([4, 5, 0, 1, 2, 3])  # with the heads of keys in the order 2, 0, 1
    groups = torch.tensor([2, 0, 1])
    after = run(attention, [q[:, pairs], k[:, groups], v[:, groups], grad[:, pairs]], causal=True, window=4)
    orders = (pairs, pairs, groups, groups)
    assert_close(after, [each[:, order] for each, order in zip(before, orders, strict=True)], 1e-14)


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": 3}], ids=str)
@pytest.mark.parametrize("backend", ["auto", "blocked"])
def test_hidden_keys_may_hold_anything(backend: str, options: dict[str, Any]) -> None:
    q, k, v, grad = draw((2, 2, 2, 6, 6, 4))
    lengths = torch.tensor([2, 5])
    before = run(attention, [q, k, v, grad], key_lengths_B=lengths, backend=backend, **options)
    hidden = (torch.arange(6) >= lengths[:, None])[:, None, :, None]
    k, v = k.masked_fill(hidden, 1e6), v.masked_fill(hidden, -1e6)
    assert_close(run(attention, [q, k, v, grad], key_lengths_B=lengths, backend=backend, **options), before, 1e-14)


def test_causal_with_more_queries_than_keys_gives_zero_where_nothing_is_seen() -> None:
    q, k, v, gradient = draw((1, 2, 2, 9, 4, 5))
    out, dq, *_ = run(attention, [q, k, v, gradient], causal=True)
    assert torch.count_nonzero(out[:, :, :5]) == 0
    assert torch.count_nonzero(dq[:, :, :5]) == 0
    torch.testing.assert_close(out[:, :, 5], v[:, :, 0])  # the first query that sees a key sees one


@pytest.mark.parametrize(("queries", "keys"), [(0, 5), (5, 0), (0, 0)])
def test_nothing_to_attend(queries: int, keys: int) -> None:
    out, dq, dk, dv = run(attention, draw((1, 2, 1, queries, keys, 4)))
    assert out.shape == dq.shape == (1, 2, queries, 4)
    assert dk.shape == dv.shape == (1, 1, keys, 4)
    assert not any(each.count_nonzero() for each in (out, dq, dk, dv))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["sdpa", "blocked"])
@pytest.mark.parametrize("causal", [False, True])
def test_is_at_most_twice_as_wrong_as_plain_torch(dtype: torch.dtype, backend: str, causal: bool) -> None:
    """flash-attention's rule: the error against fp64 is at most twice that of the plain formula in the same dtype."""
    tensors = draw((2, 3, 3, 37, 37, 13), dtype)
    seen = attention_mask(37, 37, causal=causal)

    def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        scores = (q @ k.transpose(-1, -2)) / 13**0.5
        return scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v

    truth = run(textbook, tensors, seen=seen)
    mine, theirs = run(attention, tensors, causal=causal, backend=backend), run(plain, tensors)
    assert mine[0].dtype == dtype
    least = 1e-6 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    for name, a, b, exact in zip(("out", "dq", "dk", "dv"), mine, theirs, truth, strict=True):
        error, allowed = ((each.double() - exact.double()).abs().max() for each in (a, b))
        assert error <= 2 * allowed + least * exact.double().abs().max(), name


def test_large_scores_do_not_overflow() -> None:
    tensors = draw((1, 1, 1, 33, 70, 16), torch.float32)
    tensors[0] = tensors[0] * 300
    assert_close(run(attention, tensors, return_lse=True), truth_of(tensors), 1e-3)  # exp of rounded scores near 1000


@pytest.mark.parametrize("backend", ["sdpa", "blocked"])
def test_strided_inputs_are_read_as_they_are(backend: str) -> None:
    """[S, B, H, K] permuted, as the model hands them over; slices of one projection; an expanded gradient."""
    generator = torch.Generator().manual_seed(3)
    packed = torch.randn(11, 3, 2, 3 * 5, generator=generator)
    tensors = [each.permute(1, 2, 0, 3) for each in packed.split(5, -1)]
    leaves = [each.detach().requires_grad_() for each in tensors]
    out = attention(*leaves, causal=True, backend=backend)
    out.sum().backward()
    contiguous = [*(each.contiguous() for each in tensors), torch.ones(3, 2, 11, 5)]
    expected = run(attention, contiguous, causal=True, backend=backend)
    for mine, theirs in zip([out, *(leaf.grad for leaf in leaves)], expected, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize(
    "options",
    [
        {"causal": True},
        {"causal": True, "window": 2, "soft_cap": 2.0, "scale": 0.9},
        {"key_lengths_B": torch.tensor([0, 4])},
        {"key_lengths_B": torch.tensor([2, 5]), "causal": True, "soft_cap": 2.0},
        {"window": 2, "dropout": 0.4, "seed": 5},
    ],
    ids=str,
)
def test_gradcheck(options: dict[str, Any]) -> None:
    q, k, v, _ = draw((2, 2, 1, 4, 6, 3))
    leaves = tuple(each.requires_grad_() for each in (q, k, v))
    assert torch.autograd.gradcheck(lambda q, k, v: attention(q, k, v, **options), leaves)


@pytest.mark.parametrize("options", [*MASKS, {"causal": True, "key_lengths_B": torch.tensor([29, 3])}], ids=str)
def test_many_small_blocks_give_the_same(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]) -> None:
    """Rows, heads and samples cut every way: blocks of 1 to 7 rows of one head or of several."""
    tensors = draw((2, 4, 2, 29, 31, 5))
    truth = truth_of(tensors, **options)
    for block_bytes, rows in ((1, 1), (1, 7), (31 * 8 * 2 * 5, 5), (31 * 8 * 2 * 5 * 3, 5), (1 << 20, 5)):
        monkeypatch.setattr(attention_blocked, "BLOCK_BYTES", block_bytes)
        monkeypatch.setattr(attention_blocked, "MOST_ROWS", rows)
        monkeypatch.setattr(attention_blocked, "LEAST_ROWS", rows)
        mine = run(attention, tensors, return_lse=True, backend="blocked", **options)
        assert_close(mine, truth, 1e-13)


def test_rotary_turns_queries_and_keys() -> None:
    from kernels.rotary import angles, rotary

    q, k, v, grad = draw((2, 4, 2, 9, 9, 8))
    cos_sin = angles(torch.arange(9), 4, dtype=torch.float64)

    def before(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        return attention(rotary(q, *cos_sin), rotary(k, *cos_sin), v, causal=True, window=4)

    mine = run(attention, [q, k, v, grad], causal=True, window=4, rotary=cos_sin)
    assert_close(mine, run(before, [q, k, v, grad]), 0.0)
    shifted = angles(torch.arange(9) + 100, 4, dtype=torch.float64)  # only differences of places count
    assert_close(run(attention, [q, k, v, grad], causal=True, window=4, rotary=shifted), mine, 1e-12)
    with pytest.raises(ValueError, match="rotary with 8 queries and 9 keys"):
        attention(q[:, :, 1:], k, v, rotary=cos_sin)


def test_the_reference_is_the_textbook_sum() -> None:
    """The truth itself, against loops: causal, a window, a cap, shared keys, a scale."""
    q, k, v, _ = draw((1, 2, 1, 5, 7, 2))
    seen = attention_mask(5, 7, causal=True, window=3)
    out, lse = attention_with_options(q, k, v, seen, scale=0.9, soft_cap=1.2)
    for head in range(2):
        for query in range(5):
            place = query + 2
            places = [key for key in range(7) if place - 2 <= key <= place]
            scores = torch.stack([1.2 * torch.tanh(0.9 * q[0, head, query] @ k[0, 0, key] / 1.2) for key in places])
            expected = (F.softmax(scores, 0)[:, None] * v[0, 0, places]).sum(0)
            torch.testing.assert_close(out[0, head, query], expected)
            torch.testing.assert_close(lse[0, head, query], scores.exp().sum().log())
    both_sides = attention_mask(5, 7, window=2)[0, 0]
    assert [[key for key in range(7) if both_sides[query, key]] for query in (0, 4)] == [[1, 2, 3], [5, 6]]
