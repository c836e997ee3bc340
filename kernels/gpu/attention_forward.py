"""The forward kernel of attention: out_i = sum_j p_ij v_j, p_ij = exp(scale q_i . k_j - lse_i), one pass over the keys.

Source: Dao 2023, "FlashAttention-2", algorithm 1 (the running maximum and sum of an online softmax). What is ours:

- **A head is two columns of tiles**, `LEFT + RIGHT`: 72 and 80 are 64 + 16, 96 is 64 + 32, where the usual padding to a
  power of two would compute 128. RIGHT = 0 leaves the second out.
- **Blocks that every row sees whole are computed without any mask**; before them those with the left edge of a window
  in them, behind them those with the diagonal or the end of the keys, `EDGE` keys at a time: 257 keys are 4 blocks of
  64 and one edge block of 16, not 5 of 64. Blocks that no row sees are not visited.
- **Window, documents, soft cap and dropout are compiled in only where asked for**; plain attention keeps its registers.
- **Strides come divided by UNIT**: a row of 72 elements is no multiple of 16, and without a sign of alignment the
  compiler drops its asynchronous copies. `stride * UNIT` with UNIT = 8 (16 bytes of bf16) shows it the alignment again.
- A maximum that starts at a finite -1e30 over scores masked to -inf needs no special case for a row that sees nothing:
  its sum stays 0, its output is 0 and its lse -inf.
- Scores are in units of log 2 inside, since exp2 is what the hardware has.
- Dropout zeroes weights after they were added to the sum: the lse knows nothing of it.

Names: a tile's axes are rows (queries), keys and columns (of a head). Names in capitals are pointers and constants.
"""

# mypy: disable-error-code="no-untyped-def"
# (what a kernel takes are pointers, numbers and tiles of its own language)

from __future__ import annotations

import triton
import triton.language as tl

from kernels.gpu.attention_blocks import (
    SIZES,
    find_block,
    hyperbolic_tangent,
    keeps,
    kept_scale,
    key_ranges,
    load_rows,
    score_scales,
    sees,
    slots,
    store_rows,
    visible_keys,
)

STRIDES = [f"{tensor}_{axis}" for tensor in ("q", "k", "v", "out") for axis in ("batch", "head", "row")]


@triton.jit
def _attend(
    q_left, q_right, out_left, out_right, top, total, k_head, v_head, k_row, v_row, start, places, visible, window,
    inner, outer, seed, stream, rows, k_start, threshold,
    HEAD: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, KEYS: tl.constexpr, EDGE: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr, DROP: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of KEYS keys from `start` on; EDGE: some key in it is hidden from some row."""
    own = tl.arange(0, KEYS)
    k_block = k_head + start * k_row.to(tl.int64)
    v_block = v_head + start * v_row.to(tl.int64)
    k_left = load_rows(k_block, own, k_row, visible - start, 0, LEFT, HEAD, EDGE)
    scores = tl.dot(q_left, tl.trans(k_left), input_precision=PRECISION, out_dtype=ACC)
    if RIGHT > 0:
        k_right = load_rows(k_block, own, k_row, visible - start, LEFT, RIGHT, HEAD, EDGE)
        scores = tl.dot(q_right, tl.trans(k_right), scores, input_precision=PRECISION, out_dtype=ACC)
    if CAP:
        scores = hyperbolic_tangent(scores * inner)
    if EDGE:
        columns = start + own
        seen = (columns < visible)[None, :]
        if CAUSAL or WINDOW:
            seen = seen & sees(places[:, None], columns[None, :], window, CAUSAL, WINDOW)
        scores = tl.where(seen, scores, -float("inf"))
    higher = tl.maximum(top, tl.max(scores, 1) * outer)
    weights = tl.math.exp2(scores * outer - higher[:, None])
    shrink = tl.math.exp2(top - higher)
    total = total * shrink + tl.sum(weights, 1)
    if DROP:
        kept = keeps(seed, stream, rows[:, None], (k_start + start + own)[None, :], threshold)
        weights = tl.where(kept, weights, 0.0)
    v_left = load_rows(v_block, own, v_row, visible - start, 0, LEFT, HEAD, EDGE)
    rounded = weights.to(v_left.dtype)
    out_left = tl.dot(rounded, v_left, out_left * shrink[:, None], input_precision=PRECISION, out_dtype=ACC)
    if RIGHT > 0:
        v_right = load_rows(v_block, own, v_row, visible - start, LEFT, RIGHT, HEAD, EDGE)
        out_right = tl.dot(rounded, v_right, out_right * shrink[:, None], input_precision=PRECISION, out_dtype=ACC)
    return out_left, out_right, higher, total


@triton.jit(do_not_specialize=SIZES + STRIDES)
def attention_forward_kernel(
    Q, K, V, OUT, LSE, LENGTHS, QUERY_STARTS, KEY_STARTS, SEED,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, out_batch, out_head, out_row,
    heads, group, queries, keys, documents, window, threshold, scale, soft_cap,
    HEAD: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, UNIT: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr, DROP: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, EDGE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: ROWS queries of one head of one sample, against all keys they see. `group` heads share keys."""
    blocks = slots(QUERY_STARTS, queries, documents, ROWS)
    batch = (tl.program_id(0) // blocks // heads).to(tl.int64)
    head = (tl.program_id(0) // blocks % heads).to(tl.int64)
    first_row, q_start, own_queries, k_start, own_keys = find_block(
        QUERY_STARTS, KEY_STARTS, tl.program_id(0) % blocks, queries, keys, documents, ROWS, True
    )
    kv_head = head // group
    own = tl.arange(0, ROWS)
    left = own_queries - first_row
    first_place = first_row + own_keys - own_queries
    places = first_place + own
    q_row = q_row * UNIT
    k_row = k_row * UNIT
    v_row = v_row * UNIT
    out_row = out_row * UNIT
    first_row += q_start  # from here on of the whole tensor
    q_block = Q + (batch * q_batch + head * q_head) * UNIT + first_row * q_row.to(tl.int64)
    k_base = K + (batch * k_batch + kv_head * k_head) * UNIT + k_start * k_row.to(tl.int64)
    v_base = V + (batch * v_batch + kv_head * v_head) * UNIT + k_start * v_row.to(tl.int64)
    out_block = OUT + (batch * out_batch + head * out_head) * UNIT + first_row * out_row.to(tl.int64)
    inner, outer = score_scales(scale, soft_cap, ACC, CAP)
    rows = first_row + own
    stream = (batch * heads + head).to(tl.int32)
    seed = stream
    if DROP:
        seed = tl.load(SEED)

    q_left = load_rows(q_block, own, q_row, left, 0, LEFT, HEAD, True)
    out_left = tl.zeros([ROWS, LEFT], ACC)
    q_right = q_left
    out_right = tl.zeros([ROWS, 16], ACC)  # without a right part: carried along unused, and compiled away
    if RIGHT > 0:
        q_right = load_rows(q_block, own, q_row, left, LEFT, RIGHT, HEAD, True)
        out_right = tl.zeros([ROWS, RIGHT], ACC)
    top = tl.full([ROWS], -1e30, ACC)
    total = tl.zeros([ROWS], ACC)

    visible = visible_keys(LENGTHS, batch, own_keys)
    window_start, left_end, whole_end, end = key_ranges(first_place, visible, window, ROWS, KEYS, CAUSAL, WINDOW)
    if WINDOW:
        for start in tl.range(window_start, left_end, EDGE):
            out_left, out_right, top, total = _attend(
                q_left, q_right, out_left, out_right, top, total, k_base, v_base, k_row, v_row, start, places, visible,
                window, inner, outer, seed, stream, rows, k_start, threshold,
                HEAD, LEFT, RIGHT, EDGE, True, CAUSAL, WINDOW, CAP, DROP, ACC, PRECISION,
            )  # fmt: skip
    for start in tl.range(left_end, whole_end, KEYS):
        out_left, out_right, top, total = _attend(
            q_left, q_right, out_left, out_right, top, total, k_base, v_base, k_row, v_row, start, places, visible,
            window, inner, outer, seed, stream, rows, k_start, threshold,
            HEAD, LEFT, RIGHT, KEYS, False, CAUSAL, WINDOW, CAP, DROP, ACC, PRECISION,
        )  # fmt: skip
    for start in tl.range(whole_end, end, EDGE):
        out_left, out_right, top, total = _attend(
            q_left, q_right, out_left, out_right, top, total, k_base, v_base, k_row, v_row, start, places, visible,
            window, inner, outer, seed, stream, rows, k_start, threshold,
            HEAD, LEFT, RIGHT, EDGE, True, CAUSAL, WINDOW, CAP, DROP, ACC, PRECISION,
        )  # fmt: skip

    sees_any = total > 0
    total = tl.where(sees_any, total, 1.0)
    lse = tl.where(sees_any, (top + tl.math.log2(total)) * 0.6931471805599453, -float("inf"))  # ln(2)
    lse_block = LSE + (batch * heads + head) * queries + first_row
    tl.store(lse_block + own, lse, mask=own < left)
    if DROP:
        total /= kept_scale(threshold, ACC)
    store_rows(out_block, out_left / total[:, None], own, out_row, left, 0, LEFT, HEAD)
    if RIGHT > 0:
        store_rows(out_block, out_right / total[:, None], own, out_row, left, LEFT, RIGHT, HEAD)
