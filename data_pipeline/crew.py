"""Worker processes that run one function over the jobs they are given, and are replaced when they die or hang.

    with closing(Crew(function, 4)) as crew:
        crew.give(17, (arguments, of, job, 17))
        for number, result in crew.wait(1.0):       # Lost when a job ended several workers
            ...

Design choices:
- Workers are forked by the server (fork_server.py), never by this process. The function goes to each once, through
  memory that all share, and stays there with all it has opened; a job is a small tuple of arguments.
- A function is pure, so what a worker had not answered when it ended is given to the one that takes its place.
- A worker tells each half second that it is alive, by a thread, and at each sample where it is: two numbers in shared
  memory (the board). One that is stopped, or stuck while it holds the interpreter, is silent: it is replaced.
  Only once the system has told its end does another one get its jobs: nothing is written twice at a time.
- No seconds count while this process was not looking (a laptop that slept), and more are given on a busy machine.
- Ctrl-C and SIGTERM, which reach every process of a terminal or a job, are left to the trainer: it ends its workers.
"""

from __future__ import annotations

import mmap
import os
import pickle
import runpy
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
import types
from collections import Counter, deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any

import numpy as np

from data_pipeline.errors import DataError
from data_pipeline.fork_server import Channel, fork_worker, has_ended, has_started, kill_worker, readable, start_server

AHEAD = 2  # jobs that a worker has at a time: one at work, one behind it
ATTEMPTS = 5  # workers that one job may end
LOOK = 1.0  # seconds between two looks at the board
BEAT = 0.5  # seconds between two signs of life
START = 120.0  # seconds that the server may take to import everything
MOST_BUSY = 3.0  # times that a busy machine may take longer
BEATS, JOB, MARK, STOP = range(4)  # columns of the board


@dataclass(frozen=True)
class Patience:
    """Seconds, on a machine that is not busy, after which a worker is replaced."""

    silence: float = 10.0  # without a sign of life
    standstill: float = 300.0  # at one and the same sample


class LostError(Exception):
    """A job ended ATTEMPTS workers, or no worker began to work; `job` is None then. `mark`: what it was at."""

    def __init__(self, job: int | None, mark: int, how: str) -> None:
        super().__init__(how)
        self.job, self.mark, self.how = job, mark, how


def shared_memory(size: int) -> int:
    """A new file descriptor of so many bytes of memory that has no name; nothing is left of it however processes end.

    It counts as memory of the processes, not of /dev/shm, whose size is no limit.
    """
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("weft", os.MFD_CLOEXEC)
    else:
        with tempfile.TemporaryFile() as file:
            fd = os.dup(file.fileno())
    os.ftruncate(fd, max(1, size))
    return fd


@dataclass
class _Worker:
    """One process as it is seen from here."""

    number: int  # of the server
    place: int  # row of the board
    channel: Channel
    jobs: deque[int] = field(default_factory=deque)
    began: bool = False  # it has said hello
    seen: tuple[int, ...] = ()
    silent: float = 0.0
    still: float = 0.0


class Crew:
    """`size` processes that run `function`, each with `ahead` jobs at a time.

    `shared`: descriptors that each of them gets (`shared_fds`); `told` hears how a worker ended, and at which mark.

    Raises DataError when there can be none.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        size: int,
        *,
        ahead: int = AHEAD,
        patience: Patience | None = None,
        shared: Sequence[int] = (),
        told: Callable[[str, int], None] | None = None,
    ) -> None:
        start_server()
        self._owner, self._ahead = os.getpid(), ahead
        self._patience = patience or Patience()
        self._told = told
        letter = pickle.dumps((_context(), pickle.dumps(function)))
        self._letter, self._board_fd = shared_memory(len(letter)), shared_memory(8 * 4 * size)
        self._shared = list(shared)
        with mmap.mmap(self._letter, len(letter)) as memory:
            memory[:] = letter
        self._length = len(letter)
        self._board = np.frombuffer(mmap.mmap(self._board_fd, 8 * 4 * size), np.int64).reshape(size, 4)
        self._waiting: dict[int, tuple[tuple[Any, ...], Sequence[int]]] = {}  # job -> arguments and descriptors
        self._failures: Counter[int | None] = Counter()
        self._looked = time.monotonic()
        self._workers: list[_Worker] = []
        try:
            for place in range(size):
                self._workers.append(self._begin(place))
        except BaseException:
            self.close()
            raise

    @property
    def room(self) -> int:
        """How many jobs more may be given now: to workers that are there."""
        return sum(max(0, self._ahead - len(worker.jobs)) for worker in self._workers if worker.began)

    @property
    def open_jobs(self) -> int:
        """Jobs that were given and not answered yet."""
        return len(self._waiting)

    def give(self, job: int, arguments: tuple[Any, ...], fds: Sequence[int] = ()) -> None:
        """Have function(*arguments) run by the worker with the fewest jobs. `fds` go with it (`job_fds`)."""
        self._waiting[job] = arguments, fds
        self._send(min(self._workers, key=lambda worker: (not worker.began, len(worker.jobs))), job)

    def wait(self, seconds: float = LOOK) -> list[tuple[int, Any]]:
        """(job, result) of those that have come, at the latest after so many seconds; often none.

        What the function raised is raised here. Raises Lost, and DataError where a worker cannot be ended.
        """
        ready = readable([worker.channel for worker in self._workers], seconds)
        results: list[tuple[int, Any]] = []
        for worker in list(self._workers):
            if worker.channel.fileno() in ready:
                try:
                    bodies = worker.channel.arrived()
                except EOFError:
                    self._replace(worker, "")
                    continue
                for body in bodies:
                    self._hear(worker, pickle.loads(body), results)
        now = time.monotonic()
        if now - self._looked >= LOOK:
            passed, self._looked = min(now - self._looked, 2 * LOOK), now
            if not results:
                self._look(passed)
        return results

    def close(self, patience: float = 5.0) -> None:
        """End the workers: those at work are told so (`stopping`) and have so many seconds."""
        if os.getpid() != self._owner:  # a process that the owner has forked lets go of what is not its own
            return
        self._board[:, STOP] = 1
        for worker in self._workers:
            worker.channel.close()
        limit = time.monotonic() + patience
        while self._workers:
            worker = self._workers.pop()
            has_ended(worker.number, limit - time.monotonic())
            kill_worker(worker.number)
        for fd in (self._letter, self._board_fd):
            with suppress(OSError):
                os.close(fd)
        self._letter = self._board_fd = -1

    def _hear(self, worker: _Worker, message: tuple[Any, ...], results: list[tuple[int, Any]]) -> None:
        job, good, result = message
        if job is None:
            if not good:
                raise result
            worker.began = True
            return
        worker.jobs.remove(job)
        del self._waiting[job]
        self._failures.pop(job, None)
        self._failures.pop(None, None)
        if not good:
            raise result
        results.append((job, result))

    def _look(self, passed: float) -> None:
        """Replace workers that have been silent or at one place for too long; `passed`: seconds since the last look."""
        patience, busy = self._patience, _busy()
        for worker in list(self._workers):
            board = tuple(self._board[worker.place].tolist())
            before, worker.seen = worker.seen or board, board
            waited_for = not worker.began or bool(worker.jobs)
            alike = board[BEATS] == before[BEATS]
            worker.silent = worker.silent + passed if alike and waited_for else 0.0
            worker.still = worker.still + passed if board[JOB:STOP] == before[JOB:STOP] and worker.jobs else 0.0
            limit = patience.silence * busy
            if not worker.began and not has_started(worker.number):
                limit = START * busy
            if worker.silent >= limit:
                self._replace(worker, f"gave no sign of life for {worker.silent:.0f} s")
            elif worker.began and worker.still >= patience.standstill * busy:
                self._replace(worker, f"got no further for {worker.still:.0f} s")

    def _replace(self, worker: _Worker, how: str) -> None:
        """Another process in the place of this one, with its jobs."""
        worker.channel.close()
        status = kill_worker(worker.number)
        job = worker.jobs[0] if worker.jobs and worker.began else None
        mark = int(self._board[worker.place, MARK]) if job is not None else -1
        self._failures[job] += 1
        how = how or _ending(status)
        if self._failures[job] >= ATTEMPTS:
            raise LostError(job, mark, how)
        if self._told:
            self._told(how, mark)
        new = self._begin(worker.place)
        self._workers[self._workers.index(worker)] = new
        for each in worker.jobs:
            self._send(new, each)

    def _begin(self, place: int) -> _Worker:
        self._board[place] = 0
        ours, theirs = socket.socketpair()
        try:
            fds = [theirs.fileno(), self._letter, self._board_fd, *self._shared]
            return _Worker(fork_worker(__name__, fds, (place, self._length)), place, Channel(ours))
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()

    def _send(self, worker: _Worker, job: int) -> None:
        worker.jobs.append(job)
        arguments, fds = self._waiting[job]
        with suppress(OSError):  # it has ended: the next `wait` will see
            worker.channel.send((job, arguments), fds)


def _ending(status: int | None) -> str:
    """How a process ended that should not have, in words."""
    if status is None:
        return "ended together with the process that starts workers"
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        memory = ", as the system does to what takes too much memory" if number == signal.SIGKILL else ""
        return f"was ended by {signal.Signals(number).name}{memory}"
    return f"ended with exit code {os.waitstatus_to_exitcode(status)}"


def _busy() -> float:
    """How many times slower this machine may be than one with nothing else to do."""
    return min(MOST_BUSY, max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1)))


def _context() -> dict[str, Any]:
    """What a worker takes over from this process."""
    main = sys.modules.get("__main__")
    return {
        "folder": os.getcwd(),
        "environment": dict(os.environ),
        "path": list(sys.path),
        "main": getattr(main, "__file__", None),
    }


# --- in a worker

shared_fds: list[int] = []  # of the whole crew
job_fds: list[int] = []  # of the job at hand; closed when it is done
_own: np.ndarray | None = None  # this worker's row of the board


def stopping() -> bool:
    """In a job: whether nobody wants its result any more, so that it may end with any."""
    return _own is not None and bool(_own[STOP])


def mark(where: int) -> None:
    """In a job: note where it is, a number to tell it by should this process end; leaves when nobody wants the rest."""
    if _own is not None:
        _own[MARK] = where
        if _own[STOP]:
            os._exit(0)


def work(argument: tuple[int, int], fds: list[int]) -> None:
    """The life of a worker."""
    global _own
    end, letter, board, *shared_fds[:] = fds
    place, length = argument
    channel = Channel(socket.socket(fileno=end))
    memory = mmap.mmap(board, 0)
    _own = np.frombuffer(memory, np.int64).reshape(-1, 4)[place]
    with mmap.mmap(letter, length, access=mmap.ACCESS_READ) as text:
        context, function_bytes = pickle.loads(text[:])
    os.close(letter)
    os.close(board)
    threading.Thread(target=_beat, args=(_own,), daemon=True).start()
    with suppress(OSError):
        os.chdir(context["folder"])
    os.environ.clear()
    os.environ.update(context["environment"])
    sys.path[:] = context["path"]
    try:
        function = _Unpickler(function_bytes, context["main"]).load()
    except Exception as error:
        with suppress(ConnectionError):
            channel.send((None, False, _sendable(error)))
        return
    with suppress(EOFError, ConnectionError):  # nobody is there any more
        channel.send((None, True, os.getpid()))
        _serve(channel, function)


def _serve(channel: Channel, function: Callable[..., Any]) -> None:
    assert _own is not None
    while True:
        (job, arguments), job_fds[:] = channel.receive()
        if stopping():
            return
        _own[JOB] = job
        try:
            answer = job, True, function(*arguments)
        except Exception as error:
            answer = job, False, _sendable(error)
        while job_fds:
            os.close(job_fds.pop())
        channel.send(answer)


def _beat(own: np.ndarray) -> None:
    while True:
        own[BEATS] += 1
        time.sleep(BEAT)


def _sendable(error: Exception) -> Exception:
    """The error, with the lines where it came from, in a form that reads back as itself."""
    lines = "".join(traceback.format_exception(error))
    error = error.with_traceback(None)
    error.__cause__ = error.__context__ = None
    if not isinstance(error, DataError | OSError):
        error.add_note(f"in a worker process:\n{lines}")
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # an exception's own constructor may want anything
        return RuntimeError(f"in a worker process:\n{lines}")
    return error


class _Unpickler(pickle.Unpickler):
    """Finds what the caller's own script defines, and runs that (as a module) only where something is asked of it."""

    def __init__(self, data: bytes, main: str | None) -> None:
        super().__init__(BytesIO(data))
        self._main, self._loaded = main, False

    def find_class(self, module: str, name: str) -> Any:
        if module == "__main__" and not self._loaded:
            if self._main is None:
                raise ValueError(f"{name} is defined where worker processes cannot read it: put it into a file")
            self._loaded = True
            loaded = types.ModuleType("__mp_main__")
            sys.modules["__main__"] = sys.modules["__mp_main__"] = loaded
            loaded.__dict__.update(runpy.run_path(self._main, run_name="__mp_main__"))
        return super().find_class(module, name)
