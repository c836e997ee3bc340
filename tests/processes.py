"""Processes that a test looks for."""

import psutil


def workers_of(process: int | None = None) -> list[psutil.Process]:
    """The workers (of loaders, of run_jobs) of a process, this one by default: children of its fork server."""
    mine = psutil.Process(process).children()
    return [worker for child in mine if "fork_server" in " ".join(child.cmdline()) for worker in child.children()]
