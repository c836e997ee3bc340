"""Which rank writes which parameter: a pure function of names and sizes.

The ranks of one pipeline stage (tensor, context and data parallel ones) share out the parameters of that stage, whole
and each to one of them, so that all have about as many numbers to write.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Entry:
    """A parameter of a stage as the checkpoint holds it."""

    name: str
    shape: tuple[int, ...]  # without tensor parallelism and ZeRO-3
    trained: bool  # frozen parameters have no moments

    @property
    def numel(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)

    @property
    def numbers(self) -> int:
        """How many numbers are written for it: weight and, where it is trained, both moments."""
        return self.numel * (3 if self.trained else 1)


def share_out(entries: list[Entry], ranks: int) -> list[list[Entry]]:
    """The entries that each of `ranks` ranks owns, in the order given: the largest first to whoever has least."""
    loads = [(0, rank) for rank in range(ranks)]
    owned: list[set[str]] = [set() for _ in range(ranks)]
    for entry in sorted(entries, key=lambda each: (-each.numbers, each.name)):
        load, rank = heapq.heappop(loads)
        owned[rank].add(entry.name)
        heapq.heappush(loads, (load + entry.numbers, rank))
    return [[entry for entry in entries if entry.name in names] for names in owned]


@dataclass(frozen=True)
class FileNumber:
    """Which of the `count` files of each part a rank writes; count is the number of ranks that own anything."""

    number: int
    count: int


def number_files(stages: list[list[Entry]], ranks: int) -> dict[tuple[int, int], FileNumber]:
    """File numbers by (stage, rank within the stage), stages first; ranks that own nothing have none."""
    owners = [
        (stage, rank)
        for stage, entries in enumerate(stages)
        for rank, owned in enumerate(share_out(entries, ranks))
        if owned
    ]
    return {owner: FileNumber(number, len(owners)) for number, owner in enumerate(owners)}
