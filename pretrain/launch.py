"""Start N ranks of a command on this machine through torchrun's own library, and bring back one exit code.

The library and not its command line: a rank that ends with a sentence for the user would otherwise be followed by a
page of the launcher's traceback.
"""

from __future__ import annotations

import ctypes
import logging
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence

LAUNCHER = "WEFT_LAUNCHER"  # process id of the launcher, in the environment of its ranks
PR_SET_PDEATHSIG = 1  # linux/prctl.h


def launch(arguments: Sequence[str], ranks: int) -> int:
    """Run `python -m pretrain.cli ARGUMENTS` on `ranks` ranks of this machine; the exit code of the first to fail."""
    from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    # the ranks share the cores; a user's own setting stands
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    # when the job is told to stop, the ranks save before they leave; 30 s would not do for a large model
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")
    os.environ[LAUNCHER] = str(os.getpid())
    logs = tempfile.mkdtemp(prefix="weft-launch-")  # torchrun wants a folder, though the ranks write to our own stderr
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=f"weft-{os.getpid()}",
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        max_restarts=0,
        logs_specs=DefaultLogsSpecs(log_dir=logs),
    )
    try:
        elastic_launch(config, sys.executable)("-m", "pretrain.cli", *arguments)
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        return code if code > 0 else 128 - code  # a negative code is the signal that ended it
    except SignalException as stopped:
        return 128 + int(stopped.sigval)
    finally:
        shutil.rmtree(logs, ignore_errors=True)
    return 0


def end_with_launcher() -> None:
    """In a rank: die when the launcher is killed, instead of training on unseen into a folder that others resume."""
    launcher = os.environ.get(LAUNCHER)
    if launcher is None or not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != int(launcher):  # it went before we asked
        os.kill(os.getpid(), signal.SIGKILL)
