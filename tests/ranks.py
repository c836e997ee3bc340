"""Run a test function on several gloo ranks of this machine and bring back what each rank returned.

    def both_sum(rank: int, world: int, value: float) -> float: ...
    results = run_ranks(both_sum, 2, 1.5)          # [result of rank 0, result of rank 1]

Design choices
- A rank is forked by a server that has one thread and has imported the libraries once, with what the tests of this
  process have loaded of weft: a rank starts in milliseconds, not in the 5 to 12 seconds of CPU of those imports.
- No fixed port (the rendezvous is a file), one compute thread a rank.
- The function travels by file and name and the values by pickle, so a test module needs to be on no path.
- Nothing can hang a test run: each rank dumps every thread's stack and leaves when `timeout` is over, one
  failing rank stops the others, and whatever is still alive at the end is killed.
"""

from __future__ import annotations

import faulthandler
import importlib.util
import inspect
import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import types
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

GRACE_SECONDS = 5.0  # what the other ranks get to finish or to show their own error after one has failed
LOG_CHARACTERS = 6000
PRELOADED = ("torch.distributed", "kernels", "data_pipeline", "pretrain.train")  # those that the tests have loaded


class RanksError(AssertionError):
    """A rank failed or hung; the message holds the end of what each rank printed."""


def run_ranks(function: Callable[..., Any], world: int, *args: Any, timeout: float = 600) -> list[Any]:
    """Call `function(rank, world, *args)` on `world` gloo ranks and return the results, rank 0 first.

    The default process group is initialised before the call. `function` must be at the top level of its
    module; arguments and results must pickle (tensors do). `timeout` is in seconds, start-up included.
    Raises RanksError with the ranks' output, and their stacks when they hung.
    """
    source = inspect.getsourcefile(function)
    if source is None or "<locals>" in function.__qualname__:
        raise ValueError(f"{function.__qualname__}: ranks can only run a function at the top level of a file")
    with tempfile.TemporaryDirectory(prefix="ranks-") as name:
        folder = Path(name)
        task = (str(Path(source).resolve()), function.__module__, function.__qualname__, pickle.dumps(args))
        (folder / "task.pickle").write_bytes(pickle.dumps(task))
        ranks = [_start(folder, rank, world, timeout) for rank in range(world)]
        try:
            failed = _wait(ranks, timeout)
        finally:
            for process in ranks:
                if process.is_alive():
                    process.kill()
                process.join()
        if failed:
            codes = [process.exitcode for process in ranks]
            logs = [(folder / f"rank{rank}.log").read_text(errors="replace") for rank in range(world)]
            told = "\n".join(f"--- rank {rank} of {world}\n{log[-LOG_CHARACTERS:]}" for rank, log in enumerate(logs))
            raise RanksError(f"{function.__qualname__}: {failed}; exit codes {codes}\n{told}")
        return [pickle.loads((folder / f"rank{rank}.pickle").read_bytes()) for rank in range(world)]


@cache
def _server() -> ForkServerContext:
    """A server of ranks, which starts with the first rank."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pytest", *(name for name in PRELOADED if name in sys.modules)])
    return context


def _start(folder: Path, rank: int, world: int, timeout: float) -> ForkServerProcess:
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    process = _server().Process(target=_rank_main, args=(environment, folder, rank, world, timeout))
    process.start()
    return process


def _wait(ranks: list[ForkServerProcess], timeout: float) -> str:
    """Wait until all ranks have left; returns what went wrong, or an empty string."""
    limit = time.monotonic() + timeout + GRACE_SECONDS
    failed = ""
    while any(process.is_alive() for process in ranks):
        bad = [rank for rank, process in enumerate(ranks) if process.exitcode not in (None, 0)]
        if bad and not failed:
            failed = f"rank {bad[0]} failed first"
            limit = min(limit, time.monotonic() + GRACE_SECONDS)
        if time.monotonic() > limit:
            return failed or f"still running after {timeout:g} s"
        time.sleep(0.02)
    return failed or ("a rank failed" if any(process.exitcode for process in ranks) else "")


def _load(path: str, name: str) -> types.ModuleType:
    specification = importlib.util.spec_from_file_location(name, path)
    if specification is None or specification.loader is None:
        raise ImportError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(specification)
    sys.modules[name] = module  # before execution, so that values pickled by this module's name are found
    specification.loader.exec_module(module)
    return module


def _rank_main(environment: dict[str, str], folder: Path, rank: int, world: int, timeout: float) -> None:
    os.environ.clear()
    os.environ.update(environment)
    log = os.open(folder / f"rank{rank}.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    faulthandler.dump_traceback_later(timeout, exit=True)
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    path, module_name, function_name, args = pickle.loads((folder / "task.pickle").read_bytes())
    # a script's own `if __name__ == "__main__"` must not run again in every rank
    module = _load(path, "ranks_task" if module_name == "__main__" else module_name)
    function = getattr(module, function_name)
    store = dist.FileStore(str(folder / "store"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=timeout))
    result = function(rank, world, *pickle.loads(args))
    (folder / f"rank{rank}.pickle").write_bytes(pickle.dumps(result))
    dist.barrier()  # no rank tears its sockets down while another still talks to it
    dist.destroy_process_group()
