"""What the suite does, in which order, and how long each part may take.

A job is named "part/operation/case", and what is not a row of one operation by its part alone.

Design choices:
- By value, so that a run that is cut off has what matters: the first and most telling row of every operation, behind
  a third of its checks in the dtype of the table, those of the table's sizes first; then the training step; then the
  second row of every operation with the next third, and so on; checks in other dtypes behind the third row. What
  torch.compile makes comes after all that starts at once, and what could hang the device (Gluon) after that.
- The training step keeps its time: no job before it is begun that could take it away.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch

from kernels.bench import activation, attention, contrastive, linear_cross_entropy, norm
from kernels.bench.case import COMPILED

OPERATIONS: dict[str, ModuleType] = {
    "contrastive": contrastive,
    "attention": attention,
    "linear_cross_entropy": linear_cross_entropy,
    "norm": norm,
    "activation": activation,
}
CEILINGS, CHECK, TABLE, RANKS, STEP = "ceilings", "check", "table", "ranks", "step"
COMPILED_TABLE, GLUON, SANITIZER = "compiled", "gluon", "sanitizer"
NAMES = (*OPERATIONS, STEP, GLUON, SANITIZER)  # what can be asked for

CHECK_TURNS = 3
WHOLE = 480.0  # seconds of a run that has time for all; these parts take at most, on a GPU:
MOST = {CEILINGS: 10.0, CHECK: 8.0, TABLE: 35.0, RANKS: 60.0, STEP: 120.0}
SANITIZER_SECONDS = 100.0


@dataclass
class Order:
    """What the suite asks of a process.

    skip: as Bench.skip. began: the time.time() at which the suite began; seconds: those that it has.
    """

    jobs: list[str]
    quick: bool = False
    device: str = "cpu"
    ceilings: dict[str, Any] = field(default_factory=dict)
    skip: dict[str, dict[str, str]] = field(default_factory=dict)
    began: float = 0.0
    seconds: float = WHOLE

    def why_not(self, job: str, now: float) -> str:
        """Why a job is not begun any more, or ""."""
        left = self.began + self.seconds - now
        if left <= 0:
            return "no time was left"
        if STEP not in self.jobs[self.jobs.index(job) + 1 :]:
            return ""
        part = min(1.0, self.seconds / WHOLE)  # a short run is a small one of the same kind
        return "its time is kept for the training step" if left < part * (most(job) + MOST[STEP]) else ""


def most(job: str) -> float:
    """Seconds that a job takes at most, on a GPU."""
    return MOST.get(part_of(job), MOST[TABLE])


def part_of(job: str) -> str:
    return job.split("/", 1)[0]


def jobs_of(device: torch.device, quick: bool, only: list[str]) -> list[str]:
    """All jobs of `only` (empty: of everything that this device can do), the most valuable first.

    Raises ValueError for an unknown name, and for one that needs a GPU where there is none.
    """
    gpu = device.type == "cuda"
    if unknown := set(only) - set(NAMES):
        raise ValueError(f"--only {','.join(sorted(unknown))}: choose among {', '.join(NAMES)}")
    if not gpu and (lacking := set(only) & {GLUON, SANITIZER}):
        raise ValueError(f"--only {','.join(sorted(lacking))}: needs a GPU")

    def wanted(name: str) -> bool:
        return not only or name in only

    modules = {name: module for name, module in OPERATIONS.items() if wanted(name)}
    cases = {name: module.cases(device, quick) for name, module in modules.items()}
    checks = {name: module.checks(device) for name, module in modules.items()}
    dtype = torch.bfloat16 if gpu else torch.float32  # of the table
    jobs, compiled = [CEILINGS], list[str]()
    others = [f"{CHECK}/{name}/{each.key}" for name in modules for each in checks[name] if each.dtype != dtype]
    # the sizes of the table are the last that a module lists
    telling = {name: [each.key for each in reversed(checks[name]) if each.dtype == dtype] for name in modules}
    for turn in range(max(CHECK_TURNS, *map(len, cases.values()), 0)):
        for name in modules:
            share = math.ceil(len(telling[name]) / CHECK_TURNS)
            jobs += [f"{CHECK}/{name}/{key}" for key in telling[name][turn * share : (turn + 1) * share]]
            if turn < len(cases[name]):
                case = cases[name][turn]
                jobs.append(f"{TABLE}/{name}/{case.key}")
                compiled += [f"{COMPILED_TABLE}/{name}/{case.key}"] * (COMPILED in case.rounds())
        if turn == 0:
            jobs += [STEP] * wanted(STEP)
            jobs += [RANKS] * (torch.cuda.device_count() > 1 and "contrastive" in modules)
        if turn == CHECK_TURNS - 1:
            jobs += others
    jobs += compiled
    if gpu:
        jobs += [name for name in (GLUON, SANITIZER) if wanted(name)]
    return jobs
