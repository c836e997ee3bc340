"""The backward kernels of attention. With p_ij = exp(scale q_i . k_j - lse_i), o the output and g its gradient:

    delta_i = g_i . o_i          ds_ij = p_ij (g_i . v_j - delta_i)
    dv_j = sum_i p_ij g_i        dk_j = scale sum_i ds_ij q_i        dq_i = scale sum_j ds_ij k_j

With a soft cap c the scores are c tanh(s / c), and ds_ij has a factor 1 - tanh^2 more. With dropout, z_ij being 0 or
1 / (1 - probability), p_ij z_ij stands for p_ij in o and dv, and g_i . v_j becomes z_ij g_i . v_j.

Source: Dao 2023, "FlashAttention-2", algorithm 2. What is ours:

- **Two passes, no atomics**: one over blocks of keys makes dk and dv, one over blocks of queries makes dq. Seven
  products of tiles where one pass with atomic additions into dq takes five; in exchange every run gives the same bits,
  there is no fp32 copy of dq in memory, and heads that share keys add up inside one program.
- The pass over queries has a loop over whole blocks and one over those with an edge, as the forward. The pass over keys
  has one loop, since two hold too many registers: causal or with a window, it masks every block, and it visits only
  those that see its keys. A key's gradient depends on no other key, so keys behind the end are computed and then
  written as 0.
- A query behind the end reads lse = +inf, so its p is 0. A row that sees nothing has lse = -inf: it meets masked blocks
  only, and these mask p after the exponential.
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
    row_range,
    score_scales,
    sees,
    slots,
    store_rows,
    visible_keys,
)

DELTA_STRIDES = [f"{tensor}_{axis}" for tensor in ("grad", "out") for axis in ("batch", "head", "row")]
STRIDES = [f"{t}_{axis}" for t in ("q", "k", "v", "grad", "dq", "dk", "dv") for axis in ("batch", "head", "row")]


@triton.jit(do_not_specialize=SIZES + DELTA_STRIDES)
def attention_delta_kernel(
    GRAD, OUT, DELTA,
    grad_batch, grad_head, grad_row, out_batch, out_head, out_row, heads, queries,
    HEAD: tl.constexpr, WIDTH: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """delta of ROWS queries of one head."""
    blocks = tl.cdiv(queries, ROWS)
    first_row = tl.program_id(0) % blocks * ROWS
    batch = (tl.program_id(0) // blocks // heads).to(tl.int64)
    head = (tl.program_id(0) // blocks % heads).to(tl.int64)
    places = tl.arange(0, ROWS)
    left = queries - first_row
    grad_block = GRAD + (batch * grad_batch + head * grad_head) * UNIT + first_row * grad_row.to(tl.int64) * UNIT
    out_block = OUT + (batch * out_batch + head * out_head) * UNIT + first_row * out_row.to(tl.int64) * UNIT
    grad = load_rows(grad_block, places, grad_row * UNIT, left, 0, WIDTH, HEAD, True).to(ACC)
    out = load_rows(out_block, places, out_row * UNIT, left, 0, WIDTH, HEAD, True).to(ACC)
    delta_block = DELTA + (batch * heads + head) * queries + first_row
    tl.store(delta_block + places, tl.sum(grad * out, 1), mask=places < left)


@triton.jit
def _block_to_keys(
    k_left, k_right, v_left, v_right, dk_left, dk_right, dv_left, dv_right,
    q_head, grad_head, LSE, DELTA, q_row, grad_row, start, columns, queries, shift, window, inner, outer,
    seed, stream, q_start, k_start, threshold,
    HEAD: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, ROWS: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr, DROP: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Add what ROWS queries from `start` on give to a block of keys; all tiles of scores are keys x queries."""
    places = tl.arange(0, ROWS)
    rows = start + places
    q_block = q_head + start * q_row.to(tl.int64)
    grad_block = grad_head + start * grad_row.to(tl.int64)
    lse = tl.load(LSE + rows, mask=rows < queries, other=float("inf")) * 1.4426950408889634  # log2(e)
    q_left = load_rows(q_block, places, q_row, queries - start, 0, LEFT, HEAD, True)
    scores = tl.dot(k_left, tl.trans(q_left), input_precision=PRECISION, out_dtype=ACC)
    if RIGHT > 0:
        q_right = load_rows(q_block, places, q_row, queries - start, LEFT, RIGHT, HEAD, True)
        scores = tl.dot(k_right, tl.trans(q_right), scores, input_precision=PRECISION, out_dtype=ACC)
    if CAP:
        scores = hyperbolic_tangent(scores * inner)
    weights = tl.math.exp2(scores * outer - lse[None, :])
    if CAUSAL or WINDOW:
        seen = sees((rows + shift)[None, :], columns[:, None], window, CAUSAL, WINDOW)
        weights = tl.where(seen, weights, 0.0)
    grad_left = load_rows(grad_block, places, grad_row, queries - start, 0, LEFT, HEAD, True)
    rounded = weights.to(grad_left.dtype)
    if DROP:
        kept = keeps(seed, stream, (q_start + rows)[None, :], (k_start + columns)[:, None], threshold)
        rounded = tl.where(kept, rounded, 0.0)
    dv_left = tl.dot(rounded, grad_left, dv_left, input_precision=PRECISION, out_dtype=ACC)
    dweights = tl.dot(v_left, tl.trans(grad_left), input_precision=PRECISION, out_dtype=ACC)
    if RIGHT > 0:
        grad_right = load_rows(grad_block, places, grad_row, queries - start, LEFT, RIGHT, HEAD, True)
        dv_right = tl.dot(rounded, grad_right, dv_right, input_precision=PRECISION, out_dtype=ACC)
        dweights = tl.dot(v_right, tl.trans(grad_right), dweights, input_precision=PRECISION, out_dtype=ACC)
    delta = tl.load(DELTA + rows, mask=rows < queries, other=0.0)
    if DROP:
        dweights = tl.where(kept, dweights * kept_scale(threshold, ACC), 0.0)
    dscores = weights * (dweights - delta[None, :])
    if CAP:
        dscores *= 1.0 - scores * scores
    dscores = dscores.to(q_left.dtype)
    dk_left = tl.dot(dscores, q_left, dk_left, input_precision=PRECISION, out_dtype=ACC)
    if RIGHT > 0:
        dk_right = tl.dot(dscores, q_right, dk_right, input_precision=PRECISION, out_dtype=ACC)
    return dk_left, dk_right, dv_left, dv_right


@triton.jit(do_not_specialize=SIZES + STRIDES)
def attention_dkdv_kernel(
    Q, K, V, GRAD, LSE, DELTA, DK, DV, LENGTHS, QUERY_STARTS, KEY_STARTS, SEED,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, grad_batch, grad_head, grad_row,
    dk_batch, dk_head, dk_row, dv_batch, dv_head, dv_row,
    heads, group, queries, keys, documents, window, threshold, scale, soft_cap,
    HEAD: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, UNIT: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr, DROP: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: KEYS keys of one head of keys, against all queries that see them, of each head that shares it."""
    blocks = slots(KEY_STARTS, keys, documents, KEYS)
    kv_heads = heads // group
    batch = (tl.program_id(0) // blocks // kv_heads).to(tl.int64)
    kv_head = (tl.program_id(0) // blocks % kv_heads).to(tl.int64)
    first_key, k_start, own_keys, q_start, own_queries = find_block(  # causal: the keys most rows see start first
        KEY_STARTS, QUERY_STARTS, tl.program_id(0) % blocks, keys, queries, documents, KEYS, False
    )
    own = tl.arange(0, KEYS)
    columns = first_key + own
    left = own_keys - first_key
    shift = own_keys - own_queries
    q_row = q_row * UNIT
    k_row = k_row * UNIT
    v_row = v_row * UNIT
    grad_row = grad_row * UNIT
    k_block = K + (batch * k_batch + kv_head * k_head) * UNIT + (k_start + first_key) * k_row.to(tl.int64)
    v_block = V + (batch * v_batch + kv_head * v_head) * UNIT + (k_start + first_key) * v_row.to(tl.int64)

    k_left = load_rows(k_block, own, k_row, left, 0, LEFT, HEAD, True)
    v_left = load_rows(v_block, own, v_row, left, 0, LEFT, HEAD, True)
    dk_left = tl.zeros([KEYS, LEFT], ACC)
    dv_left = tl.zeros([KEYS, LEFT], ACC)
    k_right = k_left
    v_right = v_left
    dk_right = tl.zeros([KEYS, 16], ACC)  # as out_right in the forward
    dv_right = tl.zeros([KEYS, 16], ACC)
    if RIGHT > 0:
        k_right = load_rows(k_block, own, k_row, left, LEFT, RIGHT, HEAD, True)
        v_right = load_rows(v_block, own, v_row, left, LEFT, RIGHT, HEAD, True)
        dk_right = tl.zeros([KEYS, RIGHT], ACC)
        dv_right = tl.zeros([KEYS, RIGHT], ACC)
    inner, outer = score_scales(scale, soft_cap, ACC, CAP)

    visible = visible_keys(LENGTHS, batch, own_keys)
    if WINDOW and LENGTHS is not None:  # a row whose window lies behind the length has lse = -inf: it must see no key
        columns = tl.where(columns < visible, columns, 1 << 30)
    first_row, end = row_range(first_key, own_queries, shift, window, ROWS, KEYS, CAUSAL, WINDOW)
    end = tl.where(first_key < visible, end, 0)
    seed = blocks
    if DROP:
        seed = tl.load(SEED)
    for member in tl.range(0, group):
        head = kv_head * group + member
        q_base = Q + (batch * q_batch + head * q_head) * UNIT + q_start * q_row.to(tl.int64)
        grad_base = GRAD + (batch * grad_batch + head * grad_head) * UNIT + q_start * grad_row.to(tl.int64)
        lse_base = LSE + (batch * heads + head) * queries + q_start
        delta_base = DELTA + (batch * heads + head) * queries + q_start
        stream = (batch * heads + head).to(tl.int32)
        for start in tl.range(first_row, end, ROWS):
            dk_left, dk_right, dv_left, dv_right = _block_to_keys(
                k_left, k_right, v_left, v_right, dk_left, dk_right, dv_left, dv_right, q_base, grad_base, lse_base,
                delta_base, q_row, grad_row, start, columns, own_queries, shift, window, inner, outer,
                seed, stream, q_start, k_start, threshold,
                HEAD, LEFT, RIGHT, ROWS, CAUSAL, WINDOW, CAP, DROP, ACC, PRECISION,
            )  # fmt: skip

    seen = (columns < visible)[:, None]
    scale = tl.full([], scale, ACC)
    if DROP:
        dv_left *= kept_scale(threshold, ACC)
        dv_right *= kept_scale(threshold, ACC)
    first_key += k_start
    dk_block = DK + (batch * dk_batch + kv_head * dk_head) * UNIT + first_key * dk_row.to(tl.int64) * UNIT
    dv_block = DV + (batch * dv_batch + kv_head * dv_head) * UNIT + first_key * dv_row.to(tl.int64) * UNIT
    store_rows(dk_block, tl.where(seen, dk_left * scale, 0.0), own, dk_row * UNIT, left, 0, LEFT, HEAD)
    store_rows(dv_block, tl.where(seen, dv_left, 0.0), own, dv_row * UNIT, left, 0, LEFT, HEAD)
    if RIGHT > 0:
        store_rows(dk_block, tl.where(seen, dk_right * scale, 0.0), own, dk_row * UNIT, left, LEFT, RIGHT, HEAD)
        store_rows(dv_block, tl.where(seen, dv_right, 0.0), own, dv_row * UNIT, left, LEFT, RIGHT, HEAD)


@triton.jit
def _block_to_queries(
    q_left, q_right, grad_left, grad_right, dq_left, dq_right, lse, delta,
    k_head, v_head, k_row, v_row, start, places, visible, window, inner, outer, seed, stream, rows, k_start, threshold,
    HEAD: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, KEYS: tl.constexpr, EDGE: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr, DROP: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Add what KEYS keys from `start` on give to a block of queries."""
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
    weights = tl.math.exp2(scores * outer - lse[:, None])
    if EDGE:
        columns = start + own
        seen = (columns < visible)[None, :]
        if CAUSAL or WINDOW:
            seen = seen & sees(places[:, None], columns[None, :], window, CAUSAL, WINDOW)
        weights = tl.where(seen, weights, 0.0)
    v_left = load_rows(v_block, own, v_row, visible - start, 0, LEFT, HEAD, EDGE)
    dweights = tl.dot(grad_left, tl.trans(v_left), input_precision=PRECISION, out_dtype=ACC)
    if RIGHT > 0:
        v_right = load_rows(v_block, own, v_row, visible - start, LEFT, RIGHT, HEAD, EDGE)
        dweights = tl.dot(grad_right, tl.trans(v_right), dweights, input_precision=PRECISION, out_dtype=ACC)
    if DROP:
        kept = keeps(seed, stream, rows[:, None], (k_start + start + own)[None, :], threshold)
        dweights = tl.where(kept, dweights * kept_scale(threshold, ACC), 0.0)
    dscores = weights * (dweights - delta[:, None])
    if CAP:
        dscores *= 1.0 - scores * scores
    dscores = dscores.to(k_left.dtype)
    dq_left = tl.dot(dscores, k_left, dq_left, input_precision=PRECISION, out_dtype=ACC)
    if RIGHT > 0:
        dq_right = tl.dot(dscores, k_right, dq_right, input_precision=PRECISION, out_dtype=ACC)
    return dq_left, dq_right


@triton.jit(do_not_specialize=SIZES + STRIDES)
def attention_dq_kernel(
    Q, K, V, GRAD, LSE, DELTA, DQ, LENGTHS, QUERY_STARTS, KEY_STARTS, SEED,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, grad_batch, grad_head, grad_row,
    dq_batch, dq_head, dq_row,
    heads, group, queries, keys, documents, window, threshold, scale, soft_cap,
    HEAD: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, UNIT: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr, DROP: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, EDGE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: ROWS queries of one head of one sample, against all keys they see; laid out as the forward."""
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
    grad_row = grad_row * UNIT
    first_row += q_start  # from here on of the whole tensor
    q_block = Q + (batch * q_batch + head * q_head) * UNIT + first_row * q_row.to(tl.int64)
    grad_block = GRAD + (batch * grad_batch + head * grad_head) * UNIT + first_row * grad_row.to(tl.int64)
    k_base = K + (batch * k_batch + kv_head * k_head) * UNIT + k_start * k_row.to(tl.int64)
    v_base = V + (batch * v_batch + kv_head * v_head) * UNIT + k_start * v_row.to(tl.int64)
    rows = first_row + own
    stream = (batch * heads + head).to(tl.int32)
    seed = stream
    if DROP:
        seed = tl.load(SEED)

    q_left = load_rows(q_block, own, q_row, left, 0, LEFT, HEAD, True)
    grad_left = load_rows(grad_block, own, grad_row, left, 0, LEFT, HEAD, True)
    dq_left = tl.zeros([ROWS, LEFT], ACC)
    q_right = q_left
    grad_right = grad_left
    dq_right = tl.zeros([ROWS, 16], ACC)
    if RIGHT > 0:
        q_right = load_rows(q_block, own, q_row, left, LEFT, RIGHT, HEAD, True)
        grad_right = load_rows(grad_block, own, grad_row, left, LEFT, RIGHT, HEAD, True)
        dq_right = tl.zeros([ROWS, RIGHT], ACC)
    statistics = (batch * heads + head) * queries
    lse = tl.load(LSE + statistics + rows, mask=own < left, other=float("inf")) * 1.4426950408889634  # log2(e)
    delta = tl.load(DELTA + statistics + rows, mask=own < left, other=0.0)
    inner, outer = score_scales(scale, soft_cap, ACC, CAP)

    visible = visible_keys(LENGTHS, batch, own_keys)
    window_start, left_end, whole_end, end = key_ranges(first_place, visible, window, ROWS, KEYS, CAUSAL, WINDOW)
    if WINDOW:
        for start in tl.range(window_start, left_end, EDGE):
            dq_left, dq_right = _block_to_queries(
                q_left, q_right, grad_left, grad_right, dq_left, dq_right, lse, delta, k_base, v_base, k_row, v_row,
                start, places, visible, window, inner, outer, seed, stream, rows, k_start, threshold,
                HEAD, LEFT, RIGHT, EDGE, True, CAUSAL, WINDOW, CAP, DROP, ACC, PRECISION,
            )  # fmt: skip
    for start in tl.range(left_end, whole_end, KEYS):
        dq_left, dq_right = _block_to_queries(
            q_left, q_right, grad_left, grad_right, dq_left, dq_right, lse, delta, k_base, v_base, k_row, v_row, start,
            places, visible, window, inner, outer, seed, stream, rows, k_start, threshold,
            HEAD, LEFT, RIGHT, KEYS, False, CAUSAL, WINDOW, CAP, DROP, ACC, PRECISION,
        )  # fmt: skip
    for start in tl.range(whole_end, end, EDGE):
        dq_left, dq_right = _block_to_queries(
            q_left, q_right, grad_left, grad_right, dq_left, dq_right, lse, delta, k_base, v_base, k_row, v_row, start,
            places, visible, window, inner, outer, seed, stream, rows, k_start, threshold,
            HEAD, LEFT, RIGHT, EDGE, True, CAUSAL, WINDOW, CAP, DROP, ACC, PRECISION,
        )  # fmt: skip
    scale = tl.full([], scale, ACC)
    dq_block = DQ + (batch * dq_batch + head * dq_head) * UNIT + first_row * dq_row.to(tl.int64) * UNIT
    store_rows(dq_block, dq_left * scale, own, dq_row * UNIT, left, 0, LEFT, HEAD)
    if RIGHT > 0:
        store_rows(dq_block, dq_right * scale, own, dq_row * UNIT, left, LEFT, RIGHT, HEAD)
