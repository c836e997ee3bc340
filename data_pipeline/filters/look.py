"""One pass over a data set: what each step says of each sample, in numbers, by any number of processes.

What is found is arrays of ids and signatures, so that a parent can hold it for many million samples.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np

from data_pipeline.damage import opened
from data_pipeline.errors import DamagedSampleError, DataError
from data_pipeline.filters.step import Change, Drop, Outcome, SampleStep, Step
from data_pipeline.index import INDEX_FILE
from data_pipeline.parallel import run_jobs
from data_pipeline.reader import Dataset
from data_pipeline.sample import Sample
from data_pipeline.shards import Progress

CHUNK = 256  # samples that a process looks at at a time
UNREADABLE = "cannot be read"
_ADDRESS = re.compile(r"<[\w.]+ object at 0x[0-9a-f]+>")  # in Pillow's errors; another one each time


@dataclass
class Found:
    """What a pass has found in samples of one data set, by step (and reason): ids, int64 and ascending."""

    drops: dict[tuple[int, str], np.ndarray] = field(default_factory=dict)
    changes: dict[tuple[int, str], np.ndarray] = field(default_factory=dict)
    signed: dict[int, np.ndarray] = field(default_factory=dict)
    signatures: dict[int, np.ndarray] = field(default_factory=dict)  # uint8 [signed, width], of the same samples

    @classmethod
    def join(cls, parts: list[Found]) -> Found:
        """What was found in neighbouring ranges of one data set, in order, as one."""
        joined = cls()
        for name in ("drops", "changes", "signed", "signatures"):
            gathered: dict[tuple[int, str] | int, list[np.ndarray]] = defaultdict(list)
            for part in parts:
                for of, array in getattr(part, name).items():
                    gathered[of].append(array)
            setattr(joined, name, {of: np.concatenate(arrays) for of, arrays in gathered.items()})
        return joined


@dataclass(frozen=True)
class Look:
    """What to look at: a data set with all steps, or the signatures of `only` some of them, each by itself."""

    dataset: Dataset
    steps: tuple[Step, ...]
    only: tuple[int, ...] | None

    def __call__(self, samples: range) -> Found:
        """What is found in these samples."""
        ids: dict[str, dict] = {name: defaultdict(list) for name in ("drops", "changes", "signed")}
        signatures: dict[int, list[bytes]] = defaultdict(list)
        for number in samples:
            try:
                with opened(self.dataset, number) as sample:
                    found = list(self._outcomes(sample))
            except DamagedSampleError as error:
                found = list(self._damaged(error))
            for step, outcome in found:
                if isinstance(outcome, Drop):
                    ids["drops"][step, outcome.reason].append(number)
                elif isinstance(outcome, Change):
                    for what in outcome.what:
                        ids["changes"][step, what].append(number)
                elif outcome is not None:
                    ids["signed"][step].append(number)
                    signatures[step].append(outcome)
        arrays = {name: {of: np.array(each, np.int64) for of, each in found.items()} for name, found in ids.items()}
        rows = {step: np.frombuffer(b"".join(each), np.uint8) for step, each in signatures.items()}
        by_step = {step: array.reshape(len(signatures[step]), -1) for step, array in rows.items()}
        return Found(signatures=by_step, **arrays)

    def _damaged(self, error: DamagedSampleError) -> Iterator[tuple[int, Outcome | bytes]]:
        """The first step drops what is damaged, and no other sees it."""
        yield from ((number, Drop(UNREADABLE, error.reason)) for number in self.only or (0,))

    def _outcomes(self, sample: Sample) -> Iterator[tuple[int, Outcome | bytes]]:
        if self.only is None:
            yield from outcomes(sample, self.steps)
            return
        for number in self.only:
            yield from ((number, outcome) for _, outcome in outcomes(sample, (self.steps[number],)))


def outcomes(sample: Sample, steps: Sequence[Step]) -> Iterator[tuple[int, Outcome | bytes]]:
    """(number of the step, what it says or its signature) for one sample, until one of them drops it."""
    for number, step in enumerate(steps):
        try:
            outcome = step.look(sample) if isinstance(step, SampleStep) else step.signature(sample)
        except DataError as error:
            outcome = Drop(UNREADABLE, _ADDRESS.sub("the bytes", str(error)))
        yield number, outcome
        if isinstance(outcome, Drop):
            return
        if isinstance(outcome, Change):
            sample = outcome.sample


def look_at_all(jobs: list[Look], processes: int | None, on: str | None, progress: Progress) -> list[Found]:
    """What is found in all samples of each job; by whom, see `parallel.run_jobs`."""
    chunks = [
        (number, range(start, min(start + CHUNK, len(job.dataset))))
        for number, job in enumerate(jobs)
        for start in range(0, len(job.dataset), CHUNK)
    ]
    total, done = sum(len(job.dataset) for job in jobs), 0
    needs = [path for job in jobs for path in what_is_read(job.dataset, job.steps)]
    parts: dict[int, Found] = {}
    with run_jobs(_LookAtChunk(tuple(jobs)), chunks, processes=processes, on=on, needs=needs) as results:
        for chunk, found in results:
            parts[chunk] = found
            done += len(chunks[chunk][1])
            progress(done, total)
    return [
        Found.join([parts[chunk] for chunk, (owner, _) in enumerate(chunks) if owner == number])
        for number in range(len(jobs))
    ]


def what_is_read(dataset: Dataset, steps: Sequence[Step]) -> list[Path]:
    """The files of this machine that steps over a data set read: its own, and their tables."""
    tables = [getattr(step, option.name) for step in steps for option in fields(step)]  # type: ignore[arg-type]  # a step is a dataclass
    own = [dataset.folder / INDEX_FILE] if isinstance(dataset.folder, Path) else []
    return own + [table for table in tables if isinstance(table, Path)]


@dataclass(frozen=True)
class _LookAtChunk:
    """What a worker does: a stretch of one of the jobs."""

    jobs: tuple[Look, ...]

    def __call__(self, job: int, samples: range) -> Found:
        return self.jobs[job](samples)
