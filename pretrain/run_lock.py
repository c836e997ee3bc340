"""One training at a time in a run folder: two would overwrite each other's checkpoints and metrics.

Design choices
- `RUN/.lock` is locked with fcntl's record lock for as long as the first rank lives. The system drops it when the
  process ends, however it ends, so nothing is ever left to clean up; forked loader workers do not inherit it (as they
  would flock's), and NFS servers know it.
- Where such a lock excludes nobody (some file systems ignore it, or know only this machine's), `RUN/.owner.json` says
  who trains: process, host, when it started, and a beat that counts on every few seconds. A record of this machine is
  checked against the process it names; one of another machine counts as dead once its beat has stood still.
- A job that SLURM has queued again may begin before its predecessor is gone: that one is waited for, for a while.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import IO

from data_pipeline.index import written_whole
from data_pipeline.process import started
from data_pipeline.strict_json import read_json
from pretrain.errors import RequestError, WeftError

LOCK, OWNER = ".lock", ".owner.json"
BEAT = 5.0  # seconds between two beats
STILL = 4 * BEAT  # an owner on another machine is dead when its beat has not moved for so long
PREDECESSOR = 120.0  # seconds that a job which was queued again waits for its predecessor
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)  # the file system has none


@dataclass(frozen=True)
class Owner:
    """Who trains in a run folder."""

    token: str
    process: int
    host: str
    machine: str  # which kernel and process namespace the process number is of
    started: str  # of the process: numbers are used again
    job: str = ""  # SLURM's number of the job, and how often it was queued again
    requeued: int = 0
    beat: int = 0

    @classmethod
    def me(cls) -> Owner:
        job, requeued = os.environ.get("SLURM_JOB_ID", ""), os.environ.get("SLURM_RESTART_COUNT", "0")
        return cls(
            uuid.uuid4().hex,
            os.getpid(),
            socket.gethostname(),
            _machine(),
            started(os.getpid()),
            job,
            int(requeued) if requeued.isdecimal() else 0,
        )

    @classmethod
    def read(cls, run: Path) -> Owner | None:
        """The owner that a run folder names; None where there is none, or nothing that can be read."""
        with suppress(OSError, ValueError, TypeError):
            if (run / OWNER).is_file():  # nobody may ever write to a pipe
                return cls(**read_json((run / OWNER).read_text(encoding="utf-8")))
        return None

    @property
    def is_here(self) -> bool:
        """Whether its process number means something on this machine."""
        return self.machine == _machine()

    @property
    def lives_here(self) -> bool:
        return self.is_here and bool(self.started) and started(self.process) == self.started

    def write(self, run: Path) -> None:
        with written_whole(run / OWNER) as unfinished:
            unfinished.write_text(json.dumps(asdict(self)) + "\n", encoding="utf-8")

    def __str__(self) -> str:
        return f"process {self.process} on {self.host}"


class RunLock:
    """Holds a run folder while the `with` lasts. Raises WeftError when another process trains in it."""

    def __init__(self, run: Path) -> None:
        self._run, self._me = run, Owner.me()
        self._file: IO[str] | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="run-lock", daemon=True)

    def __enter__(self) -> RunLock:
        with _told_of_the_folder(self._run):
            self._run.mkdir(parents=True, exist_ok=True)
            _refuse_unusable_checkpoints(self._run)
            self._file = _open(self._run / LOCK, "a")
        end, said = time.monotonic() + PREDECESSOR, False
        try:
            while (owner := self._other()) is not None:
                if not (owner.job and owner.job == self._me.job and owner.requeued < self._me.requeued):
                    raise _refusal(owner, self._run)
                if time.monotonic() > end:
                    raise _refusal(owner, self._run)
                if not said:
                    said = True
                    _say(
                        f"{owner}, which this job was before it was queued again, still trains in {self._run}: waiting"
                    )
                time.sleep(1)
            with _told_of_the_folder(self._run):
                self._me.write(self._run)
        except BaseException:
            self._file.close()
            raise
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()
        owner = Owner.read(self._run)
        if owner is not None and owner.token == self._me.token:
            with suppress(OSError):
                (self._run / OWNER).unlink()
        if self._file:
            self._file.close()  # and with it the lock

    def _other(self) -> Owner | None:
        """Who else trains here; None when nobody does, and then the lock is ours."""
        assert self._file is not None
        if not _take(self._file):
            return Owner.read(self._run) or _UNKNOWN
        owner = Owner.read(self._run)
        if owner is None or owner.token == self._me.token:
            return None
        if owner.is_here:
            return owner if owner.lives_here and owner.process != os.getpid() else None
        _say(f"{owner} trained in {self._run} and did not say that it ended: waiting {STILL:.0f} s for a sign of it")
        end = time.monotonic() + STILL
        while time.monotonic() < end:
            time.sleep(min(1.0, STILL / 10))
            now = Owner.read(self._run)
            if now is None:
                return None
            if now != owner:
                return now
        return None

    def _beat(self) -> None:
        while not self._over.wait(BEAT):
            owner = Owner.read(self._run)
            if owner is not None and owner.token != self._me.token:
                # we were stopped for so long that another took us for dead: it trains on from our checkpoint
                _say(f"{_refusal(owner, self._run)} (this process stood still for more than {STILL:.0f} s)")
                os._exit(WeftError.exit_code)
            self._me = replace(self._me, beat=self._me.beat + 1)
            with suppress(OSError):  # a full disk is told by who writes what matters
                self._me.write(self._run)


def refuse_if_held(run: Path) -> None:
    """WeftError when another process of this or another machine surely trains in a run folder; writes nothing."""
    try:
        with _open(run / LOCK, "r+") as file:
            free = _take(file)
    except OSError:
        return  # no folder yet, or one that cannot be written to: told by who writes
    owner = Owner.read(run)
    if free and not (owner and owner.lives_here and owner.process != os.getpid()):
        return
    me = Owner.me()
    if owner and owner.job and owner.job == me.job and owner.requeued < me.requeued:
        return  # the first rank waits for it
    raise _refusal(owner or _UNKNOWN, run)


_UNKNOWN = Owner("", 0, "", "", "")


def _refusal(owner: Owner, run: Path) -> WeftError:
    who = str(owner) if owner.process else "another process"
    return WeftError(f"{who} trains in {run}: wait until it has ended, stop it, or give another run.dir")


@contextmanager
def _told_of_the_folder(run: Path) -> Iterator[None]:
    """RequestError that names run.dir, and not a file that nobody has asked for, where nothing can be written there."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        why = (error.strerror or str(error)).lower()
        raise RequestError(
            f"run.dir is {run}, and nothing can be written there ({why}): give another run.dir"
        ) from error


def _refuse_unusable_checkpoints(run: Path) -> None:
    """RequestError where the first checkpoint would find that it cannot be written."""
    folder = run / "checkpoints"
    if not os.path.lexists(folder):
        return
    if not folder.is_dir():
        raise RequestError(f"{folder} is no folder: move it elsewhere, or give another run.dir")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise RequestError(f"{folder} cannot be written: change its permissions, or give another run.dir")


def _open(path: Path, mode: str) -> IO[str]:
    """The file of the lock; RequestError for what is no plain file: to open a pipe takes until another opens it too."""
    if path.exists() and not path.is_file():
        raise RequestError(f"{path} is no plain file, and no lock: remove it, or give another run.dir")
    return path.open(mode)


def _take(file: IO[str]) -> bool:
    """Lock a file for this process; False when another has it. True also where the file system has no locks."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        if error.errno not in NO_LOCKS:
            raise
    return True


def _machine() -> str:
    """This kernel since its last start, and the namespace of process numbers (a container has its own)."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:  # not Linux
        return socket.gethostname()


def _say(text: str) -> None:
    print(f"weft: {text}", file=sys.stderr, flush=True)
