"""Layer norm and RMS norm as Triton kernels, with the residual addition in front, and their gradients.

Formulas are those of kernels/norm.py, whose operators call `forward` and `backward` here. With xhat the normalised row,
r = 1 / sqrt(variance + eps), c = g * weight and the means over a row of D:

    dx = r (c - xhat mean(c xhat) - mean(c)) + what comes down the residual,    RMS norm: without mean(c)
    dweight = sum over rows of g xhat,    dbias = sum over rows of g

Design choices:
- A program holds whole rows in registers: several of a narrow one, one of up to `WIDEST`. So every element is read
  once, the variance comes from x - mean and not from a difference of sums, and the backward reads x and g once more.
- Weight gradients without atomics: a program goes over every P-th block of rows, adds in registers and writes its
  share [P, D] once; torch adds the shares in order. P is the processors of the GPU times `SHARES`.
- What is normalised is x + residual as it was rounded for the caller, so that the backward finds the same row again.
- Arithmetic is fp32, fp64 for fp64. Strides come in units of 8 elements where all are multiples of it: Triton knows of
  a number that is divisible by 16 only, and 72 would cost the wide loads.

State: runs in Triton's interpreter, compiles for sm_80, sm_90, sm_100 and gfx942; not yet run on a GPU.

Axes: M rows, D elements of a row; R rows and W columns of a tile; P programs.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
import triton.language as tl

from kernels.gpu.target import ACCUMULATORS, dense, unit_of

if TYPE_CHECKING:
    from kernels.aot import AotCase

WIDEST = 16384  # elements of a row that still fit the registers of a program
TILE = 4096  # elements of a program's tile, where a row does not have more
SHARES = 2  # of the weight gradients, a processor: as many programs as fit it at a time


class Tile(NamedTuple):
    rows: int
    width: int
    warps: int


def tile_of(columns: int) -> Tile:
    """16 elements a thread, or 32 where a row has more than 8192."""
    width = triton.next_power_of_2(columns)
    rows = max(1, min(TILE // width, 64))
    return Tile(rows, width, max(1, min(rows * width // 512, 16)))


def programs(tensor: torch.Tensor, blocks: int) -> int:
    """How many programs share `blocks` pieces of work, when each keeps sums of its own."""
    processors = torch.cuda.get_device_properties(tensor.device).multi_processor_count if tensor.is_cuda else 1
    return min(blocks, SHARES * processors)


def as_rows(tensor: torch.Tensor) -> torch.Tensor:
    """[M, D] with the elements of a row side by side; a view where that can be."""
    columns = tensor.shape[-1]
    rows_MD = tensor.reshape(tensor.numel() // max(columns, 1), columns)
    return rows_MD if rows_MD.stride(1) == 1 or columns == 1 else rows_MD.contiguous()


@triton.jit(do_not_specialize=["rows", "x_row", "residual_row"])
def norm_forward_kernel(
    X, RESIDUAL, WEIGHT, BIAS, OUT, TOTAL, STATISTICS, rows, x_row, residual_row, eps,
    COLUMNS: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Rows of OUT; TOTAL = X + RESIDUAL if there is one; STATISTICS [2, M]: r and mean. No BIAS: RMS norm, no mean."""
    row_R = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column_W = tl.arange(0, WIDTH)
    inside_RW = (row_R < rows)[:, None] & (column_W < COLUMNS)[None, :]
    dense_RW = row_R[:, None] * COLUMNS + column_W[None, :]
    x_RW = tl.load(X + row_R[:, None] * (x_row * UNIT) + column_W[None, :], mask=inside_RW, other=0.0).to(ACC)
    if RESIDUAL is not None:
        pointers = RESIDUAL + row_R[:, None] * (residual_row * UNIT) + column_W[None, :]
        total_RW = (x_RW + tl.load(pointers, mask=inside_RW, other=0.0).to(ACC)).to(TOTAL.dtype.element_ty)
        tl.store(TOTAL + dense_RW, total_RW, mask=inside_RW)
        x_RW = total_RW.to(ACC)
    if BIAS is not None:
        mean_R = tl.sum(x_RW, 1) / COLUMNS
        tl.store(STATISTICS + rows + row_R, mean_R, mask=row_R < rows)
        x_RW = tl.where(inside_RW, x_RW - mean_R[:, None], 0.0)
    inverse_R = tl.math.rsqrt(tl.sum(x_RW * x_RW, 1) / COLUMNS + eps)
    tl.store(STATISTICS + row_R, inverse_R, mask=row_R < rows)
    weight_W = tl.load(WEIGHT + column_W, mask=column_W < COLUMNS, other=0.0).to(ACC)
    out_RW = x_RW * inverse_R[:, None] * weight_W[None, :]
    if BIAS is not None:
        out_RW += tl.load(BIAS + column_W, mask=column_W < COLUMNS, other=0.0).to(ACC)[None, :]
    tl.store(OUT + dense_RW, out_RW.to(OUT.dtype.element_ty), mask=inside_RW)


@triton.jit(do_not_specialize=["rows", "grad_row", "total_grad_row", "x_row"])
def norm_backward_kernel(
    GRAD, TOTAL_GRAD, X, WEIGHT, STATISTICS, DX, DWEIGHT, DBIAS, rows, grad_row, total_grad_row, x_row,
    COLUMNS: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Rows of DX, and this program's share of DWEIGHT and DBIAS [P, D]. No DBIAS: RMS norm."""
    column_W = tl.arange(0, WIDTH)
    weight_W = tl.load(WEIGHT + column_W, mask=column_W < COLUMNS, other=0.0).to(ACC)
    dweight_RW = tl.zeros([ROWS, WIDTH], ACC)
    dbias_RW = tl.zeros([ROWS, WIDTH], ACC)  # compiled away where there is no bias
    for block in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row_R = (block * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        inside_RW = (row_R < rows)[:, None] & (column_W < COLUMNS)[None, :]
        x_RW = tl.load(X + row_R[:, None] * (x_row * UNIT) + column_W[None, :], mask=inside_RW, other=0.0).to(ACC)
        pointers = GRAD + row_R[:, None] * (grad_row * UNIT) + column_W[None, :]
        grad_RW = tl.load(pointers, mask=inside_RW, other=0.0).to(ACC)
        inverse_R = tl.load(STATISTICS + row_R, mask=row_R < rows, other=0.0)
        if DBIAS is not None:
            mean_R = tl.load(STATISTICS + rows + row_R, mask=row_R < rows, other=0.0)
            x_RW = tl.where(inside_RW, x_RW - mean_R[:, None], 0.0)
            dbias_RW += grad_RW
        x_RW *= inverse_R[:, None]
        dweight_RW += grad_RW * x_RW
        grad_RW *= weight_W[None, :]
        dx_RW = grad_RW - x_RW * (tl.sum(grad_RW * x_RW, 1) / COLUMNS)[:, None]
        if DBIAS is not None:
            dx_RW -= (tl.sum(grad_RW, 1) / COLUMNS)[:, None]
        dx_RW *= inverse_R[:, None]
        if TOTAL_GRAD is not None:
            pointers = TOTAL_GRAD + row_R[:, None] * (total_grad_row * UNIT) + column_W[None, :]
            dx_RW += tl.load(pointers, mask=inside_RW, other=0.0).to(ACC)
        tl.store(DX + row_R[:, None] * COLUMNS + column_W[None, :], dx_RW.to(DX.dtype.element_ty), mask=inside_RW)
    share_W = tl.program_id(0).to(tl.int64) * COLUMNS + column_W
    tl.store(DWEIGHT + share_W, tl.sum(dweight_RW, 0), mask=column_W < COLUMNS)
    if DBIAS is not None:
        tl.store(DBIAS + share_W, tl.sum(dbias_RW, 0), mask=column_W < COLUMNS)


def forward(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight_D: torch.Tensor,
    bias_D: torch.Tensor | None,
    out: torch.Tensor,
    total: torch.Tensor | None,
    statistics: torch.Tensor,
    eps: float,
) -> None:
    """Fill out and total (shaped as x, dense; total with a residual, else None) and the statistics [2, M], or [1, M]
    without a bias, fp32 or fp64."""
    x_MD, residual_MD = as_rows(x), None if residual is None else as_rows(residual)
    rows, columns = x_MD.shape
    tile = tile_of(columns)
    residual_row = 0 if residual_MD is None else residual_MD.stride(0)
    unit = unit_of(x_MD.stride(0), residual_row, of=(x_MD, residual_MD))
    with torch.cuda.device_of(x):
        if rows:
            norm_forward_kernel[(triton.cdiv(rows, tile.rows),)](
                x_MD, residual_MD, dense(weight_D), None if bias_D is None else dense(bias_D),
                out, total, statistics, rows, x_MD.stride(0) // unit, residual_row // unit, eps,
                **_constexprs(columns, unit, x.dtype), num_warps=tile.warps,
            )  # fmt: skip


def backward(
    grad: torch.Tensor,
    total_grad: torch.Tensor | None,
    x: torch.Tensor,
    weight_D: torch.Tensor,
    statistics: torch.Tensor,
    dx: torch.Tensor,
    centred: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Fill dx (shaped as x, dense); dweight and, of a layer norm (centred), dbias [D] in fp32 or fp64."""
    grad_MD, x_MD, total_grad_MD = as_rows(grad), as_rows(x), None if total_grad is None else as_rows(total_grad)
    rows, columns = x_MD.shape
    tile = tile_of(columns)
    shares = programs(x, triton.cdiv(rows, tile.rows))
    dweight_PD = statistics.new_empty(shares, columns)
    dbias_PD = torch.empty_like(dweight_PD) if centred else None
    strides = [0 if each is None else each.stride(0) for each in (grad_MD, total_grad_MD, x_MD)]
    unit = unit_of(*strides, of=(grad_MD, total_grad_MD, x_MD))
    with torch.cuda.device_of(x):
        if rows:
            norm_backward_kernel[(shares,)](
                grad_MD, total_grad_MD, x_MD, dense(weight_D), statistics, dx, dweight_PD, dbias_PD,
                rows, *(stride // unit for stride in strides),
                **_constexprs(columns, unit, x.dtype), num_warps=tile.warps,
            )  # fmt: skip
    return dweight_PD.sum(0), None if dbias_PD is None else dbias_PD.sum(0)


def _constexprs(columns: int, unit: int, dtype: torch.dtype) -> dict[str, Any]:
    tile = tile_of(columns)
    return dict(COLUMNS=columns, UNIT=unit, ROWS=tile.rows, WIDTH=tile.width, ACC=ACCUMULATORS[dtype])


def aot_cases() -> list[AotCase]:
    """bf16 rows of a head, of the usual towers and the widest, odd widths; without a residual; the other dtypes."""
    both = ("layer norm", "RMS norm")
    settings = [(norm, columns, "bf16") for columns in (64, 72, 1023, 1152, 4096, 8192, WIDEST) for norm in both]
    settings += [("layer norm", columns, "bf16") for columns in (1, 768, WIDEST - 1)]
    settings += [("layer norm", 4096, dtype) for dtype in ("fp32", "fp16")]
    cases = [_aot_case(kernel, *each) for each in settings for kernel in _KERNELS]
    cases += [_aot_case(kernel, norm, 1152, "bf16", residual=False) for norm in both for kernel in _KERNELS]
    wide = [_aot_case(kernel, "layer norm", 4096, dtype, "fp32") for dtype in ("bf16", "fp16") for kernel in _KERNELS]
    return cases + wide


_SPILLING = ("sm_80", "sm_90", "sm_100")
_FEW = {"RMS norm backward bf16 D4096 residual": {"sm_100 3.7.1": "ptxas gives up 3 words for one more program"}}
_KERNELS = {"forward": norm_forward_kernel, "backward": norm_backward_kernel}


def _aot_case(
    direction: str, norm: str, columns: int, dtype: str, of_weights: str = "", residual: bool = True
) -> AotCase:
    from kernels.aot import TARGETS, AotCase

    kernel = _KERNELS[direction]
    unit = unit_of(columns)
    constexprs = _constexprs(columns, unit, torch.bfloat16)
    if not residual:
        constexprs |= {name: None for name in kernel.arg_names if name in ("RESIDUAL", "TOTAL", "TOTAL_GRAD")}
    if norm == "RMS norm":
        constexprs["BIAS" if direction == "forward" else "DBIAS"] = None
    names = [name for name in kernel.arg_names if name not in constexprs]
    single = ("STATISTICS", "DWEIGHT", "DBIAS")
    kinds = dict.fromkeys(single, "*fp32") | dict.fromkeys(("WEIGHT", "BIAS"), f"*{of_weights or dtype}")
    pointers = {name: kinds.get(name, f"*{dtype}") for name in names if name.isupper()}
    numbers = {name: "fp32" if name == "eps" else "i32" for name in names if name.islower()}
    rows = ("X", "RESIDUAL", "GRAD", "TOTAL_GRAD")  # in units of 1 they may start anywhere
    weights = f" {of_weights} weights" if of_weights else ""
    name = f"{norm} {direction} {dtype}{weights} D{columns}{' residual' * residual}"
    return AotCase(
        name=name,
        kernel=kernel,
        signature=pointers | numbers,
        constexprs=constexprs,
        attrs=[name for name in pointers if unit > 1 or name not in rows],
        options={"num_warps": tile_of(columns).warps},
        # two sums a column and the row itself are more than 128 registers a thread
        spills=_FEW.get(name, {})
        if direction == "forward" or columns <= 8192
        else dict.fromkeys(_SPILLING if unit > 1 else TARGETS, "to read a row twice is worse"),
        matrix=False,
    )
