"""Samples that could not be used: each named once in quarantine.jsonl, counted by all ranks; too many end the run.

Too many are more than data.max_corrupt, or more than data.max_corrupt_share of the samples tried so far, stand-ins
included; the share is not asked for the first FEW, which in a small set are a large share of it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict

import torch

from data_pipeline import Corrupt
from pretrain.config import Recipe
from pretrain.errors import WeftError
from pretrain.metrics import read_lines
from pretrain.parallel.groups import Ranks

QUARANTINE = "quarantine.jsonl"
FEW = 7


class Quarantine:
    """The unusable samples of a run so far; the same on every rank.

    `samples`: of the data set. `say` puts a line on the screen: of the first one, and whenever they have doubled.
    """

    def __init__(
        self, recipe: Recipe, start_step: int, ranks: Ranks, samples: int, say: Callable[[str], None] = print
    ) -> None:
        self._file = recipe.run.dir / QUARANTINE
        self._limit, self._share = recipe.data.max_corrupt, recipe.data.max_corrupt_share
        self._ranks, self._samples, self._say = ranks, samples, say
        if ranks.is_first and start_step == 0:
            self._file.unlink(missing_ok=True)
        self._known = {int(line["sample"]) for line in read_lines(self._file)} if start_step else set()
        self._told = self._stood_in = len(self._known)  # after a resume: stand-ins at least

    def agree(
        self, corrupt: list[Corrupt], stop: bool, position: int, sums: Sequence[int] = ()
    ) -> tuple[bool, list[int]]:
        """Once a step, on every rank: take in what this rank's batch met.

        `position`: how many samples of the order have been read by now. Returns whether any rank was asked to stop, and
        `sums` added up over all ranks. Raises WeftError on every rank when too many different samples were unusable.
        """
        found, stops, *totals = self._ranks.agree(torch.tensor([len(corrupt), int(stop), *sums])).tolist()
        if found:
            everyone = [each for part in self._ranks.of_all(corrupt) for each in part]
            self._stood_in += found  # each that could not be used was followed by another
            self._take_in(everyone, min(position + self._stood_in, self._samples))
        return stops > 0, totals

    def sum_up(self) -> str:
        """How many there are, for the end of a run; "" when there is none, or the last line on the screen said it."""
        count = len(self._known)
        return f"{_samples(count)} could not be used: see {self._file}" if count > self._told else ""

    def _take_in(self, corrupt: list[Corrupt], tried: int) -> None:
        last = corrupt[-1]
        for each in corrupt:
            if each.sample in self._known:
                continue
            self._known.add(each.sample)
            last = each
            if self._ranks.is_first:
                with self._file.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(asdict(each)) + "\n")
        count = len(self._known)
        named = f"the last is {last.key!r} in {last.shard}: {last.reason}; all are named in {self._file}"
        if count > self._limit:
            raise WeftError(f"{_samples(count)} could not be used, more than data.max_corrupt={self._limit}; {named}")
        if count > FEW and count > self._share * tried:
            raise WeftError(
                f"{count} of the {tried} samples tried so far could not be used, "
                f"more than data.max_corrupt_share={self._share:g} of them; {named}"
            )
        if count >= max(1, 2 * self._told):
            self._told = count
            if self._ranks.is_first:
                stand = "another stands in for it" if count == 1 else "others stand in for them"
                self._say(f"{_samples(count)} could not be used so far, {stand}; {named}")


def _samples(count: int) -> str:
    return f"{count} sample{'' if count == 1 else 's'}"
