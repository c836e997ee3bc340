"""What the attention kernels share: blocks of rows, whose document a block is, who sees whom, dropout, soft cap.

- **Places.** Query i of Q stands at place i + S - Q among its S keys. Causal, it sees keys up to its place; a window
  hides what is `window` or further from it, behind and (not causal) ahead.
- **Documents** are packed end to end in a batch of one; document d is rows starts[d] .. starts[d + 1]. A program finds
  its own in the kernel: document d's blocks take the slots from starts[d] // BLOCK + d on. That leaves room for each of
  its blocks, whatever the lengths, and makes total // BLOCK + documents + 1 slots, a number the host knows without
  waiting for the device. Rows behind the last document make one more, without keys. Starts are held to 0 .. total.
- **Dropout** draws from Philox (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") with the seed as key
  and (key, query, batch * heads + head, 0) as counter: forward and backward see one mask whatever their tiles.
"""

# mypy: disable-error-code="no-untyped-def"
# (what a kernel takes are pointers, numbers and tiles of its own language)

from __future__ import annotations

import triton
import triton.language as tl

# integers that change from call to call: no compile of their own for 1 and for multiples of 16
SIZES = ["heads", "group", "queries", "keys", "documents", "window", "threshold"]


@triton.jit
def load_rows(
    pointer, rows, stride, limit,
    FIRST: tl.constexpr, WIDTH: tl.constexpr, HEAD: tl.constexpr, CHECK: tl.constexpr,
):  # fmt: skip
    """Columns FIRST .. FIRST + WIDTH of some rows; 0 behind column HEAD and, with CHECK, behind row `limit`."""
    columns = FIRST + tl.arange(0, WIDTH)
    pointers = pointer + rows[:, None] * stride + columns[None, :]
    if FIRST + WIDTH > HEAD:
        if CHECK:
            return tl.load(pointers, mask=(rows[:, None] < limit) & (columns[None, :] < HEAD), other=0.0)
        else:
            return tl.load(pointers, mask=columns[None, :] < HEAD, other=0.0)
    else:
        if CHECK:
            return tl.load(pointers, mask=rows[:, None] < limit, other=0.0)
        else:
            return tl.load(pointers)


@triton.jit
def store_rows(pointer, tile, rows, stride, limit, FIRST: tl.constexpr, WIDTH: tl.constexpr, HEAD: tl.constexpr):
    """The inverse of load_rows: rounds to the tensor's dtype and writes what lies inside."""
    columns = FIRST + tl.arange(0, WIDTH)
    inside = (rows[:, None] < limit) & (columns[None, :] < HEAD)
    tl.store(pointer + rows[:, None] * stride + columns[None, :], tile.to(pointer.dtype.element_ty), mask=inside)


@triton.jit
def slots(STARTS, total, documents, BLOCK: tl.constexpr):
    """How many programs share out `total` rows (or keys), by BLOCK."""
    if STARTS is not None:
        return total // BLOCK + documents + 1
    else:
        return tl.cdiv(total, BLOCK)


@triton.jit
def _start(STARTS, document, total):
    return tl.minimum(tl.maximum(tl.load(STARTS + document).to(tl.int32), 0), total)


@triton.jit
def find_document(STARTS, slot, total, documents, BLOCK: tl.constexpr):
    """The last document whose first slot is not behind this one; `documents` for the rows behind them all."""
    before = 0
    for first in tl.range(0, documents + 1, 256):
        each = first + tl.arange(0, 256)
        starts = tl.load(STARTS + each, mask=each <= documents, other=0).to(tl.int32)
        starts = tl.minimum(tl.maximum(starts, 0), total)
        before += tl.sum(((starts // BLOCK + each <= slot) & (each <= documents)).to(tl.int32))
    return tl.maximum(before - 1, 0)


@triton.jit
def find_block(
    OWN_STARTS, OTHER_STARTS, slot, own_total, other_total, documents,
    BLOCK: tl.constexpr, LAST_FIRST: tl.constexpr,
):  # fmt: skip
    """(first, own_start, own, other_start, other): a program takes BLOCK of its document's `own` rows from `first` on,
    against its `other` keys (or the other way round); both are counted from where the document starts.

    A slot that no document needs has first >= own, and no keys. LAST_FIRST: causal, the longest rows start first.
    """
    if OWN_STARTS is not None:
        document = find_document(OWN_STARTS, slot, own_total, documents, BLOCK)
        following = tl.minimum(document + 1, documents)
        own_start = _start(OWN_STARTS, document, own_total)
        own_end = tl.where(document < documents, _start(OWN_STARTS, following, own_total), own_total)
        other_start = _start(OTHER_STARTS, document, other_total)
        other_end = _start(OTHER_STARTS, following, other_total)
        first = tl.maximum(slot - own_start // BLOCK - document, 0) * BLOCK
        own = tl.maximum(own_end - own_start, 0)
        other = tl.where(first < own, tl.maximum(other_end - other_start, 0), 0)
        return first, own_start, own, other_start, other
    else:
        if LAST_FIRST:
            slot = tl.cdiv(own_total, BLOCK) - 1 - slot
        return slot * BLOCK, 0, own_total, 0, other_total


@triton.jit
def visible_keys(LENGTHS, batch, keys):
    """How many keys this sample has: `keys`, or its own length held to 0 .. keys."""
    if LENGTHS is not None:
        return tl.minimum(tl.maximum(tl.load(LENGTHS + batch).to(tl.int32), 0), keys)
    else:
        return keys


@triton.jit
def key_ranges(
    first_place, visible, window,
    ROWS: tl.constexpr, KEYS: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """(start, left, whole, end) for ROWS queries from `first_place` on.

    Each sees all keys left .. whole (blocks of KEYS), some see start .. left and whole .. end, none sees the rest.
    """
    start = 0
    left = 0
    whole = visible
    end = visible
    if CAUSAL or WINDOW:
        if CAUSAL:
            ahead = 1
        else:
            ahead = window
        whole = tl.minimum(whole, tl.maximum(first_place + ahead, 0))
        end = tl.minimum(end, tl.maximum(first_place + ROWS - 1 + ahead, 0))
    whole = whole // KEYS * KEYS
    if WINDOW:
        start = tl.maximum(first_place - window + 1, 0) // KEYS * KEYS
        left = tl.cdiv(tl.maximum(first_place + ROWS - window, 0), KEYS) * KEYS
        left = tl.minimum(left, end)
        whole = tl.maximum(whole, left)
    return start, left, whole, end


@triton.jit
def row_range(
    first_key, queries, shift, window,
    ROWS: tl.constexpr, KEYS: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """(first, end): no other queries see any of KEYS keys from `first_key` on; a query's place is its row + shift."""
    first = 0
    end = queries
    if CAUSAL:
        first = tl.maximum(first_key - shift, 0) // ROWS * ROWS
    elif WINDOW:
        first = tl.maximum(first_key - shift - window + 1, 0) // ROWS * ROWS
    if WINDOW:
        end = tl.minimum(end, tl.maximum(first_key + KEYS - 1 + window - shift, 0))
    return first, end


@triton.jit
def sees(places, columns, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """Whether a query at a place sees a key; for use where CAUSAL or WINDOW."""
    if CAUSAL:
        if WINDOW:
            return (places >= columns) & (places - columns < window)
        else:
            return places >= columns
    else:
        return tl.abs(places - columns) < window


@triton.jit
def keeps(seed, stream, rows, columns, threshold):
    """Whether dropout keeps a weight: 24 random bits are not below `threshold`, the probability times 2^24."""
    draw, _, _, _ = tl.philox(seed, columns, rows, stream, 0)
    return (draw >> 8).to(tl.int32) >= threshold


@triton.jit
def kept_scale(threshold, ACC: tl.constexpr):
    """1 / (1 - probability of dropout)."""
    return 1.0 / (1.0 - tl.full([], threshold, tl.int32).to(ACC) * 5.9604644775390625e-08)  # 2^-24


@triton.jit
def hyperbolic_tangent(x):
    """2 sigmoid(2x) - 1; exp overflows to the right answer."""
    return 1.0 - 2.0 / (1.0 + tl.math.exp2(x * 2.8853900817779268))  # 2 log2(e)


@triton.jit
def score_scales(scale, soft_cap, ACC: tl.constexpr, CAP: tl.constexpr):
    """(inner, outer): a score in units of log 2 is outer * product or, with a soft cap, outer * tanh(inner * product).

    Source of the cap: Gemma Team 2024, "Gemma 2", section 2.
    """
    scale = tl.full([], scale, ACC)
    if CAP:
        soft_cap = tl.full([], soft_cap, ACC)
        return scale / soft_cap, soft_cap * 1.4426950408889634  # log2(e); a name for it would round it to fp32
    else:
        return scale, scale * 1.4426950408889634
