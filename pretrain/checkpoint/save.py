"""Write checkpoints while training goes on.

    with Saver(engine, run, recipe, tokenizer, data_fingerprint) as saver:
        saver.save(step)      # copies the state to host memory; a thread writes, hashes and flushes this rank's files
        saver.poll()          # once a step: the first step that finds all ranks done makes the checkpoint complete
        saver.finish()        # waits for what is being written

A checkpoint is written aside and gets its name by one rename when every byte of every rank is on disk; only then does
`latest` move, and only then are older ones dropped. Ranks speak to each other in `save`, `poll` and `finish` only,
never in a thread, and every rank calls them alike.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from data_pipeline import Tokenizer
from pretrain.checkpoint.format import (
    DESCRIPTION,
    FORMAT,
    LATEST,
    PARTS,
    TOKENIZER,
    UNFINISHED,
    VERSION,
    checksum_of_description,
    complete_steps,
    file_name,
    step_folder,
)
from pretrain.checkpoint.snapshot import Snapshot
from pretrain.checkpoint.tensor_file import write_tensors, write_text
from pretrain.config import Recipe
from pretrain.errors import WeftError
from pretrain.parallel.engine import Engine

APPEARS = 10.0  # seconds in which rank 0 sees what another rank has written and flushed


@dataclass
class _Pending:
    """A checkpoint that is being written; `files` and `failure` are the thread's until it has ended."""

    step: int
    updates: int
    guard: Mapping[str, Any]
    order: str
    files: dict[str, str] = field(default_factory=dict)  # of this rank: name -> sha256
    failure: str = ""
    thread: threading.Thread | None = None


class Saver:
    """Saves an engine into a run folder, at most one checkpoint at a time."""

    def __init__(self, engine: Engine, run: Path, recipe: Recipe, tokenizer: Tokenizer, data_fingerprint: str) -> None:
        self._ranks, self._run, self._recipe = engine.ranks, run, recipe
        self._tokenizer, self._data_fingerprint = tokenizer, data_fingerprint
        if self._ranks.is_first:
            _remove_unfinished(run / "checkpoints")  # before any rank begins another: they meet in Snapshot
        self._snapshot = Snapshot(engine)
        self._pending: _Pending | None = None
        self._dropping: threading.Thread | None = None

    @property
    def pending(self) -> bool:
        """Whether a checkpoint is being written."""
        return self._pending is not None

    def save(self, step: int, guard: Mapping[str, Any] | None = None, order: str = "") -> None:
        """Begin to save the state after `step` steps; waits first for the checkpoint before, if that is not written.

        `guard` is what the trainer's guard remembers, `order` the certificate of what was read. With
        checkpoint.asynchronous=false the checkpoint is complete on return. Raises WeftError as `finish` does.
        """
        self.finish()
        pending = _Pending(step, 0, guard or {}, order)
        try:
            self._unfinished(step).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            pending.failure = _reason(error)
        self._snapshot.take()
        pending.updates = self._snapshot.updates
        self._pending = pending
        if not pending.failure:
            # a daemon: a process that is told twice to end does not wait for a disk
            pending.thread = threading.Thread(target=self._write, args=(pending,), name="checkpoint", daemon=True)
            pending.thread.start()
        if not self._recipe.checkpoint.asynchronous:
            self.finish()

    def poll(self) -> None:
        """Make the checkpoint complete if every rank has written its files; cheap, and nothing when none is pending.

        Raises WeftError on every rank when one could not write: nothing half-written is left, and the checkpoints
        before stay.
        """
        pending = self._pending
        if pending is None:
            return
        ended = pending.thread is None or not pending.thread.is_alive()
        if int(self._ranks.agree(torch.tensor([int(ended)]))) == self._ranks.world:
            self._pending = None
            self._complete(pending)

    def finish(self) -> None:
        """Wait until what is being saved is complete on every rank. Raises WeftError as `poll` does."""
        if self._pending is not None:
            self._join()
            self.poll()  # every rank has joined its own thread
        if self._dropping is not None:
            self._dropping.join()
            self._dropping = None

    def __enter__(self) -> Saver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """An error of one rank is not the others': they cannot be asked. A single rank still has its checkpoint."""
        if kind is None or (self._ranks.world == 1 and kind is not KeyboardInterrupt):
            self.finish()

    def _join(self) -> None:
        if self._pending is not None and self._pending.thread is not None:
            self._pending.thread.join()

    def _unfinished(self, step: int) -> Path:
        folder = step_folder(self._run, step)
        return folder.with_name(f".{folder.name}{UNFINISHED}")

    def _write(self, pending: _Pending) -> None:
        """In the thread: this rank's files, every byte on disk."""
        folder, snapshot = self._unfinished(pending.step), self._snapshot
        try:
            if snapshot.file is not None:
                for part, shapes in snapshot.shapes.items():
                    if shapes:
                        name = file_name(part, snapshot.file.number, snapshot.file.count)
                        pending.files[name] = write_tensors(folder / name, shapes, snapshot.numbers[part])
            if self._ranks.is_first:
                pending.files[TOKENIZER] = write_text(folder / TOKENIZER, self._tokenizer.to_json())
        except Exception as error:  # whatever it is, the ranks are to hear of it and end together
            pending.failure = _reason(error)

    def _complete(self, pending: _Pending) -> None:
        folder, unfinished = step_folder(self._run, pending.step), self._unfinished(pending.step)
        told = self._ranks.of_all((pending.failure, pending.files))
        failure = next((failure for failure, _ in told if failure), "")
        if not failure and self._ranks.is_first:
            files = {name: checksum for _, files in told for name, checksum in files.items()}
            failure = _missing([list(files) for _, files in told], unfinished)
            try:
                if not failure:
                    self._name(pending, files, unfinished, folder)
            except OSError as error:
                failure = _reason(error)
        if self._ranks.is_first:
            shutil.rmtree(unfinished, ignore_errors=True)  # of a failure; else it has got its name
        failure = next((each for each in self._ranks.of_all(failure) if each), "")
        if failure:
            raise WeftError(
                f"step {pending.step} could not be saved to {folder}: {failure}; the checkpoints before it are whole"
            )
        # a step that changed nothing has the weights that made it fail: it pushes no earlier checkpoint out
        if self._ranks.is_first and not pending.guard.get("in_a_row"):
            keep = self._recipe.checkpoint
            self._dropping = _in_thread(lambda: _drop_old(folder, keep.keep, keep.keep_every))

    def _name(self, pending: _Pending, files: dict[str, str], unfinished: Path, folder: Path) -> None:
        """Rank 0: describe what all ranks have written, and give it its name."""
        description = {
            "format": FORMAT,
            "version": VERSION,
            "step": pending.step,
            "samples": pending.step * self._recipe.train.global_batch,
            "updates": pending.updates,
            "guard": dict(pending.guard),
            "order": pending.order or None,
            "data_fingerprint": self._data_fingerprint,
            "recipe": self._recipe.model_dump(mode="json"),
            "parameters": {entry.name: list(entry.shape) for entries in self._snapshot.stages for entry in entries},
            "tensors": {
                part: {
                    entry.name: file_name(part, file.number, file.count)
                    for file, entries in self._snapshot.files_of_all
                    for entry in entries
                    if entry.trained or part == "weight"
                }
                for part in PARTS
            },
            "files": dict(sorted(files.items())),
        }
        text = json.dumps({**description, "checksum": checksum_of_description(description)}, indent=1)
        write_text(unfinished / DESCRIPTION, text + "\n")
        _flush(unfinished)
        if folder.exists():  # of a run that was rolled back, or damaged
            _remove(folder)
        unfinished.rename(folder)
        _flush(folder.parent)
        _point_latest(folder)


def _in_thread(work: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=work, name="old checkpoints", daemon=True)
    thread.start()
    return thread


def _missing(files_of: Sequence[Sequence[str]], folder: Path) -> str:
    """What is wrong when a file that some rank says it has written is not in the folder of rank 0; else ""."""
    end = time.monotonic() + APPEARS
    for rank, names in enumerate(files_of):
        for name in names:
            while not (folder / name).exists():
                if time.monotonic() > end:
                    return f"{name}, which rank {rank} has written, is not in {folder}: all nodes must share run.dir"
                time.sleep(0.1)
    return ""


def _reason(error: Exception) -> str:
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return "the disk is full" if full or "os error 28" in str(error) else (str(error) or type(error).__name__)


def _point_latest(folder: Path) -> None:
    """Let `latest` name the folder: a link, or a file with the name where the file system has no links."""
    latest, aside = folder.parent / LATEST, folder.parent / f".{LATEST}.new"
    aside.unlink(missing_ok=True)
    try:
        aside.symlink_to(folder.name)
    except OSError:
        write_text(aside, folder.name + "\n")
    if latest.is_dir() and not latest.is_symlink():  # of a copy that followed links
        _remove(latest)
    aside.replace(latest)
    _flush(folder.parent)


def _drop_old(newest: Path, keep: int, keep_every: int) -> None:
    """Keep `newest`, the keep - 1 checkpoints before it and every one of a step that keep_every divides.

    Those of later steps are of a run that was rolled back, and go.
    """
    steps = complete_steps(newest.parent)
    end = steps.index(newest) + 1
    before = steps[: max(0, end - keep)]
    for old in [path for path in before if not (keep_every and _step_of(path) % keep_every == 0)] + steps[end:]:
        _remove(old)


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))


def _remove(folder: Path) -> None:
    """By another name first: a kill in between leaves no half of a checkpoint under the name of a whole one."""
    aside = folder.with_name(f".{folder.name}.old{UNFINISHED}")
    shutil.rmtree(aside, ignore_errors=True)
    folder.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def _remove_unfinished(checkpoints: Path) -> None:
    """What a killed run has left half-written or half-removed."""
    for path in checkpoints.glob(f".*{UNFINISHED}"):
        shutil.rmtree(path, ignore_errors=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
