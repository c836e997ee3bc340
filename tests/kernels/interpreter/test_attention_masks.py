"""The masks of the Triton attention kernels, interpreted: causal, lengths, windows, documents, and all at once."""

from __future__ import annotations

import itertools
from itertools import pairwise
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from attention_calls import PACKED, SEED, assert_close, check, draw, run, run_reference, starts

from kernels.gpu.attention_blocks import find_block

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp2")  # of a sigmoid: the right answer
LENGTHS = torch.tensor([0, 37])
DOCUMENTS = {"query_starts": starts(0, 5, 17, 19), "key_starts": starts(0, 17, 17, 37)}  # 2 rows behind the last


@pytest.mark.parametrize("where", ["plain", "lengths", "documents"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [0, 7])
def test_every_set_of_options(where: str, causal: bool, window: int) -> None:
    """With and without soft cap and dropout; two heads share their keys."""
    for soft_cap, dropout in itertools.product((0.0, 2.0), (0.0, 0.3)):
        place = {"lengths": {"key_lengths_B": LENGTHS}, "documents": DOCUMENTS}.get(where, {})
        seed = {"seed": SEED} if dropout else {}
        check(
            1 if where == "documents" else 2, 2, 1, 21, 39, 8,
            where=place | seed, causal=causal, window=window, soft_cap=soft_cap, dropout=dropout, scale=0.35,
        )  # fmt: skip


@pytest.mark.parametrize("size", [64, 72, 80, 96, 128, 256])
def test_every_head_size_with_every_option(size: int) -> None:
    everything = {"causal": True, "window": 20, "soft_cap": 2.0, "dropout": 0.2, "scale": size**-0.5}
    check(1, 2, 1, 21, 39, size, where=DOCUMENTS | {"seed": SEED}, **everything)
    check(2, 1, 1, 21, 39, size, where={"key_lengths_B": LENGTHS, "seed": SEED}, **everything | {"causal": False})


@pytest.mark.parametrize(
    ("queries", "keys"),
    # the last two: the diagonal one key before the end of a block, and one behind it
    [(129, 65), (1, 130), (130, 1), (64, 128), (90, 89), (64, 126), (64, 65)],
)
def test_causal_is_aligned_to_the_bottom_right(queries: int, keys: int) -> None:
    out, dq, *_ = check(1, 1, 1, queries, keys, 16, causal=True)
    blind = max(queries - keys, 0)  # the first queries see nothing when there are more queries than keys
    assert torch.count_nonzero(out[:, :, :blind]) == 0
    assert torch.count_nonzero(dq[:, :, :blind]) == 0


@pytest.mark.parametrize("causal", [False, True])
def test_key_lengths(causal: bool) -> None:
    lengths = torch.tensor([0, 1, 64, 77, 129])
    _, _, dk, dv, _ = check(5, 1, 1, 40, 129, 16, causal=causal, where={"key_lengths_B": lengths})
    for sample, length in enumerate(lengths.tolist()):
        assert torch.count_nonzero(dk[sample, :, length:]) == 0
        assert torch.count_nonzero(dv[sample, :, length:]) == 0


def test_lengths_beyond_the_keys_and_below_zero_are_held_to_them() -> None:
    tensors = draw(2, 1, 1, 5, 7, 16)
    held = run(tensors, {"key_lengths_B": torch.tensor([100, -3], dtype=torch.int32)})
    assert_close(held, run_reference(tensors, {"key_lengths_B": torch.tensor([7, 0])}))


def test_hidden_keys_may_hold_anything() -> None:
    q, k, v, grad = draw(2, 1, 1, 9, 70, 24)
    where = {"key_lengths_B": torch.tensor([20, 65])}
    before = run([q, k, v, grad], where)
    hidden = (torch.arange(70) >= where["key_lengths_B"][:, None])[:, None, :, None]
    after = run([q, k.masked_fill(hidden, torch.nan), v.masked_fill(hidden, torch.nan), grad], where)
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a, b)


# --- windows


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [2, 17, 64, 100])
def test_windows(window: int, causal: bool) -> None:
    check(1, 1, 1, 97, 200, 16, window=window, causal=causal)


@pytest.mark.parametrize("causal", [False, True])
def test_windows_with_more_queries_than_keys(causal: bool) -> None:
    check(1, 1, 1, 200, 90, 16, window=30, causal=causal)  # with rows that see nothing


def test_windows_with_key_lengths() -> None:
    check(2, 1, 1, 70, 150, 16, window=40, where={"key_lengths_B": torch.tensor([100, 20])})


@pytest.mark.parametrize("causal", [False, True])
def test_a_window_as_long_as_the_keys_hides_nothing(causal: bool) -> None:
    tensors = draw(1, 1, 1, 65, 100, 16)
    without = run(tensors, causal=causal)
    for a, b in zip(without, run(tensors, window=100, causal=causal), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(without[0], run(tensors, window=99, causal=causal)[0])  # the last query's first key


def test_a_window_of_one_copies_the_values() -> None:
    tensors = draw(1, 1, 1, 70, 70, 16)
    out, _, _, dv, _ = run(tensors, window=1)
    torch.testing.assert_close(out, tensors[2])
    torch.testing.assert_close(dv, tensors[3])


# --- documents


@pytest.mark.parametrize(
    "settings",
    [{}, {"causal": True}, {"window": 20}, {"causal": True, "window": 9}],
    ids=["full", "causal", "window", "causal window"],
)
def test_documents(settings: dict[str, Any]) -> None:
    out, dq, dk, dv, _ = check(1, 1, 1, 100, 147, 16, where=PACKED, **settings)
    for each, end in ((out, 90), (dq, 90), (dk, 140), (dv, 140)):
        assert torch.count_nonzero(each[:, :, end:]) == 0


def test_documents_are_as_calls_of_their_own() -> None:
    tensors = draw(1, 1, 1, 105, 105, 72)
    places = (0, 65, 70, 105)
    packed = run(tensors, {"query_starts": starts(*places)}, causal=True)
    for a, b in pairwise(places):
        alone = run([each[:, :, a:b] for each in tensors], causal=True)
        for x, y in zip(packed, alone, strict=True):
            torch.testing.assert_close(x[:, :, a:b], y, atol=1e-6, rtol=1e-5)


def test_rows_behind_the_last_document_may_hold_anything() -> None:
    tensors = draw(1, 1, 1, 90, 90, 16)
    where = {"query_starts": starts(0, 70)}
    before = run(tensors, where)
    after = run(
        [torch.cat([each[:, :, :70], torch.full_like(each[:, :, 70:], torch.nan)], 2) for each in tensors], where
    )
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a, b)


@triton.jit
def _blocks_kernel(STARTS, FOUND, total, documents, STRIDE: tl.constexpr, BLOCK: tl.constexpr):
    slot = tl.program_id(0) * STRIDE
    first, start, own, _other_start, other = find_block(STARTS, STARTS, slot, total, total, documents, BLOCK, False)
    place = tl.arange(0, 4)
    found = tl.where(place == 0, first, tl.where(place == 1, start, tl.where(place == 2, own, other)))
    tl.store(FOUND + tl.program_id(0) * 4 + place, found)


def find_blocks(lengths: torch.Tensor, tail: int, stride: int) -> tuple[list[tuple[int, ...]], int]:
    """(first, start, own, other) of every stride-th slot of documents with such lengths, in blocks of 8; all rows."""
    total, documents = int(lengths.sum()) + tail, len(lengths)
    places = torch.cat([torch.zeros(1), lengths.cumsum(0)]).int()
    slots = total // 8 + documents + 1
    found = torch.empty(triton.cdiv(slots, stride), 4, dtype=torch.int32)
    _blocks_kernel[(len(found),)](places, found, total, documents, STRIDE=stride, BLOCK=8)
    return [tuple(each) for each in found.tolist()], total


def test_programs_cover_every_row_of_every_document_once() -> None:
    lengths = torch.tensor([3, 8, 0, 17, 1, 24, 7, 16, 0])
    found, total = find_blocks(lengths, tail=13, stride=1)
    taken = [row for first, start, own, _ in found for row in range(start + first, start + min(first + 8, own))]
    assert sorted(taken) == list(range(total))
    for first, start, own, other in found:
        assert other == (own if first < own and start < total - 13 else 0)
        assert first >= own or own == 13 or own in lengths


def test_programs_find_their_document_among_more_than_are_read_at_once() -> None:
    lengths = torch.arange(300) * 7 % 20
    found, total = find_blocks(lengths, tail=0, stride=37)
    starts = [0, *lengths.cumsum(0).tolist()]
    assert len(found) > 12
    for index, (first, start, own, _) in enumerate(found):
        document = max(d for d in range(301) if starts[d] // 8 + d <= index * 37)
        assert start == starts[document]
        assert first == (index * 37 - start // 8 - document) * 8
        assert own == ([*starts, total][document + 1] - start)


def test_starts_out_of_range_stay_inside_the_tensors() -> None:
    q, k, v, grad = (each[:, :, 8:16] for each in draw(1, 1, 1, 24, 24, 16))
    out, dq, dk, dv, _ = run([q, k, v, grad], {"query_starts": starts(0, 5, 3, 900)})
    assert all(each.shape == (1, 1, 8, 16) for each in (out, dq, dk, dv))
