"""A process that measures: started, listened to with a limit on its silence, and ended with all that it started."""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

DIES_WITH_PARENT = 1  # PR_SET_PDEATHSIG of <sys/prctl.h>
SECONDS_TO_DIE = 10.0  # a driver may keep a killed process for ever
HASTE = 15.0  # seconds in which a second signal means the same as the first
LOOK_SECONDS = 1.0  # between two looks whether it is alive


class OutOfTimeError(Exception):
    """The time of the whole run is over."""


class Worker:
    """A process that does jobs and says on its standard output, in lines of JSON, what comes of them."""

    def __init__(self, command: Sequence[str], log: Path) -> None:
        path = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(path)}
        self._log = log
        with log.open("a") as errors:
            self._process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=errors, env=environment, start_new_session=True
            )
        self._unread = b""
        self.patience = 0.0  # seconds of silence from here on

    def messages(self, patience: float, end: float) -> Iterator[dict[str, Any]]:
        """What it says until it ends; whoever listens may change `self.patience` at each message.

        Raises TimeoutError when it says nothing for too long, and OutOfTimeError at `end` (time.time).
        """
        assert self._process.stdout is not None
        pipe = self._process.stdout.fileno()
        self.patience = patience
        heard = time.time()
        while True:
            silent = heard + self.patience
            wait = max(0.0, min(silent - time.time(), end - time.time(), LOOK_SECONDS))
            ended = self._process.poll() is not None
            if not select.select([pipe], [], [], wait)[0]:
                if ended:  # and what it forked holds its pipe open
                    return
                if time.time() >= end:
                    raise OutOfTimeError
                if time.time() >= silent:
                    raise TimeoutError(f"no answer for {self.patience:.0f} s; the process was killed")
                continue
            piece = os.read(pipe, 1 << 16)
            if not piece:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(SECONDS_TO_DIE)  # its own exit code tells more than that of being killed
                return
            *lines, self._unread = (self._unread + piece).split(b"\n")
            for line in lines:
                if message := _message(line):
                    yield message
                else:
                    with self._log.open("ab") as errors:
                        errors.write(line + b"\n")
            heard = time.time()

    def stop(self) -> int | None:
        """Kill it with the processes that it has started; its exit code, or None for one that does not go."""
        return end_group(self._process)


def end_group(process: subprocess.Popen[bytes]) -> int | None:
    """Kill a process and all of its group; its exit code, or None for one that the driver does not let die."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    try:
        return process.wait(timeout=SECONDS_TO_DIE)
    except subprocess.TimeoutExpired:
        return None


def _message(line: bytes) -> dict[str, Any] | None:
    """None for what a library has printed, which belongs into the log."""
    try:
        message = json.loads(line)
    except ValueError:
        return None
    return message if isinstance(message, dict) and "say" in message else None


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """TERM and HUP do what Ctrl-C does: whoever ends a job at its limit sends one of them, or several.

    One that comes soon after another changes nothing, so that what the first has begun to end is ended. A HUP that is
    ignored, as under nohup, stays so; not an INT, which shells let every command in the background ignore. What is
    started meanwhile has the usual INT again.
    """
    last = -math.inf

    def interrupt(number: int, frame: Any) -> None:
        nonlocal last
        if time.monotonic() - last > HASTE:
            last = time.monotonic()
            raise KeyboardInterrupt(signal.Signals(number).name)

    before = {}
    try:
        if threading.current_thread() is threading.main_thread():
            for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                usual = signal.getsignal(each)
                if usual is not None and (usual != signal.SIG_IGN or each != signal.SIGHUP):
                    before[each] = usual
                    signal.signal(each, interrupt)
        yield
    finally:
        for each, usual in before.items():
            signal.signal(each, usual)


def die_with(parent: int) -> None:
    """End this process when its parent does, however that ends: a later run would share the device with it.

    Called by the process itself: a function that runs between fork and exec could hang in a process with threads.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(DIES_WITH_PARENT, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it ended before
        os._exit(1)


def dying_with_me(command: Sequence[str]) -> list[str]:
    """A command that ends when this process does, whatever it is."""
    return [sys.executable, __file__, str(os.getpid()), *command]  # as a file: nothing of torch is imported


if __name__ == "__main__":
    die_with(int(sys.argv[1]))
    os.execvp(sys.argv[2], sys.argv[2:])
