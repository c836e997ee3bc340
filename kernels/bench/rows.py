"""Make the rows of a check and of a case: every implementation in turn, and one that raises is a row that says why.

Design choices:
- A row is given out when it exists, not at the end of its case: a run that is cut off keeps it.
- No time without truth: the results of whatever is timed, gradients too, are first compared with those of the first
  peer that runs. What differs is "wrong", and not timed. Small errors are for check.py, on inputs with an fp64 answer.
- Before each repetition `Bench.started` is told what comes, and after an exception on a GPU the device is asked at once
  whether it lives: so a hang, a crash and a lost device are blamed on the right implementation.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from kernels.bench.case import FIRST, Case, Check, Implementation, Tensors, short
from kernels.bench.check import ENOUGH_FOR_A_NORM, Judge
from kernels.bench.measure import BACKWARD, FORWARD, Action, Clock, Run, Timing, as_list, peak_bytes, take_turns
from kernels.bench.peers import MissingPeerError
from kernels.dispatch import TRIAL_FAILED

OURS, PEER = "kernels", "peer"
OK, REFUSED, MISSING, ERROR, WRONG, LEFT_OUT = "ok", "refused", "missing", "error", "wrong", "left out"
CHOOSING = "choice of auto"
MESSAGE_CHARACTERS = 300
SDPA_REFUSALS = ("No available kernel", "No viable backend")  # what torch says when it was left one kernel only
SAME_NUMBERS = {2: 5e-2, 4: 1e-3, 8: 1e-6}  # relative error (norm) by the bytes of the inputs' numbers

Row = dict[str, Any]


class DeviceLostError(Exception):
    """The device answers nothing any more in this process: every later measurement would fail too."""


@dataclass
class Bench:
    """Where and how to measure, and whom to tell.

    round: which implementations (case.py). started(section, row, first): this row is being worked on; should the
    process die, it is the row to blame; `first`: it may have to be compiled. skip: by function and then by group and
    name, why an implementation gets no second chance: it has ended a process.
    """

    clock: Clock
    quick: bool = False
    ceilings: Mapping[str, Any] = field(default_factory=dict)
    skip: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    case_seconds: float = 8.0
    round: str = FIRST
    started: Callable[[str, Row, bool], None] = lambda section, row, first: None

    @property
    def device(self) -> torch.device:
        return self.clock.device

    def skipped(self, function: str, group: str, name: str) -> str:
        """Why it is not run any more, or ""."""
        return self.skip.get(function, {}).get(f"{group} {name}", "")


def check_rows(check: Check, bench: Bench) -> Iterator[Row]:
    """One row a backend of the round: passed, the worst of its quantities, and all of them."""
    function = check.operation.function
    blank: Row = {"operation": function, "case": check.key.split(": ", 1)[1]}
    ours = {
        backend: each
        for backend, each in check.operation.implementations(check.call).items()
        if each.round == bench.round and not bench.skipped(function, OURS, backend)
    }
    if not ours:
        return
    try:
        judge = Judge(check, bench.device)
    except Exception as error:
        raise_if_lost(bench.device, error)
        yield {**blank, "implementation": "reference", "passed": False, **failure(error)}
        return
    for backend, implementation in ours.items():
        row: Row = {**blank, "implementation": backend, "passed": False}
        bench.started("checks", row, True)
        try:
            quantities = judge.rows(implementation.make())
        except Exception as error:
            raise_if_lost(bench.device, error)
            yield {**row, **failure(error)}
            continue
        worst = max(quantities, key=lambda each: (not each["passed"], each["error"] / max(each["allowed"], 1e-300)))
        passed = all(each["passed"] for each in quantities)
        yield {**row, "passed": passed, "status": OK, "worst": worst, "quantities": quantities}


@dataclass
class _Ready:
    """An implementation that has run, its results in the case's layout, and the memory that each pass took."""

    row: Row
    run: Run
    given: list[torch.Tensor]
    results: list[torch.Tensor]
    extra_bytes: dict[str, int]

    def stages(self, which: str) -> Callable[[], Action]:
        return lambda: self.run.stage(which, self.given)


def case_rows(case: Case, bench: Bench) -> Iterator[Row]:
    """One row a pass and implementation of the round."""
    tensors = case.draw(bench.device)
    blank: Row = {
        "operation": case.operation.function,
        "case": case.name,
        "shape": f"{case.shape} {short(next(iter(tensors.values())).dtype)}",
    }
    # what results must agree with
    right = None if bench.round == FIRST else _reference(case, tensors, bench, blank)
    auto = _auto_of(case, tensors, bench, blank)
    ready: dict[str, _Ready] = {}
    for group, name, implementation in _in_order(case, bench.round):
        own = group == OURS and name in case.operation.own
        row = {**blank, "implementation": name, "group": group, "own": own, "auto": group == OURS and name == auto}
        rows = [{**row, "pass": each} for each in case.passes]
        if why := case.left_out.get(name, "") or bench.skipped(case.operation.function, group, name):
            yield from ({**each, "status": LEFT_OUT, "message": why} for each in rows)
            continue
        bench.started("rows", rows[0], True)
        try:
            one = _warm(case, implementation, tensors, row, bench.device)
        except Exception as error:
            raise_if_lost(bench.device, error)
            told = failure(error)
            yield from ({**each, **told} for each in rows)
            continue
        finally:
            _free(bench.device)
        if difference := _difference(one, right, tensors):
            yield from ({**each, "status": WRONG, "message": difference} for each in rows)
            continue
        if right is None:
            right = one
        else:
            one.results = []
        ready[f"{group} {name}"] = one
    yield from _timed(case, ready, bench)


def _in_order(case: Case, which_round: str) -> Iterator[tuple[str, str, Implementation]]:
    """Peers first: ours are compared with them."""
    for group, implementations in ((PEER, case.peers), (OURS, case.operation.implementations(case.call))):
        yield from ((group, name, each) for name, each in implementations.items() if each.round == which_round)


def _timed(case: Case, ready: Mapping[str, _Ready], bench: Bench) -> Iterator[Row]:
    """Times, pass by pass. One of ours that does what a peer does has its time: nothing is measured twice."""
    borrowed = {f"{OURS} {name}": f"{PEER} {peer}" for name, peer in case.same.items()}
    borrowed = {name: peer for name, peer in borrowed.items() if name in ready and peer in ready}
    deadline = time.monotonic() + bench.case_seconds
    for place, which in enumerate(case.passes):
        if place:
            deadline = max(deadline, time.monotonic() + bench.case_seconds / 2)

        def begins(name: str, which: str = which) -> None:
            bench.started("rows", {**ready[name].row, "pass": which}, False)

        stages = {name: each.stages(which) for name, each in ready.items() if name not in borrowed}
        took = take_turns(
            bench.clock, stages, bench.quick, deadline, begins, lambda error: raise_if_lost(bench.device, error)
        )
        for name in ready:
            yield _row_of(case, which, ready[name], took[borrowed.get(name, name)], bench, borrowed.get(name, ""))


def _row_of(case: Case, which: str, one: _Ready, took: Timing | Exception, bench: Bench, measured_as: str) -> Row:
    row: Row = {**one.row, "pass": which, **({"measured_as": measured_as} if measured_as else {})}
    if isinstance(took, Exception):
        return {**row, **failure(took)}
    limits = _against_ceilings(case, which, took.seconds, bench.ceilings)
    figures = {**asdict(took), "extra_bytes": one.extra_bytes[which], **limits}
    return {**row, "status": OK, **figures, "target": _target(case, which, one.row)}


def _warm(case: Case, implementation: Implementation, tensors: Tensors, row: Row, device: torch.device) -> _Ready:
    """Compile, keep the results, and measure the memory of each pass; a backward's is that of forward and backward."""
    run = implementation.run(tensors)
    outputs = as_list(run.forward())
    generator = torch.Generator(device).manual_seed(7)
    usual = [
        torch.randn(each.shape, device=device, generator=generator).to(each.dtype) if each.ndim else
        torch.ones_like(each)
        for each in implementation.usual([each.detach() for each in outputs])
    ]  # fmt: skip
    given = implementation.own(usual)
    results = [each.detach() for each in outputs]
    if case.passes != (FORWARD,):
        gradients = zip(run.gradients(outputs, given), run.leaves, strict=True)
        results += [torch.zeros_like(leaf) if each is None else each for each, leaf in gradients]
    values = len(outputs)
    del outputs
    extra = {}
    for which in case.passes:
        whole = (lambda: run.stage(BACKWARD, given)()) if which == BACKWARD else run.stage(which, given)
        extra[which] = peak_bytes(whole, device)
    results = implementation.usual(results)
    # a gradient that is a number is a sum that cancels: in bf16 that of the sigmoid loss's bias was off by 13%
    compared = results[:values] + [each for each in results[values:] if each.numel() >= ENOUGH_FOR_A_NORM]
    return _Ready(row, run, given, compared, extra)


def _reference(case: Case, tensors: Tensors, bench: Bench, blank: Row) -> _Ready | None:
    """The first implementation of the first round that runs; None where none does."""
    for group, name, implementation in _in_order(case, FIRST):
        if name in case.left_out or bench.skipped(case.operation.function, group, name):
            continue
        row = {**blank, "pass": case.passes[0], "group": group, "own": False, "auto": False, "implementation": name}
        bench.started("rows", row, True)
        try:
            one = _warm(case, implementation, tensors, row, bench.device)
        except Exception as error:  # its own row, of the first round, says why
            raise_if_lost(bench.device, error)
            continue
        if not _difference(one, None, tensors):
            return one
    return None


def _difference(one: _Ready, right: _Ready | None, tensors: Tensors) -> str:
    """What is wrong with the results, or "": nan and infinity are, and what differs from the right ones."""
    limit = SAME_NUMBERS[min(each.dtype.itemsize for each in tensors.values() if each.is_floating_point())]
    for place, own in enumerate(one.results):
        if not own.isfinite().all():
            return f"result {place} is not finite"
    if right is None:
        return ""
    peer = right.row["implementation"]
    if [each.shape for each in one.results] != [each.shape for each in right.results]:
        shapes = [[list(each.shape) for each in which.results] for which in (one, right)]
        return f"results of shapes {shapes[0]}, and {peer} has {shapes[1]}"
    for place, (own, wanted) in enumerate(zip(one.results, right.results, strict=True)):
        error = float((own.float() - wanted.float()).norm() / wanted.float().norm().clamp(min=1e-30))
        if not error <= limit:
            return f"result {place} is off by {error:.1e} from that of {peer}, {limit:.0e} is allowed"
    return ""


def _auto_of(case: Case, tensors: Tensors, bench: Bench, blank: Row) -> str:
    """What "auto" would take; choosing may run a kernel on trial."""
    if bench.skipped(case.operation.function, OURS, CHOOSING) or bench.round not in case.own_rounds():
        return ""
    row = {**blank, "pass": case.passes[0], "group": OURS, "own": False, "auto": False, "implementation": CHOOSING}
    bench.started("rows", row, True)
    try:
        return case.operation.chosen(case.call, tensors)
    except Exception as error:  # the rows of its backends will say what is wrong with the operation
        raise_if_lost(bench.device, error)
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


def failure(error: Exception) -> Row:
    """A status and one line of text."""
    line = (str(error).strip().splitlines() or [""])[0][:MESSAGE_CHARACTERS]
    if isinstance(error, MissingPeerError):
        return {"status": MISSING, "message": line}
    refused = line.startswith(SDPA_REFUSALS) or (isinstance(error, ValueError) and "cannot do this" in line)
    refused = refused and TRIAL_FAILED not in line
    return {"status": REFUSED if refused else ERROR, "message": f"{type(error).__name__}: {line}"}


def raise_if_lost(device: torch.device, error: Exception) -> None:
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
