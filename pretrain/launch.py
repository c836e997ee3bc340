"""Start N ranks of a command on this machine through torchrun's own library, and bring back one exit code.

The library and not its command line: a rank that ends with a sentence for the user would otherwise be followed by a
page of the launcher's traceback. What may follow a failed attempt is told in `restart`.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from data_pipeline.strict_json import read_json
from pretrain.job import LAUNCHER
from pretrain.restart import End, cause

PR_SET_PDEATHSIG = 1  # linux/prctl.h
SAID = "TORCHELASTIC_ERROR_FILE"  # torchrun's: where a rank leaves what it died of


def launch(arguments: Sequence[str], ranks: int, again: Callable[[Sequence[End]], int | None] | None = None) -> int:
    """Run `python -m pretrain.cli ARGUMENTS` on `ranks` ranks of this machine; the exit code of the first to fail.

    `again` is asked after a failure on how many ranks to start once more; None: not. A stop signal to this process is
    passed on to the ranks, and is never followed by another attempt.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    # the ranks share the cores; a user's own setting stands
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    # when the job is told to stop, the ranks save before they leave; 30 s would not do for a large model
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # nohup's, which torchrun's own handler would undo
        os.environ.setdefault("TORCHELASTIC_SIGNALS_TO_HANDLE", "SIGTERM,SIGINT,SIGQUIT")
    os.environ[LAUNCHER] = str(os.getpid())
    try:
        attempt, asked = 0, ranks
        while ends := _attempt(arguments, asked, attempt):
            next_ranks = again(ends) if again else None
            if next_ranks is None:
                return _report(ends, said=again is not None)
            attempt, asked = attempt + 1, next_ranks
    except SignalException as stopped:
        return 128 + int(stopped.sigval)
    return 0


def _attempt(arguments: Sequence[str], ranks: int, attempt: int) -> list[End]:
    """One start of all ranks until none is left; how those ended that did not end well."""
    from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # torchrun wants a folder, though the ranks write to our own stderr; what they died of goes there
    logs = tempfile.mkdtemp(prefix="weft-launch-")
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=f"weft-{os.getpid()}-{attempt}",
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        max_restarts=0,
        logs_specs=DefaultLogsSpecs(log_dir=logs),
    )
    try:
        elastic_launch(config, sys.executable)("-m", "pretrain.cli", *arguments)
    except ChildFailedError as error:
        return [
            End(rank, failure.exitcode, float(failure.timestamp), *_word(Path(failure.error_file)))
            for rank, failure in error.failures.items()
        ]
    finally:
        shutil.rmtree(logs, ignore_errors=True)
    return []


def _report(ends: Sequence[End], said: bool = False) -> int:
    """The exit code of a job that ended so; says what was wrong where the first rank, which speaks, did not know.

    `said`: that a rank was killed has been told already.
    """
    end = cause(ends)
    if end.said and end.rank != 0 and not any(each.said == end.said for each in ends if each.rank == 0):
        print(f"weft: rank {end.rank}: {end.said}", file=sys.stderr)
    elif end.code < 0 and not end.is_final and not said:
        print(f"weft: {end}", file=sys.stderr)
    return end.exit_code


def leave_word(sentence: str, lasting: bool) -> None:
    """In a rank: tell the launcher the sentence that this rank ends with; `lasting`: at another attempt too.

    The file is there whole or not at all: torchrun's library fails over half of one, and the job with it, when a rank
    is ended while it writes.
    """
    if path := os.environ.get(SAID):
        from data_pipeline.index import written_whole  # with torch, which most that ends with a sentence has loaded

        text = json.dumps({"message": sentence, "lasting": lasting, "timestamp": int(time.time())})
        # where nothing can be written, the exit code has to do
        with suppress(OSError), written_whole(Path(path)) as unfinished:
            unfinished.write_text(text, encoding="utf-8")


def _word(path: Path) -> tuple[str, bool]:
    """What `leave_word` left; nothing where a rank ended otherwise."""
    try:
        told = read_json(path.read_text(encoding="utf-8"))
        return str(told["message"]), bool(told["lasting"])
    except (OSError, ValueError, KeyError, TypeError):  # none, or one in the form of torchrun's own
        return "", True


def end_with_launcher() -> None:
    """In a rank: die when the launcher is killed, instead of training on unseen into a folder that others resume."""
    launcher = os.environ.get(LAUNCHER)
    if launcher is None or not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != int(launcher):  # it went before we asked
        os.kill(os.getpid(), signal.SIGKILL)
