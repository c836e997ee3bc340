"""Write a data set: samples made by a function, into WebDataset shards, by many processes, all or nothing.

Design choices:
- Sample i is a pure function of i, and shard s is samples s * samples_per_shard and on. So a shard is a pure function
  too: any process may write it, and the bytes are the same however many do.
- Everything is written into a hidden folder beside the goal and renamed at the end. A full disk, a Ctrl-C or a bad
  sample leaves nothing behind.
- `webdataset` writes the tar, so `webdataset` reads it; our own index code then reads it back, which is the proof.
"""

from __future__ import annotations

import errno
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from multiprocessing.synchronize import Event
from pathlib import Path

import webdataset

from data_pipeline.errors import DataError
from data_pipeline.index import Index, ShardEntry, index_shard, table_path
from data_pipeline.sample import Sample, Skipped
from data_pipeline.tar import refusal_of_name, split_name

SAMPLES_PER_SHARD = 1024

Make = Callable[[int], Sample | Skipped]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Written:
    """What was written, and what could not be."""

    index: Index
    skipped: tuple[Skipped, ...]


def write_shards(
    count: int,
    make: Make,
    folder: str | Path,
    *,
    samples_per_shard: int = SAMPLES_PER_SHARD,
    processes: int | None = None,
    progress: Progress | None = None,
) -> Written:
    """Write samples make(0) .. make(count - 1) and their index into `folder`, which must be new or empty.

    `make` must be picklable and depend on its argument alone. `processes`: default all cores, 0 or 1 = this one.
    `progress(done, total)` is called after every shard, in samples. Raises ValueError for a folder that holds
    something or a sample that cannot be stored, DataError when there is no sample, OSError when the disk is full.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is there already and not an empty folder: give a new one, or remove it")
    if samples_per_shard < 1:
        raise ValueError(f"samples_per_shard is {samples_per_shard}: give 1 or more")
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = folder.parent / f".{folder.name}.{os.getpid()}.unfinished"
    try:
        unfinished.mkdir()
        results = _write_all(count, make, unfinished, samples_per_shard, processes, progress)
        entries = [entry for entry, _ in results if entry is not None]
        skipped = tuple(skip for _, skips in results for skip in skips)
        if not entries:
            why = f"; the first, {skipped[0].source}: {skipped[0].reason}" if skipped else ""
            raise DataError(f"nothing to write to {folder}: none of {count} samples could be made{why}")
        index = Index(tuple(_renumber(unfinished, entry, number) for number, entry in enumerate(entries)))
        index.save(unfinished)
        if folder.exists():
            folder.rmdir()
        unfinished.rename(folder)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _disk_full(folder, error) from error
        raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return Written(index, skipped)


Result = tuple[ShardEntry | None, list[Skipped]]


def _write_all(
    count: int,
    make: Make,
    folder: Path,
    samples_per_shard: int,
    processes: int | None,
    progress: Progress | None,
) -> list[Result]:
    """Every shard, in order: its entry (None when all its samples were skipped) and what was skipped."""
    starts = range(0, count, samples_per_shard)
    shards = [
        (range(start, min(start + samples_per_shard, count)), make, folder / f"shard-{number:06d}.tar")
        for number, start in enumerate(starts)
    ]
    processes = min(os.cpu_count() or 1 if processes is None else processes, len(shards))
    done = 0
    if processes <= 1:
        results = []
        for shard in shards:
            results.append(_write_shard(*shard))
            done += len(shard[0])
            if progress:
                progress(done, count)
        return results
    stop = multiprocessing.Event()
    with ProcessPoolExecutor(processes, initializer=_start_process, initargs=(stop,)) as pool:
        try:
            futures = {pool.submit(_write_shard, *shard): len(shard[0]) for shard in shards}
            for future in as_completed(futures):
                future.result()
                done += futures[future]
                if progress:
                    progress(done, count)
        except BaseException:  # a Ctrl-C too: nobody should go on writing what will be thrown away
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise
        return [future.result() for future in futures]


_stop: Event | None = None  # set by the parent when what this process writes is no longer wanted


def _start_process(stop: Event) -> None:
    """Ctrl-C is the parent's to handle: it sets `stop`, and this process ends at its next sample."""
    global _stop
    _stop = stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _write_shard(samples: range, make: Make, path: Path) -> Result:
    """Make these samples and write them as one tar with its table of offsets."""
    skipped: list[Skipped] = []
    written: set[str] = set()
    with path.open("wb") as file, webdataset.TarWriter(file, encoder=False, compress=False, mtime=0) as tar:
        for number in samples:
            if _stop is not None and _stop.is_set():
                return None, []
            sample = make(number)
            if isinstance(sample, Skipped):
                skipped.append(sample)
                continue
            _refuse_unstorable(sample, written)
            written.add(sample.key)
            tar.write({"__key__": sample.key, **sample.fields})
    if not written:
        path.unlink()
        return None, skipped
    entry = index_shard(path)
    if entry.samples != len(written):
        raise ValueError(f"{len(written)} samples were written to {path.name}, but {entry.samples} can be read back")
    return entry, skipped


def _refuse_unstorable(sample: Sample, written: set[str]) -> None:
    """ValueError unless the sample reads back as itself: its key and fields survive as names in a tar."""
    if sample.key in written:
        raise ValueError(f"two samples have the key {sample.key!r}: keys must differ")
    if not sample.fields:
        raise ValueError(f"sample {sample.key!r} has no field: there is nothing to store")
    for field in sample.fields:
        name = f"{sample.key}.{field}"
        if split_name(name) != (sample.key, field) or field.startswith("_"):
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
