"""A process that forks workers for this one, so that no process that has threads ever forks.

    number = fork_worker("data_pipeline.crew", fds)     # in a new process: data_pipeline.crew.work(fds)
    end = kill_worker(number)                           # its wait status

A fork copies one thread and all locks. If another thread held one at that moment (the interpreter's own list of
threads, the allocator, a library's), the child waits for it for ever.

Design choices:
- The server is a fresh interpreter (exec, which copies no lock), has one thread, and has imported this package before
  it forks: a worker is there in milliseconds. It starts while the caller goes on, and serves until that one ends.
- A worker is handed open files and nothing else: its end of a socket, and memory that it shares. Nothing of the
  caller's other files, threads or garbage gets there.
- Workers end with the server (by signal), and the server with its caller, however that ends (the socket closes).
- The server alone waits for its children and kills them, so a number never means another process.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import importlib
import itertools
import json
import os
import pickle
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any

from data_pipeline.errors import DataError

PR_SET_PDEATHSIG = 1  # linux/prctl.h
MOST_FDS = 8  # that travel with a message
LOOK = 1.0  # seconds between two looks of the server whether its caller is still there
DEATH = 10.0  # seconds that the system may take to end a process
HEADER = struct.Struct("!Q")
START = (
    "import signal, sys, json\n"
    "for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP): signal.signal(each, signal.SIG_IGN)\n"
    "sys.path[:] = json.loads(sys.argv[1])\n"
    "from data_pipeline.fork_server import serve\n"
    "serve(int(sys.argv[2]), int(sys.argv[3]))\n"
)


class Channel:
    """Messages, and open files with them, over one end of a Unix socket."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end
        self._came = bytearray()

    def fileno(self) -> int:
        """For select."""
        return self._end.fileno()

    def send(self, message: Any, fds: Sequence[int] = ()) -> None:
        """Send one message; waits where the reader is far behind. OSError when there is no reader any more."""
        body = pickle.dumps(message)
        if fds:
            socket.send_fds(self._end, [HEADER.pack(len(body))], fds)
        else:
            body = HEADER.pack(len(body)) + body
        self._end.sendall(body)

    def receive(self) -> tuple[Any, list[int]]:
        """Wait for one message, and the files that came with it. EOFError when there is no writer any more."""
        header, fds, _, _ = socket.recv_fds(self._end, HEADER.size, MOST_FDS)
        body = self._exactly(HEADER.size - len(header), header)
        return pickle.loads(self._exactly(HEADER.unpack(body)[0])), list(fds)

    def arrived(self) -> list[bytes]:
        """The bodies of the messages that are here, without waiting. EOFError when no more can come."""
        while True:
            try:
                part = self._end.recv(1 << 20, socket.MSG_DONTWAIT)
            except BlockingIOError:
                break
            except ConnectionError:  # it has closed its end before it read all of ours
                part = b""
            if not part:
                if len(self._came) < HEADER.size:
                    raise EOFError
                break
            self._came += part
        messages = []
        while len(self._came) >= HEADER.size:
            end = HEADER.size + HEADER.unpack_from(self._came)[0]
            if len(self._came) < end:
                break
            messages.append(bytes(self._came[HEADER.size : end]))
            del self._came[:end]
        return messages

    def close(self) -> None:
        """Close this end."""
        self._end.close()

    def _exactly(self, length: int, start: bytes = b"") -> bytes:
        parts = [start]
        while length:
            part = self._end.recv(min(length, 1 << 20))
            if not part:
                raise EOFError
            parts.append(part)
            length -= len(part)
        return b"".join(parts)


# --- the caller's side


class _Server:
    """The caller's hold on its server."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        self.owner = os.getpid()
        self.ready = False
        self.channel = Channel(ours)
        self.ends: dict[int, int] = {}  # worker -> its wait status
        path = json.dumps([os.path.abspath(place) for place in sys.path])
        command = [sys.executable, "-c", START, path, str(theirs.fileno()), str(self.owner)]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=2 if _is_open(2) else None,  # what workers may print is no result of this process
            pass_fds=[theirs.fileno()],
            env=os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
        )
        theirs.close()

    def drain(self) -> None:
        """Read what it has told."""
        with suppress(EOFError, OSError):  # it has ended; or it was found so, and closed
            for body in self.channel.arrived():
                number, status = pickle.loads(body)
                if number is None:
                    self.ready = True
                else:
                    self.ends[number] = status

    @property
    def gone(self) -> bool:
        return self.process.poll() is not None

    def close(self) -> None:
        """End it, and with it all its workers."""
        self.channel.close()
        if os.getpid() == self.owner:
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(DEATH)


_lock = threading.RLock()
_server: _Server | None = None
_numbers = itertools.count()
_places: dict[int, _Server] = {}  # worker -> whose it is, as long as anybody may ask


def readable(files: Iterable[int | Channel], seconds: float) -> set[int]:
    """Wait at most so long until one of the files can be read, or has ended; the descriptors of those.

    By poll: select takes no descriptor above 1023, and a process that has opened a thousand shards has such.
    """
    poll = select.poll()
    for file in files:
        poll.register(file, select.POLLIN)
    return {fd for fd, _ in poll.poll(max(0.0, seconds) * 1000)}


def start_server() -> None:
    """Have a server for the workers to come, if there is none: it imports what they need while the caller goes on."""
    global _server
    with _lock:
        if _server is not None and (_server.owner != os.getpid() or _server.gone):
            _server.close()  # of the process that forked this one, or ended by somebody
            _server = None
        if _server is None:
            _server = _Server()


def server_pid() -> int | None:
    """The process id of this process's server; None when there is none."""
    return None if _server is None or _server.owner != os.getpid() or _server.gone else _server.process.pid


def fork_worker(module: str, fds: Sequence[int], argument: Any = None) -> int:
    """Begin a process in which `module.work(argument, fds)` runs; returns its number here.

    Raises DataError when no server can be had.
    """
    code: int | None = None
    for _ in range(2):
        with _lock:
            start_server()
            assert _server is not None
            number = next(_numbers)
            try:
                _server.drain()
                _server.channel.send(("fork", number, module, argument), fds)
            except OSError:
                with suppress(subprocess.TimeoutExpired):
                    code = _server.process.wait(DEATH)
                continue
            _places[number] = _server
            return number
    raise DataError(f"worker processes cannot be started: the process that does so ended with exit code {code}")


def has_started(number: int) -> bool:
    """Whether the server of a worker has imported everything, so that the worker is about to begin."""
    with _lock:
        server = _places.get(number)
        if server is None:
            return True
        server.drain()
        return server.ready or server.gone


def kill_worker(number: int) -> int | None:
    """End a worker at once, whatever it does; its wait status.

    None when that is not known, since the server is gone, and the worker with it. Raises DataError when the system does
    not end it: it waits for a disk or a file system that does not answer.
    """
    with _lock, suppress(OSError):
        server = _places.get(number)
        if server is not None and server.owner == os.getpid() and number not in server.ends:
            server.channel.send(("kill", number))
    if not has_ended(number, DEATH):
        raise DataError(
            f"a worker process cannot be ended after {DEATH:.0f} s: it waits for a disk or a file system that does not "
            "answer; see that the data can be read, and resume"
        )
    with _lock:
        server = _places.pop(number, None)
        return None if server is None else server.ends.pop(number, None)


def has_ended(number: int, seconds: float) -> bool:
    """Wait so long for the end of a worker: whether it has come."""
    limit = time.monotonic() + seconds
    while True:
        with _lock:
            server = _places.get(number)
            if server is None or server.owner != os.getpid():
                return True
            server.drain()
            if number in server.ends or server.gone or server.channel.fileno() < 0:
                return True
            channel = server.channel
        left = limit - time.monotonic()
        if left <= 0:
            return False
        readable([channel], min(left, 0.1))


@atexit.register
def _end_server() -> None:
    global _server
    if _server is not None and _server.owner == os.getpid():
        _server.close()
        _server = None


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


# --- the server's side


def serve(control: int, caller: int) -> None:
    """The server: fork workers until the caller is gone."""
    channel = Channel(socket.socket(fileno=control))
    awake, waker = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    children: dict[int, int] = {}  # worker -> process id
    gc.collect()
    gc.freeze()  # workers need not look at what was there before, and so copy no page of it
    try:
        channel.send((None, 0))
        while os.getppid() == caller:
            ready = readable([channel, awake], LOOK)
            if awake in ready:
                os.read(awake, 4096)
            for number, pid in list(children.items()):
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    del children[number]
                    channel.send((number, status))
            if channel.fileno() in ready:
                _obey(channel, children)
    except (EOFError, OSError):
        pass  # the caller is gone
    for pid in children.values():
        os.kill(pid, signal.SIGKILL)
    os._exit(0)


def _obey(channel: Channel, children: dict[int, int]) -> None:
    """Do what the caller asks for: fork a worker, or kill one."""
    message, fds = channel.receive()
    if message[0] == "kill":
        if message[1] in children:
            os.kill(children[message[1]], signal.SIGKILL)
        return
    _, number, module, argument = message
    server = os.getpid()
    pid = os.fork()
    if pid:
        children[number] = pid
        for fd in fds:
            os.close(fd)
        return
    try:
        channel.close()
        _end_with(server)
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        importlib.import_module(module).work(argument, fds)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def _end_with(server: int) -> None:
    """In a worker: have the system end this process when the server ends, even if it hangs or is stopped."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != server:  # it went before we asked
        os._exit(1)
