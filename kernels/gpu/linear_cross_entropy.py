"""Cross entropy over a chunk of logits in Triton: the loss of each row, and the logits overwritten by their gradients.

Formulas are those of kernels/linear_cross_entropy.py, which makes the logits and calls this file. Source of the
running maximum and sum: Milakov and Gimelshein 2018, "Online normalizer calculation for softmax", algorithm 3.

Design choices:
- A program makes one row in two sweeps: first the four numbers (maximum, sum of exp(z - maximum) without the target, z
  at the target, sum of z), then the gradient. The row is too long to stay on the chip, so the second sweep goes
  backwards: what was read last is what the cache still has. Memory traffic is 3 to 4 times the chunk, cache aside.
- A block of a row has one maximum, found by all threads together, and a sum a column: one exponential an element, and
  one exchange between threads a block.
- Blocks that are whole have no mask; a mask at a vocabulary that is no multiple of 16 would cost the wide loads.
- With ranks the sweeps are two kernels, for the four numbers are exchanged between them.
- bf16 or fp32 logits and arithmetic in fp32; in the interpreter fp64 too. No atomics: the same bits every time.

State: runs in Triton's interpreter, compiles for sm_80, sm_90, sm_100 and gfx942; not yet run on a GPU.

Axes: C rows of the chunk, V columns, B columns of a block.
"""

# mypy: disable-error-code="no-untyped-def"
# (what a kernel takes are pointers, numbers and tiles of its own language)

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from kernels.aot import TARGETS, AotCase
from kernels.precision import accumulator_of

BLOCK = 8192  # columns, at most
ONE_A_ROW = ["Places", "Factors"]  # of rows from anywhere on, so their start tells nothing
LOWEST = tl.constexpr(-1e30)  # a maximum to begin with: finite, so that -inf logits give 0 and not nan


def chunk_(
    logits_CV: torch.Tensor,
    places_C: torch.Tensor,
    factors_C: torch.Tensor,
    label_smoothing: float,
    z_loss: float,
    soft_cap: float,
    *,
    gradient: bool,
) -> torch.Tensor:
    """Losses [C], without the factors; with `gradient`, logits become dloss/dlogits times the row's factor.

    logits: rows without gaps, any distance between rows. places int64: the target's column. Losses and factors: fp32,
    or fp64 of fp64 logits. A row of factor 0 is left out: its loss and gradients are 0.
    """
    losses_C = torch.empty_like(factors_C)
    settings = {"SMOOTHING": label_smoothing, "Z_LOSS": z_loss, "SOFT_CAP": soft_cap, "GRADIENT": gradient}
    _launch(chunk_kernel, logits_CV, places_C, factors_C.contiguous(), losses_C, **settings)
    return losses_C


def numbers(logits_CV: torch.Tensor, places_C: torch.Tensor, soft_cap: float) -> torch.Tensor:
    """[4, C] of these columns: maximum, sum without the target, z at the target (-inf where places is -1), sum of z."""
    dtype = accumulator_of(logits_CV.dtype)
    numbers_4C = logits_CV.new_empty(4, len(logits_CV), dtype=dtype)
    _launch(numbers_kernel, logits_CV, places_C, numbers_4C, SOFT_CAP=soft_cap)
    return numbers_4C


def gradient_(
    logits_CV: torch.Tensor,
    places_C: torch.Tensor,
    maximum_C: torch.Tensor,
    gradient_3C: torch.Tensor,
    soft_cap: float,
) -> None:
    """Logits become scale exp(z - maximum) - floor, and `own` at the target; gradient_3C: scale, own, floor."""
    _launch(gradient_kernel, logits_CV, places_C, maximum_C, gradient_3C.contiguous(), SOFT_CAP=soft_cap)


def _launch(kernel: Any, logits_CV: torch.Tensor, places_C: torch.Tensor, *rest: torch.Tensor, **settings: Any) -> None:
    rows, columns = logits_CV.shape
    if not rows:
        return
    block, warps = block_of(columns, logits_CV.dtype.itemsize)
    with torch.cuda.device_of(logits_CV):
        kernel[(rows,)](
            logits_CV, places_C, *rest, logits_CV.stride(0), rows, columns, BLOCK=block, num_warps=warps, **settings
        )


def block_of(columns: int, itemsize: int) -> tuple[int, int]:
    """Columns of a block, and warps of 32: 16 elements a thread (4 of fp64), so many threads a row because few rows at
    a time are what the cache holds."""
    each = 16 if itemsize < 8 else 4
    block = min(max(16 * each, triton.next_power_of_2(columns)), BLOCK * each // 16)
    return block, max(1, block // (32 * each))


# --- kernels


@triton.jit
def _tanh(x):
    """tanh, to the last digits near 0 too: a series there, where 2 sigmoid(2 x) - 1 has none left."""
    square = x * x
    series = 1.0 - square * (1.0 / 3 - square * (2.0 / 15 - square * (17.0 / 315 - square * (62.0 / 2835))))
    return tl.where(tl.abs(x) < 0.125, x * series, 2.0 / (1.0 + tl.exp(-2.0 * x)) - 1.0)


@triton.jit
def _capped(z, SOFT_CAP: tl.constexpr):
    if SOFT_CAP > 0:
        return SOFT_CAP * _tanh(z / SOFT_CAP)
    else:
        return z


@triton.jit
def _block(Row, column_B, columns, SOFT_CAP: tl.constexpr, CHECK: tl.constexpr):
    """Logits of a block, with the cap; -inf behind the last column."""
    ACC: tl.constexpr = tl.float64 if Row.dtype.element_ty == tl.float64 else tl.float32
    if CHECK:
        z_B = tl.load(Row + column_B, mask=column_B < columns, other=0.0)
        return tl.where(column_B < columns, _capped(z_B.to(ACC), SOFT_CAP), -float("inf"))
    else:
        return _capped(tl.load(Row + column_B).to(ACC), SOFT_CAP)


@triton.jit
def _add_block(
    Row, column_B, columns, place, maximum, wrong_B, total_B,
    SOFT_CAP: tl.constexpr, TOTAL: tl.constexpr, CHECK: tl.constexpr,
):  # fmt: skip
    z_B = _block(Row, column_B, columns, SOFT_CAP, CHECK)
    higher = tl.maximum(maximum, tl.max(z_B, 0))
    wrong_B = wrong_B * tl.exp(maximum - higher) + tl.exp(tl.where(column_B == place, -float("inf"), z_B) - higher)
    if TOTAL:
        if CHECK:
            total_B += tl.where(column_B < columns, z_B, 0.0)
        else:
            total_B += z_B
    return higher, wrong_B, total_B


@triton.jit
def _numbers(Row, place, columns, SOFT_CAP: tl.constexpr, TOTAL: tl.constexpr, BLOCK: tl.constexpr):
    """(maximum, sum of exp(z - maximum) without the target, z at the target, sum of z) of a row."""
    ACC: tl.constexpr = tl.float64 if Row.dtype.element_ty == tl.float64 else tl.float32
    offset_B = tl.arange(0, BLOCK)
    wrong_B = tl.zeros([BLOCK], ACC)
    total_B = tl.zeros([BLOCK], ACC)
    maximum = tl.full([], LOWEST, ACC)
    whole = columns // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        maximum, wrong_B, total_B = _add_block(
            Row, start + offset_B, columns, place, maximum, wrong_B, total_B, SOFT_CAP, TOTAL, False
        )
    if whole < columns:
        maximum, wrong_B, total_B = _add_block(
            Row, whole + offset_B, columns, place, maximum, wrong_B, total_B, SOFT_CAP, TOTAL, True
        )
    own = tl.load(Row + place, mask=place >= 0, other=0.0).to(ACC)
    own = tl.where(place >= 0, _capped(own, SOFT_CAP), -float("inf"))
    return maximum, tl.sum(wrong_B, 0), own, tl.sum(total_B, 0)


@triton.jit
def _overwrite_block(
    Row, column_B, columns, place, maximum, scale, own, floor, SOFT_CAP: tl.constexpr, CHECK: tl.constexpr
):  # fmt: skip
    z_B = _block(Row, column_B, columns, SOFT_CAP, CHECK)
    gradient_B = scale * tl.exp(z_B - maximum) - floor
    gradient_B = tl.where(column_B == place, own, gradient_B)
    if SOFT_CAP > 0:
        ratio_B = z_B / SOFT_CAP
        gradient_B = gradient_B * (1.0 - ratio_B * ratio_B)
    gradient_B = gradient_B.to(Row.dtype.element_ty)
    if CHECK:
        tl.store(Row + column_B, gradient_B, mask=column_B < columns)
    else:
        tl.store(Row + column_B, gradient_B)


@triton.jit
def _overwrite(Row, columns, place, maximum, scale, own, floor, SOFT_CAP: tl.constexpr, BLOCK: tl.constexpr):
    """The gradient of a row in place of its logits, from its end to its beginning."""
    offset_B = tl.arange(0, BLOCK)
    whole = columns // BLOCK * BLOCK
    if whole < columns:
        _overwrite_block(Row, whole + offset_B, columns, place, maximum, scale, own, floor, SOFT_CAP, True)
    for done in range(0, whole, BLOCK):
        column_B = whole - BLOCK - done + offset_B
        _overwrite_block(Row, column_B, columns, place, maximum, scale, own, floor, SOFT_CAP, False)


@triton.jit
def _clear(Row, columns, BLOCK: tl.constexpr):
    zero_B = tl.zeros([BLOCK], Row.dtype.element_ty)
    for start in range(0, columns, BLOCK):
        column_B = start + tl.arange(0, BLOCK)
        tl.store(Row + column_B, zero_B, mask=column_B < columns)


@triton.jit
def _log1p(e):
    """log(1 + e) of 0 <= e <= 1 as 2 artanh(e / (2 + e)): 1 + e would drop the digits of a small e."""
    ratio = e / (2.0 + e)
    square = ratio * ratio
    series = square * 0.0 + 1.0 / 33
    for divisor in tl.static_range(31, 0, -2):
        series = 1.0 / divisor + square * series
    return 2.0 * ratio * series


@triton.jit(do_not_specialize=["rows", "columns"], do_not_specialize_on_alignment=ONE_A_ROW)
def chunk_kernel(
    Logits, Places, Factors, Losses, stride, rows, columns,
    SMOOTHING: tl.constexpr, Z_LOSS: tl.constexpr, SOFT_CAP: tl.constexpr, GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a row; loss and gradient as `_Loss.of_rows` in kernels/linear_cross_entropy.py has them."""
    row = tl.program_id(0)
    Row = Logits + row.to(tl.int64) * stride
    factor = tl.load(Factors + row)
    if factor == 0.0:
        tl.store(Losses + row, factor)
        if GRADIENT:
            _clear(Row, columns, BLOCK)
    else:
        place = tl.load(Places + row).to(tl.int32)
        maximum, wrong, own, total = _numbers(Row, place, columns, SOFT_CAP, SMOOTHING > 0, BLOCK)
        odds = tl.log(wrong) + maximum - own  # log of the wrong answers' probability over the target's
        small = tl.exp(-tl.abs(odds))
        loss = tl.maximum(odds, 0.0) + _log1p(small)
        right = tl.where(odds >= 0.0, small, 1.0) / (1.0 + small)
        own_gradient = -tl.where(odds >= 0.0, 1.0, small) / (1.0 + small)
        lse = maximum + tl.log(wrong + tl.exp(own - maximum))
        scale = tl.exp(maximum - lse)
        floor = 0.0 * factor
        if SMOOTHING > 0:
            loss += SMOOTHING * (own - total / columns)
            floor += SMOOTHING / columns
            own_gradient += SMOOTHING - floor
        if Z_LOSS != 0:
            loss += Z_LOSS * lse * lse
            own_gradient += 2.0 * Z_LOSS * lse * right
            scale += 2.0 * Z_LOSS * lse * scale
        tl.store(Losses + row, loss)
        if GRADIENT:
            _overwrite(
                Row, columns, place, maximum, factor * scale, factor * own_gradient, factor * floor, SOFT_CAP, BLOCK
            )


@triton.jit(do_not_specialize=["rows", "columns"], do_not_specialize_on_alignment=ONE_A_ROW)
def numbers_kernel(Logits, Places, Numbers, stride, rows, columns, SOFT_CAP: tl.constexpr, BLOCK: tl.constexpr):
    """Numbers [4, rows]."""
    row = tl.program_id(0)
    place = tl.load(Places + row).to(tl.int32)
    maximum, wrong, own, total = _numbers(Logits + row.to(tl.int64) * stride, place, columns, SOFT_CAP, True, BLOCK)
    tl.store(Numbers + row, maximum)
    tl.store(Numbers + rows + row, wrong)
    tl.store(Numbers + 2 * rows + row, own)
    tl.store(Numbers + 3 * rows + row, total)


@triton.jit(do_not_specialize=["rows", "columns"], do_not_specialize_on_alignment=ONE_A_ROW)
def gradient_kernel(
    Logits, Places, Maximum, Gradient, stride, rows, columns, SOFT_CAP: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Gradient [3, rows]: scale, own, floor."""
    row = tl.program_id(0)
    place = tl.load(Places + row).to(tl.int32)
    scale, own = tl.load(Gradient + row), tl.load(Gradient + rows + row)
    floor = tl.load(Gradient + 2 * rows + row)
    Row = Logits + row.to(tl.int64) * stride
    _overwrite(Row, columns, place, tl.load(Maximum + row), scale, own, floor, SOFT_CAP, BLOCK)


# --- what ships


def aot_cases() -> list[AotCase]:
    """Every kernel for bf16 and fp32 logits, plain and with everything that can be asked for; each option alone, losses
    without gradients, and short rows."""
    kernels = (chunk_kernel, numbers_kernel, gradient_kernel)
    ends = (PLAIN, EVERYTHING)
    cases = [_aot_case(kernel, each, options) for kernel in kernels for each in ("bf16", "fp32") for options in ends]
    cases += [_aot_case(chunk_kernel, "bf16", {**PLAIN, name: value}) for name, value in EVERYTHING.items()]
    cases += [_aot_case(chunk_kernel, each, options, gradient=False) for each in ("bf16", "fp32") for options in ends]
    return cases + [_aot_case(kernel, "bf16", PLAIN, columns) for kernel in kernels for columns in (1000, 1)]


EVERYTHING = {"SMOOTHING": 0.1, "Z_LOSS": 1e-4, "SOFT_CAP": 30.0}
PLAIN = dict.fromkeys(EVERYTHING, 0.0)


def _aot_case(
    kernel: Any, type_name: str, options: dict[str, float], columns: int = 128256, gradient: bool = True
) -> AotCase:
    block, warps = block_of(columns, {"bf16": 2, "fp32": 4}[type_name])
    known = options | {"GRADIENT": gradient, "BLOCK": block}
    constexprs = {name: value for name, value in known.items() if name in kernel.arg_names}
    types = {"Logits": f"*{type_name}", "Places": "*i64", "stride": "i32", "rows": "i32", "columns": "i32"}
    signature = {name: types.get(name, "*fp32") for name in kernel.arg_names if name not in constexprs}
    words = {"SMOOTHING": " smoothing", "Z_LOSS": " z", "SOFT_CAP": " cap"}
    told = "".join(word for name, word in words.items() if options[name]) + " loss only" * (not gradient)
    return AotCase(
        name=f"linear cross entropy {kernel.__name__.removesuffix('_kernel')} {type_name} V{columns}{told}",
        kernel=kernel,
        signature=signature,
        constexprs=constexprs,
        attrs=[name for name in signature if name not in (*ONE_A_ROW, "rows", "columns")],
        options={"num_warps": warps},
        targets=tuple(TARGETS),
        matrix=False,
    )
