"""The passes over the matrix of all pairs that make a contrastive loss and all its gradients.

Formulas and conventions are those of kernels/contrastive.py. `Squares` is what a backend brings; columns and their
exchange over a group are those of kernels/contrastive_group.py.

Axes: n rows of this rank, c columns of this rank (n of them true partners), C columns of a block, K columns of a
survey, D embedding size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from kernels import contrastive_squares
from kernels.contrastive_group import Block, Columns

LARGEST_SUM, SMALLEST_SUM = 1e36, 1e-30  # of fp32 exponentials; they and their inverses have all their digits
LARGEST_EXPONENT = 60.0  # e^60 is 1e26: the sum of a million equal pairs is inside


class Squares(Protocol):
    """A backend; kernels/contrastive_squares.py says what each function does."""

    def sums(
        self,
        x_nD: torch.Tensor,
        y_CD: torch.Tensor,
        scale: torch.Tensor,
        reference: torch.Tensor,
        offset: int,
        own_n: torch.Tensor,
        column_wrong_C: torch.Tensor,
    ) -> torch.Tensor: ...

    def gradients(
        self,
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
    ) -> torch.Tensor: ...

    def sigmoid(
        self,
        x_nD: torch.Tensor,
        y_CD: torch.Tensor,
        scale: torch.Tensor,
        bias: torch.Tensor,
        offset: int,
        dx_nD: torch.Tensor | None,
        dy_CD: torch.Tensor | None,
    ) -> torch.Tensor: ...


@dataclass
class Result:
    """A loss and its gradients by x [n, D], the own columns y [c, D], scale and bias; None where not asked for.

    dx and dy are `world` times the global loss's, see kernels/contrastive.py.
    """

    loss: torch.Tensor
    dx: torch.Tensor | None = None
    dy: torch.Tensor | None = None
    dscale: torch.Tensor | None = None
    dbias: torch.Tensor | None = None


# --- InfoNCE


class _Fixed:
    """Sums of exp(s - reference) with one reference for all rows and columns; one exponential an element and pass."""

    def __init__(
        self, squares: Squares, x_nD: torch.Tensor, columns: Columns, scale: torch.Tensor, reference: torch.Tensor
    ) -> None:
        self.squares, self.x_nD, self.columns, self.scale, self.reference = squares, x_nD, columns, scale, reference
        own_n, row_wrong_n = scale.new_empty(len(x_nD)), scale.new_zeros(len(x_nD))

        def visit(block: Block) -> None:
            row_wrong_n.add_(
                squares.sums(x_nD, block.y, scale, reference, block.offset, own_n, column_wrong_C=block.sums[0])
            )
            true_n = own_n.exp()
            if columns.knows_all:  # the rows have met all columns: their partners tell all ranks of those out of range
                true_n.masked_fill_(_out_of_range(row_wrong_n + true_n), torch.nan)
            block.at_partners(block.sums[1], true_n)

        wrong_K, true_K = columns.survey(visit)
        self.row_sum, self.column_sum = row_wrong_n + own_n.exp(), wrong_K + true_K
        self.own = own_n + reference
        self.row_odds, self.column_odds = row_wrong_n.log() - own_n, wrong_K[columns.own_pairs].log() - own_n

    def in_range(self) -> bool:
        """Whether no sum left the range of fp32; the same on every rank."""
        outside = (_out_of_range(self.column_sum) & self.columns.have_rows).sum()
        if not self.columns.knows_all:
            outside = self.columns.add(outside + _out_of_range(self.row_sum).sum())
        return bool(outside == 0)

    def gradients(self, own_gradient_n: torch.Tensor, dx_nD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """dy [c, D] and this rank's part of the gradient of scale, both without the factors; adds to dx."""
        row_inverse_n = 1 / self.row_sum

        def of_block(block: Block) -> torch.Tensor:
            return self.squares.gradients(
                self.x_nD,
                block.y,
                self.scale,
                self.reference,
                row_inverse_n,
                block.vectors[0],
                own_gradient_n,
                block.offset,
                dx_nD,
                block.sums[0],
            )

        return _sweep_gradients(self.columns, 1 / self.column_sum, 0.0, dx_nD, of_block)


def _out_of_range(sums: torch.Tensor) -> torch.Tensor:
    return ~((sums > SMALLEST_SUM) & (sums < LARGEST_SUM))


class _Exact:
    """The same from true log-sum-exps, right for any logits, in plain torch: two exponentials an element and pass."""

    def __init__(self, x_nD: torch.Tensor, columns: Columns, scale: torch.Tensor) -> None:
        self.x_nD, self.columns, self.scale = x_nD, columns, scale
        own_n, row_wrong_n = scale.new_empty(len(x_nD)), scale.new_full((len(x_nD),), -torch.inf)

        def visit(block: Block) -> None:
            of_block_n = contrastive_squares.exact_sums(x_nD, block.y, scale, block.offset, own_n, block.sums[0])
            torch.logaddexp(row_wrong_n, of_block_n, out=row_wrong_n)
            block.at_partners(block.sums[1], own_n)

        wrong_K, true_K = columns.survey(visit, logarithms=True)
        self.row_lse, self.column_lse = torch.logaddexp(row_wrong_n, own_n), torch.logaddexp(wrong_K, true_K)
        self.own, self.row_odds, self.column_odds = own_n, row_wrong_n - own_n, wrong_K[columns.own_pairs] - own_n

    def gradients(self, own_gradient_n: torch.Tensor, dx_nD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        def of_block(block: Block) -> torch.Tensor:
            return contrastive_squares.exact_gradients(
                self.x_nD,
                block.y,
                self.scale,
                self.row_lse,
                block.vectors[0],
                own_gradient_n,
                block.offset,
                dx_nD,
                block.sums[0],
            )

        return _sweep_gradients(self.columns, self.column_lse, torch.inf, dx_nD, of_block)


def _sweep_gradients(
    columns: Columns,
    vector_K: torch.Tensor,
    negatives: float,
    dx_nD: torch.Tensor,
    of_block: Callable[[Block], torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """dy [c, D] and this rank's part of the gradient of scale, which `of_block` gives for a block; it adds to dx and
    sums[0].

    vectors[0] has `vector` of the columns that have a partner, and `negatives`, which makes their column's softmax 0,
    of the extra ones, which are wrong answers for rows only.
    """
    shown_K = vector_K.where(columns.have_rows, negatives)
    dscale = torch.zeros((), dtype=torch.float64, device=dx_nD.device)
    (dy_cD,) = columns.sweep(lambda block: dscale.add_(of_block(block)), [shown_K], [dx_nD.shape[1:]])
    return dy_cD, dscale


def _sums(squares: Squares, x_nD: torch.Tensor, columns: Columns, scale: torch.Tensor) -> _Fixed | _Exact:
    """Row and column sums in one pass; in a second, exact one where a sum leaves the range of fp32."""
    reference = (scale.abs() * columns.largest.prod() - LARGEST_EXPONENT).clamp(min=0)
    fixed = _Fixed(squares, x_nD, columns, scale, reference)
    return fixed if fixed.in_range() else _Exact(x_nD, columns, scale)


def longest_rows(x_nD: torch.Tensor, y_cD: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest norm of a row of each; 0 without rows. `infonce` asks its columns for the `largest` of the group."""
    lengths = [torch.linalg.vector_norm(each, dim=1, dtype=dtype) for each in (x_nD, y_cD)]
    longest_x, longest_y = (each.max() if len(each) else each.sum() for each in lengths)
    return longest_x, longest_y


def infonce(
    squares: Squares,
    x_nD: torch.Tensor,
    columns: Columns,
    scale: torch.Tensor,
    label_smoothing: float,
    gradients: bool,
) -> Result:
    """InfoNCE; scale in the dtype of the sums, columns that know the `longest_rows`. The mean over no pairs is nan."""
    sums = _sums(squares, x_nD, columns, scale)
    pairs = columns.all_pairs or torch.nan
    losses_n = (_softplus(sums.row_odds) + _softplus(sums.column_odds)) / 2 + label_smoothing * sums.own
    totals = torch.zeros(2, dtype=torch.float64, device=x_nD.device)  # of the loss, and of the gradient of scale
    totals[0] = losses_n.sum()
    dx_nD, dy_cD = None, None
    if gradients:
        own_gradient_n = 2 * label_smoothing - sums.row_odds.sigmoid() - sums.column_odds.sigmoid()
        dx_nD = scale.new_zeros(x_nD.shape)
        dy_cD, dscale = sums.gradients(own_gradient_n, dx_nD)
        totals[1] = dscale / 2
        for each in (dx_nD, dy_cD):
            each.mul_(scale * (columns.world / (2 * pairs)))
    totals = columns.add(totals) / pairs
    if label_smoothing:
        uniform = _Uniform(x_nD, columns, scale)
        totals -= label_smoothing * torch.stack([uniform.mean, uniform.mean_product])
        if dx_nD is not None and dy_cD is not None:
            uniform.add_gradients(-label_smoothing, dx_nD, dy_cD)
    loss, dscale = totals.to(scale.dtype).unbind()
    return Result(loss.clone(), dx_nD, dy_cD, dscale.clone() if gradients else None)


def _softplus(values: torch.Tensor) -> torch.Tensor:
    """log(1 + exp(value)), exact in fp64 too."""
    return torch.nn.functional.softplus(values, threshold=40)


class _Uniform:
    """The part of smoothed labels that is spread over all answers: the mean logit, of sums of embeddings only.

    Half of it is the mean over rows and all columns, half that over columns with partners and all rows.
    """

    def __init__(self, x_nD: torch.Tensor, columns: Columns, scale: torch.Tensor) -> None:
        self.columns, self.scale = columns, scale
        self.pairs = columns.all_pairs or torch.nan
        self.weights_c = scale.new_full((len(columns.y_cD),), 0.5 / (columns.all_columns or torch.nan))
        self.weights_c[: columns.pairs] += 0.5 / self.pairs
        x_sum_D, y_mean_D = x_nD.to(scale.dtype).sum(0), self.weights_c @ columns.y_cD.to(scale.dtype)
        x_sum_D, self.y_mean_D = columns.add(torch.stack([x_sum_D, y_mean_D]))
        self.x_mean_D = x_sum_D / self.pairs
        self.mean_product = self.x_mean_D @ self.y_mean_D
        self.mean = scale * self.mean_product

    def add_gradients(self, factor: float, dx_nD: torch.Tensor, dy_cD: torch.Tensor) -> None:
        factor *= self.columns.world
        dx_nD.add_(self.scale * self.y_mean_D / self.pairs, alpha=factor)
        dy_cD.addr_(self.weights_c, self.scale * self.x_mean_D, alpha=factor)


# --- sigmoid


def sigmoid(
    squares: Squares,
    x_nD: torch.Tensor,
    columns: Columns,
    scale: torch.Tensor,
    bias: torch.Tensor,
    gradients: bool,
) -> Result:
    """The pairwise sigmoid loss; scale and bias in the dtype of the sums."""
    pairs = columns.all_pairs or torch.nan
    dx_nD = scale.new_zeros(x_nD.shape) if gradients else None
    numbers = torch.zeros(3, dtype=torch.float64, device=x_nD.device)

    def visit(block: Block) -> None:
        dy_CD = block.sums[0] if gradients else None
        numbers.add_(squares.sigmoid(x_nD, block.y, scale, bias, block.offset, dx_nD, dy_CD))

    sums = columns.sweep(visit, tails=[x_nD.shape[1:]] if gradients else [])
    loss, dscale, dbias = (columns.add(numbers) / pairs).to(scale.dtype).unbind()
    if dx_nD is None:
        return Result(loss.clone())
    for each in (dx_nD, *sums):
        each.mul_(scale * (columns.world / pairs))
    return Result(loss.clone(), dx_nD, sums[0], dscale.clone(), dbias.clone())
