"""The contrastive losses over the global batch in O(N) extra memory, on one process or a group of them.

InfoNCE (Radford et al. 2021, figure 3), s_ij = scale x_i . y_j, over all N pairs of all ranks:

    L = 1/2N sum_i [ logsumexp_j s_ij - s_ii ]  +  1/2N sum_j [ logsumexp_i s_ij - s_jj ]
    dL/ds_ij = (exp(s_ij - row_i) + exp(s_ij - column_j)) / 2N - [i = j] / N

Pairwise sigmoid (Zhai et al. 2023, algorithm 1), t_ij = scale x_i . y_j + bias, z_ij = 1 on the diagonal and -1 off it:

    L = 1/N sum_ij log(1 + exp(-z_ij t_ij)),      dL/dt_ij = -z_ij / (1 + exp(z_ij t_ij)) / N

Design choices:
- The N x N matrix is never whole: rows come in chunks of `CHUNK_BYTES`, and InfoNCE makes them again in the backward
  (8 N^2 D operations). The sigmoid loss is separable, so loss and gradients come from one pass (6 N^2 D).
- InfoNCE subtracts one constant from every logit instead of a running maximum, so one exponential serves the row
  sum and the column sum, forward and backward. |s| is bounded by scale * max|x| * max|y|; should a sum still leave
  the range of fp32, both passes are repeated with exact maxima (`_Exact`).
- Near the end of training s_ii is nearly all of its log-sum-exp, and their difference and exp(.) - 1 on the diagonal
  would be rounding noise. So the wrong answers are summed without s_ii, and both come from the log odds against the
  true pair, row_i = logsumexp_{j != i} s_ij - s_ii: L_i = log(1 + exp(row_i)), dL_i/ds_ii = -1 / (1 + exp(-row_i)).
- With a group, a rank holds the rows of its own x and gathers y only; column sums are added over the group, and the
  gradient of y goes back to its owner.
- Gradient convention: every rank returns the same global loss, and gradients of x and y are `world` times those of the
  global loss, because data parallelism averages parameter gradients over the group afterwards.

Axes: n pairs of this rank, N pairs of all ranks, C rows of a chunk, D embedding size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

CHUNK_BYTES = 16 << 20  # of one chunk of the logits; two are alive at a time
LARGEST_SUM, SMALLEST_SUM = 1e30, 1e-30  # of fp32 exponentials that still have all their digits
LARGEST_EXPONENT = 60.0  # a million times e^60 is below LARGEST_SUM squared, far inside fp32


def contrastive_loss(
    x_nD: torch.Tensor,
    y_nD: torch.Tensor,
    scale: torch.Tensor,
    *,
    label_smoothing: float = 0.0,
    group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """InfoNCE both ways over all pairs of the group; a scalar, the same on every rank.

    x and y fp32 or fp64 [n, D], paired row by row; n may differ between ranks. scale: a scalar tensor.
    Raises ValueError when x and y do not fit each other.
    """
    _check(x_nD, y_nD)
    loss: torch.Tensor = _InfoNCE.apply(x_nD, y_nD, scale, label_smoothing, group)
    return loss


def sigmoid_loss(
    x_nD: torch.Tensor,
    y_nD: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor,
    *,
    group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """Pairwise sigmoid loss over all pairs of the group; a scalar, the same on every rank.

    x and y fp32 or fp64 [n, D], paired row by row; n may differ between ranks. scale and bias: scalar tensors.
    Raises ValueError when x and y do not fit each other.
    """
    _check(x_nD, y_nD)
    loss: torch.Tensor = _Sigmoid.apply(x_nD, y_nD, scale, bias, group)
    return loss


def _check(x_nD: torch.Tensor, y_nD: torch.Tensor) -> None:
    if x_nD.ndim != 2 or x_nD.shape != y_nD.shape or x_nD.dtype != y_nD.dtype:
        raise ValueError(
            f"x is {x_nD.dtype} {list(x_nD.shape)} and y {y_nD.dtype} {list(y_nD.shape)}: "
            "they must be matrices of one shape and dtype, paired row by row"
        )
    if x_nD.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"x is {x_nD.dtype}: sums over the global batch need float32 or float64")


class _Share:
    """The pairs of this rank among those of the group; without a group, all there are."""

    def __init__(self, group: dist.ProcessGroup | None, pairs: int, device: torch.device) -> None:
        self.group = group
        self.world = dist.get_world_size(group) if group is not None else 1
        sizes = [torch.tensor([pairs], device=device) for _ in range(self.world)]
        if self.world > 1:
            dist.all_gather(sizes, torch.tensor([pairs], device=device), group=group)
        self.sizes = [int(size) for size in sizes]
        self.total = sum(self.sizes)
        rank = dist.get_rank(group) if self.world > 1 else 0
        start = sum(self.sizes[:rank])
        self.own = slice(start, start + pairs)

    def gather(self, rows_nD: torch.Tensor) -> torch.Tensor:
        """[N, D]: the rows of all ranks, in rank order."""
        if self.world == 1:
            return rows_nD
        most = max(self.sizes)
        padded = torch.nn.functional.pad(rows_nD, (0, 0, 0, most - len(rows_nD))).contiguous()
        parts = [torch.empty_like(padded) for _ in self.sizes]
        dist.all_gather(parts, padded, group=self.group)
        return torch.cat([part[:size] for part, size in zip(parts, self.sizes, strict=True)])

    def add(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over ranks, in place."""
        if self.world > 1:
            dist.all_reduce(values, group=self.group)
        return values

    def maximum(self, values: torch.Tensor) -> torch.Tensor:
        """The maximum over ranks, in place."""
        if self.world > 1:
            dist.all_reduce(values, op=dist.ReduceOp.MAX, group=self.group)
        return values

    def diagonal(self, logits_CN: torch.Tensor, rows: slice) -> torch.Tensor:
        """A view of the true pairs' elements in the chunk of logits of these rows."""
        return logits_CN.diagonal(self.own.start + rows.start)[: rows.stop - rows.start]

    def chunks(self, like: torch.Tensor) -> list[slice]:
        """Slices of the own rows such that a chunk of logits [C, N] takes about CHUNK_BYTES."""
        rows = max(1, CHUNK_BYTES // max(1, self.total * like.itemsize))
        pairs = self.own.stop - self.own.start
        return [slice(start, min(start + rows, pairs)) for start in range(0, pairs, rows)]


@dataclass
class _Sums:
    """What the backward needs to know about all rows and columns; the log odds are those against the true pair."""

    own: torch.Tensor  # [n] logits of the true pairs
    row_odds: torch.Tensor  # [n] log of the sum over a row's wrong answers, minus own
    column_odds: torch.Tensor  # [n] the same over the columns of this rank's pairs


@dataclass
class _Fixed(_Sums):
    """exp(s - reference) summed over rows and columns, with one reference for all."""

    reference: torch.Tensor  # []
    row_sum: torch.Tensor  # [n]
    column_sum: torch.Tensor  # [N]

    def probabilities(self, logits_CN: torch.Tensor, rows: slice) -> torch.Tensor:
        """Row softmax + column softmax of a chunk; overwrites the logits. One exponential an element."""
        exponentials_CN = logits_CN.sub_(self.reference).exp_()
        return exponentials_CN.mul_(1 / self.row_sum[rows, None] + 1 / self.column_sum)


@dataclass
class _Exact(_Sums):
    """The same from true log-sum-exps: two exponentials an element, right for any logits."""

    row_lse: torch.Tensor  # [n]
    column_lse: torch.Tensor  # [N]

    def probabilities(self, logits_CN: torch.Tensor, rows: slice) -> torch.Tensor:
        by_row_CN = (logits_CN - self.row_lse[rows, None]).exp_()
        return logits_CN.sub_(self.column_lse).exp_().add_(by_row_CN)


def _fixed_sums(x_nD: torch.Tensor, y_ND: torch.Tensor, scale: torch.Tensor, share: _Share) -> _Fixed | None:
    """Row and column sums in one pass; None (on every rank) when a sum leaves the range of fp32."""
    longest = torch.stack([_longest(x_nD), _longest(y_ND)])
    share.maximum(longest)
    reference = (scale.abs() * longest.prod() - LARGEST_EXPONENT).clamp(min=0)
    own_n, own_exponential_n, row_wrong_n = (x_nD.new_empty(len(x_nD)) for _ in range(3))
    columns = x_nD.new_zeros(2 * share.total + 1)  # added over ranks in one piece
    column_wrong_N, column_own_N, out_of_range = columns.split([share.total, share.total, 1])
    for rows in share.chunks(x_nD):
        logits_CN = x_nD[rows] * scale @ y_ND.T
        own_C = share.diagonal(logits_CN, rows)
        own_n[rows] = own_C
        exponentials_CN = logits_CN.sub_(reference).exp_()
        own_exponential_n[rows] = own_C
        own_C.zero_()
        torch.sum(exponentials_CN, 1, out=row_wrong_n[rows])
        column_wrong_N += exponentials_CN.sum(0)
    row_sum = row_wrong_n + own_exponential_n
    column_own_N[share.own] = own_exponential_n
    out_of_range += (~_in_range(row_sum)).sum()
    share.add(columns)
    column_sum = column_wrong_N + column_own_N
    if out_of_range > 0 or not _in_range(column_sum).all():
        return None
    return _Fixed(
        own=own_n,
        row_odds=row_wrong_n.log() - (own_n - reference),
        column_odds=column_wrong_N[share.own].log() - (own_n - reference),
        reference=reference,
        row_sum=row_sum,
        column_sum=column_sum,
    )


def _longest(rows: torch.Tensor) -> torch.Tensor:
    return rows.norm(dim=1).max() if len(rows) else rows.new_zeros(())


def _in_range(sums: torch.Tensor) -> torch.Tensor:
    return (sums > SMALLEST_SUM) & (sums < LARGEST_SUM)


def _exact_sums(x_nD: torch.Tensor, y_ND: torch.Tensor, scale: torch.Tensor, share: _Share) -> _Exact:
    own_n, row_wrong_n = (x_nD.new_empty(len(x_nD)) for _ in range(2))
    column_wrong_N = x_nD.new_full((share.total,), -torch.inf)
    for rows in share.chunks(x_nD):
        logits_CN = x_nD[rows] * scale @ y_ND.T
        own_C = share.diagonal(logits_CN, rows)
        own_n[rows] = own_C
        own_C.fill_(-torch.inf)
        row_wrong_n[rows] = logits_CN.logsumexp(1)
        column_wrong_N = torch.logaddexp(column_wrong_N, logits_CN.logsumexp(0))
    # a single pair has no wrong answer: -inf - (-inf) must not become nan
    highest_N = share.maximum(column_wrong_N.clone()).clamp(min=torch.finfo(x_nD.dtype).min)
    column_wrong_N = share.add((column_wrong_N - highest_N).exp_()).log() + highest_N
    own_N = x_nD.new_zeros(share.total)
    own_N[share.own] = own_n
    return _Exact(
        own=own_n,
        row_odds=row_wrong_n - own_n,
        column_odds=column_wrong_N[share.own] - own_n,
        row_lse=torch.logaddexp(row_wrong_n, own_n),
        column_lse=torch.logaddexp(column_wrong_N, share.add(own_N)),
    )


def _softplus(values: torch.Tensor) -> torch.Tensor:
    """log(1 + exp(value)), exact in fp64 too."""
    return torch.nn.functional.softplus(values, threshold=40)


class _InfoNCE(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_nD: torch.Tensor,
        y_nD: torch.Tensor,
        scale: torch.Tensor,
        label_smoothing: float,
        group: dist.ProcessGroup | None,
    ) -> torch.Tensor:
        scale = scale.to(x_nD.dtype)
        share = _Share(group, len(x_nD), x_nD.device)
        y_ND = share.gather(y_nD)
        sums = _fixed_sums(x_nD, y_ND, scale, share) or _exact_sums(x_nD, y_ND, scale, share)
        losses_n = (_softplus(sums.row_odds) + _softplus(sums.column_odds)) / 2 + label_smoothing * sums.own
        loss = share.add(losses_n.sum() / share.total)
        y_total_D = None
        if label_smoothing:  # the uniform part of the targets needs sums of embeddings only
            x_total_D, y_total_D = share.add(x_nD.sum(0)), y_ND.sum(0)
            loss -= label_smoothing / share.total**2 * scale * (x_total_D @ y_total_D)
        ctx.save_for_backward(x_nD, y_ND, scale, y_total_D)
        ctx.share, ctx.sums, ctx.label_smoothing = share, sums, label_smoothing
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_nD, y_ND, scale, y_total_D = ctx.saved_tensors
        share, sums, smoothing = ctx.share, ctx.sums, ctx.label_smoothing
        own_n = 2 * smoothing - sums.row_odds.sigmoid() - sums.column_odds.sigmoid()
        dx_nD = torch.empty_like(x_nD)  # without the factor scale until the end: x . dx is then the scale's gradient
        dy_ND = torch.zeros_like(y_ND)
        for rows in share.chunks(x_nD):
            logits_CN = x_nD[rows] * scale @ y_ND.T
            gradient_CN = sums.probabilities(logits_CN, rows)
            share.diagonal(gradient_CN, rows).copy_(own_n[rows])
            torch.mm(gradient_CN, y_ND, out=dx_nD[rows])
            dy_ND.addmm_(gradient_CN.T, x_nD[rows])
        dx_nD /= 2 * share.total
        dy_ND /= 2 * share.total
        if smoothing:
            dx_nD -= smoothing / share.total**2 * y_total_D
            # dy is still a sum over ranks, each of which brings its own rows of x
            dy_ND -= smoothing / share.total**2 * x_nD.sum(0)
        dscale = share.add((x_nD * dx_nD).sum())
        dy_nD = share.add(dy_ND)[share.own]
        factor = gradients[0] * scale * share.world
        return dx_nD * factor, dy_nD * factor, dscale * gradients[0], None, None


class _Sigmoid(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_nD: torch.Tensor,
        y_nD: torch.Tensor,
        scale: torch.Tensor,
        bias: torch.Tensor,
        group: dist.ProcessGroup | None,
    ) -> torch.Tensor:
        scale, bias = scale.to(x_nD.dtype), bias.to(x_nD.dtype)
        share = _Share(group, len(x_nD), x_nD.device)
        y_ND = share.gather(y_nD)
        dx_nD = torch.empty_like(x_nD)  # without the factor scale, as in _InfoNCE
        dy_ND = torch.zeros_like(y_ND)
        numbers = x_nD.new_zeros(3)  # loss, gradient of scale, gradient of bias
        for rows in share.chunks(x_nD):
            logits_CN = torch.addmm(bias, x_nD[rows] * scale, y_ND.T)
            own_C = share.diagonal(logits_CN, rows)
            own_C.neg_()  # now every element is -z t
            numbers[0] += _softplus(logits_CN).sum()
            gradient_CN = logits_CN.sigmoid_()
            own_C.neg_()
            torch.mm(gradient_CN, y_ND, out=dx_nD[rows])
            dy_ND.addmm_(gradient_CN.T, x_nD[rows])
            numbers[2] += gradient_CN.sum()
        numbers[1] = (x_nD * dx_nD).sum()
        numbers = share.add(numbers) / share.total
        dy_nD = share.add(dy_ND)[share.own] / share.total
        ctx.save_for_backward(dx_nD / share.total, dy_nD, scale, numbers)
        ctx.world = share.world
        return numbers[0].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        dx_nD, dy_nD, scale, numbers = ctx.saved_tensors
        factor = gradients[0] * scale * ctx.world
        return dx_nD * factor, dy_nD * factor, numbers[1] * gradients[0], numbers[2] * gradients[0], None
