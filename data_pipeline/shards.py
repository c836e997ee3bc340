"""Write a data set: samples made by a function, into WebDataset shards, by many processes, all or nothing.

Design choices:
- A sample is a pure function of its input, and shard s is made of inputs s * samples_per_shard and on. So a shard is a
  pure function too: any process on any node may write it, even twice, and the bytes are the same however many do.
- Everything is written into a hidden folder beside the goal and renamed at the end. A full disk, a Ctrl-C or a bad
  sample leaves nothing behind.
- A process that is killed cannot tidy up. Where the samples have an `Origin`, its hidden folder is named by that, and
  the same request goes on in it: shards that were finished are kept, their checksums read again first.
- Workers write under names of their own into a folder of this run, and this process, when it hears of it, gives a
  finished shard its name. So no worker, however late or lost to us, can touch what another one has written.
- One process writes into a folder at a time, by a lock that the system takes back when it ends, and with it the workers
  on this machine, which share it. Those on a Ray may outlive it by a moment, in a folder that nobody reads any more.
- `webdataset` writes the tar, so `webdataset` reads it; our own index code then reads it back, which is the proof.
"""

from __future__ import annotations

import errno
import json
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import webdataset

from data_pipeline.errors import DataError
from data_pipeline.index import (
    Index,
    ShardEntry,
    checksum_of,
    index_shard,
    load_index,
    load_table,
    table_path,
    written_whole,
)
from data_pipeline.lock import held
from data_pipeline.parallel import run_jobs, stopping
from data_pipeline.sample import Sample, Skipped
from data_pipeline.strict_json import read_json
from data_pipeline.tar import refusal_of_name, split_name

SAMPLES_PER_SHARD = 1024
ORIGIN_FILE = "origin.json"
LOCK_SECONDS = 5.0  # to wait for the workers of a process that was killed a moment ago

Make = Callable[[Any], Sample | Skipped]
Progress = Callable[[int, int], None]


class Inputs(Protocol):
    """What samples are made of, one item each, in order: a list, a range, an array."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Any]: ...

    def __getitem__(self, part: slice, /) -> Any: ...


@dataclass(frozen=True)
class Written:
    """What was written, and what could not be; `already`: an earlier call has done it, and this one nothing."""

    index: Index
    skipped: tuple[Skipped, ...]
    already: bool = False


@dataclass(frozen=True)
class Origin:
    """What samples are made from: `request` in words, as JSON, and a fingerprint that tells all their bytes apart."""

    request: dict[str, Any]
    fingerprint: str


@dataclass(frozen=True)
class Workers:
    """Who makes the shards; see `parallel.run_jobs`."""

    processes: int | None = None
    on: str | None = None
    reads: Sequence[Path] = ()


def write_shards(
    inputs: int | Inputs,
    make: Make,
    folder: str | Path,
    *,
    samples_per_shard: int = SAMPLES_PER_SHARD,
    processes: int | None = None,
    on: str | None = None,
    reads: Sequence[Path] = (),
    progress: Progress | None = None,
    origin: Origin | None = None,
) -> Written:
    """Write a sample make(input) for each of the inputs, and their index, into `folder`, which must be new or empty.

    `inputs`: what samples are made of, or how many: then that is 0, 1, 2 and on. `make` must be picklable and depend on
    its argument alone. `processes`: default all cores, 0 or 1 = this one. `on`: the address of a Ray to do it on
    (`parallel.run_jobs`); `folder`, and `reads`, the files and folders that `make` reads, must then lie on a file
    system that all its nodes share. `progress(done, total)` is called after every shard, in samples. `origin` is kept
    in `folder`: a folder that was finished from the same one is left as it is, and what a killed process left of it is
    gone on with.
    Raises ValueError for a folder that holds something or that another process writes to, or a sample that cannot be
    stored, DataError when there is no sample, when a worker dies, or as `run_jobs` does, OSError when the disk is full.
    """
    folder = Path(folder)
    if isinstance(inputs, int):
        inputs = range(inputs)
    if origin is not None:
        finished = _read_finished(folder, origin)
        if finished is not None:
            return finished
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is there already and not an empty folder: give a new one, or remove it")
    if samples_per_shard < 1:
        raise ValueError(f"samples_per_shard is {samples_per_shard}: give 1 or more")
    folder.parent.mkdir(parents=True, exist_ok=True)
    mark = f"{origin.fingerprint[:16]}-{samples_per_shard}" if origin else uuid.uuid4().hex[:16]
    hidden = folder.parent / f".{folder.name}.{mark}.unfinished"
    workers = Workers(processes, on, reads)
    try:
        with _hidden_folder(hidden, folder) as unfinished:
            made = _write_all(inputs, make, unfinished, samples_per_shard, workers, progress, origin is not None)
            return _finish(made, len(inputs), unfinished, folder, origin)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _disk_full(folder, error) from error
        if hidden.stem in str(error.filename):  # a name that nobody has given
            error.filename, error.filename2 = str(folder), None
        raise


def read_origin(folder: Path) -> Origin | None:
    """What the shards in `folder` were made from; None when that was not written down."""
    try:
        tree = read_json((folder / ORIGIN_FILE).read_text(encoding="utf-8"))
        return Origin(dict(tree["request"]), str(tree["fingerprint"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _read_finished(folder: Path, origin: Origin) -> Written | None:
    """What was written when `folder` was finished from `origin`; None when it was not."""
    if read_origin(folder) != origin:
        return None
    tree = read_json((folder / ORIGIN_FILE).read_text(encoding="utf-8"))
    skipped = tuple(Skipped(skip["source"], skip["reason"]) for skip in tree["skipped"])
    return Written(load_index(folder), skipped, already=True)


@contextmanager
def _hidden_folder(unfinished: Path, folder: Path) -> Iterator[Path]:
    """A folder that this process alone writes to; gone at the end. ValueError when another one holds it."""
    with held(unfinished.with_suffix(".lock"), LOCK_SECONDS, str(folder)):
        unfinished.mkdir(exist_ok=True)
        try:
            yield unfinished
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)


@dataclass(frozen=True)
class Made:
    """What came of one shard: its entry (None when all its samples were skipped) and what was skipped.

    `file`: where it lies until it gets its name; None where an earlier process has finished it.
    """

    entry: ShardEntry | None
    skipped: tuple[Skipped, ...]
    file: Path | None = None


def _finish(made: list[Made], inputs: int, unfinished: Path, folder: Path, origin: Origin | None) -> Written:
    """Make a data set of the shards in `unfinished`, and rename it to `folder`."""
    entries = [each.entry for each in made if each.entry is not None]
    skipped = tuple(skip for each in made for skip in each.skipped)
    if not entries:
        why = f"; the first, {skipped[0].source}: {skipped[0].reason}" if skipped else ""
        raise DataError(f"nothing to write to {folder}: none of {inputs} samples could be made{why}")
    index = Index(tuple(_renumber(unfinished, entry, number) for number, entry in enumerate(entries)))
    index.save(unfinished)
    for note in (*unfinished.glob("*.done"), *unfinished.glob(".*.tmp")):  # the latter of a killed process
        note.unlink()
    if origin:
        tree = {**asdict(origin), "skipped": [asdict(skip) for skip in skipped]}
        (unfinished / ORIGIN_FILE).write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")
    if folder.exists():
        folder.rmdir()
    unfinished.rename(folder)
    return Written(index, skipped)


def _write_all(
    inputs: Inputs,
    make: Make,
    folder: Path,
    samples_per_shard: int,
    workers: Workers,
    progress: Progress | None,
    keep: bool,
) -> list[Made]:
    """Every shard, in order.

    `keep`: note what is finished, and take what an earlier process has noted.
    """
    for left in folder.glob(".work-*"):  # of a killed process; a worker that it has left fails now
        shutil.rmtree(left, ignore_errors=True)
    work = folder / f".work-{uuid.uuid4().hex}"
    work.mkdir()
    (work / "seen").write_text("a node that sees this file sees the right folder\n", encoding="utf-8")
    starts = range(0, len(inputs), samples_per_shard)
    jobs = [
        (f"shard-{number:06d}.tar", inputs[start : start + samples_per_shard]) for number, start in enumerate(starts)
    ]
    write = _WriteShard(make, folder, work, keep)
    needs = (work / "seen", *workers.reads)
    made: dict[int, Made] = {}
    done = 0
    with run_jobs(write, jobs, processes=workers.processes, on=workers.on, needs=needs) as results:
        for number, result in results:
            name, part = jobs[number]
            made[number] = _settle(folder / name, result, keep)
            done += len(part)
            if progress:
                progress(done, len(inputs))
    shutil.rmtree(work, ignore_errors=True)
    return [made[number] for number in range(len(jobs))]


def _settle(path: Path, made: Made, keep: bool) -> Made:
    """Give a shard that a worker has made its place, and note that it is finished."""
    if made.file is None:
        return made
    entry = made.entry
    if entry is not None:
        made.file.rename(path)
        table_path(made.file).rename(table_path(path))
        entry = replace(entry, file=path.name)
    settled = Made(entry, made.skipped)
    if keep:
        _write_note(path, settled)
    return settled


@dataclass(frozen=True)
class _WriteShard:
    """What a worker does: one shard, taken as it is when it was finished before, and otherwise made in `work`."""

    make: Make
    folder: Path
    work: Path
    keep: bool

    def __call__(self, name: str, inputs: Inputs) -> Made:
        made = _read_note(self.folder / name) if self.keep else None
        return made or _make_shard(inputs, self.make, self.work / f"{uuid.uuid4().hex}.tar", name)


def _write_note(path: Path, made: Made) -> None:
    """Note beside the shard at `path` that it is finished, and what came of it."""
    tree = {"entry": made.entry and made.entry.as_tree(), "skipped": [asdict(skip) for skip in made.skipped]}
    with written_whole(path.with_suffix(".done")) as unfinished:
        unfinished.write_text(json.dumps(tree), encoding="utf-8")


def _read_note(path: Path) -> Made | None:
    """What came of the shard at `path`; None when it is not finished, or not what was noted (a power cut)."""
    try:
        tree = read_json(path.with_suffix(".done").read_text(encoding="utf-8"))
        skipped = tuple(Skipped(skip["source"], skip["reason"]) for skip in tree["skipped"])
        if tree["entry"] is None:
            return Made(None, skipped)
        entry = ShardEntry.from_tree(tree["entry"])
        if checksum_of(path) != entry.checksum:
            return None
        load_table(path, entry)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return Made(entry, skipped)


def _make_shard(inputs: Inputs, make: Make, path: Path, name: str) -> Made:
    """Make these samples and write them as one tar, with its table of offsets, that will be called `name`."""
    skipped: list[Skipped] = []
    written: set[str] = set()
    with (
        path.open("wb") as file,
        webdataset.TarWriter(file, encoder=False, compress=False, mtime=0, keep_meta=True) as tar,
    ):
        for each in inputs:
            if stopping():
                return Made(None, ())
            sample = make(each)
            if isinstance(sample, Skipped):
                skipped.append(sample)
                continue
            _refuse_unstorable(sample, written)
            written.add(sample.key)
            tar.write({"__key__": sample.key, **sample.fields})
    if not written:
        path.unlink()
        return Made(None, tuple(skipped), path)
    entry = index_shard(path)
    if entry.samples != len(written):
        raise ValueError(f"{len(written)} samples were written to {name}, but {entry.samples} can be read back")
    return Made(entry, tuple(skipped), path)


def _refuse_unstorable(sample: Sample, written: set[str]) -> None:
    """ValueError unless the sample reads back as itself: its key and fields survive as names in a tar."""
    if sample.key in written:
        raise ValueError(f"two samples have the key {sample.key!r}: keys must differ")
    if not sample.fields:
        raise ValueError(f"sample {sample.key!r} has no field: there is nothing to store")
    for field in sample.fields:
        name = f"{sample.key}.{field}"
        if field.startswith("__"):
            raise ValueError(
                f"sample {sample.key!r} has the field {field!r}, which cannot be stored: names that begin with two "
                "underscores are webdataset's own"
            )
        if split_name(name) != (sample.key, field):
            raise ValueError(
                f"sample {sample.key!r} with field {field!r} would not read back as itself: a key has no dot after "
                "its last slash, a field is lower-case and has no slash"
            )
        reason = refusal_of_name(name)
        if reason:
            raise ValueError(f"sample {sample.key!r} cannot be stored: {name!r} {reason}")


def _renumber(folder: Path, entry: ShardEntry, number: int) -> ShardEntry:
    """Give a shard its number among those that hold samples, so that names have no gap."""
    name = f"shard-{number:06d}.tar"
    if name != entry.file:
        table_path(folder / entry.file).rename(table_path(folder / name))
        (folder / entry.file).rename(folder / name)
    return replace(entry, file=name)


def _disk_full(folder: Path, error: OSError) -> OSError:
    """The same error with a sentence for the user, instead of a number and a temporary file."""
    full = OSError(f"the disk is full: {folder} could not be written and nothing of it was kept; make room and repeat")
    full.errno = error.errno
    return full
