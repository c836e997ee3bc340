"""Whole `weft` jobs in processes of their own, for tests that kill or stop one of their ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from pretrain.metrics import read_lines

STEPS = 20
RECIPE = [
    "data.test=null",
    "model.vision.layers=1",
    "model.vision.width=32",
    "model.vision.image_size=32",
    "model.text.layers=1",
    "model.text.width=32",
    "model.text.vocab_size=300",
    "model.embed_dim=16",
    "train.global_batch=24",
    f"train.steps={STEPS}",
    "train.warmup=4",
    "train.log_every=1",
    "checkpoint.every=8",
    "eval.every=0",
    "data.workers=1",
    "data.crop_scale=[0.7, 1.0]",
]


class Job:
    """A running `weft train quickstart` on small data; `options` are ranks and restarts."""

    def __init__(self, data: Path, run: Path, *options: str) -> None:
        self.run, self._errors = run, run.with_name(f"{run.name}-errors.txt")
        arguments = ["train", "quickstart", f"data.train={data / 'train'}", f"run.dir={run}", *RECIPE, *options]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        with self._errors.open("wb") as file:
            command = [sys.executable, "-m", "pretrain.cli", *arguments]
            self._process = subprocess.Popen(command, stderr=file, env=environment)

    @property
    def told(self) -> str:
        """What it has said on stderr so far."""
        return self._errors.read_text(errors="replace")

    @property
    def losses(self) -> list[tuple[int, int, float]]:
        """(step, samples, loss) of each step so far."""
        return [(line["step"], line["samples"], line["loss"]) for line in read_lines(self.run / "metrics.jsonl")]

    @property
    def starts(self) -> list[tuple[int, int]]:
        """(step, ranks) of each start so far."""
        path = self.run / "manifest.json"
        if not path.exists():
            return []
        return [(each["step"], each["world"]) for each in json.loads(path.read_text())["starts"]]

    def rank(self, rank: int) -> int:
        """Process id of a rank."""
        [found] = [each for each in _children(self._process.pid) if f"RANK={rank}" in _environment(each)]
        return found

    def loader_workers(self, rank: int) -> list[int]:
        """Process ids of the loader workers of a rank: children of its fork server."""
        return [worker for server in _children(self.rank(rank)) for worker in _children(server)]

    def wait_until(self, holds: Callable[[], bool], seconds: float = 400) -> None:
        """Until something holds of the running job; AssertionError when it ends before."""
        limit = time.monotonic() + seconds
        while not holds():
            assert self._process.poll() is None, self.told
            assert time.monotonic() < limit, self.told
            time.sleep(0.02)

    def wait(self, seconds: float = 400) -> int:
        """Its exit code."""
        try:
            return self._process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(self.told) from None

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.kill()  # its ranks end with it
            self._process.wait()


def _children(parent: int) -> list[int]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if int((folder / "stat").read_text().rpartition(")")[2].split()[1]) == parent:
                found.append(int(folder.name))
        except (OSError, IndexError):
            continue  # it has just ended
    return sorted(found)


def _environment(process: int) -> list[str]:
    try:
        return (Path("/proc") / str(process) / "environ").read_text(errors="replace").split("\0")
    except OSError:
        return []
