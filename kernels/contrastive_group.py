"""The columns of the contrastive losses, spread over a group: every row meets every column, sums find their way home.

A rank holds rows x [n, D] and columns y [c, D]: first the n partners of its rows, in order, then extra negatives.
`Columns.sweep` shows the caller all columns of the group in blocks, and brings what the caller adds up over the columns
of a block, which are mostly other ranks', back to the rank that holds them.

Design choices:
- "gather": one block, the columns of all ranks in rank order. One collective each way; every rank holds all of y.
- "ring": one block a rank, passed from neighbour to neighbour by batched point-to-point calls. Its sums travel with it
  and are home after a whole turn. A rank holds two blocks, and their sums, however large the group is; the next block
  is under way while the present one is worked on.
- Ranks may hold different numbers of rows and columns, and none.

Axes: n rows of this rank, c columns of this rank, C columns of a block, D embedding size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from kernels.collectives import all_gather, reduce_scatter

EXCHANGES = ("gather", "ring")


@dataclass
class Block:
    """Some columns and what goes with them. Row i's partner is column i + offset; an offset of C: none is here."""

    y: torch.Tensor  # [C, D]
    offset: int
    vectors: list[torch.Tensor]  # [C] each, to be read
    sums: list[torch.Tensor]  # [C, ...] each, to be added to in place


class Columns:
    """Those of a process by itself, and what both exchanges have in common. dtype: that of the sums."""

    def __init__(
        self, y_cD: torch.Tensor, pairs: int, dtype: torch.dtype, group: dist.ProcessGroup | None = None
    ) -> None:
        self.y_cD, self.pairs, self.dtype, self.group = y_cD, pairs, dtype, group
        self.world, self.rank = (1, 0) if group is None else (dist.get_world_size(group), dist.get_rank(group))
        counts = [[pairs, len(y_cD)]]
        if self.world > 1:
            counts_W2 = torch.empty(self.world, 2, dtype=torch.int64, device=y_cD.device)
            all_gather(counts_W2, counts_W2.new_tensor(counts), group=group)
            counts = counts_W2.tolist()
        self.sizes = [columns for _, columns in counts]
        self.all_pairs, self.all_columns = sum(pairs for pairs, _ in counts), sum(self.sizes)

    def sweep(
        self,
        visit: Callable[[Block], object],
        vectors: Sequence[torch.Tensor] = (),
        tails: Sequence[Sequence[int]] = ((),),
        logarithms: bool = False,
    ) -> list[torch.Tensor]:
        """Call `visit` with blocks that hold every column of the group once; the sums for the own columns.

        vectors [c]: of the own columns, shown with them. tails: each makes a sum [c, *tail], which begins at 0.
        logarithms: what is summed is given by its logarithm, begins at -inf, and the visitor uses logaddexp.
        """
        sums = [self._begin(len(self.y_cD), tail, logarithms) for tail in tails]
        visit(Block(self.y_cD, 0, list(vectors), sums))
        return sums

    def _begin(self, columns: int, tail: Sequence[int], logarithms: bool) -> torch.Tensor:
        return self.y_cD.new_full((columns, *tail), -torch.inf if logarithms else 0.0, dtype=self.dtype)

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


class Gathered(Columns):
    def __init__(self, y_cD: torch.Tensor, pairs: int, dtype: torch.dtype, group: dist.ProcessGroup) -> None:
        super().__init__(y_cD, pairs, dtype, group)
        start = sum(self.sizes[: self.rank])
        self.own = slice(start, start + len(y_cD))
        self.y_CD = self._gather(y_cD)

    def sweep(
        self,
        visit: Callable[[Block], object],
        vectors: Sequence[torch.Tensor] = (),
        tails: Sequence[Sequence[int]] = ((),),
        logarithms: bool = False,
    ) -> list[torch.Tensor]:
        sums = [self._begin(self.all_columns, tail, logarithms) for tail in tails]
        visit(Block(self.y_CD, self.own.start, [self._gather(vector_c) for vector_c in vectors], sums))
        return [self._add_logarithms(each) if logarithms else self._add_up(each) for each in sums]

    def _gather(self, own: torch.Tensor) -> torch.Tensor:
        """[C, ...]: the rows of all ranks, in rank order."""
        most = max(self.sizes)
        padded = (
            own.contiguous() if len(own) == most else torch.cat([own, own.new_zeros(most - len(own), *own.shape[1:])])
        )
        rows = own.new_empty(self.world * most, *own.shape[1:])
        all_gather(rows, padded, group=self.group)
        if min(self.sizes) == most:
            return rows
        return torch.cat([part[:size] for part, size in zip(rows.split(most), self.sizes, strict=True)])

    def _add_up(self, sums: torch.Tensor) -> torch.Tensor:
        """[C, ...] of every rank to [c, ...] of all."""
        if min(self.sizes) < max(self.sizes):
            return self.add(sums)[self.own].clone()  # a view would keep all the columns' sums alive
        own = sums.new_empty(len(self.y_cD), *sums.shape[1:])
        reduce_scatter(own, sums, group=self.group)
        return own

    def _add_logarithms(self, logarithms_C: torch.Tensor) -> torch.Tensor:
        # a column of -inf, which has no wrong answers, must not become -inf - (-inf) = nan
        highest_C = self.maximum(logarithms_C.clone()).clamp(min=torch.finfo(self.dtype).min)
        return self._add_up((logarithms_C - highest_C).exp_()).log_() + highest_C[self.own]


class Ring(Columns):
    def sweep(
        self,
        visit: Callable[[Block], object],
        vectors: Sequence[torch.Tensor] = (),
        tails: Sequence[Sequence[int]] = ((),),
        logarithms: bool = False,
    ) -> list[torch.Tensor]:
        sums = [self._begin(len(self.y_cD), tail, logarithms) for tail in tails]
        shown = [self.y_cD.contiguous(), *vectors]
        for step in range(self.world):
            owner_of_next = (self.rank - step - 1) % self.world
            coming = _Passing(self, shown, owner_of_next) if step < self.world - 1 else None
            y_CD, *block_vectors = shown
            visit(Block(y_CD, 0 if step == 0 else len(y_CD), block_vectors, sums))
            sums = _Passing(self, sums, owner_of_next).arrived()
            shown = coming.arrived() if coming is not None else []
        return sums


class _Passing:
    """Tensors [C, ...] on their way to the next rank, and those of another owner's columns coming from the one before.

    What has no elements is not sent; both sides know, for all know all sizes.
    """

    def __init__(self, columns: Columns, leaving: Sequence[torch.Tensor], owner: int) -> None:
        self.coming = [each.new_empty(columns.sizes[owner], *each.shape[1:]) for each in leaving]
        after, before = (columns.rank + 1) % columns.world, (columns.rank - 1) % columns.world
        calls = [
            dist.P2POp(call, each, group=columns.group, group_peer=peer)
            for call, tensors, peer in ((dist.isend, leaving, after), (dist.irecv, self.coming, before))
            for each in tensors
            if each.numel()
        ]
        self._leaving = leaving  # not to be freed before it has left
        self._requests = dist.batch_isend_irecv(calls) if calls else []

    def arrived(self) -> list[torch.Tensor]:
        for request in self._requests:
            request.wait()
        return self.coming


def columns_of(
    y_cD: torch.Tensor, pairs: int, dtype: torch.dtype, group: dist.ProcessGroup | None, exchange: str
) -> Columns:
    """The columns of this rank, of which the first `pairs` are its rows' partners, among those of the group."""
    if group is None or dist.get_world_size(group) == 1:
        return Columns(y_cD, pairs, dtype)
    return (Ring if exchange == "ring" else Gathered)(y_cD, pairs, dtype, group)
