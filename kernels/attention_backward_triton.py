"""The backward kernels of attention. With p_ij = exp(scale q_i . k_j - lse_i), o the output and g its gradient:

    delta_i = g_i . o_i          ds_ij = p_ij (g_i . v_j - delta_i)
    dv_j = sum_i p_ij g_i        dk_j = scale sum_i ds_ij q_i        dq_i = scale sum_j ds_ij k_j

Source: Dao 2023, "FlashAttention-2", algorithm 2. What is ours:

- **Two passes, no atomics**: one over blocks of keys makes dk and dv, one over blocks of queries makes dq. Seven
  products of tiles where one pass with atomic additions into dq takes five; in exchange every run gives the same bits,
  there is no fp32 copy of dq in memory, and heads that share keys add up inside one program.
- The pass over queries has a loop over whole blocks and one over those with an edge, as the forward. The pass over keys
  has one loop, since two hold too many registers: causal, it masks every block. A key's gradient depends on no other
  key, so keys behind the end are computed and then written as 0.
- A query behind the end reads lse = +inf, so its p is 0. A row that sees nothing has lse = -inf: it meets masked blocks
  only, and these mask p after the exponential.
"""

# mypy: disable-error-code="no-untyped-def"
# (what a kernel takes are pointers, numbers and tiles of its own language)

from __future__ import annotations

import triton
import triton.language as tl

from kernels.attention_forward_triton import SIZES, key_ranges, load_rows, store_rows, visible_keys

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
    q_head, grad_head, LSE, DELTA, q_row, grad_row, start, columns, queries, shift, scale,
    HEAD: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, ROWS: tl.constexpr,
    CAUSAL: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
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
    weights = tl.math.exp2(scores * scale - lse[None, :])
    if CAUSAL:
        weights = tl.where(rows[None, :] + shift >= columns[:, None], weights, 0.0)
    grad_left = load_rows(grad_block, places, grad_row, queries - start, 0, LEFT, HEAD, True)
    rounded = weights.to(grad_left.dtype)
    dv_left = tl.dot(rounded, grad_left, dv_left, input_precision=PRECISION, out_dtype=ACC)
    dweights = tl.dot(v_left, tl.trans(grad_left), input_precision=PRECISION, out_dtype=ACC)
    if RIGHT > 0:
        grad_right = load_rows(grad_block, places, grad_row, queries - start, LEFT, RIGHT, HEAD, True)
        dv_right = tl.dot(rounded, grad_right, dv_right, input_precision=PRECISION, out_dtype=ACC)
        dweights = tl.dot(v_right, tl.trans(grad_right), dweights, input_precision=PRECISION, out_dtype=ACC)
    delta = tl.load(DELTA + rows, mask=rows < queries, other=0.0)
    dscores = (weights * (dweights - delta[None, :])).to(q_left.dtype)
    dk_left = tl.dot(dscores, q_left, dk_left, input_precision=PRECISION, out_dtype=ACC)
    if RIGHT > 0:
        dk_right = tl.dot(dscores, q_right, dk_right, input_precision=PRECISION, out_dtype=ACC)
    return dk_left, dk_right, dv_left, dv_right


@triton.jit(do_not_specialize=SIZES + STRIDES)
def attention_dkdv_kernel(
    Q, K, V, GRAD, LSE, DELTA, DK, DV, LENGTHS,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, grad_batch, grad_head, grad_row,
    dk_batch, dk_head, dk_row, dv_batch, dv_head, dv_row,
    heads, group, queries, keys, scale,
    HEAD: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, UNIT: tl.constexpr, CAUSAL: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: KEYS keys of one head of keys, against all queries that see them, of each head that shares it."""
    blocks = tl.cdiv(keys, KEYS)
    first_key = tl.program_id(0) % blocks * KEYS  # causal: the keys that most rows see start first
    kv_heads = heads // group
    batch = (tl.program_id(0) // blocks // kv_heads).to(tl.int64)
    kv_head = (tl.program_id(0) // blocks % kv_heads).to(tl.int64)
    places = tl.arange(0, KEYS)
    columns = first_key + places
    shift = keys - queries
    q_row = q_row * UNIT
    k_row = k_row * UNIT
    v_row = v_row * UNIT
    grad_row = grad_row * UNIT
    k_block = K + (batch * k_batch + kv_head * k_head) * UNIT + first_key * k_row.to(tl.int64)
    v_block = V + (batch * v_batch + kv_head * v_head) * UNIT + first_key * v_row.to(tl.int64)

    k_left = load_rows(k_block, places, k_row, keys - first_key, 0, LEFT, HEAD, True)
    v_left = load_rows(v_block, places, v_row, keys - first_key, 0, LEFT, HEAD, True)
    dk_left = tl.zeros([KEYS, LEFT], ACC)
    dv_left = tl.zeros([KEYS, LEFT], ACC)
    k_right = k_left
    v_right = v_left
    dk_right = tl.zeros([KEYS, 16], ACC)  # as out_right in the forward
    dv_right = tl.zeros([KEYS, 16], ACC)
    if RIGHT > 0:
        k_right = load_rows(k_block, places, k_row, keys - first_key, LEFT, RIGHT, HEAD, True)
        v_right = load_rows(v_block, places, v_row, keys - first_key, LEFT, RIGHT, HEAD, True)
        dk_right = tl.zeros([KEYS, RIGHT], ACC)
        dv_right = tl.zeros([KEYS, RIGHT], ACC)
    scale = tl.full([], scale, ACC)
    scale_log2 = scale * 1.4426950408889634

    visible = visible_keys(LENGTHS, batch, keys)
    first_row = 0
    if CAUSAL:
        first_row = tl.maximum(first_key - shift, 0) // ROWS * ROWS
    end = tl.where(first_key < visible, queries, 0)
    for member in tl.range(0, group):
        head = kv_head * group + member
        q_base = Q + (batch * q_batch + head * q_head) * UNIT
        grad_base = GRAD + (batch * grad_batch + head * grad_head) * UNIT
        lse_base = LSE + (batch * heads + head) * queries
        delta_base = DELTA + (batch * heads + head) * queries
        for start in tl.range(first_row, end, ROWS):
            dk_left, dk_right, dv_left, dv_right = _block_to_keys(
                k_left, k_right, v_left, v_right, dk_left, dk_right, dv_left, dv_right, q_base, grad_base, lse_base,
                delta_base, q_row, grad_row, start, columns, queries, shift, scale_log2,
                HEAD, LEFT, RIGHT, ROWS, CAUSAL, ACC, PRECISION,
            )  # fmt: skip

    seen = (columns < visible)[:, None]
    left = keys - first_key
    dk_block = DK + (batch * dk_batch + kv_head * dk_head) * UNIT + first_key * dk_row.to(tl.int64) * UNIT
    dv_block = DV + (batch * dv_batch + kv_head * dv_head) * UNIT + first_key * dv_row.to(tl.int64) * UNIT
    store_rows(dk_block, tl.where(seen, dk_left * scale, 0.0), places, dk_row * UNIT, left, 0, LEFT, HEAD)
    store_rows(dv_block, tl.where(seen, dv_left, 0.0), places, dv_row * UNIT, left, 0, LEFT, HEAD)
    if RIGHT > 0:
        store_rows(dk_block, tl.where(seen, dk_right * scale, 0.0), places, dk_row * UNIT, left, LEFT, RIGHT, HEAD)
        store_rows(dv_block, tl.where(seen, dv_right, 0.0), places, dv_row * UNIT, left, LEFT, RIGHT, HEAD)


@triton.jit
def _block_to_queries(
    q_left, q_right, grad_left, grad_right, dq_left, dq_right, lse, delta,
    k_head, v_head, k_row, v_row, start, rows, visible, shift, scale,
    HEAD: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, KEYS: tl.constexpr, EDGE: tl.constexpr,
    CAUSAL: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add what KEYS keys from `start` on give to a block of queries."""
    places = tl.arange(0, KEYS)
    k_block = k_head + start * k_row.to(tl.int64)
    v_block = v_head + start * v_row.to(tl.int64)
    k_left = load_rows(k_block, places, k_row, visible - start, 0, LEFT, HEAD, EDGE)
    scores = tl.dot(q_left, tl.trans(k_left), input_precision=PRECISION, out_dtype=ACC)
    if RIGHT > 0:
        k_right = load_rows(k_block, places, k_row, visible - start, LEFT, RIGHT, HEAD, EDGE)
        scores = tl.dot(q_right, tl.trans(k_right), scores, input_precision=PRECISION, out_dtype=ACC)
    weights = tl.math.exp2(scores * scale - lse[:, None])
    if EDGE:
        columns = start + places
        seen = (columns < visible)[None, :]
        if CAUSAL:
            seen = seen & (rows[:, None] + shift >= columns[None, :])
        weights = tl.where(seen, weights, 0.0)
    v_left = load_rows(v_block, places, v_row, visible - start, 0, LEFT, HEAD, EDGE)
    dweights = tl.dot(grad_left, tl.trans(v_left), input_precision=PRECISION, out_dtype=ACC)
    if RIGHT > 0:
        v_right = load_rows(v_block, places, v_row, visible - start, LEFT, RIGHT, HEAD, EDGE)
        dweights = tl.dot(grad_right, tl.trans(v_right), dweights, input_precision=PRECISION, out_dtype=ACC)
    dscores = (weights * (dweights - delta[:, None])).to(k_left.dtype)
    dq_left = tl.dot(dscores, k_left, dq_left, input_precision=PRECISION, out_dtype=ACC)
    if RIGHT > 0:
        dq_right = tl.dot(dscores, k_right, dq_right, input_precision=PRECISION, out_dtype=ACC)
    return dq_left, dq_right


@triton.jit(do_not_specialize=SIZES + STRIDES)
def attention_dq_kernel(
    Q, K, V, GRAD, LSE, DELTA, DQ, LENGTHS,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, grad_batch, grad_head, grad_row,
    dq_batch, dq_head, dq_row,
    heads, group, queries, keys, scale,
    HEAD: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, UNIT: tl.constexpr, CAUSAL: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, EDGE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: ROWS queries of one head of one sample, against all keys they see; laid out as the forward."""
    blocks = tl.cdiv(queries, ROWS)
    block = blocks - 1 - tl.program_id(0) % blocks
    batch = (tl.program_id(0) // blocks // heads).to(tl.int64)
    head = (tl.program_id(0) // blocks % heads).to(tl.int64)
    kv_head = head // group
    first_row = block * ROWS
    places = tl.arange(0, ROWS)
    rows = first_row + places
    left = queries - first_row
    shift = keys - queries
    q_row = q_row * UNIT
    k_row = k_row * UNIT
    v_row = v_row * UNIT
    grad_row = grad_row * UNIT
    q_block = Q + (batch * q_batch + head * q_head) * UNIT + first_row * q_row.to(tl.int64)
    grad_block = GRAD + (batch * grad_batch + head * grad_head) * UNIT + first_row * grad_row.to(tl.int64)
    k_base = K + (batch * k_batch + kv_head * k_head) * UNIT
    v_base = V + (batch * v_batch + kv_head * v_head) * UNIT

    q_left = load_rows(q_block, places, q_row, left, 0, LEFT, HEAD, True)
    grad_left = load_rows(grad_block, places, grad_row, left, 0, LEFT, HEAD, True)
    dq_left = tl.zeros([ROWS, LEFT], ACC)
    q_right = q_left
    grad_right = grad_left
    dq_right = tl.zeros([ROWS, 16], ACC)
    if RIGHT > 0:
        q_right = load_rows(q_block, places, q_row, left, LEFT, RIGHT, HEAD, True)
        grad_right = load_rows(grad_block, places, grad_row, left, LEFT, RIGHT, HEAD, True)
        dq_right = tl.zeros([ROWS, RIGHT], ACC)
    statistics = (batch * heads + head) * queries
    lse = tl.load(LSE + statistics + rows, mask=places < left, other=float("inf")) * 1.4426950408889634  # log2(e)
    delta = tl.load(DELTA + statistics + rows, mask=places < left, other=0.0)
    scale = tl.full([], scale, ACC)
    scale_log2 = scale * 1.4426950408889634

    visible = visible_keys(LENGTHS, batch, keys)
    whole, end = key_ranges(first_row, visible, shift, ROWS, KEYS, CAUSAL)
    for start in tl.range(0, whole, KEYS):
        dq_left, dq_right = _block_to_queries(
            q_left, q_right, grad_left, grad_right, dq_left, dq_right, lse, delta, k_base, v_base, k_row, v_row, start,
            rows, visible, shift, scale_log2, HEAD, LEFT, RIGHT, KEYS, False, CAUSAL, ACC, PRECISION,
        )  # fmt: skip
    for start in tl.range(whole, end, EDGE):
        dq_left, dq_right = _block_to_queries(
            q_left, q_right, grad_left, grad_right, dq_left, dq_right, lse, delta, k_base, v_base, k_row, v_row, start,
            rows, visible, shift, scale_log2, HEAD, LEFT, RIGHT, EDGE, True, CAUSAL, ACC, PRECISION,
        )  # fmt: skip
    dq_block = DQ + (batch * dq_batch + head * dq_head) * UNIT + first_row * dq_row.to(tl.int64) * UNIT
    store_rows(dq_block, dq_left * scale, places, dq_row * UNIT, left, 0, LEFT, HEAD)
    if RIGHT > 0:
        store_rows(dq_block, dq_right * scale, places, dq_row * UNIT, left, LEFT, RIGHT, HEAD)
