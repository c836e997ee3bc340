"""Measure all of kernels on this machine, in a few minutes, and write it down as it goes.

    python -m kernels.bench.suite --out DIR [--only attention,contrastive,...] [--quick] [--minutes 8]

In order: the ceilings of the machine; every backend against fp64; times and memory beside peers; a CLIP training step;
NVIDIA's compute-sanitizer. Results are in DIR/<card>-<date>.json from the first row on, so a run that is cut off leaves
what it has; with matplotlib there is a picture of them too. Needs torch alone; on CPU shapes are small.

Design choices:
- One process measures (worker.py) and this one listens. When the other dies, or says nothing for `SILENCE` seconds,
  what it was working on becomes a row with the reason, and a new process goes on with the rest. Whatever libraries
  print goes to DIR/<card>-<date>.log.
- Whatever no time is left for is listed as not run. The training step and the sanitizer have their time kept for them.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.util
import json
import os
import platform
import re
import select
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from kernels.bench.rows import ERROR, MISSING, REFUSED
from kernels.bench.table import live, markdown, verdicts
from kernels.bench.worker import CHECK, OPERATIONS, RANKS, SANITIZER, STEP, TABLE, Order, jobs_of

SILENCE = 150.0  # seconds; compiling one kernel takes tens
STEP_SECONDS, SANITIZER_SECONDS = 90.0, 60.0  # kept for them at the end
CHECK_PART = 0.45  # of the time
COMMAND = (sys.executable, "-m", "kernels.bench.worker")
SECTIONS = ("checks", "rows", "step", "sanitizer", "failures", "not_run")


class Record:
    """The results so far, in a file that is whole at any moment."""

    def __init__(self, path: Path, machine: dict[str, Any]) -> None:
        self.path = path
        self.results: dict[str, Any] = {"machine": machine, **{name: [] for name in SECTIONS}}
        self._began = time.monotonic()
        path.parent.mkdir(parents=True, exist_ok=True)
        self.save()

    def add(self, section: str, row: dict[str, Any]) -> None:
        self.results[section].append(row)
        self.save()

    def forget(self, job: str) -> None:
        """Drop the rows of a job that is done again, except those that tell why."""
        for name in SECTIONS:
            self.results[name] = [row for row in self.results[name] if row.get("job") != job or row.get("killed")]

    def save(self) -> None:
        self.results["verdicts"] = verdicts(self.results["rows"])
        self.results["seconds"] = round(time.monotonic() - self._began, 1)
        draft = self.path.with_suffix(".part")
        draft.write_text(json.dumps(self.results, indent=1) + "\n")
        draft.replace(self.path)


class Worker:
    """A process that does jobs; its messages are read with a limit on its silence."""

    def __init__(self, order: Order, log: Path) -> None:
        command = [*COMMAND, json.dumps(asdict(order))]
        path = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(path)}
        with log.open("a") as errors:
            self._process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=errors, env=environment, start_new_session=True
            )
        self._unread = b""

    def messages(self, silence: float) -> Iterator[dict[str, Any]]:
        """What it says until it ends. Raises TimeoutError when it says nothing for too long."""
        assert self._process.stdout is not None
        pipe = self._process.stdout.fileno()
        while True:
            if not select.select([pipe], [], [], silence)[0]:
                raise TimeoutError(f"no answer for {silence:.0f} s; the process was killed")
            piece = os.read(pipe, 1 << 16)
            if not piece:
                return
            *lines, self._unread = (self._unread + piece).split(b"\n")
            yield from map(json.loads, lines)

    def stop(self) -> int:
        """Kill it with the processes that it has started; its exit code."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        return self._process.wait()


def _print(line: str) -> None:
    print(line, flush=True)


def run(
    out: Path,
    only: list[str] | None = None,
    quick: bool = False,
    minutes: float = 8.0,
    silence: float = SILENCE,
    show: Callable[[str], None] = _print,
) -> Path:
    """Measure, show rows as they come, and return the file of results. Raises ValueError for an unknown operation."""
    known = (*OPERATIONS, STEP)
    if unknown := set(only or ()) - set(known):
        raise ValueError(f"--only {','.join(sorted(unknown))}: choose among {', '.join(known)}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    machine = describe(device, quick)
    chosen = [*(["--only", ",".join(only)] if only else []), *(["--quick"] if quick else [])]
    machine["command"] = shlex.join(["python", "-m", "kernels.bench.suite", "--out", "DIR", *chosen])
    record = Record(out / f"{machine['name']}-{machine['date'][:10]}.json", machine)
    order = Order(jobs_of(device, quick, only or []), quick, device.type, latest=_latest(minutes, quick))
    show(f"{machine['card']}, torch {machine['torch']}; results in {record.path}")
    while order.jobs:
        order.jobs = _one_worker(order, record, silence, show)
    record.save()
    return record.path


def _latest(minutes: float, quick: bool) -> dict[str, float]:
    """When the last job of each part may begin; checks of many kernels must leave time to measure some."""
    now = time.time()
    end = now + 60 * minutes
    measured = end - SANITIZER_SECONDS - (0.0 if quick else STEP_SECONDS)
    parts = {CHECK: now + CHECK_PART * 60 * minutes, TABLE: measured, RANKS: measured}
    return {**parts, STEP: end - SANITIZER_SECONDS, SANITIZER: end - 20}


def _one_worker(order: Order, record: Record, silence: float, show: Callable[[str], None]) -> list[str]:
    """Let one process do the jobs; returns those that are left when it ends, whatever ended it."""
    worker = Worker(order, record.path.with_suffix(".log"))
    left = list(order.jobs)
    current, why = "", ""
    started: dict[str, Any] = {}
    try:
        for message in worker.messages(silence):
            say = message["say"]
            if say == "begin":
                current, started = message["job"], {}
            elif say == "started":
                started = message
            elif say == "facts":
                record.results[message["section"]] = message["facts"]
                if message["section"] == "ceilings":
                    order.ceilings = message["facts"]
                record.save()
            elif say == "row":
                record.add(message["section"], {**message["row"], "job": message["job"]})
                show(line_of(message["section"], message["row"]))
            elif say == "not run":
                left.remove(message["job"])
                record.add("not_run", {"job": message["job"], "why": message["why"]})
            elif say == "lost":
                why = message["why"]
            elif say == "end":
                left.remove(message["job"])
                current = ""
    except TimeoutError as error:
        why = str(error)
    except KeyboardInterrupt:
        for job in left:
            record.add("not_run", {"job": job, "why": "interrupted"})
        raise
    finally:
        code = worker.stop()
    if current:
        show(_blame(order, record, current, started, why or f"the process died (exit code {code})"))
        if not started:
            left.remove(current)
    elif left and left == order.jobs:
        raise RuntimeError(
            f"the measuring process did nothing and left with exit code {code}: see {record.path.with_suffix('.log')}"
        )
    return left


def _blame(order: Order, record: Record, job: str, started: dict[str, Any], why: str) -> str:
    """A row for what was being measured when the process died, as text too; the job is done again without it."""
    if not started:
        record.add("failures", {"job": job, "status": ERROR, "message": why})
        return f"{job}: {why}"
    record.forget(job)
    row = {**started["row"], "status": ERROR, "message": why, "job": job, "killed": True}
    order.skip.setdefault(job, []).append(row["implementation"])
    record.add(started["section"], row)
    return line_of(started["section"], row)


def line_of(section: str, row: dict[str, Any]) -> str:
    """A row as it is shown while the suite runs."""
    if section in ("rows", "step"):
        return live(row)
    if section != "checks":
        return f"{section}: {json.dumps(row)}"
    head = f"{row['operation']:<22} {row['case']:<31} kernels {row['implementation']:<22}"
    if row["status"] != "ok":
        return f"{head} {row['status']}: {row['message']}"
    worst = row["worst"]
    told = "ok   " if row["passed"] else "WRONG"
    return f"{head} {told} {worst['quantity']} off by {worst['error']:.1e}, allowed {worst['allowed']:.1e}"


def describe(device: torch.device, quick: bool) -> dict[str, Any]:
    """The machine and the software."""
    gpu = device.type == "cuda"
    card = torch.cuda.get_device_name(device) if gpu else f"CPU, {_cpu_name()}, {torch.get_num_threads()} threads"
    triton = "none"
    if importlib.util.find_spec("triton"):
        from importlib.metadata import PackageNotFoundError, version

        try:
            triton = version("triton")
        except PackageNotFoundError:
            triton = "of an unknown version"
    return {
        "name": re.sub(r"[^a-z0-9]+", "-", (card if gpu else "cpu").lower()).strip("-"),
        "card": card,
        "cards": torch.cuda.device_count(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "torch": torch.__version__,
        "triton": triton,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "quick": quick,
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m kernels.bench.suite", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the results go")
    parser.add_argument("--only", default="", metavar="NAME,...", help=f"of {', '.join((*OPERATIONS, STEP))}")
    parser.add_argument("--quick", action="store_true", help="the main rows, few repetitions")
    parser.add_argument("--minutes", type=float, default=8.0, help="begin nothing new after about that long")
    arguments = parser.parse_args()
    try:
        path = run(
            arguments.out, [name for name in arguments.only.split(",") if name], arguments.quick, arguments.minutes
        )
    except ValueError as error:
        parser.error(str(error))
    results = json.loads(path.read_text())
    print("\n" + markdown(results))
    print(picture(path))
    return 0 if holds(results) else 1


def holds(results: dict[str, Any]) -> bool:
    """Whether every backend that can run here gave the right numbers."""
    return all(row["passed"] or row["status"] in (REFUSED, MISSING) for row in results["checks"])


def picture(path: Path) -> str:
    """Draw a results file where matplotlib is there; says what was done."""
    if importlib.util.find_spec("matplotlib") is None:
        return f"no picture: matplotlib is not here; elsewhere: python -m kernels.bench.plot {path.name}"
    from kernels.bench.plot import draw

    try:
        return f"picture: {draw(path)}"
    except ValueError as nothing_to_compare:
        return f"no picture: {nothing_to_compare}"


if __name__ == "__main__":
    sys.exit(main())
