"""The N^2 parts of the contrastive losses in Triton: sums of exponentials, and gradients of the logits, tile by tile.

Formulas and conventions are those of kernels/contrastive.py, which calls this file for embeddings on a GPU. With
s_ij = scale x_i . y_j, and o the offset such that row i's true answer is column i + o:

    sums            row_i = sum_{j != i + o} exp(s_ij - reference), columns alike, own_i = s_{i, i + o} - reference
    InfoNCE         g_ij = exp(s_ij - reference) (1 / row sum_i + 1 / column sum_j), given on the diagonal
    sigmoid         u_ij = -z_ij (s_ij + bias), loss = sum log(1 + exp(u_ij)), g_ij = -z_ij / (1 + exp(-u_ij))
    both            dx_i = sum_j g_ij y_j,  dy_j = sum_i g_ij x_i, without the factor scale

Design choices:
- One pass over x y^T makes row and column sums at once; no logits are stored. 2 N^2 D operations.
- The backward writes a square of g, [SIDE, SIDE] at most, and leaves dx += g y and dy += g^T x to torch's matrix
  products with fp32 results: 6 N^2 D more, 8 in all, 6 for the sigmoid loss, whose loss is summed while g is made.
  Squares, because thin chunks would read and write all of dy once a chunk. A kernel with dx in registers would have to
  make the logits twice (10 N^2 D), and does not fit for D = 1024.
- Sums are deterministic: every tile stores its share, and torch adds the shares in order. `atomic=True` adds them
  with atomics instead, in no order.
- Inputs are bf16 or fp32, every sum and exponential is fp32. fp32 products are three tf32 ones on NVIDIA (error as
  fp32's own), fp32 ones on AMD. g is stored in the dtype of the inputs.

State: runs in Triton's interpreter, compiles for sm_80, sm_90, sm_100 and gfx942; not yet run on a GPU.

Axes: n rows, N columns, D embedding size; R rows and C columns of a square.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton

from kernels.aot import TARGETS, AotCase
from kernels.contrastive_tiles_triton import gradient_kernel, sigmoid_kernel, sums_kernel

SIDE = 16384  # of a square of logits
SQUARE_BYTES = 512 << 20  # of the gradients of a square


class Tiling(NamedTuple):
    """Rows and columns of a tile, and how a program runs; registers: a thread's limit, where two programs then fit."""

    rows: int = 128
    columns: int = 128
    warps: int = 8
    stages: int = 3
    registers: int | None = None


def supports(x_nD: torch.Tensor) -> bool:
    """Whether the kernels take these embeddings: bf16 or fp32 on a GPU, D a multiple of 16."""
    return x_nD.is_cuda and x_nD.dtype in (torch.bfloat16, torch.float32) and x_nD.shape[1] % 16 == 0


def sums(
    x_nD: torch.Tensor,
    y_ND: torch.Tensor,
    scale: torch.Tensor,
    reference: torch.Tensor,
    start: int = 0,
    *,
    atomic: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """own_n, row_wrong_n, column_wrong_N in fp32: logit - reference of the true pairs (i, start + i), and the sums of
    exp(logit - reference) over the wrong answers of each row and of each column.

    x [n, D] and y [N, D] of one dtype, bf16 or fp32. A sum out of the range of fp32 is left as it comes out (0 or inf):
    the caller looks, as kernels/contrastive.py does.
    """
    x_nD, y_ND, scale, reference = _inputs(x_nD, y_ND, scale, reference)
    own_n = scale.new_empty(len(x_nD))
    row_wrong_n, column_wrong_N = scale.new_zeros(len(x_nD)), scale.new_zeros(len(y_ND))
    tiling = tiling_of("sums", x_nD.dtype, _target(x_nD))
    for rows, columns in _squares(len(x_nD), len(y_ND), SIDE):
        x_RD, y_CD = x_nD[rows], y_ND[columns]
        tiles_down, tiles_across = triton.cdiv(len(x_RD), tiling.rows), triton.cdiv(len(y_CD), tiling.columns)
        if atomic:
            row_shares, column_shares = row_wrong_n[rows], column_wrong_N[columns]
        else:
            row_shares = scale.new_empty(tiles_across, len(x_RD))
            column_shares = scale.new_empty(tiles_down, len(y_CD))
        with torch.cuda.device_of(x_nD):
            sums_kernel[(tiles_down * tiles_across,)](
                x_RD,
                y_CD,
                scale,
                reference,
                own_n[rows],
                row_shares,
                column_shares,
                len(x_RD),
                len(y_CD),
                x_nD.shape[1],
                start + rows.start - columns.start,
                ATOMIC=atomic,
                **_options(tiling, x_nD),
            )
        if not atomic:
            row_wrong_n[rows] += row_shares.sum(0)
            column_wrong_N[columns] += column_shares.sum(0)
    return own_n, row_wrong_n, column_wrong_N


def gradients(
    x_nD: torch.Tensor,
    y_ND: torch.Tensor,
    scale: torch.Tensor,
    reference: torch.Tensor,
    row_sum_n: torch.Tensor,
    column_sum_N: torch.Tensor,
    own_gradient_n: torch.Tensor,
    start: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """dx [n, D] and dy [N, D] in fp32 of InfoNCE, without the factors scale and 1 / 2N; dy from these rows only.

    row_sum and column_sum: of exp(logit - reference), true pairs included, over all columns and all rows of the group.
    own_gradient_n: what stands on the diagonal of the gradients.
    """
    x_nD, y_ND, scale, reference = _inputs(x_nD, y_ND, scale, reference)
    row_inverse_n, column_inverse_N = 1 / row_sum_n.float(), 1 / column_sum_N.float()
    own_gradient_n = own_gradient_n.float().contiguous()
    products = _Products(x_nD, y_ND)
    for rows, columns in products.squares():
        gradient_RC = products.square(rows, columns)
        gradient_chunk(
            x_nD[rows],
            y_ND[columns],
            scale,
            reference,
            row_inverse_n[rows],
            column_inverse_N[columns],
            own_gradient_n[rows],
            start + rows.start - columns.start,
            gradient_RC,
        )
        products.add(gradient_RC, rows, columns)
    return products.dx_nD, products.dy_ND


def gradient_chunk(
    x_RD: torch.Tensor,
    y_CD: torch.Tensor,
    scale: torch.Tensor,
    reference: torch.Tensor,
    row_inverse_R: torch.Tensor,
    column_inverse_C: torch.Tensor,
    own_gradient_R: torch.Tensor,
    offset: int,
    out_RC: torch.Tensor,
) -> None:
    """Write the gradients of a square's logits; the true answer of row i is column i + offset, in or out of the square.

    All fp32 and contiguous but x and y (contiguous), and out (in the dtype of x, contiguous rows), SIDE rows at most.
    """
    tiling = tiling_of("gradient", x_RD.dtype, _target(x_RD))
    tiles = triton.cdiv(len(x_RD), tiling.rows) * triton.cdiv(len(y_CD), tiling.columns)
    with torch.cuda.device_of(x_RD):
        gradient_kernel[(tiles,)](
            x_RD,
            y_CD,
            scale,
            reference,
            row_inverse_R,
            column_inverse_C,
            own_gradient_R,
            out_RC,
            len(x_RD),
            len(y_CD),
            x_RD.shape[1],
            offset,
            out_RC.stride(0),
            **_options(tiling, x_RD),
        )


def sigmoid(
    x_nD: torch.Tensor, y_ND: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor, start: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sum of the pairwise sigmoid losses, that of the gradients of the logits (the bias's), dx [n, D] and dy [N, D].

    All fp32, without the factor 1 / N, dx and dy without scale; dy from these rows only.
    """
    x_nD, y_ND, scale, bias = _inputs(x_nD, y_ND, scale, bias)
    tiling = tiling_of("sigmoid", x_nD.dtype, _target(x_nD))
    products = _Products(x_nD, y_ND)
    totals = torch.zeros(2, dtype=torch.float64, device=x_nD.device)
    for rows, columns in products.squares():
        x_RD, y_CD = x_nD[rows], y_ND[columns]
        gradient_RC = products.square(rows, columns)
        tiles = triton.cdiv(len(x_RD), tiling.rows) * triton.cdiv(len(y_CD), tiling.columns)
        loss_shares, bias_shares = scale.new_empty(tiles), scale.new_empty(tiles)
        with torch.cuda.device_of(x_nD):
            sigmoid_kernel[(tiles,)](
                x_RD,
                y_CD,
                scale,
                bias,
                loss_shares,
                bias_shares,
                gradient_RC,
                len(x_RD),
                len(y_CD),
                x_nD.shape[1],
                start + rows.start - columns.start,
                gradient_RC.stride(0),
                **_options(tiling, x_nD),
            )
        totals += torch.stack([loss_shares, bias_shares]).sum(1, dtype=torch.float64)
        products.add(gradient_RC, rows, columns)
    loss, bias_gradient = totals.float()
    return loss, bias_gradient, products.dx_nD, products.dy_ND


def _inputs(
    x_nD: torch.Tensor, y_ND: torch.Tensor, *numbers: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows without gaps, and the two numbers in fp32 beside them."""
    first, second = (number.to(x_nD.device, torch.float32) for number in numbers)
    return x_nD.contiguous(), y_ND.contiguous(), first, second


def _squares(rows: int, columns: int, side: int) -> Iterator[tuple[slice, slice]]:
    """Cover rows x columns; none where either is 0."""
    for top in range(0, rows, side):
        for left in range(0, columns, side):
            yield slice(top, min(top + side, rows)), slice(left, min(left + side, columns))


class _Products:
    """dx and dy, to which squares of gradients are added one after the other."""

    def __init__(self, x_nD: torch.Tensor, y_ND: torch.Tensor) -> None:
        self.x_nD, self.y_ND = x_nD, y_ND
        self.dx_nD = torch.zeros_like(x_nD, dtype=torch.float32)
        self.dy_ND = torch.zeros_like(y_ND, dtype=torch.float32)
        self.side = min(SIDE, math.isqrt(SQUARE_BYTES // x_nD.itemsize) // 128 * 128)
        rows, columns = (min(self.side, len(each)) for each in (x_nD, y_ND))
        self._memory = x_nD.new_empty(rows * triton.cdiv(columns, 64) * 64)

    def squares(self) -> Iterator[tuple[slice, slice]]:
        return _squares(len(self.x_nD), len(self.y_ND), self.side)

    def square(self, rows: slice, columns: slice) -> torch.Tensor:
        """Memory for the gradients of a square, the same for all; its rows begin at multiples of 64 elements."""
        height, width = rows.stop - rows.start, columns.stop - columns.start
        stride = triton.cdiv(width, 64) * 64
        return self._memory[: height * stride].view(height, stride)[:, :width]

    def add(self, gradient_RC: torch.Tensor, rows: slice, columns: slice) -> None:
        with torch.autocast(gradient_RC.device.type, enabled=False):
            self.dx_nD[rows] += _product(gradient_RC, self.y_ND[columns])
            self.dy_ND[columns] += _product(gradient_RC.T, self.x_nD[rows])


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
    ("gradient", torch.bfloat16, "sm_80"): Tiling(registers=128),
    ("sums", torch.bfloat16, "sm_90"): Tiling(warps=4),
    ("gradient", torch.bfloat16, "sm_90"): Tiling(warps=4),
    ("sums", torch.float32, "sm_80"): Tiling(columns=64),
    ("gradient", torch.float32, "sm_80"): Tiling(columns=64),
    ("sigmoid", torch.float32, "sm_80"): Tiling(columns=64),
    ("sigmoid", torch.float32, "sm_90"): Tiling(columns=64),
    ("sigmoid", torch.float32, "sm_100"): Tiling(columns=64),
}


def tiling_of(kernel: str, dtype: torch.dtype, target: str) -> Tiling:
    """What "sums", "gradient" or "sigmoid" runs with on a GPU of TARGETS."""
    return TILINGS.get((kernel, dtype, target), Tiling(stages=2) if target == "gfx942" else Tiling())


def _target(tensor: torch.Tensor) -> str:
    """The name in TARGETS that is nearest to the tensor's GPU."""
    if not tensor.is_cuda:
        return "sm_80"
    if torch.version.hip:
        return "gfx942"
    major = torch.cuda.get_device_capability(tensor.device)[0]
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_80")


def _options(tiling: Tiling, x_nD: torch.Tensor) -> dict[str, Any]:
    return _constexprs(tiling, x_nD.dtype, x_nD.shape[1], _target(x_nD)) | _launch(tiling)


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
    """Every kernel in both dtypes at D = 512, the sums with atomics, and a size with short steps."""
    cases = [
        _aot_case(name, dtype, 512, target)
        for name in _KERNELS
        for dtype in (torch.bfloat16, torch.float32)
        for target in TARGETS
    ]
    cases += [_aot_case("sums", torch.bfloat16, 48, target) for target in TARGETS]
    return cases + [_aot_case("sums", torch.bfloat16, 512, target, atomic=True) for target in TARGETS]


def _aot_case(name: str, dtype: torch.dtype, size: int, target: str, atomic: bool = False) -> AotCase:
    kernel, tiling = _KERNELS[name], tiling_of(name, dtype, target)
    type_name = {torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]
    constexprs = _constexprs(tiling, dtype, size, target) | ({"ATOMIC": atomic} if name == "sums" else {})
    arguments = [argument for argument in kernel.arg_names if argument not in constexprs]
    pointers = [argument for argument in arguments if argument[0].isupper()]
    types = {argument: f"*{type_name if argument in ('X', 'Y', 'Gradient') else 'fp32'}" for argument in pointers}
    return AotCase(
        name=f"contrastive {name}{' atomic' * atomic} {type_name} D{size}",
        kernel=kernel,
        signature={argument: types.get(argument, "i32") for argument in arguments},
        constexprs=constexprs,
        attrs=[*pointers, *(argument for argument in arguments if argument in ("size", "gradient_stride"))],
        options=_launch(tiling),
        targets=[target],
    )
