"""Fuzz of the whole way: random damages to all files that a run reads, each through check, stats, train and report.

    python -m pytest tests/pretrain/fuzz --damages 2000 --fuzz-workers 2     # in full: `make fuzz`
    python -m pytest tests/pretrain/fuzz --damages 1 --first-damage 1234    # one of them once more

Each is a function of its seed (damages.py). Expected of each command: exit 0 with every sample read or named, or exit 1
or 2 with one sentence; never a traceback, a crash, a hang, or a loss in silence (worker.py). Commands run in a process
that has imported everything once; it is replaced when it does not answer, and after a fault.
"""

from __future__ import annotations

import itertools
import json
import os
import select
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import pytest
from damages import make_base

IN_CI = 16
LOADING, PATIENCE = 600.0, 240.0  # seconds for a worker's start and for the commands of a damage, on a busy machine
NUMBERS = itertools.count()  # of workers
WORKER = Path(__file__).with_name("worker.py")


class Worker:
    """A process that tries damages, replaced when it dies or hangs."""

    def __init__(self, base: Path) -> None:
        self._base = base
        self._errors = base.parent / f"errors.{next(NUMBERS)}.txt"
        self._process: subprocess.Popen[str] | None = None

    def __call__(self, seed: int) -> dict[str, Any]:
        if self._process is None:
            command = [sys.executable, str(WORKER), str(self._base)]
            quiet = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
            with self._errors.open("w") as errors:
                self._process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=quiet
                )
            if told := self._answer("READY", LOADING)[1]:
                return _lost(seed, told)
        assert self._process.stdin
        self._process.stdin.write(f"{seed}\n")
        self._process.stdin.flush()
        line, told = self._answer("RESULT ", PATIENCE)
        if told:
            return _lost(seed, told)
        result: dict[str, Any] = json.loads(line)
        if result["faults"]:
            self.close()
        return result

    def _answer(self, mark: str, patience: float) -> tuple[str, str]:
        """(what follows `mark` in the line that begins with it, ""), or ("", why there is none)."""
        process = self._process
        assert process
        assert process.stdout
        end = time.monotonic() + patience
        while select.select([process.stdout], [], [], max(0.0, end - time.monotonic()))[0]:
            line = process.stdout.readline()
            if line.startswith(mark):
                return line.removeprefix(mark), ""
            if not line:
                code = process.wait()
                self.close()
                last = self._errors.read_text(errors="replace").splitlines()[-1:]
                return "", f"it died: {code}: {''.join(last)[:200]}"
        self.close()
        return "", f"no answer in {patience:.0f} s"

    def close(self) -> None:
        if self._process:
            self._process.kill()
            self._process.wait()
        self._process = None


def _lost(seed: int, told: str) -> dict[str, Any]:
    """The result of a damage that its worker did not answer to."""
    return {"seed": seed, "target": "?", "codes": {}, "outcome": "fault", "faults": [told]}


def table_of(results: list[dict[str, Any]], seconds: float) -> str:
    """How many damages, by what was damaged and by what came of it."""
    rows = Counter((each["target"], each["outcome"]) for each in results)
    total = Counter(each["outcome"] for each in results)
    lines = [
        f"{len(results)} damages in {seconds:.0f} s: {total['trained']} trained with every sample accounted for, "
        f"{total['refused']} refused in one sentence, {total['fault']} faults",
        f"{'damaged':16}{'trained':>9}{'refused':>9}{'faults':>9}",
    ]
    for target in sorted({target for target, _ in rows}):
        counts = (rows[target, outcome] for outcome in ("trained", "refused", "fault"))
        lines.append(f"{target:16}" + "".join(f"{count:>9}" for count in counts))
    return "\n".join(lines)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz") / "base"
    make_base(folder)
    return folder


@pytest.mark.slow
@pytest.mark.timeout(0)  # each damage has its own
def test_no_damage_is_more_than_a_sentence(base: Path, request: pytest.FixtureRequest) -> None:
    option = request.config.getoption
    count, first = option("--damages", 0) or IN_CI, option("--first-damage", 0)
    workers = [Worker(base) for _ in range(option("--fuzz-workers", 1))]

    stopped, began = Event(), time.monotonic()

    def some(number: int) -> list[dict[str, Any]]:
        results: list[dict[str, Any]] = []
        for seed in range(first + number, first + count, len(workers)):
            if stopped.is_set():
                break
            results.append(workers[number](seed))
            if len(results) % 25 == 0:
                print(f"worker {number}: {len(results)} damages, the last {seed}", flush=True)
            for fault in results[-1]["faults"]:
                print(f"damage {seed} ({results[-1]['target']}, {results[-1].get('how')}): {fault}", flush=True)
        return results

    with ThreadPoolExecutor(len(workers)) as pool:
        try:
            results = [each for part in pool.map(some, range(len(workers))) for each in part]
        finally:  # after Ctrl-C, too: without their processes the threads end
            stopped.set()
            for worker in workers:
                worker.close()
    print(table_of(results, time.monotonic() - began), flush=True)
    bad = [each for each in results if each["faults"]]
    assert not bad, "\n".join(
        f"damage {each['seed']}: {each['target']}, {each.get('how')}: {each['faults']}" for each in bad
    )
