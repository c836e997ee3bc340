"""The process that touches the device: does one job after another and reports each row at once.

    python -m kernels.bench.worker '{"jobs": [...], ...}' PARENT     started by suite.py, which reads what it says

It says lines of JSON on its standard output: {"say": "begin" | "started" | "row" | "facts" | "end" | "not run" |
"lost", ...}. A kernel that hangs, or that kills the process, so costs the suite its row and no more.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from kernels.bench import sanitize, step
from kernels.bench.case import COMPILED, LAST
from kernels.bench.jobs import (
    CEILINGS,
    CHECK,
    COMPILED_TABLE,
    GLUON,
    OPERATIONS,
    RANKS,
    SANITIZER_SECONDS,
    STEP,
    TABLE,
    Order,
)
from kernels.bench.measure import Clock, ceilings
from kernels.bench.peers import present
from kernels.bench.process import die_with
from kernels.bench.rows import ERROR, Bench, DeviceLostError, Row, case_rows, check_rows, failure, raise_if_lost

Say = Callable[[dict[str, Any]], None]
Rows = Iterator[tuple[str, Row]]  # each with the section that it belongs to


def work(order: Order, say: Say) -> None:
    """Do the jobs; an exception of one is a row, and a lost device ends the process's work."""
    device = torch.device(order.device)
    torch.manual_seed(0)
    bench = Bench(Clock(device), order.quick, order.ceilings, order.skip)
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = False
    for job in order.jobs:
        if why := order.why_not(job, time.time()):
            say({"say": "not run", "job": job, "why": why})
            continue
        say({"say": "begin", "job": job})
        bench.started = partial(_tell_started, say, job)
        try:
            for section, row in _do(job, bench, order, say):
                say({"say": "row", "job": job, "section": section, "row": row})
        except DeviceLostError as error:
            say({"say": "lost", "job": job, "why": f"the device was lost: {error}"})
            return
        say({"say": "end", "job": job})
        _start_afresh(device)


def _do(job: str, bench: Bench, order: Order, say: Say) -> Rows:
    """The rows of a job, the last of which may be an exception that no implementation is to blame for."""
    try:
        yield from do(job, bench, order, say)
    except DeviceLostError:
        raise
    except Exception as error:
        raise_if_lost(bench.device, error)  # else every later job would fail as well
        yield "failures", {"job": job, **failure(error)}


def do(job: str, bench: Bench, order: Order, say: Say) -> Rows:
    """The rows of one job, each when it exists."""
    part, _, rest = job.partition("/")
    name, _, key = rest.partition("/")
    device = bench.device
    if part == CEILINGS:
        bench.ceilings = ceilings(bench.clock, bench.quick)
        say({"say": "facts", "section": "ceilings", "facts": bench.ceilings})
        say({"say": "facts", "section": "peers", "facts": present()})
    elif part == CHECK:
        check = next(each for each in OPERATIONS[name].checks(device) if each.key == key)
        yield from _of("checks", check_rows(check, bench))
    elif part in (TABLE, COMPILED_TABLE):
        case = next(each for each in OPERATIONS[name].cases(device, bench.quick) if each.key == key)
        yield from _of("rows", case_rows(case, replace(bench, round=COMPILED) if part == COMPILED_TABLE else bench))
    elif part == GLUON:
        yield from _last(replace(bench, round=LAST))
    elif part == RANKS:
        from kernels.bench import ranks

        yield from _of("rows", iter(ranks.rows(device, bench.quick)))
    elif part == STEP:
        yield from _of("step", step.rows(bench))
    else:
        left = order.began + order.seconds - time.time()
        yield from _of("sanitizer", iter(sanitize.rows(min(left, SANITIZER_SECONDS))))


def _of(section: str, rows: Iterator[Row]) -> Rows:
    yield from ((section, row) for row in rows)


def _last(bench: Bench) -> Rows:
    """Checks, then times, of the backends that are run after all else."""
    for module in OPERATIONS.values():
        for check in module.checks(bench.device):
            yield from _of("checks", check_rows(check, bench))
    for module in OPERATIONS.values():
        for case in module.cases(bench.device, bench.quick):
            if LAST in case.rounds():
                yield from _of("rows", case_rows(case, bench))


def _tell_started(say: Say, job: str, section: str, row: Row, first: bool) -> None:
    say({"say": "started", "job": job, "section": section, "row": {**row, "status": ERROR}, "first": first})


def _start_afresh(device: torch.device) -> None:
    """Nothing of one job, compiled code included, is there in the next."""
    if "torch._dynamo" in sys.modules:  # else there is nothing to forget, and the import alone takes seconds
        torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def main(arguments: Mapping[str, Any], parent: int) -> None:
    """Speak on what was standard output; whatever a library prints goes to standard error."""
    die_with(parent)
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(message: dict[str, Any]) -> None:
        channel.write(json.dumps(message) + "\n")
        channel.flush()

    work(Order(**arguments), say)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), int(sys.argv[2]))
