"""Samples that could not be used: named once each in quarantine.jsonl, counted by all ranks; too many end the run."""

from __future__ import annotations

import json
from dataclasses import asdict

import torch
import torch.distributed as dist

from data_pipeline import Corrupt
from pretrain.config import Recipe
from pretrain.errors import WeftError
from pretrain.metrics import read_lines
from pretrain.parallel.groups import Ranks

QUARANTINE = "quarantine.jsonl"


class Quarantine:
    """The unusable samples of a run so far; the same on every rank."""

    def __init__(self, recipe: Recipe, start_step: int, ranks: Ranks) -> None:
        self._file = recipe.run.dir / QUARANTINE
        self._limit = recipe.data.max_corrupt
        self._ranks = ranks
        if ranks.is_first and start_step == 0:
            self._file.unlink(missing_ok=True)
        self._known = {int(line["sample"]) for line in read_lines(self._file)} if start_step else set()

    def agree(self, corrupt: list[Corrupt], stop: bool) -> bool:
        """Once a step, on every rank: take in what this rank's batch met; returns whether any rank was asked to stop.

        Raises WeftError on every rank when more than data.max_corrupt different samples were unusable.
        """
        found, stops = self._ranks.agree(torch.tensor([len(corrupt), int(stop)])).tolist()
        if found:
            everyone: list[list[Corrupt]] = [[] for _ in range(self._ranks.world)]
            dist.all_gather_object(everyone, corrupt, group=self._ranks.control_group)
            self._take_in([each for part in everyone for each in part])
        return stops > 0

    def _take_in(self, corrupt: list[Corrupt]) -> None:
        for each in corrupt:
            if each.sample in self._known:
                continue
            self._known.add(each.sample)
            if self._ranks.is_first:
                with self._file.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(asdict(each)) + "\n")
        if len(self._known) > self._limit:
            last = corrupt[-1]
            raise WeftError(
                f"{len(self._known)} samples could not be used, more than data.max_corrupt={self._limit}; the last is "
                f"{last.key!r} in {last.shard}: {last.reason}; all are named in {self._file}"
            )
