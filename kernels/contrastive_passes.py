"""The passes over the matrix of all pairs that make a contrastive loss and all its gradients.

Formulas and conventions are those of kernels/contrastive.py. `Squares` is what a backend brings; columns and their
exchange over a group are those of kernels/contrastive_group.py.

Axes: n rows of this rank, c columns of this rank (n of them true partners), C columns of a block, D embedding size.
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

        column_wrong_n = columns.sweep(visit)[0][: len(x_nD)]
        self.row_sum, self.column_sum = row_wrong_n + own_n.exp(), column_wrong_n + own_n.exp()
        self.own = own_n + reference
        self.row_odds, self.column_odds = row_wrong_n.log() - own_n, column_wrong_n.log() - own_n

    def in_range(self) -> bool:
        """Whether no sum left the range of fp32; the same on every rank."""
        sums = torch.cat([self.row_sum, self.column_sum])
        outside = ~((sums > SMALLEST_SUM) & (sums < LARGEST_SUM))
        return bool(self.columns.add(outside.sum()) == 0)

    def gradients(self, own_gradient_n: torch.Tensor, dx_nD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """dy [c, D] and the gradient of scale, both without the factors; adds to dx."""
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


class _Exact:
    """The same from true log-sum-exps, right for any logits, in plain torch: two exponentials an element and pass."""

    def __init__(self, x_nD: torch.Tensor, columns: Columns, scale: torch.Tensor) -> None:
        self.x_nD, self.columns, self.scale = x_nD, columns, scale
        own_n, row_wrong_n = scale.new_empty(len(x_nD)), scale.new_full((len(x_nD),), -torch.inf)

        def visit(block: Block) -> None:
            of_block_n = contrastive_squares.exact_sums(x_nD, block.y, scale, block.offset, own_n, block.sums[0])
            torch.logaddexp(row_wrong_n, of_block_n, out=row_wrong_n)

        column_wrong_n = columns.sweep(visit, logarithms=True)[0][: len(x_nD)]
        self.row_lse, self.column_lse = (torch.logaddexp(each, own_n) for each in (row_wrong_n, column_wrong_n))
        self.own, self.row_odds, self.column_odds = own_n, row_wrong_n - own_n, column_wrong_n - own_n

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
    partners_n: torch.Tensor,
    negatives: float,
    dx_nD: torch.Tensor,
    of_block: Callable[[Block], torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """dy [c, D] and the gradient of scale, where `of_block` gives a block's part of that and adds to dx and sums[0].

    vectors[0] has `partners` of the columns that have a partner, and `negatives`, which makes their column's softmax 0,
    of the extra ones, which are wrong answers for rows only.
    """
    vector_c = torch.nn.functional.pad(partners_n, (0, len(columns.y_cD) - columns.pairs), value=negatives)
    dscale = torch.zeros((), dtype=torch.float64, device=dx_nD.device)
    (dy_cD,) = columns.sweep(lambda block: dscale.add_(of_block(block)), [vector_c], [dx_nD.shape[1:]])
    return dy_cD, dscale


def _sums(squares: Squares, x_nD: torch.Tensor, columns: Columns, scale: torch.Tensor) -> _Fixed | _Exact:
    """Row and column sums in one pass; in a second, exact one where a sum leaves the range of fp32."""
    longest = columns.maximum(torch.stack([_longest(each, scale.dtype) for each in (x_nD, columns.y_cD)]))
    reference = (scale.abs() * longest.prod() - LARGEST_EXPONENT).clamp(min=0)
    fixed = _Fixed(squares, x_nD, columns, scale, reference)
    return fixed if fixed.in_range() else _Exact(x_nD, columns, scale)


def _longest(rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The largest norm of a row; 0 without rows."""
    lengths = torch.linalg.vector_norm(rows, dim=1, dtype=dtype)
    return lengths.max() if len(rows) else lengths.sum()


def infonce(
    squares: Squares,
    x_nD: torch.Tensor,
    columns: Columns,
    scale: torch.Tensor,
    label_smoothing: float,
    gradients: bool,
) -> Result:
    """InfoNCE; scale in the dtype of the sums. The mean over no pairs at all is nan."""
    sums = _sums(squares, x_nD, columns, scale)
    pairs = columns.all_pairs or torch.nan
    losses_n = (_softplus(sums.row_odds) + _softplus(sums.column_odds)) / 2 + label_smoothing * sums.own
    loss = columns.add(losses_n.sum() / pairs)
    uniform = _Uniform(x_nD, columns, scale) if label_smoothing else None
    if uniform is not None:
        loss -= label_smoothing * uniform.mean
    if not gradients:
        return Result(loss)
    own_gradient_n = 2 * label_smoothing - sums.row_odds.sigmoid() - sums.column_odds.sigmoid()
    dx_nD = scale.new_zeros(x_nD.shape)
    dy_cD, dscale = sums.gradients(own_gradient_n, dx_nD)
    dscale = columns.add(dscale) / (2 * pairs)
    for each in (dx_nD, dy_cD):
        each.mul_(scale * (columns.world / (2 * pairs)))
    if uniform is not None:
        uniform.add_gradients(-label_smoothing, dx_nD, dy_cD)
        dscale -= label_smoothing * uniform.mean_product
    return Result(loss, dx_nD, dy_cD, dscale.to(scale.dtype))


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
        self.x_mean_D = columns.add(x_nD.to(scale.dtype).sum(0)) / self.pairs
        self.y_mean_D = columns.add(self.weights_c @ columns.y_cD.to(scale.dtype))
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
