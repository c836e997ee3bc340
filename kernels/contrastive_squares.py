"""The N^2 parts of the contrastive losses in plain torch: what rows and columns add to each other's sums and gradients.

Formulas and conventions are those of kernels/contrastive.py. kernels/gpu/contrastive.py has `sums`, `gradients` and
`sigmoid` again in Triton. All of them take rows x [n, D] and columns y [C, D], of which column i + offset is row i's
partner (none is, with an offset of C), and add to what they are given.

Design choices:
- The matrix is made in squares of `SIDE`. On CPU one is 4 MiB of fp32: small enough for the cache, and large enough for
  matrix products at full speed. Thin chunks of rows would read all of y once a chunk; with larger squares, the memory
  that glibc keeps after they are gone adds to the peak of the backward.
- x comes as scale x to the product, which saves a pass over the square.
- log(1 + e_1) + log(1 + e_2) + ... is one logarithm of a product, of which q = product - 1 is kept: q of two factors is
  a + b + a b. 1 + e would drop the digits of a small e, and nearly all of a sigmoid loss is small ones.
- Embeddings of 16 bits are widened, so their products are exact and the sums fp32.

Axes: n rows, C columns, D embedding size; R rows and S columns of a square.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

SIDE = 1024  # of a square, on CPU
SIDE_ON_GPU = 8192  # there a square is a few kernels, and these have to be large
FACTORS = 5  # 2^5 of (1 + e), e <= 1, are multiplied: no more than 2^32


def sums(
    x_nD: torch.Tensor,
    y_CD: torch.Tensor,
    scale: torch.Tensor,
    reference: torch.Tensor,
    offset: int,
    own_n: torch.Tensor,
    column_wrong_C: torch.Tensor,
) -> torch.Tensor:
    """The sum [n] of exp(s_ij - reference) over the wrong answers among these columns; adds that over rows to
    column_wrong, and writes s_ij - reference of the true pairs that are here to own."""
    row_wrong_n = own_n.new_zeros(len(x_nD))
    for square in _squares(x_nD, y_CD, scale, offset, own_n.dtype):
        exponents_RS = square.logits
        if not reference.is_cpu or reference != 0:
            exponents_RS.sub_(reference)
        own_n[square.own_rows] = square.own
        square.own.fill_(-torch.inf)
        exponentials_RS = exponents_RS.exp_()
        row_wrong_n[square.rows] += exponentials_RS.sum(1)
        column_wrong_C[square.columns] += exponentials_RS.sum(0)
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

    def gradient(square: _Square) -> torch.Tensor:
        if not reference.is_cpu or reference != 0:
            square.logits.sub_(reference)
        weights_RS = torch.add(row_inverse_n[square.rows, None], column_inverse_C[square.columns], out=square.memory)
        gradient_RS = square.logits.exp_().mul_(weights_RS)
        square.own.copy_(own_gradient_n[square.own_rows])
        return gradient_RS

    return _add_products(x_nD, y_CD, scale, offset, dx_nD, dy_CD, gradient)


def exact_sums(
    x_nD: torch.Tensor,
    y_CD: torch.Tensor,
    scale: torch.Tensor,
    offset: int,
    own_n: torch.Tensor,
    column_wrong_C: torch.Tensor,
) -> torch.Tensor:
    """As `sums`, for logits of any size: without a reference, and every sum by its logarithm."""
    row_wrong_n = own_n.new_full((len(x_nD),), -torch.inf)
    for square in _squares(x_nD, y_CD, scale, offset, own_n.dtype):
        own_n[square.own_rows] = square.own
        square.own.fill_(-torch.inf)
        for wrong, dim, place in ((row_wrong_n, 1, square.rows), (column_wrong_C, 0, square.columns)):
            wrong[place] = torch.logaddexp(wrong[place], square.logits.logsumexp(dim))
    return row_wrong_n


def exact_gradients(
    x_nD: torch.Tensor,
    y_CD: torch.Tensor,
    scale: torch.Tensor,
    row_lse_n: torch.Tensor,
    column_lse_C: torch.Tensor,
    own_gradient_n: torch.Tensor,
    offset: int,
    dx_nD: torch.Tensor,
    dy_CD: torch.Tensor,
) -> torch.Tensor:
    """As `gradients`, with g_ij = exp(s_ij - row_lse_i) + exp(s_ij - column_lse_j)."""

    def gradient(square: _Square) -> torch.Tensor:
        by_row_RS = torch.sub(square.logits, row_lse_n[square.rows, None], out=square.memory).exp_()
        gradient_RS = square.logits.sub_(column_lse_C[square.columns]).exp_().add_(by_row_RS)
        square.own.copy_(own_gradient_n[square.own_rows])
        return gradient_RS

    return _add_products(x_nD, y_CD, scale, offset, dx_nD, dy_CD, gradient)


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
    sum_j g_ij y_j to dx and sum_i g_ij x_i to dy. Without dx and dy, of the losses only."""
    loss, bias_gradient = (torch.zeros((), dtype=torch.float64, device=x_nD.device) for _ in range(2))
    dtype = scale.dtype

    def gradient(square: _Square) -> torch.Tensor:
        wrong_RS = square.logits.add_(bias)
        square.own.neg_()  # -z t: how wrong each logit is
        loss.add_(torch.clamp(wrong_RS, min=0, out=square.memory).sum())
        gradient_RS = torch.sigmoid(wrong_RS, out=square.memory)
        # exp(-|u|) from the sigmoid; where that is nearly 1, the part of the loss that counts is already in
        smaller_RS = torch.minimum(torch.sub(1, gradient_RS, out=wrong_RS), gradient_RS, out=wrong_RS)
        loss.add_(_sum_log1p(smaller_RS.reciprocal_().sub_(1).reciprocal_()))  # p / (1 - p), in place
        own_gradient = gradient_RS.diagonal(square.diagonal)
        own_gradient.neg_()
        bias_gradient.add_(gradient_RS.sum())
        return gradient_RS

    if dx_nD is None or dy_CD is None:
        for square in _squares(x_nD, y_CD, scale, offset, dtype):
            gradient(square)
        return torch.stack([loss, *loss.new_zeros(2)])
    scale_gradient = _add_products(x_nD, y_CD, scale, offset, dx_nD, dy_CD, gradient)
    return torch.stack([loss, scale_gradient, bias_gradient])


def _sum_log1p(terms: torch.Tensor) -> torch.Tensor:
    """sum log(1 + term), terms 0 to 1, to the relative error of their dtype; overwrites them."""
    for _ in range(FACTORS):
        half = len(terms) // 2
        first, second = terms[:half], terms[len(terms) - half :]
        second.addcmul_(first, second).add_(first)
        terms = terms[half:]  # an odd row out stands before the products
    return terms.log1p_().sum()


# --- squares


@dataclass
class _Square:
    """Logits without bias, of some rows and columns; own: a view of those of the true pairs, of own_rows."""

    rows: slice
    columns: slice
    x: torch.Tensor  # [R, D]
    y: torch.Tensor  # [S, D]
    logits: torch.Tensor  # [R, S], may be overwritten
    memory: torch.Tensor  # [R, S], to be used at will
    own: torch.Tensor
    own_rows: slice
    diagonal: int  # where the true pairs are


def _squares(
    x_nD: torch.Tensor, y_CD: torch.Tensor, scale: torch.Tensor, offset: int, dtype: torch.dtype
) -> Iterator[_Square]:
    """All squares, the columns of one strip of rows after the other; a square's memory is the next one's too."""
    side = SIDE if x_nD.is_cpu else SIDE_ON_GPU
    most = min(side, len(x_nD)) * min(side, len(y_CD))
    memory = torch.empty(2, most, dtype=dtype, device=x_nD.device)
    for rows in _slices(len(x_nD), side):
        x_RD = x_nD[rows].to(dtype)
        scaled_RD = x_RD * scale
        for columns in _slices(len(y_CD), side):
            y_SD = y_CD[columns].to(dtype)
            shape = len(x_RD), len(y_SD)
            logits_RS, memory_RS = (each[: shape[0] * shape[1]].view(shape) for each in memory)
            torch.mm(scaled_RD, y_SD.T, out=logits_RS)
            diagonal = rows.start + offset - columns.start
            own = logits_RS.diagonal(diagonal)
            first = rows.start + max(0, -diagonal)
            own_rows = slice(first, first + len(own))
            yield _Square(rows, columns, x_RD, y_SD, logits_RS, memory_RS, own, own_rows, diagonal)


def _slices(length: int, most: int) -> Iterator[slice]:
    return (slice(start, min(start + most, length)) for start in range(0, length, most))


def _add_products(
    x_nD: torch.Tensor,
    y_CD: torch.Tensor,
    scale: torch.Tensor,
    offset: int,
    dx_nD: torch.Tensor,
    dy_CD: torch.Tensor,
    gradient: Callable[[_Square], torch.Tensor],
) -> torch.Tensor:
    """Add sum_j g_ij y_j to dx and sum_i g_ij x_i to dy, where `gradient` makes g of a square; sum g_ij x_i . y_j."""
    scale_gradient = torch.zeros((), dtype=torch.float64, device=x_nD.device)
    dx_RD = dx_nD[:0]  # of these columns only
    for square in _squares(x_nD, y_CD, scale, offset, dx_nD.dtype):
        if square.columns.start == 0:
            dx_RD = torch.zeros_like(square.x)
        gradient_RS = gradient(square)
        dx_RD.addmm_(gradient_RS, square.y)
        dy_CD[square.columns].addmm_(gradient_RS.T, square.x)
        if square.columns.stop == len(y_CD):
            scale_gradient += (square.x * dx_RD).sum(dtype=torch.float64)
            dx_nD[square.rows] += dx_RD
    return scale_gradient
