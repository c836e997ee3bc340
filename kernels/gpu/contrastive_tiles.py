"""The Triton kernels of kernels/gpu/contrastive.py, whose docstring has the formulas. A program makes one tile.

Design choices:
- All offsets fit 32 bits, because what comes is a square of gpu.contrastive.SIDE rows at most.
- Rows and columns behind the last are read as the last one, without masks, and fall away at the end.
- What does not count becomes exp(-inf) or sigmoid(-inf), which costs fewer registers than zeros put in afterwards; and
  conditions on the diagonal are for every tile alike, for a branch that changes a tile costs registers too.
- log(1 + e) of e = exp(-|u|) is the series 2 artanh(e / (2 + e)), because 1 + e would drop the digits of a small e, and
  nearly all of a sigmoid loss is small ones.

Axes: A rows and B columns of a tile, K a step in the embedding.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

SHARED_COLUMNS = tl.constexpr(8)  # row tiles that go over the same columns together, which stay in the cache
ANY_NUMBER = ("rows", "columns", "offset")  # compiled once for all of them


@triton.jit
def _place(rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """This program's tile, as (tile down, tile across): down SHARED_COLUMNS rows first, then across."""
    tiles_down, tiles_across = tl.cdiv(rows, ROWS), tl.cdiv(columns, COLUMNS)
    band_tiles = SHARED_COLUMNS * tiles_across
    band, within = tl.program_id(0) // band_tiles, tl.program_id(0) % band_tiles
    first_down = band * SHARED_COLUMNS
    height = tl.minimum(tiles_down - first_down, SHARED_COLUMNS)
    return first_down + within % height, within // height


@triton.jit
def _dot_products(
    X, Y, row_A, column_B, rows, columns, size, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """x_i . y_j in fp32; beyond the last row or column, those of the last."""
    depth_K = tl.arange(0, STEP)
    x_pointers = X + tl.minimum(row_A, rows - 1)[:, None] * size + depth_K[None, :]
    y_pointers = Y + tl.minimum(column_B, columns - 1)[None, :] * size + depth_K[:, None]
    products_AB = tl.zeros([ROWS, COLUMNS], tl.float32)
    for depth in range(0, size, STEP):
        x_AK, y_KB = tl.load(x_pointers + depth), tl.load(y_pointers + depth)
        products_AB = tl.dot(x_AK, y_KB, products_AB, input_precision=PRECISION)
    return products_AB


@triton.jit
def _has_own(down, across, offset, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Whether a true pair may be in the tile."""
    first_column = down * ROWS + offset  # of the true pair of the first row
    return (first_column < (across + 1) * COLUMNS) & (first_column + ROWS > across * COLUMNS)


@triton.jit
def _own(row_A, column_B, offset):
    """Where the true pairs are in a tile."""
    return (row_A + offset)[:, None] == column_B[None, :]


@triton.jit
def _inside(row_A, column_B, rows, columns):
    return (row_A < rows)[:, None] & (column_B < columns)[None, :]


@triton.jit(do_not_specialize=ANY_NUMBER)
def sums_kernel(
    X, Y, Scale, Reference, Own, RowShares, ColumnShares, rows, columns, size, offset,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr,
    ATOMIC: tl.constexpr,
):  # fmt: skip
    """Shares [tiles across, rows] and [tiles down, columns]; with ATOMIC, [rows] and [columns] to be added to."""
    down, across = _place(rows, columns, ROWS, COLUMNS)
    row_A, column_B = down * ROWS + tl.arange(0, ROWS), across * COLUMNS + tl.arange(0, COLUMNS)
    products_AB = _dot_products(X, Y, row_A, column_B, rows, columns, size, ROWS, COLUMNS, STEP, PRECISION)
    exponents_AB = products_AB * tl.load(Scale) - tl.load(Reference)
    own_AB = _own(row_A, column_B, offset)
    if _has_own(down, across, offset, ROWS, COLUMNS):
        own_A = tl.sum(tl.where(own_AB, exponents_AB, 0.0), 1)
        own_column_A = row_A + offset
        here_A = (own_column_A >= across * COLUMNS) & (own_column_A < tl.minimum((across + 1) * COLUMNS, columns))
        tl.store(Own + row_A, own_A, mask=here_A & (row_A < rows))
    exponents_AB = tl.where(own_AB, -float("inf"), exponents_AB)
    exponents_AB = tl.where(_inside(row_A, column_B, rows, columns), exponents_AB, -float("inf"))
    exponentials_AB = tl.exp(exponents_AB)
    row_sum_A, column_sum_B = tl.sum(exponentials_AB, 1), tl.sum(exponentials_AB, 0)
    if ATOMIC:
        tl.atomic_add(RowShares + row_A, row_sum_A, mask=row_A < rows, sem="relaxed")
        tl.atomic_add(ColumnShares + column_B, column_sum_B, mask=column_B < columns, sem="relaxed")
    else:
        tl.store(RowShares + across * rows + row_A, row_sum_A, mask=row_A < rows)
        tl.store(ColumnShares + down * columns + column_B, column_sum_B, mask=column_B < columns)


@triton.jit(do_not_specialize=ANY_NUMBER)
def gradient_kernel(
    X, Y, Scale, Reference, RowInverse, ColumnInverse, OwnGradient, ScaleShares, Gradient, rows, columns, size, offset,
    gradient_stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient [rows, columns]: row softmax + column softmax, and OwnGradient on the diagonal; ScaleShares [tiles]."""
    down, across = _place(rows, columns, ROWS, COLUMNS)
    row_A, column_B = down * ROWS + tl.arange(0, ROWS), across * COLUMNS + tl.arange(0, COLUMNS)
    products_AB = _dot_products(X, Y, row_A, column_B, rows, columns, size, ROWS, COLUMNS, STEP, PRECISION)
    row_inverse_A = tl.load(RowInverse + row_A, mask=row_A < rows, other=0.0)
    column_inverse_B = tl.load(ColumnInverse + column_B, mask=column_B < columns, other=0.0)
    exponentials_AB = tl.exp(products_AB * tl.load(Scale) - tl.load(Reference))
    gradient_AB = exponentials_AB * (row_inverse_A[:, None] + column_inverse_B[None, :])
    own_gradient_A = tl.load(OwnGradient + row_A, mask=row_A < rows, other=0.0)
    gradient_AB = tl.where(_own(row_A, column_B, offset), own_gradient_A[:, None], gradient_AB)
    inside_AB = _inside(row_A, column_B, rows, columns)
    # the gradient of scale is summed before its terms are rounded for the products
    tl.store(ScaleShares + tl.program_id(0), tl.sum(tl.where(inside_AB, gradient_AB * products_AB, 0.0)))
    pointers = Gradient + row_A[:, None] * gradient_stride + column_B[None, :]
    tl.store(pointers, gradient_AB.to(Gradient.dtype.element_ty), mask=inside_AB)


@triton.jit(do_not_specialize=ANY_NUMBER)
def sigmoid_kernel(
    X, Y, Scale, Bias, LossShares, ScaleShares, BiasShares, Gradient, rows, columns, size, offset, gradient_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient [rows, columns] of the logits; shares [tiles]: sums of the loss and of scale's and bias's gradients."""
    down, across = _place(rows, columns, ROWS, COLUMNS)
    row_A, column_B = down * ROWS + tl.arange(0, ROWS), across * COLUMNS + tl.arange(0, COLUMNS)
    products_AB = _dot_products(X, Y, row_A, column_B, rows, columns, size, ROWS, COLUMNS, STEP, PRECISION)
    own_AB = _own(row_A, column_B, offset)
    logits_AB = products_AB * tl.load(Scale) + tl.load(Bias)
    wrong_AB = tl.where(own_AB, -logits_AB, logits_AB)  # -z t: how wrong each logit is
    inside_AB = _inside(row_A, column_B, rows, columns)
    wrong_AB = tl.where(inside_AB, wrong_AB, -float("inf"))  # then loss and gradient are 0
    # e = exp(-|u|); 1 / (1 + e) and 1 / (2 + e) come from one division
    small_AB = tl.exp(-tl.abs(wrong_AB))
    both_AB = 1.0 / ((1.0 + small_AB) * (2.0 + small_AB))
    sigmoid_AB = tl.where(wrong_AB >= 0.0, 1.0, small_AB) * (2.0 + small_AB) * both_AB
    ratio_AB = small_AB * (1.0 + small_AB) * both_AB  # e / (2 + e), a third at most
    square_AB = ratio_AB * ratio_AB
    series_AB = 1.0 / 11 + square_AB * (1.0 / 13)  # artanh(r) / r = 1 + r^2/3 + r^4/5 + ..., the rest below 2e-8
    for divisor in tl.static_range(9, 0, -2):
        series_AB = 1.0 / divisor + square_AB * series_AB
    losses_AB = tl.maximum(wrong_AB, 0.0) + 2.0 * ratio_AB * series_AB
    gradient_AB = tl.where(own_AB, -sigmoid_AB, sigmoid_AB)
    tl.store(LossShares + tl.program_id(0), tl.sum(losses_AB))
    tl.store(ScaleShares + tl.program_id(0), tl.sum(gradient_AB * products_AB))
    tl.store(BiasShares + tl.program_id(0), tl.sum(gradient_AB))
    pointers = Gradient + row_A[:, None] * gradient_stride + column_B[None, :]
    tl.store(pointers, gradient_AB.to(Gradient.dtype.element_ty), mask=inside_AB)
