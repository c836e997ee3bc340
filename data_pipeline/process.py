"""Whether a process that a file names is still the one that wrote it: numbers of processes are used again."""

from __future__ import annotations

from pathlib import Path


def started(process: int) -> str:
    """When a process of this machine started, in the kernel's ticks; empty when there is none.

    What psutil says moves with the clock of the machine: after a step of it a live process would seem to have ended.
    """
    try:
        state, *fields = Path(f"/proc/{process}/stat").read_text(errors="replace").rpartition(")")[2].split()
        return "" if state in "ZX" else fields[18]  # proc(5): fields 3 and 22
    except (FileNotFoundError, ProcessLookupError):
        if Path("/proc/self/stat").exists():
            return ""
    import psutil

    try:  # not Linux
        found = psutil.Process(process)
        return "" if found.status() == psutil.STATUS_ZOMBIE else f"{found.create_time():.2f}"
    except psutil.Error:
        return ""
