"""Measure all of kernels on this machine, in a few minutes, and write it down as it goes.

    python -m kernels.bench.suite --out DIR [--only attention,contrastive,...] [--quick] [--minutes 8]

The ceilings of the machine first; then every backend against fp64, and times and memory beside peers, the most telling
first; a CLIP training step early; last what could hang, and NVIDIA's compute-sanitizer (jobs.py has the order). Results
are in DIR/<card>-<date>.json from the first row on, so a run that is cut off leaves what it has; a later run of the day
adds its rows, and what it measures again replaces the older. With matplotlib there is a picture of them too. Needs
torch alone; on CPU shapes are small.

Design choices:
- One process measures (worker.py) and this one listens. When the other dies, or says nothing for too long, what it was
  working on becomes a row with the reason, its implementation is out for the rest of the run, and a new process goes
  on. Before an implementation has run once it may be silent for `SILENCE`: it compiles. Whatever libraries print goes
  to DIR/<card>-<date>.log.
- Whatever no time is left for is listed as not run. `GRACE` after its minutes the run ends, whatever it is doing.
- Ctrl-C, TERM and HUP end it in the same way, and nothing that it started outlives it.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import fcntl
import importlib.util
import itertools
import json
import os
import platform
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from kernels.bench.jobs import NAMES, WHOLE, Order, jobs_of
from kernels.bench.process import OutOfTimeError, Worker, interruptible
from kernels.bench.rows import ERROR, MISSING, OURS, REFUSED, WRONG
from kernels.bench.table import live, markdown, verdicts

SILENCE = 150.0  # seconds; compiling one kernel takes tens
SILENCE_ON_GPU = 20.0  # of an implementation that has run there
GRACE = 20.0  # seconds beyond the minutes
COMMAND = (sys.executable, "-m", "kernels.bench.worker")
SECTIONS = ("checks", "rows", "step", "sanitizer", "failures", "not_run")
ROW_NAMES = ("job", "operation", "case", "pass", "group", "implementation")
SOFTWARE = ("card", "cards", "torch", "triton", "cuda", "python")  # results with the same of these can be put together


class Record:
    """The results so far, in a file that is whole at any moment.

    kept: where a file of this name has gone that cannot be added to, or None.
    """

    def __init__(self, path: Path, machine: dict[str, Any]) -> None:
        self.path = path
        self.kept: Path | None = None
        self.results: dict[str, Any] = {"machine": machine, **{name: [] for name in SECTIONS}}
        self._began = time.monotonic()
        self._seconds_before = 0.0
        self._begun: set[str] = set()
        self._killed: list[dict[str, Any]] = []  # rows of this run that tell what ended a process
        self._older: list[dict[str, Any]] = []  # of the job that is done now, from an earlier try
        path.parent.mkdir(parents=True, exist_ok=True)
        self._log = path.with_suffix(".log").open("a")  # whose lock ends with this process, however that ends
        try:
            fcntl.flock(self._log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._log.close()
            raise ValueError(
                f"{path} is being written by another run: wait for its end, or name another folder"
            ) from None
        if path.exists() and not self._go_on():
            names = (path.with_name(f"{path.name}.{number}") for number in itertools.count(1))
            self.kept = path.rename(next(each for each in names if not each.exists()))
        self.save()

    def _go_on(self) -> bool:
        """Add to what a run of the same day has left; False where another machine or library has, or no run."""
        machine = self.results["machine"]
        try:
            before = json.loads(self.path.read_text())
            if any(before["machine"][name] != machine[name] for name in SOFTWARE):
                return False
            commands = before["machine"]["command"].split("; ")
            commands += [machine["command"]] if machine["command"] not in commands else []
            quick = before["machine"]["quick"] and machine["quick"]
            verdicts(before["rows"])
            self._seconds_before = float(before["seconds"])
        except (ValueError, KeyError, TypeError, AttributeError):  # cut off, or somebody else's
            return False
        self.results |= before | {"machine": {**before["machine"], "command": "; ".join(commands), "quick": quick}}
        return True

    def close(self) -> None:
        """Let another run have the file."""
        self._log.close()

    def begin(self, job: str) -> None:
        """From here on rows of an earlier try of a job give way to their like; those that tell of a death stay."""
        self._begun.add(job)
        self.results["not_run"] = [row for row in self.results["not_run"] if row["job"] != job]
        rows = (row for name in SECTIONS for row in self.results[name] if row.get("job") == job)
        self._older = [row for row in rows if not _among(row, self._killed)]

    def add(self, section: str, row: dict[str, Any]) -> None:
        if any(_named_alike(row, each) for each in self._killed):
            return  # the row that tells what it did says more than one of the same job without it
        if row.get("killed"):
            self._killed.append(row)
        stale = [each for each in self._older if _named_alike(row, each)]
        self.results[section] = [*(each for each in self.results[section] if not _among(each, stale)), row]
        self.save()

    def end(self) -> None:
        """The job is done: what it has not measured this time is no row of it any more."""
        for name in SECTIONS if self._older else ():
            self.results[name] = [row for row in self.results[name] if not _among(row, self._older)]
        self._older = []

    def not_run(self, jobs: Iterable[str], why: str) -> None:
        """List jobs as not run, or not to their end; but none that an earlier run has done."""
        done = {
            row.get("job") for name in SECTIONS if name not in ("failures", "not_run") for row in self.results[name]
        }
        left = [job for job in jobs if job in self._begun or job not in done]
        rows = [row for row in self.results["not_run"] if row["job"] not in left]
        self.results["not_run"] = rows + [{"job": job, "why": why} for job in left]
        self.save()

    def save(self) -> None:
        self.results["verdicts"] = verdicts(self.results["rows"])
        self.results["seconds"] = round(self._seconds_before + time.monotonic() - self._began, 1)
        draft = self.path.with_suffix(".part")
        draft.write_text(json.dumps(self.results, indent=1) + "\n")
        draft.replace(self.path)


def _among(row: dict[str, Any], rows: Iterable[dict[str, Any]]) -> bool:
    return any(row is each for each in rows)


def _named_alike(row: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(row.get(name) == other.get(name) for name in ROW_NAMES)


def _print(line: str) -> None:
    print(line, flush=True)


def run(
    out: Path,
    only: list[str] | None = None,
    quick: bool = False,
    minutes: float = WHOLE / 60,
    silence: float = SILENCE,
    show: Callable[[str], None] = _print,
) -> Path:
    """Measure, show rows as they come, and return the file of results.

    Raises ValueError for an unknown name in `only`, for minutes that are none and where another run writes the file,
    and KeyboardInterrupt where a signal ended it; the file is whole.
    """
    if not minutes > 0:
        raise ValueError(f"--minutes {minutes:g}: must be above 0")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    jobs = jobs_of(device, quick, only or [])
    machine = describe(device, quick)
    chosen = [*(["--only", ",".join(only)] if only else []), *(["--quick"] if quick else [])]
    machine["command"] = shlex.join(["python", "-m", "kernels.bench.suite", "--out", "DIR", *chosen])
    record = Record(out / f"{machine['name']}-{machine['date'][:10]}.json", machine)
    if record.kept:
        show(f"{record.kept} is kept: what was in {record.path.name} is of another machine or library, or no results")
    order = Order(jobs, quick, device.type, began=time.time(), seconds=60 * minutes)
    show(f"{machine['card']}, torch {machine['torch']}; results in {record.path}")
    with contextlib.closing(record), interruptible():
        try:
            while order.jobs:
                order.jobs = _one_worker(order, record, silence, show)
        except OutOfTimeError:
            show("the time is over")
            record.not_run(order.jobs, "the time was over")
        except KeyboardInterrupt:
            record.not_run(order.jobs, "interrupted")
            raise
        except RuntimeError as error:
            record.not_run(order.jobs, str(error))
            raise
        record.save()
    return record.path


def _one_worker(order: Order, record: Record, silence: float, show: Callable[[str], None]) -> list[str]:
    """Let one process do the jobs; returns those that are left when it ends, whatever ended it.

    `order.jobs` shrinks with each job that has ended.
    """
    given = list(order.jobs)
    worker = Worker([*COMMAND, json.dumps(asdict(order)), str(os.getpid())], record.path.with_suffix(".log"))
    left = order.jobs
    current, why = "", ""
    started: dict[str, Any] = {}
    try:
        for message in worker.messages(silence, order.began + order.seconds + GRACE):
            say = message["say"]
            worker.patience = silence
            if say == "begin":
                current, started = message["job"], {}
                record.begin(current)
            elif say == "started":
                started = message
                if order.device == "cuda" and not message["first"]:
                    worker.patience = min(silence, SILENCE_ON_GPU)
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
                record.not_run([message["job"]], message["why"])
            elif say == "lost":
                why = message["why"]
            elif say == "end":
                left.remove(message["job"])
                current = ""
                record.end()
    except TimeoutError as error:
        why = str(error)
    finally:
        code = worker.stop()
    ended = "does not end even when killed" if code is None else f"died (exit code {code})"
    if current:
        show(_blame(order, record, current, started, why or f"the process {ended}"))
        if not started:
            left.remove(current)
    elif left and left == given:
        log = record.path.with_suffix(".log")
        raise RuntimeError(f"the measuring process did nothing and {ended}: see {log}")
    return left


def _blame(order: Order, record: Record, job: str, started: dict[str, Any], why: str) -> str:
    """A row for what was being measured when the process died, as text too; the job is done again without it."""
    if not started:
        record.add("failures", {"job": job, "status": ERROR, "message": why})
        return f"{job}: {why}"
    row = {**started["row"], "status": ERROR, "message": why, "job": job, "killed": True}
    group = row.get("group", OURS if started["section"] == "checks" else "")
    once = order.skip.setdefault(row["operation"], {})
    once[f"{group} {row['implementation']}"] = f"it ended the process of {job}"
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
    parser.add_argument("--only", default="", metavar="NAME,...", help=f"of {', '.join(NAMES)}")
    parser.add_argument("--quick", action="store_true", help="the main rows, few repetitions")
    parser.add_argument("--minutes", type=float, default=8.0, help="begin nothing new after about that long")
    arguments = parser.parse_args()
    try:
        path = run(
            arguments.out, [name for name in arguments.only.split(",") if name], arguments.quick, arguments.minutes
        )
    except ValueError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        print("interrupted: the results so far are kept", file=sys.stderr)
        return 130
    except OSError as error:
        print(f"the results cannot be written: {error}", file=sys.stderr)
        return 1
    results = json.loads(path.read_text())
    print("\n" + markdown(results))
    print(picture(path))
    return 0 if holds(results) else 1


def holds(results: dict[str, Any]) -> bool:
    """Whether everything of ours that can run here gave the right numbers, and no part of the suite broke."""
    checked = all(row["passed"] or row["status"] in (REFUSED, MISSING) for row in results["checks"])
    timed = all(row["status"] not in (ERROR, WRONG) for row in results["rows"] if row["group"] == OURS)
    stepped = all(row["status"] not in (ERROR, WRONG) for row in results["step"])
    sane = not any(row.get("errors") for row in results["sanitizer"])
    return checked and timed and stepped and sane and not results["failures"]


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
