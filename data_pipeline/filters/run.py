"""Run a list of steps over a data set: look at every sample, decide, write what is kept, report.

Design choices:
- One pass looks. It takes each sample through all steps, whatever a `SetStep` on the way may decide later, and notes
  what each step would do, or the signature. Ranges of samples go to any number of processes.
- The parent then decides step by step, in order, over the samples that are still there. So the result is that of one
  step after the other, for one read of the data.
- What is noted is numbers and signatures: some ten bytes for each sample that a step drops or changes.
- A second pass writes the kept samples by `write_shards`, and lets only those steps look again that changed one.
- A test set is compared as it lies: none of the steps changes it first.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data_pipeline.damage import opened
from data_pipeline.errors import DamagedSampleError, DataError
from data_pipeline.filters.look import Found, Look, look_at_all, outcomes, what_is_read
from data_pipeline.filters.report import DatasetName, Example, FilterReport, StepReport
from data_pipeline.filters.step import Change, Drop, SampleStep, SetStep, Signatures, Step
from data_pipeline.keys import refuse_equal_keys, written_key
from data_pipeline.parallel import connected
from data_pipeline.reader import Dataset, open_dataset
from data_pipeline.sample import Sample
from data_pipeline.shards import SAMPLES_PER_SHARD, Progress, write_shards

EXAMPLES = 3  # of each reason in the report
MOST_STEPS = 63  # which of them changed a sample is one bit each of an int64


def run_filters(
    source: Path,
    out: Path,
    steps: Sequence[Step],
    *,
    against: Path | None = None,
    samples_per_shard: int = SAMPLES_PER_SHARD,
    shard_keys: bool = False,
    processes: int | None = None,
    on: str | None = None,
    progress: Progress | None = None,
) -> FilterReport:
    """Write what `steps` keep of the data set `source` into `out`, new or empty, and filters.json beside it.

    against: a test set; what a step finds there too leaves `source`. `shard_keys`: write keys as <shard>/<key>, for
    shards that have equal ones. `processes`: default all cores, 0 or 1 = this.
    `on`: the address of a Ray to do it on (`parallel.run_jobs`), whose nodes must share the file system of all that is
    read and written here. `progress(done, total)` counts samples that were looked at and written.
    Raises ValueError when `out` holds something, there is no step, no step that compares with `against`, or two kept
    samples of one key would come into one shard; FileNotFoundError when there is no data set; DataError when a shard
    is bad, no sample is kept, or as `run_jobs` does.
    """
    refuse_existing(out)
    with connected(on, processes):
        return _run(source, out, steps, against, samples_per_shard, shard_keys, processes, on, progress)


def _run(
    source: Path,
    out: Path,
    steps: Sequence[Step],
    against: Path | None,
    samples_per_shard: int,
    shard_keys: bool,
    processes: int | None,
    on: str | None,
    progress: Progress | None,
) -> FilterReport:
    comparing = _comparing(steps, against)
    dataset = open_dataset(source)
    test = open_dataset(against) if against else None
    if test is not None and test.fingerprint == dataset.fingerprint:
        raise ValueError(f"{against} is the same data set as {source}: nothing of it would be left")
    looked, of_test = len(dataset), len(test) if test else 0

    def look_progress(done: int, _: int) -> None:
        if progress:
            progress(done, 2 * looked + of_test)

    jobs = [Look(dataset, tuple(steps), None)]
    if test is not None:
        jobs.append(Look(test, tuple(steps), comparing))
    found, *of_others = look_at_all(jobs, processes, on, look_progress)
    decision = _decide(dataset, steps, found, (test, of_others[0]) if test is not None else None)
    kept, mask = np.flatnonzero(decision.alive), decision.changed[decision.alive]
    if not kept.size:
        most = max(decision.steps, key=lambda step: step.removed)
        raise DataError(
            f"nothing would be left of the {looked} samples of {source}: {most.step} removes {most.removed} of them, "
            f"most because of: {next(iter(most.reasons))}"
        )
    refuse_equal_keys(dataset, kept, samples_per_shard, shard_keys)

    def write_progress(done: int, total: int) -> None:
        if progress:
            progress(looked + of_test + done, looked + of_test + total)

    report = FilterReport(
        source=_name(source, dataset),
        against=_name(against, test) if against and test is not None else None,
        against_unreadable=len(
            {sample for other in of_others for ids in other.drops.values() for sample in ids.tolist()}
        ),
        seen=looked,
        kept=len(kept),
        changed=int(np.count_nonzero(mask)),
        steps=tuple(decision.steps),
    )
    write_shards(
        np.stack([kept, mask], axis=1),
        _MakeKept(dataset, tuple(steps), shard_keys),
        out,
        samples_per_shard=samples_per_shard,
        processes=processes,
        on=on,
        reads=what_is_read(dataset, steps),
        progress=write_progress,
    )
    try:
        report.save(out)
    except BaseException:  # shards that nobody can say the origin of are of no use
        shutil.rmtree(out, ignore_errors=True)
        raise
    return report


def refuse_existing(out: Path) -> None:
    """ValueError when `out` is there and not an empty folder: told before any work."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is there already and not an empty folder: give a new one, or remove it")


def _comparing(steps: Sequence[Step], against: Path | None) -> tuple[int, ...]:
    """Numbers of the steps that compare with a test set; ValueError when the list or the test set makes no sense."""
    if not 1 <= len(steps) <= MOST_STEPS:
        raise ValueError(f"{len(steps)} filter steps: give 1 to {MOST_STEPS}")
    comparing = tuple(
        number for number, step in enumerate(steps) if against and isinstance(step, SetStep) and step.compares
    )
    if against and not comparing:
        raise ValueError(
            f"none of the steps compares with a test set, so {against} would change nothing: "
            "add duplicates or near-duplicates, or leave the test set out"
        )
    return comparing


Removal = tuple[str, np.ndarray, Callable[[int], str]]  # reason, ids of samples, what it was in one of them


@dataclass
class _Decision:
    """Which samples are left, which steps changed them (a bit each), and what each step is reported to have done."""

    alive: np.ndarray  # bool, one a sample
    changed: np.ndarray  # int64, one a sample
    steps: list[StepReport] = field(default_factory=list)


def _decide(dataset: Dataset, steps: Sequence[Step], found: Found, test: tuple[Dataset, Found] | None) -> _Decision:
    """One step after the other, each over what those before it have left."""
    decision = _Decision(np.ones(len(dataset), bool), np.zeros(len(dataset), np.int64))
    for number, step in enumerate(steps):
        removals: list[Removal] = [
            (reason, ids[decision.alive[ids]], _Again(dataset, steps, number).detail)
            for (of, reason), ids in found.drops.items()
            if of == number
        ]
        if isinstance(step, SetStep) and number in found.signed:
            ids, rows_NW = found.signed[number], found.signatures[number]
            left = decision.alive[ids]
            removals += _decide_set(step, number, dataset, ids[left], rows_NW[left], test)
        changes = {what: ids[decision.alive[ids]] for (of, what), ids in sorted(found.changes.items()) if of == number}
        seen = int(np.count_nonzero(decision.alive))
        for ids in changes.values():
            decision.changed[ids] |= 1 << number
        for _, ids, _ in removals:
            decision.alive[ids] = False
        changed = np.unique(np.concatenate([*changes.values(), np.empty(0, np.int64)]))
        decision.steps.append(
            StepReport(
                step=step.name,
                options=step.options(),
                seen=seen,
                removed=seen - int(np.count_nonzero(decision.alive)),
                changed=len(changed),
                reasons=_counts({reason: len(ids) for reason, ids, _ in removals}),
                changes=_counts({what: len(ids) for what, ids in changes.items()}),
                examples=tuple(_examples(dataset, removals)),
            )
        )
    return decision


def _decide_set(
    step: SetStep,
    number: int,
    dataset: Dataset,
    ids: np.ndarray,
    rows_NW: np.ndarray,
    test: tuple[Dataset, Found] | None,
) -> list[Removal]:
    """What a step that needs all samples removes of those that are left."""
    if not len(ids):
        return []
    others = None
    if test is not None and number in test[1].signed:
        others = Signatures(test[1].signatures[number], _Place(test[0], test[1].signed[number]))
    return [
        (removed.reason, ids[removed.rows], _OfRow(ids, removed.detail))
        for removed in step.decide(Signatures(rows_NW, _Place(dataset, ids)), others)
    ]


@dataclass(frozen=True)
class _OfRow:
    """Id of a sample -> detail, from row -> detail; ids ascend."""

    ids: np.ndarray
    detail: Callable[[int], str]

    def __call__(self, sample: int) -> str:
        return self.detail(int(np.searchsorted(self.ids, sample)))


@dataclass(frozen=True)
class _Place:
    """Row -> which sample it is, in words."""

    dataset: Dataset
    ids: np.ndarray

    def __call__(self, row: int) -> str:
        sample = int(self.ids[row])
        return f"{self.dataset.key(sample)} in {self.dataset.shard_file(sample)}"


@dataclass(frozen=True)
class _Again:
    """Looks once more at a sample, for what a step says of it in detail."""

    dataset: Dataset
    steps: Sequence[Step]
    number: int

    def detail(self, sample: int) -> str:
        """The detail of the drop by this step."""
        last = None
        try:
            with opened(self.dataset, sample) as read:
                for number, outcome in outcomes(read, self.steps):
                    if number == self.number:
                        last = outcome
        except DamagedSampleError as error:
            return error.reason
        assert isinstance(last, Drop), "a step judges a sample the same whenever it looks"
        return last.detail


def _examples(dataset: Dataset, removals: list[Removal]) -> Iterator[Example]:
    """The first few samples of each reason, in order of the reasons."""
    for reason, ids, detail in sorted(removals, key=lambda removal: removal[0]):
        for sample in ids[:EXAMPLES].tolist():
            yield Example(dataset.key(sample), dataset.shard_file(sample), reason, detail(sample))


def _counts(counts: dict[str, int]) -> dict[str, int]:
    """Those above 0, the most frequent first, then by name."""
    return dict(
        sorted(((name, count) for name, count in counts.items() if count), key=lambda each: (-each[1], each[0]))
    )


def _name(path: Path, dataset: Dataset) -> DatasetName:
    return DatasetName(str(path), dataset.fingerprint, len(dataset))


@dataclass(frozen=True)
class _MakeKept:
    """make(input) for `write_shards`: one kept sample, changed again by the steps that changed it."""

    dataset: Dataset
    steps: tuple[Step, ...]
    shard_keys: bool

    def __call__(self, kept: np.ndarray) -> Sample:
        """kept: int64 [2], the id of the sample and a bit for each step that changed it."""
        number, mask = kept.tolist()
        sample = self.dataset.read(number)
        for step_number, step in enumerate(self.steps):
            if mask >> step_number & 1:
                outcome = step.look(sample) if isinstance(step, SampleStep) else None
                assert isinstance(outcome, Change), "a step judges a sample the same whenever it looks"
                sample = outcome.sample
        return Sample(written_key(self.dataset, number, sample.key, self.shard_keys), sample.fields)
