"""The order of the suite, and what a run has that is cut off anywhere: with the real order, worker and file of results,
and a clock that every job moves on by the time that it takes on a card (as estimated; nothing was measured)."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from kernels.bench import jobs, suite, worker
from kernels.bench.jobs import (
    CEILINGS,
    CHECK,
    COMPILED_TABLE,
    GLUON,
    OPERATIONS,
    SANITIZER,
    STEP,
    TABLE,
    Order,
    jobs_of,
)
from kernels.bench.rows import DeviceLostError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
TENTHS = range(1, 11)
START = 40.0  # seconds until a process has imported torch from a cold disk


def firsts(found: list[str], part: str) -> dict[str, int]:
    """By operation, the place of its first job of a part."""
    places: dict[str, int] = {}
    for place, job in enumerate(found):
        if job.startswith(f"{part}/"):
            places.setdefault(job.split("/")[1], place)
    return places


@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
def test_jobs_are_in_the_order_of_their_value(device: torch.device) -> None:
    found = jobs_of(device, False, [])
    assert len(found) == len(set(found))
    assert found[0] == CEILINGS
    rows, checks = firsts(found, TABLE), firsts(found, CHECK)
    assert rows.keys() == checks.keys() == OPERATIONS.keys()
    assert all(checks[name] < rows[name] for name in OPERATIONS)
    assert max(rows.values()) < found.index(STEP)
    table = [place for place, job in enumerate(found) if job.startswith(f"{TABLE}/")]
    assert [place for place in table if place < found.index(STEP)] == sorted(rows.values())  # one of each before it
    late = [place for place, job in enumerate(found) if job.startswith(f"{COMPILED_TABLE}/")]
    assert min(late) > max(table)
    dtype = "bf16" if device == CUDA else "fp32"
    before = [job for job in found[: found.index(STEP)] if job.startswith(f"{CHECK}/")]
    assert all(job.endswith(dtype) for job in before)
    if device == CUDA:  # the sizes of the table are checked first
        assert {"check/attention/attention: long, head of 64, bf16", "check/norm/rms_norm: 3001 x 1152, bf16"} < {
            *before
        }
    assert {job for job in found if job.startswith(f"{CHECK}/")} == {
        f"{CHECK}/{name}/{check.key}" for name, module in OPERATIONS.items() for check in module.checks(device)
    }
    assert (found[-2:] == [GLUON, SANITIZER]) == (device == CUDA)


def test_only_what_is_named() -> None:
    assert jobs_of(CPU, True, ["step"]) == [CEILINGS, STEP]
    assert jobs_of(CUDA, True, ["gluon", "sanitizer"]) == [CEILINGS, GLUON, SANITIZER]
    assert {job.split("/")[1] for job in jobs_of(CUDA, True, ["norm"])[1:]} == {"norm"}
    with pytest.raises(ValueError, match="--only gluon: needs a GPU"):
        jobs_of(CPU, True, ["gluon"])
    with pytest.raises(ValueError, match="--only norms: choose among contrastive, attention"):
        jobs_of(CPU, True, ["norms"])


def test_time_is_kept_for_the_step_only_where_it_is_wanted() -> None:
    order = Order(["table/norm/a", STEP, "table/norm/b"], began=1000.0, seconds=480.0)
    assert order.why_not("table/norm/a", 1320.0) == ""
    assert order.why_not("table/norm/a", 1330.0) == "its time is kept for the training step"
    assert order.why_not(STEP, 1479.0) == order.why_not("table/norm/b", 1479.0) == ""
    assert order.why_not("table/norm/b", 1480.0) == "no time was left"
    short = Order(["table/norm/a", "table/norm/b"], began=1000.0, seconds=60.0)
    assert short.why_not("table/norm/a", 1059.0) == ""
    both = Order(["table/norm/a", STEP], began=1000.0, seconds=120.0)  # a quarter of everything
    assert both.why_not("table/norm/a", 1080.0) == ""
    assert both.why_not("table/norm/a", 1082.0) != ""


def takes(job: str) -> float:
    """Seconds on an H200, by the estimates of an audit."""
    part, _, rest = job.partition("/")
    if part == CHECK:
        return 3.0 if "attention" in rest else 1.2
    if part == TABLE:
        large = 40.0 if "4k" in rest or "16k" in rest or "N256k" in rest else 25.0
        return 8.0 if rest.startswith(("norm", "activation")) else large
    return {CEILINGS: 8.0, STEP: 110.0, GLUON: 60.0, SANITIZER: 60.0, COMPILED_TABLE: 30.0}[part]


class Clock:
    now = 0.0

    def time(self) -> float:
        return self.now


def rows_of(clock: Clock, job: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Four rows, a quarter of its time each."""
    part, _, rest = job.partition("/")
    section = {CHECK: "checks", STEP: "step", CEILINGS: "", SANITIZER: "sanitizer"}.get(part, "rows")
    names: dict[str, Any] = {"operation": rest.split("/")[0] or part, "case": rest, "pass": "forward", "shape": "1"}
    names |= {"group": "kernels", "own": True, "auto": False, "passed": False, "target": None}
    for quarter in "1234":
        clock.now += takes(job) / 4
        if section:
            yield section, {**names, "implementation": quarter, "status": "left out", "message": "a test"}


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Replaces the process by the real worker's loop, run at once; `cut` seconds after the start a signal comes."""
    clock, settings = Clock(), SimpleNamespace(cut=float("inf"))

    class Worker:
        patience = 0.0

        def __init__(self, command: list[str], log: Path) -> None:
            self.order = Order(**json.loads(command[-2]))

        def messages(self, patience: float, end: float) -> Iterator[dict[str, Any]]:
            said: list[tuple[float, dict[str, Any]]] = []
            clock.now += START
            worker.work(self.order, lambda message: said.append((clock.now, message)))
            for at, message in said:
                if at > settings.cut:
                    raise KeyboardInterrupt
                if at > end:
                    raise suite.OutOfTimeError
                yield message

        def stop(self) -> int:
            return 0

    def described(device: torch.device, quick: bool) -> dict[str, Any]:
        return {"name": "card", "card": "a card", "date": "2026-01-02T00:00:00Z", "quick": quick, "torch": "2.11"}

    monkeypatch.setattr(suite, "time", SimpleNamespace(time=clock.time, monotonic=clock.time))
    monkeypatch.setattr(worker, "time", SimpleNamespace(time=clock.time))
    monkeypatch.setattr(worker, "Clock", lambda device: SimpleNamespace(device=device))
    monkeypatch.setattr(worker, "do", lambda job, *_: rows_of(clock, job))
    monkeypatch.setattr(worker, "_start_afresh", lambda device: None)
    monkeypatch.setattr(suite, "Worker", Worker)
    monkeypatch.setattr(suite, "describe", described)
    monkeypatch.setattr(suite, "jobs_of", lambda device, quick, only: jobs.jobs_of(CUDA, quick, only))
    return SimpleNamespace(clock=clock, settings=settings)


def run_until(simulated: SimpleNamespace, folder: Path, cut: float, **more: Any) -> dict[str, Any]:
    simulated.clock.now, simulated.settings.cut = 0.0, cut
    try:
        path = suite.run(folder, show=lambda line: None, **more)
    except KeyboardInterrupt:
        (path,) = folder.glob("*.json")
    results: dict[str, Any] = json.loads(path.read_text())
    return results


def test_what_a_run_has_that_is_cut_off(simulated: SimpleNamespace, tmp_path: Path) -> None:
    """At every tenth of eight minutes. `pytest -s` prints the table."""
    told: dict[int, tuple[list[str], int, int]] = {}
    before = -1
    for tenth in TENTHS:
        results = run_until(simulated, tmp_path / str(tenth), 48.0 * tenth)
        operations = sorted({row["operation"] for row in results["rows"]})
        cases = {row["job"] for row in results["rows"]}
        told[tenth] = (operations, len(cases), len(results["step"]))
        checks = len({row["job"] for row in results["checks"]})
        print(f"{48 * tenth:>4} s: {checks} checks, {len(cases)} cases of {operations}, {len(results['step'])}/4 step")
        everything = sum(len(results[each]) for each in ("checks", "rows", "step", "sanitizer"))
        assert everything >= before  # no later cut has less
        before = everything
        done = {row["job"] for row in (*results["rows"], *results["checks"], *results["step"])}
        left = {row["job"] for row in results["not_run"]}
        assert done | left | {CEILINGS, SANITIZER} >= set(jobs_of(CUDA, False, []))  # what is not there is named
    assert "contrastive" in told[2][0]
    assert set(told[5][0]) == set(OPERATIONS)
    assert told[7][2] == 4
    assert told[10][1] > told[7][1]


def test_a_cut_within_a_job_keeps_its_rows(simulated: SimpleNamespace, tmp_path: Path) -> None:
    whole = run_until(simulated, tmp_path / "whole", float("inf"))
    job = next(row["job"] for row in whole["rows"])
    before = [each for each in jobs_of(CUDA, False, []) if each != job]
    began = START + sum(map(takes, jobs_of(CUDA, False, [])[: jobs_of(CUDA, False, []).index(job)]))
    assert len(before) + 1 == len(jobs_of(CUDA, False, []))
    results = run_until(simulated, tmp_path / "cut", began + takes(job) * 0.6)
    assert [row["implementation"] for row in results["rows"]] == ["1", "2"]
    assert job in {row["job"] for row in results["not_run"]}


@pytest.mark.parametrize("name", [*OPERATIONS, STEP, GLUON])
def test_a_short_run_of_one_part_measures_it(simulated: SimpleNamespace, tmp_path: Path, name: str) -> None:
    results = run_until(simulated, tmp_path, float("inf"), only=[name], minutes=2.0)
    assert results["step"] if name == STEP else results["rows"]


@pytest.mark.parametrize("lost", [False, True])
def test_a_job_that_raises_on_a_lost_device_is_the_last_of_its_process(
    monkeypatch: pytest.MonkeyPatch, lost: bool
) -> None:
    """Where no implementation runs: on drawing the inputs, say. Each later job would fail as well."""

    def do(*_: Any) -> Any:
        raise RuntimeError("an illegal memory access was encountered")

    def raise_if_lost(device: torch.device, error: Exception) -> None:
        if lost:
            raise DeviceLostError(str(error))

    monkeypatch.setattr(worker, "do", do)
    monkeypatch.setattr(worker, "Clock", lambda device: SimpleNamespace(device=device))
    monkeypatch.setattr(worker, "raise_if_lost", raise_if_lost, raising=False)
    said: list[str] = []
    worker.work(Order(["table/norm/a", "table/norm/b"], began=time.time()), lambda message: said.append(message["say"]))
    assert said == (["begin", "lost"] if lost else ["begin", "row", "end"] * 2)


@pytest.mark.parametrize("compiles", [False, True])
def test_a_process_that_compiles_nothing_does_not_import_the_compiler(
    monkeypatch: pytest.MonkeyPatch, compiles: bool
) -> None:
    monkeypatch.delitem(sys.modules, "torch._dynamo", raising=False)
    if compiles:
        monkeypatch.setitem(sys.modules, "torch._dynamo", ModuleType("torch._dynamo"))
    resets: list[bool] = []
    monkeypatch.setattr(torch.compiler, "reset", lambda: resets.append(True))
    worker._start_afresh(CPU)
    assert resets == [True] * compiles
