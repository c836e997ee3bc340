"""One writer at a time, on one machine or on several that share a file system.

Design choices:
- The lock is flock on a file of its own, open for writing. NFS clients make of it a lock of the whole file, which
  the server keeps; of a folder, which can only be opened for reading, they would refuse it.
- It lasts as long as the writer or a worker that it has forked: a killed writer leaves nothing locked.
- Where a file system has no locks at all, the file is made by whoever is first, and says who that is. A writer of this
  machine that has ended is told from one at work; of another machine nobody can tell, and the error says what to do.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data_pipeline.process import started
from data_pipeline.strict_json import read_json

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF, errno.EPERM)
PAUSE = 0.05  # seconds between two tries


class TakenError(ValueError):
    """Somebody else holds the lock."""


@contextmanager
def held(path: Path, seconds: float, what: str) -> Iterator[None]:
    """Hold the lock at `path`, which is gone at the end; TakenError when another one keeps it for `seconds`.

    `what`: what is locked, in words for the error.
    """
    file = _take(path, time.monotonic() + seconds, what)
    if file is None:
        with _owned(path, what):
            yield
        return
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is locked: who waits for it finds that out
        os.close(file)


def _take(path: Path, last: float, what: str) -> int | None:
    """A descriptor that holds the lock; None where there are no locks. TakenError when it is not free until `last`."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(file), path.stat()):
                return file
        except (BlockingIOError, FileNotFoundError):  # the latter: the one before us has just removed it
            pass
        except OSError as error:
            os.close(file)
            if error.errno in NO_LOCKS:
                return None
            raise
        os.close(file)
        if time.monotonic() > last:
            raise TakenError(f"another process is writing {what} at this moment: let it finish, or end it")
        time.sleep(PAUSE)


@contextmanager
def _owned(path: Path, what: str) -> Iterator[None]:
    """The same where there are no locks: who makes a file beside `path` is the owner."""
    lock, path = path, path.with_name(f"{path.name}.owner")
    ours = _who()
    for _ in range(2):
        try:
            with path.open("x", encoding="utf-8") as file:
                json.dump(ours, file)
            break
        except FileExistsError:
            owner = _read(path)
            if not _has_ended(owner):
                raise TakenError(
                    f"{what} may be written by process {owner.get('process')} of {owner.get('host')}, and the file "
                    f"system has no locks to tell: let it finish, or remove {path} if it has ended"
                ) from None
            path.unlink(missing_ok=True)
    else:
        raise TakenError(f"another process is writing {what} at this moment: let it finish, or end it")
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        path.unlink(missing_ok=True)


def _who() -> dict[str, object]:
    """This process, so that another one of this machine finds out whether it is still there."""
    try:
        space = os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        space = 0
    process = os.getpid()
    return {"host": socket.gethostname(), "space": space, "process": process, "started": started(process)}


def _read(path: Path) -> dict[str, object]:
    try:
        owner = read_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return owner if isinstance(owner, dict) else {}


def _has_ended(owner: dict[str, object]) -> bool:
    ours = _who()
    process = owner.get("process")
    if not isinstance(process, int) or any(owner.get(name) != ours[name] for name in ("host", "space")):
        return False
    return not (now := started(process)) or now != owner.get("started", now)
