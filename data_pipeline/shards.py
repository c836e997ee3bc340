"""Write a data set: samples made by a function, into WebDataset shards, by many processes, all or nothing.

Design choices:
- Sample i is a pure function of i, and shard s is samples s * samples_per_shard and on. So a shard is a pure function
  too: any process may write it, and the bytes are the same however many do.
- Everything is written into a hidden folder beside the goal and renamed at the end. A full disk, a Ctrl-C or a bad
  sample leaves nothing behind.
- A process that is killed cannot tidy up. Where the samples have an `Origin`, its hidden folder is named by that, and
  the same request goes on in it: shards that were finished are kept, their checksums read again first.
- One process writes into a folder at a time, by a lock that its workers share and the system takes back with the last
  of them; and they end when their parent does.
- `webdataset` writes the tar, so `webdataset` reads it; our own index code then reads it back, which is the proof.
"""

from __future__ import annotations

import errno
import fcntl
import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

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
from data_pipeline.sample import Sample, Skipped
from data_pipeline.tar import refusal_of_name, split_name

SAMPLES_PER_SHARD = 1024
ORIGIN_FILE = "origin.json"
LOCK_SECONDS = 5.0  # to wait for the workers of a process that was killed a moment ago

Make = Callable[[int], Sample | Skipped]
Progress = Callable[[int, int], None]


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


def write_shards(
    count: int,
    make: Make,
    folder: str | Path,
    *,
    samples_per_shard: int = SAMPLES_PER_SHARD,
    processes: int | None = None,
    progress: Progress | None = None,
    origin: Origin | None = None,
) -> Written:
    """Write samples make(0) .. make(count - 1) and their index into `folder`, which must be new or empty.

    `make` must be picklable and depend on its argument alone. `processes`: default all cores, 0 or 1 = this one.
    `progress(done, total)` is called after every shard, in samples. `origin` is kept in `folder`: a folder that was
    finished from the same one is left as it is, and what a killed process left of it is gone on with.
    Raises ValueError for a folder that holds something or that another process writes to, or a sample that cannot be
    stored, DataError when there is no sample, OSError when the disk is full.
    """
    folder = Path(folder)
    if origin is not None:
        finished = _read_finished(folder, origin)
        if finished is not None:
            return finished
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is there already and not an empty folder: give a new one, or remove it")
    if samples_per_shard < 1:
        raise ValueError(f"samples_per_shard is {samples_per_shard}: give 1 or more")
    folder.parent.mkdir(parents=True, exist_ok=True)
    mark = f"{origin.fingerprint[:16]}-{samples_per_shard}" if origin else str(os.getpid())
    hidden = folder.parent / f".{folder.name}.{mark}.unfinished"
    if origin is None:
        shutil.rmtree(hidden, ignore_errors=True)  # of a process that had our number before
    with _hidden_folder(hidden, folder) as unfinished:
        return _write_folder(count, make, folder, unfinished, samples_per_shard, processes, progress, origin)


def read_origin(folder: Path) -> Origin | None:
    """What the shards in `folder` were made from; None when that was not written down."""
    try:
        tree = json.loads((folder / ORIGIN_FILE).read_text(encoding="utf-8"))
        return Origin(dict(tree["request"]), str(tree["fingerprint"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _read_finished(folder: Path, origin: Origin) -> Written | None:
    """What was written when `folder` was finished from `origin`; None when it was not."""
    if read_origin(folder) != origin:
        return None
    tree = json.loads((folder / ORIGIN_FILE).read_text(encoding="utf-8"))
    skipped = tuple(Skipped(skip["source"], skip["reason"]) for skip in tree["skipped"])
    return Written(load_index(folder), skipped, already=True)


@contextmanager
def _hidden_folder(unfinished: Path, folder: Path) -> Iterator[Path]:
    """A folder that this process alone writes to; gone at the end. ValueError when another one holds it."""
    unfinished.mkdir(exist_ok=True)
    lock = os.open(unfinished, os.O_RDONLY)
    try:
        taken = _take(lock)
        if not taken or not unfinished.is_dir() or not os.path.samestat(os.fstat(lock), unfinished.stat()):
            raise ValueError(f"another process is writing {folder} at this moment: let it finish, or end it")
        try:
            yield unfinished
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    finally:
        os.close(lock)


def _take(lock: int) -> bool:
    """Lock an open folder; False when somebody else keeps it. Where the file system has no locks, it is ours."""
    last = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > last:
                return False
            time.sleep(0.05)
        except OSError:
            return True


def _write_folder(
    count: int,
    make: Make,
    folder: Path,
    unfinished: Path,
    samples_per_shard: int,
    processes: int | None,
    progress: Progress | None,
    origin: Origin | None,
) -> Written:
    """Fill `unfinished` and rename it to `folder`."""
    try:
        results = _write_all(count, make, unfinished, samples_per_shard, processes, progress, origin is not None)
        entries = [entry for entry, _ in results if entry is not None]
        skipped = tuple(skip for _, skips in results for skip in skips)
        if not entries:
            why = f"; the first, {skipped[0].source}: {skipped[0].reason}" if skipped else ""
            raise DataError(f"nothing to write to {folder}: none of {count} samples could be made{why}")
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
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _disk_full(folder, error) from error
        raise
    return Written(index, skipped)


Result = tuple[ShardEntry | None, list[Skipped]]


def _write_all(
    count: int,
    make: Make,
    folder: Path,
    samples_per_shard: int,
    processes: int | None,
    progress: Progress | None,
    keep: bool,
) -> list[Result]:
    """Every shard, in order: its entry (None when all its samples were skipped) and what was skipped.

    `keep`: note what is finished, and take what an earlier process has noted.
    """
    starts = range(0, count, samples_per_shard)
    shards = [
        (range(start, min(start + samples_per_shard, count)), make, folder / f"shard-{number:06d}.tar", keep)
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
    obey_parent()


def obey_parent() -> None:
    """In a worker process: Ctrl-C is the parent's to handle, and this process ends when its parent does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this process when its parent does: a killed one cannot tell its workers, and they would wait for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _write_shard(samples: range, make: Make, path: Path, keep: bool) -> Result:
    """One shard: taken as it is when it was finished before, and otherwise made."""
    if not keep:
        return _make_shard(samples, make, path)
    result = _read_note(path)
    if result is None:
        result = _make_shard(samples, make, path)
        if _stop is None or not _stop.is_set():
            _write_note(path, result)
    return result


def _write_note(path: Path, result: Result) -> None:
    """Note beside the shard at `path` that it is finished, and what came of it."""
    entry, skipped = result
    tree = {"entry": entry and asdict(entry), "skipped": [asdict(skip) for skip in skipped]}
    with written_whole(path.with_suffix(".done")) as unfinished:
        unfinished.write_text(json.dumps(tree), encoding="utf-8")


def _read_note(path: Path) -> Result | None:
    """What came of the shard at `path`; None when it is not finished, or not what was noted (a power cut)."""
    try:
        tree = json.loads(path.with_suffix(".done").read_text(encoding="utf-8"))
        skipped = [Skipped(skip["source"], skip["reason"]) for skip in tree["skipped"]]
        if tree["entry"] is None:
            return None, skipped
        entry = ShardEntry(**{**tree["entry"], "modalities": tuple(tree["entry"]["modalities"])})
        if checksum_of(path) != entry.checksum:
            return None
        load_table(path, entry)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return entry, skipped


def _make_shard(samples: range, make: Make, path: Path) -> Result:
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
