"""bias + GELU and SwiGLU as Triton kernels, with their gradients. Formulas are those of kernels/activation.py.

Design choices:
- One pass over memory each way: the backward computes the activation again from its inputs.
- The gradient of the bias is the sum of dx over rows. A program goes down a strip of `Tile.width` columns and writes
  its share [P, F] once; torch adds the shares in order. No atomics.
- Rows may have a stride: gate and up are often the halves of one matrix product.
- GELU by tanh is u sigmoid(2 z), as (1 + tanh z) / 2 = sigmoid(2 z), which needs no tanh (Triton has none).
- Arithmetic is fp32, fp64 for fp64.

State: runs in Triton's interpreter, compiles for sm_80, sm_90, sm_100 and gfx942; not yet run on a GPU.

Axes: M rows, F features; R rows and C columns of a tile; P programs down a strip.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
import triton.language as tl

from kernels.gpu.norm import as_rows, programs
from kernels.gpu.target import ACCUMULATORS, dense, unit_of
from kernels.precision import accumulator_of

if TYPE_CHECKING:
    from kernels.aot import AotCase

TILE = 2048  # elements; 16 a thread
WARPS = 4


class Tile(NamedTuple):
    rows: int
    width: int


def tile_of(columns: int) -> Tile:
    width = min(1024, triton.next_power_of_2(columns))
    return Tile(min(TILE // width, 64), width)


@triton.jit
def _gelu(u, TANH: tl.constexpr):
    """(value, slope) of GELU."""
    if TANH:
        twice_z = 1.5957691216057308 * u * (1.0 + 0.044715 * u * u)  # 2 sqrt(2 / pi)
        share = _sigmoid(twice_z)
        slope = share + u * share * (1.0 - share) * 1.5957691216057308 * (1.0 + 0.134145 * u * u)
    else:
        share = 0.5 + 0.5 * tl.math.erf(u * 0.7071067811865476)  # 1 / sqrt(2)
        slope = share + u * tl.exp(-0.5 * u * u) * 0.3989422804014327  # 1 / sqrt(2 pi)
    return u * share, slope


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _place(rows, columns, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Rows and columns of this program's tile, and where it is inside; programs go across before they go down."""
    strips = tl.cdiv(columns, WIDTH)
    row_R = (tl.program_id(0) // strips).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column_C = tl.program_id(0) % strips * WIDTH + tl.arange(0, WIDTH)
    return row_R, column_C, (row_R < rows)[:, None] & (column_C < columns)[None, :]


@triton.jit
def _at(row_R, column_C, stride):
    return row_R[:, None] * stride + column_C[None, :]


@triton.jit(do_not_specialize=["rows", "x_row"])
def bias_gelu_forward_kernel(
    X, BIAS, OUT, rows, columns, x_row,
    TANH: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    row_R, column_C, inside_RC = _place(rows, columns, ROWS, WIDTH)
    bias_C = tl.load(BIAS + column_C, mask=column_C < columns, other=0.0).to(ACC)
    u_RC = tl.load(X + _at(row_R, column_C, x_row * UNIT), mask=inside_RC, other=0.0).to(ACC) + bias_C[None, :]
    out_RC, _ = _gelu(u_RC, TANH)
    tl.store(OUT + _at(row_R, column_C, columns), out_RC.to(OUT.dtype.element_ty), mask=inside_RC)


@triton.jit(do_not_specialize=["rows", "grad_row", "x_row"])
def bias_gelu_backward_kernel(
    GRAD, X, BIAS, DX, DBIAS, rows, columns, grad_row, x_row,
    TANH: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """A strip's every P-th tile of DX, and this program's share of DBIAS [P, F]."""
    column_C = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    bias_C = tl.load(BIAS + column_C, mask=column_C < columns, other=0.0).to(ACC)
    dbias_RC = tl.zeros([ROWS, WIDTH], ACC)
    for block in range(tl.program_id(1), tl.cdiv(rows, ROWS), tl.num_programs(1)):
        row_R = (block * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        inside_RC = (row_R < rows)[:, None] & (column_C < columns)[None, :]
        u_RC = tl.load(X + _at(row_R, column_C, x_row * UNIT), mask=inside_RC, other=0.0).to(ACC) + bias_C[None, :]
        grad_RC = tl.load(GRAD + _at(row_R, column_C, grad_row * UNIT), mask=inside_RC, other=0.0).to(ACC)
        _, slope_RC = _gelu(u_RC, TANH)
        dx_RC = grad_RC * slope_RC
        dbias_RC += dx_RC
        tl.store(DX + _at(row_R, column_C, columns), dx_RC.to(DX.dtype.element_ty), mask=inside_RC)
    share_C = tl.program_id(1).to(tl.int64) * columns + column_C
    tl.store(DBIAS + share_C, tl.sum(dbias_RC, 0), mask=column_C < columns)


@triton.jit(do_not_specialize=["rows", "gate_row", "up_row"])
def swiglu_forward_kernel(
    GATE, UP, OUT, rows, columns, gate_row, up_row,
    UNIT: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    row_R, column_C, inside_RC = _place(rows, columns, ROWS, WIDTH)
    gate_RC = tl.load(GATE + _at(row_R, column_C, gate_row * UNIT), mask=inside_RC, other=0.0).to(ACC)
    up_RC = tl.load(UP + _at(row_R, column_C, up_row * UNIT), mask=inside_RC, other=0.0).to(ACC)
    out_RC = gate_RC * _sigmoid(gate_RC) * up_RC
    tl.store(OUT + _at(row_R, column_C, columns), out_RC.to(OUT.dtype.element_ty), mask=inside_RC)


@triton.jit(do_not_specialize=["rows", "grad_row", "gate_row", "up_row"])
def swiglu_backward_kernel(
    GRAD, GATE, UP, DGATE, DUP, rows, columns, grad_row, gate_row, up_row,
    UNIT: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    row_R, column_C, inside_RC = _place(rows, columns, ROWS, WIDTH)
    grad_RC = tl.load(GRAD + _at(row_R, column_C, grad_row * UNIT), mask=inside_RC, other=0.0).to(ACC)
    gate_RC = tl.load(GATE + _at(row_R, column_C, gate_row * UNIT), mask=inside_RC, other=0.0).to(ACC)
    up_RC = tl.load(UP + _at(row_R, column_C, up_row * UNIT), mask=inside_RC, other=0.0).to(ACC)
    share_RC = _sigmoid(gate_RC)
    dgate_RC = grad_RC * up_RC * share_RC * (1.0 + gate_RC * (1.0 - share_RC))
    dup_RC = grad_RC * gate_RC * share_RC
    tl.store(DGATE + _at(row_R, column_C, columns), dgate_RC.to(DGATE.dtype.element_ty), mask=inside_RC)
    tl.store(DUP + _at(row_R, column_C, columns), dup_RC.to(DUP.dtype.element_ty), mask=inside_RC)


def bias_gelu_forward(x: torch.Tensor, bias_F: torch.Tensor, out: torch.Tensor, tanh: bool) -> None:
    """Fill out (shaped as x, dense)."""
    x_MF = as_rows(x)
    rows, columns = x_MF.shape
    unit = unit_of(x_MF.stride(0), of=(x_MF,))
    with torch.cuda.device_of(x):
        if x.numel():
            bias_gelu_forward_kernel[(_tiles(rows, columns),)](
                x_MF, dense(bias_F), out, rows, columns, x_MF.stride(0) // unit,
                TANH=tanh, **_constexprs(columns, unit, x.dtype), num_warps=WARPS,
            )  # fmt: skip


def bias_gelu_backward(
    grad: torch.Tensor, x: torch.Tensor, bias_F: torch.Tensor, dx: torch.Tensor, tanh: bool
) -> torch.Tensor:
    """Fill dx (shaped as x, dense); dbias [F] in fp32 or fp64."""
    grad_MF, x_MF = as_rows(grad), as_rows(x)
    rows, columns = x_MF.shape
    tile = tile_of(columns)
    strips = triton.cdiv(columns, tile.width)
    shares = triton.cdiv(programs(x, strips * triton.cdiv(rows, tile.rows)), strips)
    dbias_PF = x.new_empty((shares, columns), dtype=accumulator_of(x.dtype))
    unit = unit_of(grad_MF.stride(0), x_MF.stride(0), of=(grad_MF, x_MF))
    with torch.cuda.device_of(x):
        if x.numel():
            bias_gelu_backward_kernel[(strips, shares)](
                grad_MF, x_MF, dense(bias_F), dx, dbias_PF, rows, columns,
                grad_MF.stride(0) // unit, x_MF.stride(0) // unit,
                TANH=tanh, **_constexprs(columns, unit, x.dtype), num_warps=WARPS,
            )  # fmt: skip
    return dbias_PF.sum(0)


def swiglu_forward(gate: torch.Tensor, up: torch.Tensor, out: torch.Tensor) -> None:
    """Fill out (shaped as gate, dense)."""
    _swiglu(swiglu_forward_kernel, (gate, up), (out,))


def swiglu_backward(
    grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, dgate: torch.Tensor, dup: torch.Tensor
) -> None:
    """Fill dgate and dup (shaped as gate, dense)."""
    _swiglu(swiglu_backward_kernel, (grad, gate, up), (dgate, dup))


def _swiglu(kernel: Any, inputs: tuple[torch.Tensor, ...], outputs: tuple[torch.Tensor, ...]) -> None:
    matrices = [as_rows(each) for each in inputs]
    rows, columns = matrices[0].shape
    strides = [each.stride(0) for each in matrices]
    unit = unit_of(*strides, of=matrices)
    with torch.cuda.device_of(inputs[0]):
        if inputs[0].numel():
            kernel[(_tiles(rows, columns),)](
                *matrices, *outputs, rows, columns, *(stride // unit for stride in strides),
                **_constexprs(columns, unit, inputs[0].dtype), num_warps=WARPS,
            )  # fmt: skip


def _tiles(rows: int, columns: int) -> int:
    tile = tile_of(columns)
    return triton.cdiv(rows, tile.rows) * triton.cdiv(columns, tile.width)


def _constexprs(columns: int, unit: int, dtype: torch.dtype) -> dict[str, Any]:
    tile = tile_of(columns)
    return dict(UNIT=unit, ROWS=tile.rows, WIDTH=tile.width, ACC=ACCUMULATORS[dtype])


def aot_cases() -> list[AotCase]:
    """bf16 with the feed-forward width of a tower, one by 8, an odd one and a single feature; GELUs; other dtypes."""
    gelu, swiglu = (
        (bias_gelu_forward_kernel, bias_gelu_backward_kernel),
        (swiglu_forward_kernel, swiglu_backward_kernel),
    )
    cases = []
    for columns, dtype in ((4096, "bf16"), (1023, "bf16"), (4096, "fp32")):
        cases += [_aot_case(kernel, columns, dtype, kind) for kernel in gelu for kind in ("none", "tanh")]
        cases += [_aot_case(kernel, columns, dtype) for kernel in swiglu]
    for columns, dtype in ((1, "bf16"), (1000, "bf16"), (4096, "fp16")):
        cases += [_aot_case(kernel, columns, dtype, "none") for kernel in gelu]
        cases += [_aot_case(kernel, columns, dtype) for kernel in swiglu]
    return cases + [_aot_case(kernel, 4096, dtype, "none", "fp32") for dtype in ("bf16", "fp16") for kernel in gelu]


_SPILLING = ("bias_gelu_backward none bf16 F1023",)


def _aot_case(kernel: Any, columns: int, dtype: str, approximate: str = "", of_bias: str = "") -> AotCase:
    from kernels.aot import AotCase

    unit = unit_of(columns)
    constexprs = _constexprs(columns, unit, torch.bfloat16)
    if approximate:
        constexprs["TANH"] = approximate == "tanh"
    if columns == 1:  # which Triton makes a constant
        constexprs["columns"] = 1
    names = [name for name in kernel.arg_names if name not in constexprs]
    kinds = {"DBIAS": "*fp32", "BIAS": f"*{of_bias or dtype}"}
    pointers = {name: kinds.get(name, f"*{dtype}") for name in names if name.isupper()}
    numbers = {name: "i32" for name in names if name.islower()}
    rows = ("X", "GRAD", "GATE", "UP")  # in units of 1 they may start anywhere
    aligned = [name for name in pointers if unit > 1 or name not in rows] + ["columns"] * (columns % 16 == 0)
    kind, bias = f" {approximate}" if approximate else "", f" {of_bias} bias" if of_bias else ""
    name = f"{kernel.fn.__name__.removesuffix('_kernel')}{kind} {dtype}{bias} F{columns}"
    return AotCase(
        name=name,
        kernel=kernel,
        signature=pointers | numbers,
        constexprs=constexprs,
        attrs=aligned,
        options={"num_warps": WARPS},
        spills={"sm_90": "4 bytes, of rows that load element by element"} if name in _SPILLING else {},
        matrix=False,
    )
