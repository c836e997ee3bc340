"""Whole fp32 tensors on the CPU of the rank that writes them, from the pieces and fragments of all ranks.

Within a pipeline stage every number moves once, straight from the rank that keeps it to the owner of its parameter, in
rounds of bounded size; the owner alone holds the whole tensor. Its numbers lie as its files will, and the memory for
them is kept from one checkpoint to the next.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from pretrain.checkpoint.format import PARTS
from pretrain.checkpoint.owners import Entry, FileNumber, number_files, share_out
from pretrain.checkpoint.state import Run, count_updates, make_moments, own_numbers, own_run, whole_shape
from pretrain.models.initialise import sharded_axis
from pretrain.parallel.engine import Engine

ROUND_NUMBERS = 16 << 20  # an owner takes in so many numbers of a part at a time (64 MiB), or one larger tensor


@dataclass(frozen=True)
class Holding:
    """What one rank of the stage keeps of one parameter."""

    tp_rank: int
    zero_rank: int
    run: Run


class Snapshot:
    """The tensors that this rank writes. Made once; `take` copies the state of the engine. Every rank calls both."""

    def __init__(self, engine: Engine) -> None:
        self._engine, ranks = engine, engine.ranks
        self._group = ranks.all_rows_group
        self._size, self._rank = dist.get_world_size(self._group), dist.get_rank(self._group)
        self._parameters = dict(_written(engine))
        entries = [
            Entry(name, whole_shape(each, ranks.tp_size), each.requires_grad) for name, each in self._parameters.items()
        ]
        self._owned_by = share_out(entries, self._size)
        self._holdings = self._exchange_holdings(entries)
        # parameter name -> what each rank of the stage sends to its owner
        self._sources = {
            entry.name: self._plan(entry, owner) for owner, owned in enumerate(self._owned_by) for entry in owned
        }
        self.stages = self._exchange_stages(entries)
        files = number_files(self.stages, self._size)
        self.file: FileNumber | None = files.get((ranks.pp_rank, self._rank))
        self.files_of_all = [
            (file, share_out(self.stages[stage], self._size)[rank]) for (stage, rank), file in files.items()
        ]
        own = self._owned_by[self._rank]
        self.shapes = {part: {each.name: each.shape for each in own if _has(each, part)} for part in PARTS}
        self.numbers: dict[str, torch.Tensor] = {}  # part -> the tensors of `shapes` one behind the other
        self.updates = 0

    def take(self) -> None:
        """Copy the state into `numbers`; the engine may go on when this returns."""
        make_moments(self._engine)  # parameters that never had a gradient have none
        if not self.numbers:
            on_gpu = self._engine.ranks.device.type == "cuda"
            for part, shapes in self.shapes.items():
                size = sum(torch.Size(shape).numel() for shape in shapes.values())
                self.numbers[part] = torch.empty(size, dtype=torch.float32, pin_memory=on_gpu)
        self.updates = count_updates(self._engine)
        places = {part: _places(self.numbers[part], self.shapes[part]) for part in PARTS}
        for batch in self._rounds():
            for part in PARTS:
                self._collect(part, [[each for each in entries if _has(each, part)] for entries in batch], places[part])

    def _rounds(self) -> Iterator[list[list[Entry]]]:
        """Entries of each owner that are collected together."""
        queues = [_batches(owned) for owned in self._owned_by]
        for number in range(max(map(len, queues))):
            yield [queue[number] if number < len(queue) else [] for queue in queues]

    def _collect(self, part: str, wanted: list[list[Entry]], places: dict[str, torch.Tensor]) -> None:
        """Send what this rank keeps of the entries of each owner, and put together those of its own."""
        own = wanted[self._rank]
        sources = [[self._sources[entry.name][rank] for entry in own] for rank in range(self._size)]
        received = self._swap(part, wanted, [sum(run.numel for run in runs) for runs in sources])
        for at, entry in enumerate(own):
            whole = places[entry.name]
            axis = sharded_axis(self._parameters[entry.name])
            pieces = self._engine.ranks.tp_size if axis is not None else 1
            # a tensor that is cut along a later axis does not lie piece by piece: it is put together aside
            aside = whole if pieces == 1 or axis == 0 else torch.empty(entry.shape)
            flat = aside.view(pieces, -1)
            for rank, runs in enumerate(sources):
                run = runs[at]
                piece = self._holdings[rank][entry.name].tp_rank if pieces > 1 else 0
                target = flat[piece, run.start : run.start + run.numel]
                if rank == self._rank:
                    target.copy_(self._own(entry.name, part, run))
                else:
                    target.copy_(received[rank][: run.numel])
                    received[rank] = received[rank][run.numel :]
            if aside is not whole:
                shape = list(entry.shape)
                assert axis is not None
                shape[axis] //= pieces
                torch.cat([piece.view(shape) for piece in flat], dim=axis, out=whole.view(entry.shape))

    def _swap(self, part: str, wanted: list[list[Entry]], sizes: list[int]) -> list[torch.Tensor]:
        """What each rank sent to this one, of the given sizes; what stays on this rank is left out."""
        if self._size == 1:
            return [torch.empty(0)]
        device = self._engine.ranks.device
        outgoing = [
            [
                self._own(entry.name, part, run).to(device, torch.float32)
                for entry in (entries if owner != self._rank else [])
                if (run := self._sources[entry.name][self._rank]).numel
            ]
            for owner, entries in enumerate(wanted)
        ]
        sent = torch.cat([torch.empty(0, device=device), *(each for pieces in outgoing for each in pieces)])
        incoming = [0 if rank == self._rank else size for rank, size in enumerate(sizes)]
        received = torch.empty(sum(incoming), device=device)
        dist.all_to_all_single(
            received,
            sent,
            output_split_sizes=incoming,
            input_split_sizes=[sum(each.numel() for each in pieces) for pieces in outgoing],
            group=self._group,
        )
        return list(received.split(incoming))

    def _own(self, name: str, part: str, run: Run) -> torch.Tensor:
        return own_numbers(self._engine, self._parameters[name], part)[: run.numel]

    def _plan(self, entry: Entry, owner: int) -> list[Run]:
        """What each rank of the stage contributes to a parameter that `owner` puts together.

        Numbers that several ranks keep come from the owner itself, or from its tensor or data parallel peers.
        """
        holdings = [by_name[entry.name] for by_name in self._holdings]
        cut = sharded_axis(self._parameters[entry.name]) is not None
        piece = entry.numel // (self._engine.ranks.tp_size if cut else 1)
        copies = all(each.run.numel == piece for each in holdings)  # ZeRO does not partition it
        return [
            each.run
            if (cut or each.tp_rank == holdings[owner].tp_rank)
            and (not copies or each.zero_rank == holdings[owner].zero_rank)
            else Run(0, 0)
            for each in holdings
        ]

    def _exchange_holdings(self, entries: list[Entry]) -> list[dict[str, Holding]]:
        ranks = self._engine.ranks
        own = torch.tensor(
            [[ranks.tp_rank, ranks.zero_rank]]
            + [[run.start, run.numel] for each in self._parameters.values() for run in [own_run(self._engine, each)]],
            device=ranks.device,
        )
        tables = [torch.empty_like(own) for _ in range(self._size)]
        dist.all_gather(tables, own, group=self._group)
        found = []
        for table in tables:
            (tp_rank, zero_rank), *runs = table.tolist()
            found.append(
                {entry.name: Holding(tp_rank, zero_rank, Run(*run)) for entry, run in zip(entries, runs, strict=True)}
            )
        return found

    def _exchange_stages(self, entries: list[Entry]) -> list[list[Entry]]:
        """The entries of every pipeline stage."""
        ranks = self._engine.ranks
        everyone: list[tuple[int, list[Entry]]] = ranks.of_all((ranks.pp_rank, entries if self._rank == 0 else []))
        stages: list[list[Entry]] = [[] for _ in range(ranks.pp_size)]
        for stage, told in everyone:
            stages[stage] = stages[stage] or told
        return stages


def _written(engine: Engine) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """The parameters that this stage writes: one that is on both end stages is written by the first."""
    for name, parameter in engine.named_parameters():
        if not (getattr(parameter, "on_both_ends", False) and engine.ranks.pp_rank > 0):
            yield name, parameter


def _has(entry: Entry, part: str) -> bool:
    return entry.trained or part == "weight"


def _places(numbers: torch.Tensor, shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Views of `numbers`, flat, by parameter name."""
    sizes = [torch.Size(shape).numel() for shape in shapes.values()]
    return dict(zip(shapes, numbers.split(sizes), strict=True)) if sizes else {}


def _batches(entries: list[Entry]) -> list[list[Entry]]:
    batches: list[list[Entry]] = []
    room = 0
    for entry in entries:
        if entry.numel > room:
            batches.append([])
            room = ROUND_NUMBERS
        batches[-1].append(entry)
        room -= entry.numel
    return batches
