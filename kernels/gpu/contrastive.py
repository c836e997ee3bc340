"""The N^2 parts of the contrastive losses in Triton: sums of exponentials, and gradients of the logits, tile by tile.

Formulas and conventions are those of kernels/contrastive.py; `sums`, `gradients` and `sigmoid` do what those of
kernels/contrastive_squares.py do. With s_ij = scale x_i . y_j, and row i's true answer column i + offset:

    sums            row_i = sum_{j != i + offset} exp(s_ij - reference), columns alike, own_i = s_ij - reference else
    InfoNCE         g_ij = exp(s_ij - reference) (1 / row sum_i + 1 / column sum_j), given on the diagonal
    sigmoid         u_ij = -z_ij (s_ij + bias), loss = sum log(1 + exp(u_ij)), g_ij = -z_ij / (1 + exp(-u_ij))
    both            dx_i = sum_j g_ij y_j,  dy_j = sum_i g_ij x_i,  dscale = sum_ij g_ij x_i . y_j, without factors

Design choices:
- One pass over x y^T makes row and column sums at once; no logits are stored. 2 N^2 D operations.
- The backward writes a square of g, [SIDE, SIDE] at most, and leaves dx += g y and dy += g^T x to torch's matrix
  products with fp32 results: 6 N^2 D more, 8 in all, 6 for the sigmoid loss, whose loss is summed while g is made.
  Squares, because thin chunks would read and write all of dy once a chunk. A kernel with dx in registers would have to
  make the logits twice (10 N^2 D), and does not fit for D = 1024.
- Sums are deterministic: every tile stores its share, and torch adds the shares in order. `atomic=True` adds them
  with atomics instead, in no order.
- Inputs are bf16 or fp32, every sum and exponential is fp32. fp32 products are three tf32 ones on NVIDIA (error as
  fp32's own), fp32 ones on AMD. g is stored in the dtype of the inputs; the gradients of scale and bias are summed
  before that. fp64, which no GPU trains in, is left to plain torch.

State: runs in Triton's interpreter, compiles for sm_80, sm_90, sm_100 and gfx942; not yet run on a GPU.

Axes: n rows, C columns, D embedding size; R rows and S columns of a square.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton

from kernels.aot import TARGETS, AotCase
from kernels.gpu.contrastive_tiles import gradient_kernel, sigmoid_kernel, sums_kernel
from kernels.gpu.target import target_of

SIDE = 16384  # of a square of logits
SQUARE_BYTES = 512 << 20  # of the gradients of a square


class Tiling(NamedTuple):
    """Rows and columns of a tile, and how a program runs; registers: a thread's limit, where two programs then fit."""

    rows: int = 128
    columns: int = 128
    warps: int = 8
    stages: int = 3
    registers: int | None = None


def refusal(x_nD: torch.Tensor, products: torch.dtype) -> str:
    """Why the kernels do not take these embeddings in this precision, or ""."""
    if products not in (torch.bfloat16, torch.float32):
        return f"products in {products}; the kernels have bfloat16 and float32"
    if x_nD.shape[1] % 16 or not x_nD.shape[1]:
        return f"an embedding size of {x_nD.shape[1]}, which is no multiple of 16"
    return ""


def sums(
    x_nD: torch.Tensor,
    y_CD: torch.Tensor,
    scale: torch.Tensor,
    reference: torch.Tensor,
    offset: int,
    own_n: torch.Tensor,
    column_wrong_C: torch.Tensor,
    atomic: bool = False,
) -> torch.Tensor:
    """The sum [n] of exp(s_ij - reference) over the wrong answers among these columns; adds that over rows to
    column_wrong, and writes s_ij - reference of the true pairs that are here to own.

    x [n, D] and y [C, D] of one dtype, bf16 or fp32, contiguous, the rest fp32. A sum out of the range of fp32 is left
    as it comes out (0 or inf): the caller looks.
    """
    row_wrong_n = scale.new_zeros(len(x_nD))
    tiling = tiling_of("sums", x_nD.dtype, target_of(x_nD))
    for rows, columns in _squares(len(x_nD), len(y_CD), SIDE):
        x_RD, y_SD = x_nD[rows], y_CD[columns]
        tiles_down, tiles_across = triton.cdiv(len(x_RD), tiling.rows), triton.cdiv(len(y_SD), tiling.columns)
        if atomic:
            row_shares, column_shares = row_wrong_n[rows], column_wrong_C[columns]
        else:
            row_shares = scale.new_empty(tiles_across, len(x_RD))
            column_shares = scale.new_empty(tiles_down, len(y_SD))
        with torch.cuda.device_of(x_nD):
            sums_kernel[(tiles_down * tiles_across,)](
                x_RD,
                y_SD,
                scale,
                reference,
                own_n[rows],
                row_shares,
                column_shares,
                len(x_RD),
                len(y_SD),
                x_nD.shape[1],
                offset + rows.start - columns.start,
                ATOMIC=atomic,
                **_options(tiling, x_nD),
            )
        if not atomic:
            row_wrong_n[rows] += row_shares.sum(0)
            column_wrong_C[columns] += column_shares.sum(0)
    return row_wrong_n


def gradients(
    x_nD: torch.Tensor,
    y_CD: torch.Tensor,
    scale: torch.Tensor,
    reference: torch.Tensor,
    row_inverse_n: torch.Tensor,
    column_inverse_C: torch.Tensor,
    own_gradient_n: torch.Tensor,
    offset: int,
    dx_nD: torch.Tensor,
    dy_CD: torch.Tensor,
) -> torch.Tensor:
    """With g_ij = exp(s_ij - reference) (row_inverse_i + column_inverse_j), and own_gradient at the true pairs: adds
    sum_j g_ij y_j to dx and sum_i g_ij x_i to dy; sum_ij g_ij x_i . y_j in fp64, the gradient of scale."""
    scale_gradient = torch.zeros((), dtype=torch.float64, device=x_nD.device)
    products = _Products(x_nD, y_CD, dx_nD, dy_CD)
    for rows, columns in products.squares():
        gradient_RS = products.square(rows, columns)
        scale_gradient += gradient_square(
            x_nD[rows],
            y_CD[columns],
            scale,
            reference,
            row_inverse_n[rows],
            column_inverse_C[columns],
            own_gradient_n[rows],
            offset + rows.start - columns.start,
            gradient_RS,
        )
        products.add(gradient_RS, rows, columns)
    return scale_gradient


def gradient_square(
    x_RD: torch.Tensor,
    y_SD: torch.Tensor,
    scale: torch.Tensor,
    reference: torch.Tensor,
    row_inverse_R: torch.Tensor,
    column_inverse_S: torch.Tensor,
    own_gradient_R: torch.Tensor,
    offset: int,
    out_RS: torch.Tensor,
) -> torch.Tensor:
    """Write the gradients of a square's logits; the gradient of scale from this square, in fp64.

    All fp32 and contiguous but x and y (contiguous), and out (in the dtype of x, contiguous rows), SIDE rows at most.
    """
    tiling = tiling_of("gradient", x_RD.dtype, target_of(x_RD))
    tiles = triton.cdiv(len(x_RD), tiling.rows) * triton.cdiv(len(y_SD), tiling.columns)
    scale_shares = scale.new_empty(tiles)
    with torch.cuda.device_of(x_RD):
        gradient_kernel[(tiles,)](
            x_RD,
            y_SD,
            scale,
            reference,
            row_inverse_R,
            column_inverse_S,
            own_gradient_R,
            scale_shares,
            out_RS,
            len(x_RD),
            len(y_SD),
            x_RD.shape[1],
            offset,
            out_RS.stride(0),
            **_options(tiling, x_RD),
        )
    return scale_shares.sum(dtype=torch.float64)


def sigmoid(
    x_nD: torch.Tensor,
    y_CD: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor,
    offset: int,
    dx_nD: torch.Tensor | None,
    dy_CD: torch.Tensor | None,
) -> torch.Tensor:
    """Sums [3] in fp64 of the losses, of g_ij x_i . y_j and of g_ij, with g_ij = -z_ij / (1 + exp(z_ij t_ij)); adds
    sum_j g_ij y_j to dx and sum_i g_ij x_i to dy. Without dx and dy, these sums only."""
    tiling = tiling_of("sigmoid", x_nD.dtype, target_of(x_nD))
    products = _Products(x_nD, y_CD, dx_nD, dy_CD)
    totals = torch.zeros(3, dtype=torch.float64, device=x_nD.device)
    for rows, columns in products.squares():
        x_RD, y_SD = x_nD[rows], y_CD[columns]
        gradient_RS = products.square(rows, columns)
        tiles = triton.cdiv(len(x_RD), tiling.rows) * triton.cdiv(len(y_SD), tiling.columns)
        shares = scale.new_empty(3, triton.cdiv(tiles, 4) * 4)[:, :tiles]  # each starts at a multiple of 16 bytes
        with torch.cuda.device_of(x_nD):
            sigmoid_kernel[(tiles,)](
                x_RD,
                y_SD,
                scale,
                bias,
                *shares,
                gradient_RS,
                len(x_RD),
                len(y_SD),
                x_nD.shape[1],
                offset + rows.start - columns.start,
                gradient_RS.stride(0),
                **_options(tiling, x_nD),
            )
        totals += shares.sum(1, dtype=torch.float64)
        products.add(gradient_RS, rows, columns)
    return totals


def _squares(rows: int, columns: int, side: int) -> Iterator[tuple[slice, slice]]:
    """Cover rows x columns; none where either is 0."""
    for top in range(0, rows, side):
        for left in range(0, columns, side):
            yield slice(top, min(top + side, rows)), slice(left, min(left + side, columns))


class _Products:
    """dx and dy (or None), to which squares of gradients are added one after the other."""

    def __init__(
        self, x_nD: torch.Tensor, y_CD: torch.Tensor, dx_nD: torch.Tensor | None, dy_CD: torch.Tensor | None
    ) -> None:
        self.x_nD, self.y_CD, self.dx_nD, self.dy_CD = x_nD, y_CD, dx_nD, dy_CD
        self.side = min(SIDE, math.isqrt(SQUARE_BYTES // x_nD.itemsize) // 128 * 128)
        rows, columns = (min(self.side, len(each)) for each in (x_nD, y_CD))
        self._memory = x_nD.new_empty(rows * triton.cdiv(columns, 64) * 64)

    def squares(self) -> Iterator[tuple[slice, slice]]:
        return _squares(len(self.x_nD), len(self.y_CD), self.side)

    def square(self, rows: slice, columns: slice) -> torch.Tensor:
        """Memory for the gradients of a square, the same for all; its rows begin at multiples of 64 elements."""
        height, width = rows.stop - rows.start, columns.stop - columns.start
        stride = triton.cdiv(width, 64) * 64
        return self._memory[: height * stride].view(height, stride)[:, :width]

    def add(self, gradient_RS: torch.Tensor, rows: slice, columns: slice) -> None:
        if self.dx_nD is None or self.dy_CD is None:
            return
        self.dx_nD[rows] += _product(gradient_RS, self.y_CD[columns])
        self.dy_CD[columns] += _product(gradient_RS.T, self.x_nD[rows])


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b in fp32."""
    if a.dtype == torch.float32:
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()  # torch has no such product on CPU; the interpreter comes here


# --- configurations


# by (kernel, dtype, target), where it is not the default: chosen with kernels/aot.py for no spills and, on bf16, room
# for two programs at a time, one of which multiplies while the other takes exponentials
TILINGS = {
    ("sums", torch.bfloat16, "sm_80"): Tiling(registers=128),
    ("gradient", torch.bfloat16, "sm_80"): Tiling(columns=64, warps=4),
    ("sums", torch.bfloat16, "sm_90"): Tiling(warps=4),
    ("gradient", torch.bfloat16, "sm_90"): Tiling(columns=64, warps=4),
    ("sums", torch.float32, "sm_80"): Tiling(columns=64),
    ("gradient", torch.float32, "sm_80"): Tiling(columns=64),
    ("sigmoid", torch.float32, "sm_80"): Tiling(columns=64),
    ("sigmoid", torch.float32, "sm_90"): Tiling(columns=64),
    ("sigmoid", torch.float32, "sm_100"): Tiling(columns=64),
}


def tiling_of(kernel: str, dtype: torch.dtype, target: str) -> Tiling:
    """What "sums", "gradient" or "sigmoid" runs with on a GPU of TARGETS."""
    return TILINGS.get((kernel, dtype, target), Tiling(stages=2) if target == "gfx942" else Tiling())


def _options(tiling: Tiling, x_nD: torch.Tensor) -> dict[str, Any]:
    return _constexprs(tiling, x_nD.dtype, x_nD.shape[1], target_of(x_nD)) | _launch(tiling)


def _constexprs(tiling: Tiling, dtype: torch.dtype, size: int, target: str) -> dict[str, Any]:
    step = math.gcd(size, 64 if dtype == torch.bfloat16 else 32)  # 128 bytes of a row at a time, where D allows
    precision = "tf32x3" if dtype == torch.float32 and target != "gfx942" else "ieee"
    return {"ROWS": tiling.rows, "COLUMNS": tiling.columns, "STEP": step, "PRECISION": precision}


def _launch(tiling: Tiling) -> dict[str, int]:
    limit = {} if tiling.registers is None else {"maxnreg": tiling.registers}
    return {"num_warps": tiling.warps, "num_stages": tiling.stages} | limit


# --- what ships

_KERNELS = {"sums": sums_kernel, "gradient": gradient_kernel, "sigmoid": sigmoid_kernel}


def aot_cases() -> list[AotCase]:
    """Every kernel in both dtypes with steps of each length, and the sums with atomics."""
    sizes = {torch.bfloat16: (512, 96, 48), torch.float32: (512, 48)}
    cases = [
        _aot_case(name, dtype, size, target)
        for name in _KERNELS
        for dtype in sizes
        for size in sizes[dtype]
        for target in TARGETS
    ]
    return cases + [_aot_case("sums", torch.bfloat16, 512, target, atomic=True) for target in TARGETS]


def _aot_case(name: str, dtype: torch.dtype, size: int, target: str, atomic: bool = False) -> AotCase:
    kernel, tiling = _KERNELS[name], tiling_of(name, dtype, target)
    type_name = {torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]
    constexprs = _constexprs(tiling, dtype, size, target) | ({"ATOMIC": atomic} if name == "sums" else {})
    arguments = [argument for argument in kernel.arg_names if argument not in constexprs]
    pointers = [argument for argument in arguments if argument[0].isupper()]
    spilling = (name, target) == ("sigmoid", "sm_100") and (type_name, size) != ("fp32", 512)
    types = {argument: f"*{type_name if argument in ('X', 'Y', 'Gradient') else 'fp32'}" for argument in pointers}
    return AotCase(
        name=f"contrastive {name}{' atomic' * atomic} {type_name} D{size}",
        kernel=kernel,
        signature={argument: types.get(argument, "i32") for argument in arguments},
        constexprs=constexprs,
        attrs=[*pointers, *(argument for argument in arguments if argument in ("size", "gradient_stride"))],
        options=_launch(tiling),
        targets=[target],
        spills={"sm_100 3.6.0": "1 word"} if spilling else {},
    )
