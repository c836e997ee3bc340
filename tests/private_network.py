"""Run a test function in a process of its own that has a network of its own, with nothing in it but 127.0.0.1.

    found = in_private_network(scenario, folder, 4)        # what scenario(folder, 4) returned

For servers that listen on every interface, as Ray's does: nobody outside can reach them, and no port is in use already.
The function must be at the top level of its module; arguments and result must pickle. Every process it leaves behind is
found by a mark in its environment, and ended.
"""

from __future__ import annotations

import ctypes
import fcntl
import importlib.util
import inspect
import os
import pickle
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

CLONE_NEWNET = 0x40000000  # linux/sched.h
SIOCSIFFLAGS, IFF_UP, IFF_RUNNING = 0x8914, 0x1, 0x40  # linux/sockios.h, linux/if.h
MARK = "WEFT_TEST_MARK"
LOG_CHARACTERS = 6000


def in_private_network(function: Callable[..., Any], *arguments: Any, timeout: float = 1000) -> Any:
    """The result of the function; AssertionError with its output when it fails. Skips where it is not allowed."""
    if not _allowed():
        pytest.skip("making a network namespace is not allowed here (it needs root on Linux)")
    source = Path(inspect.getsourcefile(function) or "").resolve()
    with tempfile.TemporaryDirectory(prefix="net-", dir="/tmp") as name:
        task, result, log = Path(name, "task"), Path(name, "result"), Path(name, "log")
        task.write_bytes(pickle.dumps((str(source), function.__module__, function.__qualname__, arguments)))
        mark = uuid.uuid4().hex
        environment = os.environ | {MARK: mark, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        command = [sys.executable, __file__, str(task), str(result)]
        with log.open("wb") as output:
            process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGABRT)  # faulthandler shows where it was
            process.wait(10)
        finally:
            for left in marked(mark):
                os.kill(left, signal.SIGKILL)
        said = log.read_text(errors="replace")[-LOG_CHARACTERS:]
        assert result.exists(), f"{function.__name__} ended with {process.returncode} and no result:\n{said}"
        found, good = pickle.loads(result.read_bytes())
        assert good, f"{function.__name__}: {found}\n{said}"
        return found


def marked(mark: str) -> list[int]:
    """Processes that were started under this mark and are alive."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if f"{MARK}={mark}".encode() in (path / "environ").read_bytes():
                found.append(int(path.name))
        except OSError:
            continue
    return found


def _allowed() -> bool:
    return sys.platform == "linux" and os.geteuid() == 0 and hasattr(os, "fork")


def _enter() -> None:
    """Into a new network namespace, with its loopback interface up."""
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "unshare")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        request = struct.pack("16sh14x", b"lo", IFF_UP | IFF_RUNNING)
        fcntl.ioctl(control, SIOCSIFFLAGS, request)


def _main(task: str, result: str) -> None:
    import faulthandler
    import traceback

    faulthandler.enable()
    _enter()
    path, module_name, qualname, arguments = pickle.loads(Path(task).read_bytes())
    specification = importlib.util.spec_from_file_location(module_name, path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[module_name] = module
    specification.loader.exec_module(module)
    try:
        found = (getattr(module, qualname)(*arguments), True)
    except BaseException:
        found = (traceback.format_exc(), False)
    aside = Path(result + ".new")
    aside.write_bytes(pickle.dumps(found))
    aside.rename(result)


if __name__ == "__main__":
    _main(*sys.argv[1:])
