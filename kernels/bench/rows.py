"""Make the rows of a check and of a case: every implementation in turn, and one that raises is a row that says why."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from kernels.bench.case import Case, Check, Implementation, Tensors
from kernels.bench.check import Judge
from kernels.bench.measure import BACKWARD, Action, Clock, Run, as_list, peak_bytes, take_turns
from kernels.bench.peers import MissingPeerError

OURS, PEER = "kernels", "peer"
OK, REFUSED, MISSING, ERROR = "ok", "refused", "missing", "error"
CHOOSING = "choice of auto"
MESSAGE_CHARACTERS = 300
SDPA_REFUSALS = ("No available kernel", "No viable backend")  # what torch says when it was left one kernel only

Row = dict[str, Any]


class DeviceLostError(Exception):
    """The device answers nothing any more in this process: every later measurement would fail too."""


@dataclass
class Bench:
    """Where and how to measure, and whom to tell.

    started(section, row): this row is being worked on; should the process die, it is the row to blame.
    skip: implementations that have killed a process before, and get no second chance.
    """

    clock: Clock
    quick: bool = False
    ceilings: Mapping[str, Any] = field(default_factory=dict)
    skip: Collection[str] = ()
    case_seconds: float = 25.0
    started: Callable[[str, Row], None] = lambda section, row: None

    @property
    def device(self) -> torch.device:
        return self.clock.device


def check_rows(check: Check, bench: Bench) -> list[Row]:
    """One row a backend: passed, the worst of its quantities, and all of them."""
    blank: Row = {"operation": check.operation.function, "case": check.key.split(": ", 1)[1]}
    try:
        judge = Judge(check, bench.device)
    except Exception as error:
        _raise_if_lost(bench.device, error)
        return [{**blank, "implementation": "reference", "passed": False, **failure(error)}]
    rows = []
    for backend, implementation in check.operation.implementations(check.call).items():
        if backend in bench.skip:
            continue
        row: Row = {**blank, "implementation": backend, "passed": False}
        bench.started("checks", row)
        try:
            quantities = judge.rows(implementation.make())
        except Exception as error:
            _raise_if_lost(bench.device, error)
            rows.append({**row, **failure(error)})
            continue
        worst = max(quantities, key=lambda each: (not each["passed"], each["error"] / max(each["allowed"], 1e-300)))
        passed = all(each["passed"] for each in quantities)
        rows.append({**row, "passed": passed, "status": OK, "worst": worst, "quantities": quantities})
    return rows


@dataclass
class _Ready:
    """An implementation that has run once, and what it took."""

    row: Row
    run: Run
    given: list[torch.Tensor]
    extra_bytes: dict[str, int]

    def stages(self, which: str) -> Callable[[], Action]:
        return lambda: self.run.stage(which, self.given)


def case_rows(case: Case, bench: Bench) -> list[Row]:
    """One row a pass and implementation."""
    tensors = case.draw(bench.device)
    auto = _auto_of(case, tensors, bench)
    rows: list[Row] = []
    ready: dict[str, _Ready] = {}
    ours = case.operation.implementations(case.call)
    groups = ((OURS, ours), (PEER, case.peers))
    for group, implementations in groups:
        for name, implementation in implementations.items():
            row: Row = {
                "operation": case.operation.function,
                "case": case.name,
                "shape": f"{case.shape} {_dtype_of(tensors)}",
                "implementation": name,
                "group": group,
                "own": group == OURS and name in case.operation.own,
                "auto": group == OURS and name == auto,
            }
            if name in bench.skip:
                continue
            bench.started("rows", {**row, "pass": case.passes[0]})
            try:
                ready[f"{group} {name}"] = _warm(case, implementation, tensors, row, bench.device)
            except Exception as error:
                _raise_if_lost(bench.device, error)
                rows += [{**row, "pass": each, **failure(error)} for each in case.passes]
            _free(bench.device)
    deadline = time.monotonic() + bench.case_seconds
    for which in case.passes:
        stages = {name: each.stages(which) for name, each in ready.items()}
        for name, took in take_turns(bench.clock, stages, bench.quick, deadline).items():
            one = ready[name]
            if isinstance(took, Exception):
                _raise_if_lost(bench.device, took)
                rows.append({**one.row, "pass": which, **failure(took)})
                continue
            limits = _against_ceilings(case, which, took.seconds, bench.ceilings)
            figures = {**asdict(took), "extra_bytes": one.extra_bytes[which], **limits}
            rows.append({**one.row, "pass": which, "status": OK, **figures, "target": _target(case, which, one.row)})
    return rows


def _warm(case: Case, implementation: Implementation, tensors: Tensors, row: Row, device: torch.device) -> _Ready:
    """Compile, then measure the memory of each pass; a backward's is that of forward and backward."""
    run = implementation.run(tensors)
    generator = torch.Generator(device).manual_seed(7)
    given = [
        torch.randn(each.shape, device=device, generator=generator).to(each.dtype) if each.ndim else
        torch.ones_like(each.detach())
        for each in as_list(run.forward())
    ]  # fmt: skip
    extra = {}
    for which in case.passes:
        run.stage(which, given)()
        whole = (lambda: run.stage(BACKWARD, given)()) if which == BACKWARD else run.stage(which, given)
        extra[which] = peak_bytes(whole, device)
    return _Ready(row, run, given, extra)


def _auto_of(case: Case, tensors: Tensors, bench: Bench) -> str:
    """What "auto" would take; choosing may run a kernel on trial."""
    if CHOOSING in bench.skip:
        return ""
    blank: Row = {"operation": case.operation.function, "case": case.name, "shape": case.shape, "pass": case.passes[0]}
    told = {"group": OURS, "own": False, "auto": False, "implementation": CHOOSING}
    bench.started("rows", {**blank, **told})
    try:
        return case.operation.chosen(case.call, tensors)
    except Exception as error:  # the rows of its backends will say what is wrong with the operation
        _raise_if_lost(bench.device, error)
        return ""


def _target(case: Case, which: str, row: Row) -> float | None:
    """The aim for this row, as a part of the best peer's time."""
    wanted = case.targets.get(which, {})
    return wanted.get(row["implementation"], wanted.get("")) if row["own"] else None


def _against_ceilings(case: Case, which: str, seconds: float, ceilings: Mapping[str, Any]) -> Row:
    """Rates, the shortest time that the ceilings allow, and the part of it that was reached."""
    flops, moved = case.flops.get(which, 0.0), case.bytes.get(which, 0.0)
    rates: Row = {"flops_per_second": flops / seconds, "bytes_per_second": moved / seconds}
    if not ceilings:
        return rates
    floors = {"matrix": flops / ceilings["flops_per_second"], "memory": moved / ceilings["bytes_per_second"]}
    bound = max(floors, key=lambda each: floors[each])
    return {**rates, "bound": bound, "floor_seconds": floors[bound], "fraction": floors[bound] / seconds}


def _dtype_of(tensors: Tensors) -> str:
    from kernels.bench.case import short

    return short(next(iter(tensors.values())).dtype)


def failure(error: Exception) -> Row:
    """A status and one line of text."""
    line = (str(error).strip().splitlines() or [""])[0][:MESSAGE_CHARACTERS]
    if isinstance(error, MissingPeerError):
        return {"status": MISSING, "message": line}
    refused = line.startswith(SDPA_REFUSALS) or (isinstance(error, ValueError) and "cannot do this" in line)
    return {"status": REFUSED if refused else ERROR, "message": f"{type(error).__name__}: {line}"}


def _raise_if_lost(device: torch.device, error: Exception) -> None:
    """An illegal memory access, for one, spoils the whole process."""
    if device.type != "cuda":
        return
    try:
        torch.cuda.synchronize(device)
        torch.zeros(1, device=device).item()
    except Exception:
        raise DeviceLostError(failure(error)["message"]) from error


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
