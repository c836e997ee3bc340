"""The process that touches the device: does one job after another and reports each row at once.

    python -m kernels.bench.worker '{"jobs": [...], ...}'     started by suite.py, which reads what it says

It says lines of JSON on its standard output: {"say": "begin" | "started" | "row" | "facts" | "end" | "not run" |
"lost", ...}. A kernel that hangs, or that kills the process, so costs the suite its row and no more.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from types import ModuleType
from typing import Any

import torch

from kernels.bench import activation, attention, contrastive, linear_cross_entropy, norm, sanitize, step
from kernels.bench.measure import Clock, ceilings, peak_bytes, take_turns
from kernels.bench.peers import present
from kernels.bench.rows import ERROR, OK, Bench, DeviceLostError, Row, case_rows, check_rows, failure

OPERATIONS: dict[str, ModuleType] = {
    "attention": attention,
    "contrastive": contrastive,
    "linear_cross_entropy": linear_cross_entropy,
    "norm": norm,
    "activation": activation,
}
CEILINGS, CHECK, TABLE, RANKS, STEP, SANITIZER = "ceilings", "check", "table", "ranks", "step", "sanitizer"

Say = Callable[[dict[str, Any]], None]


@dataclass
class Order:
    """What the suite asks for.

    jobs: "part/operation/case". skip: by job, implementations that have killed a process. latest: by part, the
    time.time() after which none of its jobs is begun.
    """

    jobs: list[str]
    quick: bool = False
    device: str = "cpu"
    ceilings: dict[str, Any] = field(default_factory=dict)
    skip: dict[str, list[str]] = field(default_factory=dict)
    latest: dict[str, float] = field(default_factory=dict)


def jobs_of(device: torch.device, quick: bool, only: list[str]) -> list[str]:
    """All jobs, in the order of the suite; of the table, first what a quick run would have measured."""
    modules = {name: module for name, module in OPERATIONS.items() if not only or name in only}
    jobs = [CEILINGS]
    jobs += [f"{CHECK}/{name}/{check.key}" for name, module in modules.items() for check in module.checks(device)]
    rows = [(name, case.key) for name, module in modules.items() for case in module.cases(device, quick)]
    first = {(name, case.key) for name, module in modules.items() for case in module.cases(device, True)}
    jobs += [f"{TABLE}/{name}/{key}" for name, key in sorted(rows, key=lambda row: row not in first)]
    if torch.cuda.device_count() > 1 and (not only or "contrastive" in only):
        jobs.append(RANKS)
    if not only or "step" in only:
        jobs.append(STEP)
    if device.type == "cuda":
        jobs += [f"{SANITIZER}/{name}" for name in modules]
    return jobs


def work(order: Order, say: Say) -> None:
    """Do the jobs; an exception of one is a row, and a lost device ends the process's work."""
    device = torch.device(order.device)
    torch.manual_seed(0)
    bench = Bench(Clock(device), order.quick, order.ceilings)
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = False
    for job in order.jobs:
        part = job.split("/", 1)[0]
        if time.time() > order.latest.get(part, float("inf")):
            say({"say": "not run", "job": job, "why": "no time was left"})
            continue
        say({"say": "begin", "job": job})
        bench.skip = order.skip.get(job, [])
        bench.started = partial(_tell_started, say, job)
        try:
            for section, row in do(job, bench, say):
                say({"say": "row", "job": job, "section": section, "row": row})
        except DeviceLostError as error:
            say({"say": "lost", "job": job, "why": f"the device was lost: {error}"})
            return
        except Exception as error:
            say({"say": "row", "job": job, "section": "failures", "row": {"job": job, **failure(error)}})
        say({"say": "end", "job": job})
        _start_afresh(device)


def do(job: str, bench: Bench, say: Say) -> list[tuple[str, Row]]:
    """The rows of one job, each with the section that it belongs to."""
    part, _, rest = job.partition("/")
    name, _, key = rest.partition("/")
    device = bench.device
    if part == CEILINGS:
        bench.ceilings = ceilings(bench.clock, bench.quick)
        say({"say": "facts", "section": "ceilings", "facts": bench.ceilings})
        say({"say": "facts", "section": "peers", "facts": present()})
        return []
    if part == CHECK:
        check = next(each for each in OPERATIONS[name].checks(device) if each.key == key)
        return [("checks", row) for row in check_rows(check, bench)]
    if part == TABLE:
        case = next(each for each in OPERATIONS[name].cases(device, bench.quick) if each.key == key)
        return [("rows", row) for row in case_rows(case, bench)]
    if part == RANKS:
        from kernels.bench import ranks

        return [("rows", row) for row in ranks.rows(device, bench.quick)]
    if part == STEP:
        return [("step", row) for row in step_rows(bench)]
    return [("sanitizer", row) for row in sanitize.rows(name)]


def step_rows(bench: Bench) -> list[Row]:
    """One row a way to write the training step; in turns, like all else."""
    size = step.VIT_L if bench.device.type == "cuda" else step.SMALL
    blank: Row = {"operation": "train step", "case": size.name, "batch": size.batch}
    rows, extra = [], {}
    steps: dict[str, Callable[[], Any]] = {}
    for name, (operations, compile_blocks) in step.implementations(bench.device).items():
        row = {**blank, "implementation": name}
        if name in bench.skip:
            continue
        bench.started("step", row)
        try:
            action = step.training_step(size, operations(), bench.device, compile_blocks)
            first_loss = float(action())
            extra[name] = {"first_loss": first_loss, "extra_bytes": peak_bytes(action, bench.device)}
            steps[name] = action
        except Exception as error:
            rows.append({**row, **failure(error)})
    deadline = time.monotonic() + 2 * bench.case_seconds
    stages = {name: partial(_same, action) for name, action in steps.items()}
    for name, took in take_turns(bench.clock, stages, bench.quick, deadline).items():
        if isinstance(took, Exception):
            rows.append({**blank, "implementation": name, **failure(took)})
            continue
        figures = step.figures(size, took.seconds, bench.device, bench.ceilings)
        spread = {"seconds": took.seconds, "low": took.low, "high": took.high, "n": took.n}
        rows.append({**blank, "implementation": name, "status": OK, **spread, **extra[name], **figures})
    return rows


def _same(action: Callable[[], Any]) -> Callable[[], Any]:
    return action


def _tell_started(say: Say, job: str, section: str, row: Row) -> None:
    say({"say": "started", "job": job, "section": section, "row": {**row, "status": ERROR}})


def _start_afresh(device: torch.device) -> None:
    """Nothing of one job, compiled code included, is there in the next."""
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def main(arguments: Mapping[str, Any]) -> None:
    """Speak on what was standard output; whatever a library prints goes to standard error."""
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(message: dict[str, Any]) -> None:
        channel.write(json.dumps(message) + "\n")
        channel.flush()

    work(Order(**arguments), say)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
