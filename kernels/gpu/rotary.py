"""Rotary position embedding as a Triton kernel; formula and pairing are those of kernels/rotary.py.

Design choices:
- A program turns a block of positions for `HEADS` heads, one after the other: cos and sin, in fp32 as large as the head
  in bf16, are read once for all of them.
- Interleaved pairs are read side by side and split in registers, so both pairings read whole lines of memory.
- x may lie in memory as [B, S, H, K] does, and the output lies as x. Strides come in units of 8 elements where they are
  multiples of it, see kernels/gpu/norm.py.

State: runs in Triton's interpreter, compiles for sm_80, sm_90, sm_100 and gfx942; not yet run on a GPU.

Axes: B batch, H heads, S positions, K size of a head; R rows of a block, P pairs.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

from kernels.gpu.target import ACCUMULATORS, dense, unit_of
from kernels.precision import accumulator_of

if TYPE_CHECKING:
    from kernels.aot import AotCase

TILE = 1024  # pairs of a block
HEADS = 4  # of a program
WARPS = 4
NUMBERS = [f"{tensor}_{axis}" for tensor in ("x", "out") for axis in ("batch", "head", "row")]
NUMBERS += ["heads", "rows", "table_batch"]  # one compiled kernel for all of them


@triton.jit
def _turn(first_RP, second_RP, cos_RP, sin_RP):
    return first_RP * cos_RP - second_RP * sin_RP, first_RP * sin_RP + second_RP * cos_RP


@triton.jit(do_not_specialize=NUMBERS)
def rotary_kernel(
    X, COS, SIN, OUT, x_batch, x_head, x_row, out_batch, out_head, out_row, heads, rows, table_batch,
    SIZE: tl.constexpr, PAIRS: tl.constexpr, WIDTH: tl.constexpr, REST: tl.constexpr, INTERLEAVED: tl.constexpr,
    INVERSE: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """ROWS positions of HEADS heads of one sample. WIDTH, REST: PAIRS and what is not turned, up to a power of 2."""
    groups = tl.cdiv(heads, HEADS)
    blocks = tl.cdiv(rows, ROWS)
    first_head = tl.program_id(0) % groups * HEADS  # programs of the same positions are neighbours
    batch = (tl.program_id(0) // groups // blocks).to(tl.int64)
    row_R = (tl.program_id(0) // groups % blocks * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    pair_P = tl.arange(0, WIDTH)
    inside_RP = (row_R < rows)[:, None] & (pair_P < PAIRS)[None, :]
    table_RP = batch * table_batch + row_R[:, None] * PAIRS + pair_P[None, :]
    cos_RP = tl.load(COS + table_RP, mask=inside_RP, other=0.0).to(ACC)
    sin_RP = tl.load(SIN + table_RP, mask=inside_RP, other=0.0).to(ACC)
    if INVERSE:
        sin_RP = -sin_RP
    x_rows = X + (batch * x_batch + row_R * x_row)[:, None] * UNIT
    out_rows = OUT + (batch * out_batch + row_R * out_row)[:, None] * UNIT
    both = tl.arange(0, 2 * WIDTH)[None, :]
    inside_both = (row_R < rows)[:, None] & (both < 2 * PAIRS)
    rest = 2 * PAIRS + tl.arange(0, REST)[None, :]
    inside_rest = (row_R < rows)[:, None] & (rest < SIZE)
    for step in tl.static_range(HEADS):
        head = (first_head + step).to(tl.int64)
        there = head < heads
        x_head_rows = x_rows + head * x_head * UNIT
        out_head_rows = out_rows + head * out_head * UNIT
        if INTERLEAVED:
            x_both = tl.load(x_head_rows + both, mask=inside_both & there, other=0.0).to(ACC)
            first_RP, second_RP = tl.split(tl.reshape(x_both, [ROWS, WIDTH, 2]))
            first_RP, second_RP = _turn(first_RP, second_RP, cos_RP, sin_RP)
            out_both = tl.interleave(first_RP, second_RP).to(OUT.dtype.element_ty)
            tl.store(out_head_rows + both, out_both, mask=inside_both & there)
        else:
            first_RP = tl.load(x_head_rows + pair_P[None, :], mask=inside_RP & there, other=0.0).to(ACC)
            second_RP = tl.load(x_head_rows + PAIRS + pair_P[None, :], mask=inside_RP & there, other=0.0).to(ACC)
            first_RP, second_RP = _turn(first_RP, second_RP, cos_RP, sin_RP)
            tl.store(out_head_rows + pair_P[None, :], first_RP.to(OUT.dtype.element_ty), mask=inside_RP & there)
            second_RP = second_RP.to(OUT.dtype.element_ty)
            tl.store(out_head_rows + PAIRS + pair_P[None, :], second_RP, mask=inside_RP & there)
        if SIZE > 2 * PAIRS:
            kept = tl.load(x_head_rows + rest, mask=inside_rest & there)
            tl.store(out_head_rows + rest, kept, mask=inside_rest & there)


def rotate(
    x_BHSK: torch.Tensor,
    cos_SR: torch.Tensor,
    sin_SR: torch.Tensor,
    out_BHSK: torch.Tensor,
    interleaved: bool,
    inverse: bool,
) -> None:
    """Fill out (shaped as x). cos and sin [S, R] or [B, S, R], of any dtype: fp32 reaches the kernel; inverse: turn
    back."""
    if x_BHSK.stride(3) != 1:
        x_BHSK = x_BHSK.contiguous()
    batch, heads, rows, size = x_BHSK.shape
    pairs = cos_SR.shape[-1]
    cos_SR, sin_SR = (dense(each.to(accumulator_of(x_BHSK.dtype))) for each in (cos_SR, sin_SR))
    strides = [*x_BHSK.stride()[:3], *out_BHSK.stride()[:3]]
    unit = unit_of(*strides, of=(x_BHSK,))
    constexprs = _constexprs(size, pairs, interleaved, inverse, unit, x_BHSK.dtype)
    programs = batch * triton.cdiv(rows, constexprs["ROWS"]) * triton.cdiv(heads, HEADS)
    with torch.cuda.device_of(x_BHSK):
        if programs:
            rotary_kernel[(programs,)](
                x_BHSK, cos_SR, sin_SR, out_BHSK, *(stride // unit for stride in strides),
                heads, rows, rows * pairs if cos_SR.ndim == 3 else 0, **constexprs, num_warps=WARPS,
            )  # fmt: skip


def _constexprs(
    size: int, pairs: int, interleaved: bool, inverse: bool, unit: int, dtype: torch.dtype
) -> dict[str, Any]:
    width = triton.next_power_of_2(pairs)
    return dict(
        SIZE=size, PAIRS=pairs, WIDTH=width, REST=triton.next_power_of_2(max(1, size - 2 * pairs)),
        INTERLEAVED=interleaved, INVERSE=inverse, UNIT=unit, ROWS=max(1, min(TILE // width, 64)), HEADS=HEADS,
        ACC=ACCUMULATORS[dtype],
    )  # fmt: skip


def aot_cases() -> list[AotCase]:
    """Whole heads, part of a head, both pairings and directions, in bf16; other dtypes; heads that fill no power of 2,
    heads at odd strides, a single pair."""
    settings = [(64, 32, "bf16"), (128, 64, "bf16"), (80, 20, "bf16"), (72, 36, "bf16"), (65, 32, "bf16")]
    settings += [(2, 1, "bf16"), (128, 64, "fp32"), (128, 64, "fp16")]
    cases = [_aot_case(*each, pairing, False) for each in settings for pairing in (False, True)]
    inverse = [(64, 32, "bf16"), (80, 20, "bf16")]
    return cases + [_aot_case(*each, pairing, True) for each in inverse for pairing in (False, True)]


def _aot_case(size: int, pairs: int, dtype: str, interleaved: bool, inverse: bool) -> AotCase:
    from kernels.aot import AotCase

    unit = unit_of(size)
    constexprs = _constexprs(size, pairs, interleaved, inverse, unit, torch.bfloat16)
    names = [name for name in rotary_kernel.arg_names if name not in constexprs]
    kinds = {"COS": "*fp32", "SIN": "*fp32"}
    pointers = {name: kinds.get(name, f"*{dtype}") for name in names if name.isupper()}
    pairing = "interleaved" if interleaved else "halves"
    return AotCase(
        name=f"rotary {dtype} K{size} R{pairs} {pairing}{' inverse' * inverse}",
        kernel=rotary_kernel,
        signature=pointers | {name: "i32" for name in names if name.islower()},
        constexprs=constexprs,
        attrs=[name for name in pointers if unit > 1 or name != "X"],
        options={"num_warps": WARPS},
        matrix=False,
    )
