"""What a run writes down while it trains: metrics.jsonl for scripts, TensorBoard for the eye, a line for the terminal.

metrics.jsonl has one object a logged step: step, epoch, samples, loss, loss_<objective>, grad_norm, lr, skipped,
logit_scale, order (the order certificate, see certificate.py), samples_per_s, tflops (a rank), mfu (null where the
card's peak is not known), data_wait (share of the time spent waiting for data, 0 to 1), memory_gib (a rank's peak),
time (Unix seconds). evaluation.jsonl has one object an evaluation.
A resumed run cuts both files back to the step it resumes from, so each step stands there once.
"""

from __future__ import annotations

import json
import math
import resource
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from data_pipeline.index import written_whole
from data_pipeline.strict_json import read_json, strict_json
from pretrain.errors import DivergedError
from pretrain.run_folder import record_divergence

METRICS, EVALUATION, EXAMPLES = "metrics.jsonl", "evaluation.jsonl", "examples.json"
WAITING = 0.2  # share of the time: to wait more than that is worth a hint


class RunLog:
    """The growing files of a run folder; only the first rank holds one."""

    def __init__(self, run: Path, resumed_step: int) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        _cut_back(run / METRICS, resumed_step)
        if _cut_back(run / EVALUATION, resumed_step) or not resumed_step:
            (run / EXAMPLES).unlink(missing_ok=True)  # they are of an evaluation that no longer counts
        self._run = run
        self._metrics = (run / METRICS).open("a", encoding="utf-8")
        self._evaluation = (run / EVALUATION).open("a", encoding="utf-8")
        self._board = SummaryWriter(str(run / "tensorboard"), purge_step=resumed_step + 1)

    def step(self, line: dict[str, Any]) -> None:
        """One logged step; what is not finite is written as null."""
        _append(self._metrics, line)
        for name, value in line.items():
            if name not in ("step", "time", "order") and value is not None and math.isfinite(value):
                self._board.add_scalar(f"train/{name}", value, line["step"])

    def evaluation(self, line: dict[str, Any]) -> None:
        """One evaluation: step, and numbers in a tree; what is not finite is written as null."""
        _append(self._evaluation, line)
        for name, value in _leaves(line):
            self._board.add_scalar(f"evaluation/{name}", value, line["step"])

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._metrics.close()
        self._evaluation.close()
        self._board.close()
        if isinstance(error, DivergedError):
            record_divergence(self._run, error)


class Clock:
    """Speed, work and waiting since the last logged step."""

    def __init__(self) -> None:
        self.began = self._since = time.perf_counter()
        self._waited = self._operations = 0.0
        self._steps = 0

    def waited(self, seconds: float) -> None:
        """A step has waited so long for its batch."""
        self._waited += seconds
        self._steps += 1

    def computed(self, operations: float) -> None:
        """A step has made so many floating point operations."""
        self._operations += operations

    def lap(self) -> tuple[float, float, float]:
        """(seconds a step, share of the time spent waiting for data, operations a second) since the last lap."""
        now = time.perf_counter()
        elapsed = max(now - self._since, 1e-9)
        result = elapsed / max(self._steps, 1), self._waited / elapsed, self._operations / elapsed
        self._since, self._waited, self._operations, self._steps = now, 0.0, 0.0, 0
        return result

    def pause(self, seconds: float) -> None:
        """Take out time that was not training: an evaluation, a checkpoint."""
        self._since += seconds


class WaitHint:
    """Says once what to change when training waits for data, line after line."""

    def __init__(self, loader: str, workers: int, ranks: int, cores: int) -> None:
        self._loader, self._workers, self._ranks, self._cores = loader, workers, ranks, cores
        self._in_a_row, self._said = 0, False

    def look(self, share: float) -> str:
        """The hint, when so large a share of the time was waited for the third logged line in a row; else ""."""
        self._in_a_row = self._in_a_row + 1 if share > WAITING else 0
        if self._said or self._in_a_row < 3:
            return ""
        self._said = True
        spare = self._cores // self._ranks
        if self._loader == "ray":
            change = f"raise data.most_workers (data.workers={self._workers}), and give Ray nodes with free processors"
        elif self._workers < spare:
            workers = f"raise data.workers from {self._workers} to at most {spare} (the cores per rank)"
            change = f"{workers}, or store smaller images"
        else:
            change = (
                f"all {self._cores} cores decode already: data.loader=ray decodes on other machines too, and images "
                "stored nearer to model.vision.image_size decode faster"
            )
        return f"training waits for data {share:.0%} of its time: {change}"


class ProgressLine:
    """The live line on stderr: one that rewrites itself on a terminal, one a logged step elsewhere."""

    def __init__(self, steps: int, global_batch: int) -> None:
        self._steps, self._global_batch = steps, global_batch
        self._live = sys.stderr.isatty()

    def show(self, line: dict[str, Any]) -> None:
        """Loss, speed, data wait and time to go."""
        left = (self._steps - line["step"]) * self._global_batch / line["samples_per_s"]
        text = (
            f"step {line['step']}/{self._steps}  loss {line['loss']:.4f}  {line['samples_per_s']:.0f} samples/s  "
            f"data wait {line['data_wait']:.0%}  ETA {duration(left)}"
        )
        self._print(text, end="\r" if self._live else "\n")

    def say(self, text: str) -> None:
        """A sentence that stays."""
        self._print(text + (" " * 40 if self._live else ""))

    def _print(self, text: str, end: str = "\n") -> None:
        with suppress(OSError):  # nobody reads it any more, as after a terminal was closed: the run goes on, or saves
            print(text, end=end, file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """ "2 h 05 min", "3 min 20 s" or "12 s"."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 60} min {whole % 60:02d} s" if whole >= 60 else f"{whole} s"


def peak_memory_gib(device: torch.device) -> float:
    """This rank's peak so far: of the card's allocator, or of the process on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    kibibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "darwin" else 1)
    return kibibytes / 2**20


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a .jsonl file up to the first line that is none (cut short by a crash); [] without a file."""
    lines: list[dict[str, Any]] = []
    if not path.is_file():
        return lines
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = read_json(text)
        except ValueError:
            break
        if not isinstance(line, dict):
            break
        lines.append(line)
    return lines


def _cut_back(path: Path, step: int) -> int:
    """Drop the lines after `step`; returns how many those were."""
    lines = read_lines(path)
    kept = [line for line in lines if isinstance(line.get("step"), int) and line["step"] <= step]
    with written_whole(path) as unfinished:
        unfinished.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
    return len(lines) - len(kept)


def _append(file: Any, line: dict[str, Any]) -> None:
    file.write(strict_json(line) + "\n")
    file.flush()


def _leaves(tree: dict[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    found: list[tuple[str, float]] = []
    for name, value in tree.items():
        if isinstance(value, dict):
            found += _leaves(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and name != "step" and math.isfinite(value):
            found.append((prefix + name, float(value)))
    return found
