"""The columns of the contrastive losses, spread over a group: every row meets every column, sums find their way home.

A rank holds rows x [n, D] and columns y [c, D]: first the n partners of its rows, in order, then extra negatives.
`Columns.sweep` shows the caller all columns of the group in blocks, and brings what the caller adds up over the columns
of a block, which are mostly other ranks', back to the rank that holds them. `Columns.survey` comes before: it adds up
numbers of each column for whoever will show that column in a sweep.

Design choices:
- "replicate": every rank gathers rows and columns and makes the whole loss of them, as one process would (`Whole`). It
  is for few pairs, of which the other two spend most of the time on waiting for collectives.
- "gather": one block, the columns of all ranks in rank order. One collective each way; every rank holds all of y.
  It also has all of a survey, which is small beside y: one sum over ranks, where to bring each number home and to
  gather again what becomes of it are two collectives.
- "ring": one block a rank, passed from neighbour to neighbour by batched point-to-point calls. Its sums travel with it
  and are home after a whole turn. A rank holds two blocks, and their sums, however large the group is; the next block
  is under way while the present one is worked on.
- Ranks may hold different numbers of rows and columns, and none.
- Numbers travel together where they can: a collective of a few numbers takes as long as one of many thousands.

Axes: n rows of this rank, c columns of this rank, C columns of a block, K columns of a survey, D embedding size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.distributed as dist

from kernels.collectives import all_gather, reduce_scatter

AUTO, REPLICATE, GATHER, RING = "auto", "replicate", "gather", "ring"
EXCHANGES = (REPLICATE, GATHER, RING)
FEW = 1024  # columns of all ranks, up to which "auto" replicates: 8 FEW^2 operations for each number of an embedding


@dataclass
class Block:
    """Some columns and what goes with them. Row i's partner is column i + offset; an offset of C: none is here."""

    y: torch.Tensor  # [C, D]
    offset: int
    vectors: list[torch.Tensor]  # [C] each, to be read
    sums: list[torch.Tensor]  # [C, ...] each, to be added to in place

    def at_partners(self, values_C: torch.Tensor, values_n: torch.Tensor) -> None:
        """Write a value of each row to the place of its partner, if that is here."""
        if self.offset < len(self.y):
            values_C[self.offset : self.offset + len(values_n)] = values_n


class Columns:
    """Those of a process by itself, and what both exchanges have in common. dtype: that of the sums.

    largest [k]: over all ranks, of the k numbers that each of them gives.
    """

    knows_all = True  # K is all columns of the group, and there is one block; else K is c

    def __init__(
        self,
        y_cD: torch.Tensor,
        pairs: int,
        dtype: torch.dtype,
        group: dist.ProcessGroup | None = None,
        numbers: Sequence[torch.Tensor] = (),
    ) -> None:
        self.y_cD, self.pairs, self.dtype, self.group = y_cD, pairs, dtype, group
        self.world, self.rank = (1, 0) if group is None else (dist.get_world_size(group), dist.get_rank(group))
        counts = [(pairs, len(y_cD))]
        self.largest = torch.stack([*numbers]) if numbers else y_cD.new_empty(0, dtype=dtype)
        if self.world > 1:
            told = torch.cat([y_cD.new_tensor(counts[0], dtype=torch.float64), self.largest.double()])
            everyone = told.new_empty(self.world, len(told))
            all_gather(everyone, told[None], group=group)
            counts = [(int(pairs), int(columns)) for pairs, columns in everyone[:, :2].tolist()]
            self.largest = everyone[:, 2:].amax(0).to(self.largest.dtype)
        self.counts, self.sizes = counts, [columns for _, columns in counts]
        self.all_pairs, self.all_columns = sum(pairs for pairs, _ in counts), sum(self.sizes)
        before = sum(self.sizes[: self.rank]) if self.knows_all else 0
        self.own = slice(before, before + len(y_cD))  # columns of this rank among the K
        self.own_pairs = slice(before, before + pairs)

    @cached_property
    def y_CD(self) -> torch.Tensor:
        """Those of the one block."""
        return self.y_cD

    @cached_property
    def have_rows(self) -> torch.Tensor:
        """[K]: whether a column is the partner of a row, and no extra negative."""
        counts = self.counts if self.knows_all else [self.counts[self.rank]]
        if self.all_pairs == self.all_columns:
            return self.y_cD.new_ones(sum(columns for _, columns in counts), dtype=torch.bool)
        kinds = torch.tensor([True, False] * len(counts))
        sizes = torch.tensor([size for pairs, columns in counts for size in (pairs, columns - pairs)])
        return kinds.repeat_interleave(sizes).to(self.y_cD.device)

    def survey(self, visit: Callable[[Block], object], logarithms: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """Call `visit` with blocks that hold every column of the group once; two sums [K] that it makes.

        logarithms: what is summed is given by its logarithm, begins at -inf, and the visitor uses logaddexp.
        """
        both_2C = self._begin((2, len(self.y_CD)), logarithms)
        visit(Block(self.y_CD, self.own.start, [], list(both_2C)))
        first_K, second_K = self._over_ranks(both_2C, logarithms)
        return first_K, second_K

    def sweep(
        self,
        visit: Callable[[Block], object],
        vectors: Sequence[torch.Tensor] = (),
        tails: Sequence[Sequence[int]] = (),
    ) -> list[torch.Tensor]:
        """The same with vectors [K], shown with the columns. tails: each makes a sum [c, *tail] of the own columns."""
        sums = [self._begin((len(self.y_CD), *tail)) for tail in tails]
        visit(Block(self.y_CD, self.own.start, list(vectors), sums))
        return [self._home(each) for each in sums]

    def _over_ranks(self, sums: torch.Tensor, logarithms: bool) -> torch.Tensor:
        """Those of a survey [2, C], by this rank, to those by all ranks."""
        return sums

    def _home(self, sums: torch.Tensor) -> torch.Tensor:
        """[C, ...] of every rank to [c, ...] of all."""
        return sums

    def _begin(self, shape: Sequence[int], logarithms: bool = False) -> torch.Tensor:
        return self.y_cD.new_full((*shape,), -torch.inf if logarithms else 0.0, dtype=self.dtype)

    def add(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over ranks, in place."""
        if self.world > 1:
            dist.all_reduce(values, group=self.group)
        return values


class Gathered(Columns):
    @cached_property
    def y_CD(self) -> torch.Tensor:
        return self.gather(self.y_cD, self.sizes)

    def gather(self, own: torch.Tensor, sizes: list[int]) -> torch.Tensor:
        """The rows of all ranks, which have so many, in rank order."""
        most = max(sizes)
        padded = (
            own.contiguous() if len(own) == most else torch.cat([own, own.new_zeros(most - len(own), *own.shape[1:])])
        )
        rows = own.new_empty(self.world * most, *own.shape[1:])
        all_gather(rows, padded, group=self.group)
        if min(sizes) == most:
            return rows
        return torch.cat([part[:size] for part, size in zip(rows.split(most), sizes, strict=True)])

    def _home(self, sums: torch.Tensor) -> torch.Tensor:
        if min(self.sizes) < max(self.sizes):
            return self.add(sums)[self.own].clone()  # a view would keep all the columns' sums alive
        own = sums.new_empty(len(self.y_cD), *sums.shape[1:])
        reduce_scatter(own, sums, group=self.group)
        return own

    def _over_ranks(self, sums: torch.Tensor, logarithms: bool) -> torch.Tensor:
        if not logarithms:
            return self.add(sums)
        highest = sums.clone()
        dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=self.group)
        # a column of -inf, which has no wrong answers, must not become -inf - (-inf) = nan
        highest.clamp_(min=torch.finfo(self.dtype).min)
        return self.add((sums - highest).exp_()).log_() + highest


class Ring(Columns):
    knows_all = False

    def survey(self, visit: Callable[[Block], object], logarithms: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        first, second = self._turn(visit, [], [self._begin((len(self.y_cD),), logarithms) for _ in range(2)])
        return first, second

    def sweep(
        self,
        visit: Callable[[Block], object],
        vectors: Sequence[torch.Tensor] = (),
        tails: Sequence[Sequence[int]] = (),
    ) -> list[torch.Tensor]:
        return self._turn(visit, vectors, [self._begin((len(self.y_cD), *tail)) for tail in tails])

    def _turn(
        self, visit: Callable[[Block], object], vectors: Sequence[torch.Tensor], sums: list[torch.Tensor]
    ) -> list[torch.Tensor]:
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


class Whole:
    """All rows x [N, D] and columns of a group on every rank, which stands for a process by itself."""

    def __init__(self, x_nD: torch.Tensor, told: Gathered) -> None:
        y_cD = told.y_cD
        self.world = told.world
        if told.all_pairs == told.all_columns:
            both = told.gather(torch.cat([x_nD, y_cD], 1), told.sizes)
            self.x, y_CD = (each.contiguous() for each in both.chunk(2, 1))
            self._own_rows = self._own_columns = torch.arange(told.own.start, told.own.stop, device=y_cD.device)
        else:
            self.x, y_CD = told.gather(x_nD, [pairs for pairs, _ in told.counts]), told.y_CD
            before = sum(pairs for pairs, _ in told.counts[: told.rank])
            self._own_rows = torch.arange(before, before + len(x_nD), device=y_cD.device)
            partners_first = (~told.have_rows).int().argsort(stable=True)
            y_CD = y_CD[partners_first]
            self._own_columns = partners_first.argsort()[told.own]
        self.columns = Columns(y_CD, told.all_pairs, told.dtype, numbers=list(told.largest))

    def own(self, dx_ND: torch.Tensor, dy_CD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """This rank's part of the gradients, by the convention of a group: `world` times the global loss's."""
        return dx_ND[self._own_rows] * self.world, dy_CD[self._own_columns] * self.world


def columns_of(
    y_cD: torch.Tensor,
    pairs: int,
    dtype: torch.dtype,
    group: dist.ProcessGroup | None,
    exchange: str,
    numbers: Sequence[torch.Tensor] = (),
) -> Columns:
    """The columns of this rank, of which the first `pairs` are its rows' partners, among those of the group.

    numbers: scalars of this rank, of which `largest` has the largest over the group.
    """
    if group is None or dist.get_world_size(group) == 1:
        return Columns(y_cD, pairs, dtype, None, numbers)
    return (Ring if exchange == RING else Gathered)(y_cD, pairs, dtype, group, numbers)


def whole_of(x_nD: torch.Tensor, columns: Columns, exchange: str) -> Whole | None:
    """What a rank makes the whole loss of, where that is asked for or, with "auto", the pairs are few."""
    few = columns.all_columns <= FEW
    if isinstance(columns, Gathered) and (exchange == REPLICATE or (exchange == AUTO and few)):
        return Whole(x_nD, columns)
    return None
