"""The forward kernel of attention: out_i = sum_j p_ij v_j, p_ij = exp(scale q_i . k_j - lse_i), one pass over the keys.

Source: Dao 2023, "FlashAttention-2", algorithm 1 (the running maximum and sum of an online softmax). What is ours:

- **A head is two columns of tiles**, `LEFT + RIGHT`: 72 and 80 are 64 + 16, 96 is 64 + 32, where the usual padding to a
  power of two would compute 128. RIGHT = 0 leaves the second out.
- **The blocks every row sees whole come first, without any mask**; then those with an edge in them (the diagonal, the
  end of the keys), `EDGE` keys at a time: 257 keys are 4 blocks of 64 and one edge block of 16, not 5 of 64.
- **Strides come divided by UNIT**: a row of 72 elements is no multiple of 16, and without a sign of alignment the
  compiler drops its asynchronous copies. `stride * UNIT` with UNIT = 8 (16 bytes of bf16) shows it the alignment again.
- A maximum that starts at a finite -1e30 over scores masked to -inf needs no special case for a row that sees nothing:
  its sum stays 0, its output is 0 and its lse -inf.
- Scores are in units of log 2 inside, since exp2 is what the hardware has.

Names: a tile's axes are rows (queries), keys and columns (of a head). Q, K, V, OUT, LSE, LENGTHS are pointers.
"""

# mypy: disable-error-code="no-untyped-def"
# (what a kernel takes are pointers, numbers and tiles of its own language)

from __future__ import annotations

import triton
import triton.language as tl

# integers that change from call to call: no compile of their own for 1 and for multiples of 16
SIZES = ["heads", "group", "queries", "keys"]
STRIDES = [f"{tensor}_{axis}" for tensor in ("q", "k", "v", "out") for axis in ("batch", "head", "row")]


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
def visible_keys(LENGTHS, batch, keys):
    """How many keys this sample has: `keys`, or its own length held to 0 .. keys."""
    if LENGTHS is not None:
        return tl.minimum(tl.maximum(tl.load(LENGTHS + batch).to(tl.int32), 0), keys)
    else:
        return keys


@triton.jit
def key_ranges(first_row, visible, shift, ROWS: tl.constexpr, KEYS: tl.constexpr, CAUSAL: tl.constexpr):
    """(whole, end): each of ROWS rows sees keys 0 .. whole (full blocks), some see whole .. end, none the rest."""
    whole = visible
    end = visible
    if CAUSAL:  # row i sees keys up to i + shift
        whole = tl.minimum(whole, tl.maximum(first_row + shift + 1, 0))
        end = tl.minimum(end, tl.maximum(first_row + ROWS + shift, 0))
    return whole // KEYS * KEYS, end


@triton.jit
def _attend(
    q_left, q_right, out_left, out_right, top, total, k_head, v_head, k_row, v_row, start, rows, visible, shift, scale,
    HEAD: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, KEYS: tl.constexpr, EDGE: tl.constexpr,
    CAUSAL: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of KEYS keys from `start` on; EDGE: some key in it is hidden from some row."""
    places = tl.arange(0, KEYS)
    k_block = k_head + start * k_row.to(tl.int64)
    v_block = v_head + start * v_row.to(tl.int64)
    k_left = load_rows(k_block, places, k_row, visible - start, 0, LEFT, HEAD, EDGE)
    scores = tl.dot(q_left, tl.trans(k_left), input_precision=PRECISION, out_dtype=ACC)
    if RIGHT > 0:
        k_right = load_rows(k_block, places, k_row, visible - start, LEFT, RIGHT, HEAD, EDGE)
        scores = tl.dot(q_right, tl.trans(k_right), scores, input_precision=PRECISION, out_dtype=ACC)
    if EDGE:
        columns = start + places
        seen = (columns < visible)[None, :]
        if CAUSAL:
            seen = seen & (rows[:, None] + shift >= columns[None, :])
        scores = tl.where(seen, scores, -float("inf"))
    higher = tl.maximum(top, tl.max(scores, 1) * scale)
    weights = tl.math.exp2(scores * scale - higher[:, None])
    shrink = tl.math.exp2(top - higher)
    v_left = load_rows(v_block, places, v_row, visible - start, 0, LEFT, HEAD, EDGE)
    rounded = weights.to(v_left.dtype)
    out_left = tl.dot(rounded, v_left, out_left * shrink[:, None], input_precision=PRECISION, out_dtype=ACC)
    if RIGHT > 0:
        v_right = load_rows(v_block, places, v_row, visible - start, LEFT, RIGHT, HEAD, EDGE)
        out_right = tl.dot(rounded, v_right, out_right * shrink[:, None], input_precision=PRECISION, out_dtype=ACC)
    return out_left, out_right, higher, total * shrink + tl.sum(weights, 1)


@triton.jit(do_not_specialize=SIZES + STRIDES)
def attention_forward_kernel(
    Q, K, V, OUT, LSE, LENGTHS,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, out_batch, out_head, out_row,
    heads, group, queries, keys, scale,
    HEAD: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, UNIT: tl.constexpr, CAUSAL: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, EDGE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: ROWS queries of one head of one sample, against all keys they see. `group` heads share keys."""
    blocks = tl.cdiv(queries, ROWS)
    block = blocks - 1 - tl.program_id(0) % blocks  # causal: the longest rows start first
    batch = (tl.program_id(0) // blocks // heads).to(tl.int64)
    head = (tl.program_id(0) // blocks % heads).to(tl.int64)
    kv_head = head // group
    first_row = block * ROWS
    places = tl.arange(0, ROWS)
    rows = first_row + places
    shift = keys - queries
    q_row = q_row * UNIT
    k_row = k_row * UNIT
    v_row = v_row * UNIT
    out_row = out_row * UNIT
    q_block = Q + (batch * q_batch + head * q_head) * UNIT + first_row * q_row.to(tl.int64)
    k_base = K + (batch * k_batch + kv_head * k_head) * UNIT
    v_base = V + (batch * v_batch + kv_head * v_head) * UNIT
    out_block = OUT + (batch * out_batch + head * out_head) * UNIT + first_row * out_row.to(tl.int64)
    scale = tl.full([], scale, ACC) * 1.4426950408889634  # log2(e)

    q_left = load_rows(q_block, places, q_row, queries - first_row, 0, LEFT, HEAD, True)
    out_left = tl.zeros([ROWS, LEFT], ACC)
    q_right = q_left
    out_right = tl.zeros([ROWS, 16], ACC)  # without a right part: carried along unused, and compiled away
    if RIGHT > 0:
        q_right = load_rows(q_block, places, q_row, queries - first_row, LEFT, RIGHT, HEAD, True)
        out_right = tl.zeros([ROWS, RIGHT], ACC)
    top = tl.full([ROWS], -1e30, ACC)
    total = tl.zeros([ROWS], ACC)

    visible = visible_keys(LENGTHS, batch, keys)
    whole, end = key_ranges(first_row, visible, shift, ROWS, KEYS, CAUSAL)
    for start in tl.range(0, whole, KEYS):
        out_left, out_right, top, total = _attend(
            q_left, q_right, out_left, out_right, top, total, k_base, v_base, k_row, v_row, start, rows, visible, shift,
            scale, HEAD, LEFT, RIGHT, KEYS, False, CAUSAL, ACC, PRECISION,
        )  # fmt: skip
    for start in tl.range(whole, end, EDGE):
        out_left, out_right, top, total = _attend(
            q_left, q_right, out_left, out_right, top, total, k_base, v_base, k_row, v_row, start, rows, visible, shift,
            scale, HEAD, LEFT, RIGHT, EDGE, True, CAUSAL, ACC, PRECISION,
        )  # fmt: skip

    sees_any = total > 0
    total = tl.where(sees_any, total, 1.0)
    lse = tl.where(sees_any, (top + tl.math.log2(total)) * 0.6931471805599453, -float("inf"))  # ln(2)
    lse_block = LSE + (batch * heads + head) * queries + first_row
    tl.store(lse_block + places, lse, mask=rows < queries)
    store_rows(out_block, out_left / total[:, None], places, out_row, queries - first_row, 0, LEFT, HEAD)
    if RIGHT > 0:
        store_rows(out_block, out_right / total[:, None], places, out_row, queries - first_row, LEFT, RIGHT, HEAD)
