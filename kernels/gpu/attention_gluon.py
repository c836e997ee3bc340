"""The forward of attention for Hopper, in Gluon: out = softmax(scale q k^T) v, written warp by warp.

Source: Shah et al. 2024, "FlashAttention-3", algorithm 2. One program computes 128 queries of one head:

- **One warp only loads, two groups of four warps only compute** (64 queries each). The loading warp asks the copy
  engine (TMA) for blocks of keys and values, `STAGES` ahead; a block is shared by both groups. Registers go where the
  arithmetic is: 24 a thread for the loading warp, 240 for the others.
- **The softmax of a block runs under the product of the block before it**: scores of block i + 1 and weights x values
  of block i are both in flight before the softmax of block i + 1 begins. Between that softmax and the wait for the
  product stands the wait for the next keys: ptxas moves arithmetic freely, but not behind a loop that waits. Without
  it all exponentials ended up after the product (seen in the machine code; a test looks).
- **From the last block to the first**, as FlashAttention-3: the blocks with an edge in them (the end of the keys, the
  diagonal) are the first ones, the rest goes without a mask. At least one block is done with the mask, so that a row
  that sees no key needs no special case: its sum stays 0, its output is 0 and its lse -inf.
- **A tensor is described to the copy engine in all four axes**, with whatever strides it has: a block never reaches
  into the next head, what lies behind the end of an axis arrives as zeros and is never written.
- Barriers come in pairs, `full` (the copy engine counts bytes) and `free` (both groups have read it). Block i is the
  (i // STAGES)-th use of its place; a wait names the parity of that number.

Compiles for sm_90 on triton 3.6 and 3.7 without spilling, never run: there is no interpreter for Gluon and there was no
GPU. What holds it up are tests/kernels/ahead_of_time/test_attention_gluon*.py: the gate's numbers, and this very source
run on a small model of barriers, copy engine and matrix unit, in many orders of events, against fp64. "auto" never
takes it. The turn-taking of FlashAttention-3 (one group's softmax under the other's products, by decree of a
barrier) would be one more pair of barriers here; it is left out until it can be timed.

Axes: B batch, H heads, G heads of keys and values (H a multiple of G), Q queries, S keys, K size of a head. A tile's
axes are rows (queries), keys and columns (of a head).
"""

# mypy: disable-error-code="no-untyped-def"
# (what a kernel takes are pointers, numbers and tiles of its own language)

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from kernels.gpu.attention import shape_refusal

if TYPE_CHECKING:
    from kernels.aot import AotCase
    from kernels.attention_spec import Spec

ROWS = gl.constexpr(64)  # of a group: what one matrix instruction of Hopper takes
GROUPS = gl.constexpr(2)


class Tile(NamedTuple):
    keys: int
    stages: int


TILES = {64: Tile(128, 2), 128: Tile(128, 2), 256: Tile(64, 2)}  # by size of a head
DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}
SIZES = ["heads", "group", "queries", "keys"]  # no compile of their own for 1 and for multiples of 16


@gluon.jit
def load_block(source, tiles, full, free, batch, head, turn, blocks, KEYS: gl.constexpr, STAGES: gl.constexpr):
    """Ask for this turn's keys or values as soon as there is room."""
    stage = turn % STAGES
    mbarrier.wait(free.index(stage), (turn // STAGES) & 1 ^ 1)  # at the first use of a place, true from the start
    mbarrier.expect(full.index(stage), source.block_type.nbytes)
    where = [batch, head, (blocks - 1 - turn) * KEYS, 0]
    tma.async_copy_global_to_shared(source, where, full.index(stage), tiles.index(stage))


@gluon.jit
def load_tiles(
    q_source, k_source, v_source, tiles, full, free, batch, head, kv_head, first_row, blocks,
    KEYS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The loading warp: queries once, then keys and values in the order in which they are needed."""
    q_tiles, k_tiles, v_tiles = tiles
    q_full, k_full, v_full = full
    k_free, v_free = free
    for group in gl.static_range(GROUPS):
        mbarrier.expect(q_full.index(group), q_source.block_type.nbytes)
        where = [batch, head, first_row + group * ROWS, 0]
        tma.async_copy_global_to_shared(q_source, where, q_full.index(group), q_tiles.index(group))
    load_block(k_source, k_tiles, k_full, k_free, batch, kv_head, 0, blocks, KEYS, STAGES)
    for turn in range(1, blocks):
        load_block(k_source, k_tiles, k_full, k_free, batch, kv_head, turn, blocks, KEYS, STAGES)
        load_block(v_source, v_tiles, v_full, v_free, batch, kv_head, turn - 1, blocks, KEYS, STAGES)
    load_block(v_source, v_tiles, v_full, v_free, batch, kv_head, blocks - 1, blocks, KEYS, STAGES)


@gluon.jit
def start_scores(q_tile, k_tiles, turn, KEYS: gl.constexpr, HEAD: gl.constexpr, STAGES: gl.constexpr):
    """Scores of this turn's keys, which are there, in flight."""
    layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, KEYS, 16])
    k_tile = k_tiles.index(turn % STAGES).reshape([KEYS, HEAD]).permute((1, 0))
    nothing = gl.zeros([ROWS, KEYS], gl.float32, layout=layout)
    return warpgroup_mma(q_tile, k_tile, nothing, use_acc=False, is_async=True)


@gluon.jit
def start_output(weights, out, v_tiles, v_full, turn, KEYS: gl.constexpr, HEAD: gl.constexpr, STAGES: gl.constexpr):
    """out + weights x this turn's values, in flight."""
    stage = turn % STAGES
    mbarrier.wait(v_full.index(stage), (turn // STAGES) & 1)
    return warpgroup_mma(weights, v_tiles.index(stage).reshape([KEYS, HEAD]), out, is_async=True)


@gluon.jit
def weigh(scores, top, total, rows, start, keys, shift, scale, dtype: gl.constexpr, layout: gl.constexpr,
          KEYS: gl.constexpr, CAUSAL: gl.constexpr, EDGE: gl.constexpr):  # fmt: skip
    """One step of the online softmax: (weights as `layout`, what earlier weights shrink by, new maximum, new sum).

    EDGE: some key of the block is hidden from some row.
    """
    if EDGE:
        columns = start + gl.arange(0, KEYS, layout=gl.SliceLayout(0, scores.type.layout))
        seen = (columns < keys)[None, :]
        if CAUSAL:
            seen = seen & (rows[:, None] + shift >= columns[None, :])
        scores = gl.where(seen, scores, -float("inf"))
    higher = gl.maximum(top, gl.max(scores, 1) * scale)
    weights = gl.exp2(scores * scale - higher[:, None])
    shrink = gl.exp2(top - higher)
    total = total * shrink + gl.sum(weights, 1)
    return gl.convert_layout(weights.to(dtype), layout), shrink, higher, total


@gluon.jit
def attend_block(
    q_tile, k_tiles, v_tiles, k_full, v_full, k_free, v_free, weights, out, top, total, rows, turn, blocks, keys, shift,
    scale, KEYS: gl.constexpr, HEAD: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr, EDGE: gl.constexpr,
):  # fmt: skip
    """Turn 1 and later: this turn's softmax under the product of the turn before it."""
    weights_layout: gl.constexpr = weights.type.layout
    scores = start_scores(q_tile, k_tiles, turn, KEYS, HEAD, STAGES)
    out_later = start_output(weights, out, v_tiles, v_full, turn - 1, KEYS, HEAD, STAGES)
    scores = warpgroup_mma_wait(1, deps=[scores])
    mbarrier.arrive(k_free.index(turn % STAGES))
    next_weights, shrink, top, total = weigh(
        scores, top, total, rows, (blocks - 1 - turn) * KEYS, keys, shift, scale,
        v_tiles.dtype, weights_layout, KEYS, CAUSAL, EDGE,
    )  # fmt: skip
    later = turn + 1
    mbarrier.wait(k_full.index(later % STAGES), (later // STAGES) & 1, pred=later < blocks)
    out, weights = warpgroup_mma_wait(0, deps=[out_later, weights])  # the product reads the old weights until here
    mbarrier.arrive(v_free.index((turn - 1) % STAGES))
    out = out * gl.convert_layout(shrink, gl.SliceLayout(1, out.type.layout))[:, None]
    return next_weights, out, top, total


@gluon.jit
def attend(
    out_target, LSE, tiles, full, free, scale, batch, head, first_row, first_lse, blocks, edges, queries, keys,
    GROUP: gl.constexpr, KEYS: gl.constexpr, HEAD: gl.constexpr, STAGES: gl.constexpr,
    CAUSAL: gl.constexpr,
):  # fmt: skip
    """One group of warps: ROWS queries against all blocks, the first `edges` of them with the mask."""
    scores_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD, 16])
    weights_layout: gl.constexpr = gl.DotOperandLayout(0, out_layout, 2)
    row_layout: gl.constexpr = gl.SliceLayout(1, scores_layout)
    q_tiles, k_tiles, v_tiles = tiles
    q_full, k_full, v_full = full
    k_free, v_free = free
    own = GROUP * ROWS + gl.arange(0, ROWS, layout=row_layout)
    rows = first_row + own
    shift = keys - queries
    q_tile = q_tiles.index(GROUP).reshape([ROWS, HEAD])
    top = gl.full([ROWS], -1e30, gl.float32, layout=row_layout)
    total = gl.zeros([ROWS], gl.float32, layout=row_layout)
    out = gl.zeros([ROWS, HEAD], gl.float32, layout=out_layout)

    mbarrier.wait(q_full.index(GROUP), 0)
    mbarrier.wait(k_full.index(0), 0)
    scores = warpgroup_mma_wait(0, deps=[start_scores(q_tile, k_tiles, 0, KEYS, HEAD, STAGES)])
    mbarrier.arrive(k_free.index(0))
    weights, _, top, total = weigh(
        scores, top, total, rows, (blocks - 1) * KEYS, keys, shift, scale,
        v_tiles.dtype, weights_layout, KEYS, CAUSAL, True,
    )  # fmt: skip
    mbarrier.wait(k_full.index(1), 0, pred=blocks > 1)
    for turn in range(1, edges):
        weights, out, top, total = attend_block(
            q_tile, k_tiles, v_tiles, k_full, v_full, k_free, v_free, weights, out, top, total, rows, turn, blocks,
            keys, shift, scale, KEYS, HEAD, STAGES, CAUSAL, True,
        )  # fmt: skip
    for turn in range(edges, blocks):
        weights, out, top, total = attend_block(
            q_tile, k_tiles, v_tiles, k_full, v_full, k_free, v_free, weights, out, top, total, rows, turn, blocks,
            keys, shift, scale, KEYS, HEAD, STAGES, CAUSAL, False,
        )  # fmt: skip
    out = start_output(weights, out, v_tiles, v_full, blocks - 1, KEYS, HEAD, STAGES)
    out, weights = warpgroup_mma_wait(0, deps=[out, weights])

    sees_any = total > 0
    total = gl.where(sees_any, total, 1.0)
    lse = gl.where(sees_any, (top + gl.log2(total)) * 0.6931471805599453, -float("inf"))  # ln(2)
    gl.store(LSE + first_lse + own, lse, mask=rows < queries)
    out = out / gl.convert_layout(total, gl.SliceLayout(1, out_layout))[:, None]
    q_tile.store(out.to(q_tiles.dtype))  # the queries are read for the last time; their place takes the output
    fence_async_shared()
    tma.async_copy_shared_to_global(out_target, [batch, head, first_row + GROUP * ROWS, 0], q_tiles.index(GROUP))
    tma.store_wait(0)


@gluon.jit(do_not_specialize=SIZES)
def attention_gluon_kernel(
    q_source, k_source, v_source, out_target, LSE, heads, group, queries, keys, scale,
    HEAD: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr,
):  # fmt: skip
    """One program: GROUPS * ROWS queries of a head of a sample. `group` heads share keys; scale includes log2(e)."""
    gl.static_assert(STAGES >= 2, "the next keys are awaited before the last values are given back")
    row_blocks = gl.cdiv(queries, GROUPS * ROWS)
    row_block = row_blocks - 1 - gl.program_id(0) % row_blocks  # causal: the longest rows start first
    batch = gl.program_id(0) // row_blocks // heads
    head = gl.program_id(0) // row_blocks % heads
    first_row = row_block * (GROUPS * ROWS)
    first_lse = gl.cast(batch * heads + head, gl.int64) * queries + first_row

    # every row sees keys 0 .. whole, some see whole .. end, none the rest; one block at least, be it all hidden
    whole = keys
    end = keys
    if CAUSAL:
        whole = gl.minimum(whole, gl.maximum(first_row + keys - queries + 1, 0))
        end = gl.minimum(end, gl.maximum(first_row + GROUPS * ROWS + keys - queries, 0))
    blocks = gl.maximum(gl.cdiv(end, KEYS), 1)
    edges = gl.maximum(blocks - whole // KEYS, 1)

    q_tiles = gl.allocate_shared_memory(q_source.dtype, [GROUPS, 1, 1, ROWS, HEAD], q_source.layout)
    k_tiles = gl.allocate_shared_memory(k_source.dtype, [STAGES, 1, 1, KEYS, HEAD], k_source.layout)
    v_tiles = gl.allocate_shared_memory(v_source.dtype, [STAGES, 1, 1, KEYS, HEAD], v_source.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [GROUPS, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for each in gl.static_range(GROUPS):
        mbarrier.init(q_full.index(each), count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_full.index(stage), count=1)
        mbarrier.init(v_full.index(stage), count=1)
        mbarrier.init(k_free.index(stage), count=GROUPS)
        mbarrier.init(v_free.index(stage), count=GROUPS)
    fence_async_shared()  # the copy engine must see the barriers as they are now

    tiles = (q_tiles, k_tiles, v_tiles)
    full = (q_full, k_full, v_full)
    free = (k_free, v_free)
    gl.warp_specialize(
        [
            (attend, (out_target, LSE, tiles, full, free, scale, batch, head, first_row, first_lse, blocks, edges,
                      queries, keys, 0, KEYS, HEAD, STAGES, CAUSAL)),
            (attend, (out_target, LSE, tiles, full, free, scale, batch, head, first_row, first_lse, blocks, edges,
                      queries, keys, 1, KEYS, HEAD, STAGES, CAUSAL)),
            (load_tiles, (q_source, k_source, v_source, tiles, full, free, batch, head, head // group, first_row,
                          blocks, KEYS, STAGES)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


def forward(
    q_BHQK: torch.Tensor, k_BGSK: torch.Tensor, v_BGSK: torch.Tensor, spec: Spec
) -> tuple[torch.Tensor, torch.Tensor]:
    """(output [B, H, Q, K] in the inputs' dtype, log-sum-exp of the scaled scores [B, H, Q] in fp32, natural log).

    A query that sees no key gives 0 and -inf. For tensors that `refusal` has nothing against.
    Raises ValueError for a tensor that does not begin at a multiple of 16 bytes.
    """
    for name, tensor in (("q", q_BHQK), ("k", k_BGSK), ("v", v_BGSK)):
        if tensor.data_ptr() % 16:
            raise ValueError(f"Gluon attention: {name} begins {tensor.data_ptr() % 16} bytes off a multiple of 16")
    out_BHQK = torch.empty_like(q_BHQK)
    lse_BHQ = q_BHQK.new_empty(q_BHQK.shape[:3], dtype=torch.float32)
    if not k_BGSK.numel():  # the copy engine knows no empty tensors
        return out_BHQK.zero_(), lse_BHQ.fill_(-math.inf)
    if out_BHQK.numel():
        grid, arguments, constants = launch(q_BHQK, k_BGSK, v_BGSK, out_BHQK, lse_BHQ, spec)
        with torch.cuda.device_of(q_BHQK):
            attention_gluon_kernel[grid](*arguments, **constants)
    return out_BHQK, lse_BHQ


def refusal(
    q_BHQK: torch.Tensor,
    k_BGSK: torch.Tensor,
    v_BGSK: torch.Tensor,
    spec: Spec,
    *,
    key_lengths_B: torch.Tensor | None = None,
    query_starts: torch.Tensor | None = None,
    key_starts: torch.Tensor | None = None,
    seed: torch.Tensor | None = None,
) -> str:
    """Why this kernel cannot take such tensors, in words; empty when it can."""
    q, k, v = q_BHQK, k_BGSK, v_BGSK
    if why_not := shape_refusal(q, k, v):
        return why_not
    if q.shape[3] not in TILES:
        return f"heads of size {q.shape[3]}: sizes {', '.join(map(str, TILES))} are there"
    if q.dtype not in DTYPES or not q.dtype == k.dtype == v.dtype:
        return f"q is {q.dtype}, k {k.dtype}, v {v.dtype}: need bfloat16 or float16 for all three"
    extras = {
        "a window": spec.window, "a soft cap": spec.soft_cap, "dropout": spec.dropout,
        "key lengths": key_lengths_B is not None, "a dropout seed": seed is not None,
        "packed samples": query_starts is not None or key_starts is not None,
    }  # fmt: skip
    if wanted := [name for name, value in extras.items() if value]:
        return f"{' and '.join(wanted)}: it is plain or causal only"
    if not spec.scale > 0:
        return f"scale is {spec.scale}: it must be positive"
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if why_not := _layout_refusal(tensor):
            return f"{name} {why_not}"
    if not q.device == k.device == v.device:
        return f"q is on {q.device}, k on {k.device}, v on {v.device}: need one device"
    if not q.is_cuda or torch.version.hip or torch.cuda.get_device_capability(q.device)[0] != 9:
        return f"the tensors are on {q.device}: it needs a Hopper GPU (sm_90)"
    return ""


def _layout_refusal(tensor: torch.Tensor) -> str:
    """Why the copy engine could not read a tensor; it takes steps of a multiple of 16 bytes, 8 elements."""
    if tensor.stride(3) != 1:
        return f"has strides {tuple(tensor.stride())}: elements of a head must lie side by side"
    steps = [tensor.stride(axis) for axis in range(3) if tensor.shape[axis] > 1]
    if any(step == 0 or step % 8 for step in steps):
        return f"has strides {tuple(tensor.stride())}: need multiples of 8 elements (16 bytes), and no expanded axis"
    if not torch.compiler.is_compiling() and tensor.storage_offset() % 8:  # cannot be traced; `forward` looks again
        return f"begins at element {tensor.storage_offset()} of its storage: need a multiple of 8 (16 bytes)"
    return ""


def launch(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, spec: Spec
) -> tuple[tuple[int], tuple[Any, ...], dict[str, Any]]:
    """(grid, arguments, constants and options) of the kernel."""
    batch, heads, queries, head = q.shape
    tile = TILES[head]
    q_source, out_target = (_describe(each, ROWS.value) for each in (q, out))
    k_source, v_source = (_describe(each, tile.keys) for each in (k, v))
    sizes = (heads, heads // k.shape[1], queries, k.shape[2], spec.scale * math.log2(math.e))
    constants = dict(HEAD=head, KEYS=tile.keys, STAGES=tile.stages, CAUSAL=spec.causal, num_warps=4)
    programs = batch * heads * -(queries // -(GROUPS.value * ROWS.value))
    return (programs,), (q_source, k_source, v_source, out_target, lse, *sizes), constants


def _describe(tensor: torch.Tensor, rows: int) -> TensorDescriptor:
    """A tensor and its blocks of `rows` rows of one head, for the copy engine."""
    steps = [
        tensor.stride(axis) if tensor.shape[axis] > 1 else tensor.shape[3] for axis in range(3)
    ]  # else: any will do
    block = [1, 1, rows, tensor.shape[3]]
    layout = gl.NVMMASharedLayout.get_default_for(block, DTYPES[tensor.dtype])
    return TensorDescriptor(tensor, list(tensor.shape), [*steps, 1], block, layout)


def aot_cases() -> list[AotCase]:
    """Every head size, dtype and mask."""
    return [_aot_case(head, dtype, causal) for head in TILES for dtype in ("bf16", "fp16") for causal in (False, True)]


def _aot_case(head: int, dtype: str, causal: bool) -> AotCase:
    from kernels.aot import AotCase

    tile = TILES[head]
    element = {"bf16": gl.bfloat16, "fp16": gl.float16}[dtype]

    def blocks(rows: int) -> str:
        shape = [1, 1, rows, head]
        return f"tensordesc<{dtype}{shape},{gl.NVMMASharedLayout.get_default_for(shape, element)!r}>"

    return AotCase(
        name=f"attention_gluon {head} {dtype} {'causal' if causal else 'full'}",
        kernel=attention_gluon_kernel,
        signature={
            "q_source": blocks(ROWS.value), "k_source": blocks(tile.keys), "v_source": blocks(tile.keys),
            "out_target": blocks(ROWS.value), "LSE": "*fp32", **dict.fromkeys(SIZES, "i32"), "scale": "fp32",
        },
        constexprs=dict(HEAD=head, KEYS=tile.keys, STAGES=tile.stages, CAUSAL=causal),
        attrs=["LSE"],
        options=dict(num_warps=4),
        targets=("sm_90",),
    )  # fmt: skip
