"""Stopped anywhere and resumed, a run is the run it would have been: the same losses to the last bit on one layout."""

from __future__ import annotations

import os
import random
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from ranks import run_ranks

from data_pipeline.scenes.synth import synthesise
from pretrain.checkpoint.format import describe, verify
from pretrain.config import load_recipe
from pretrain.metrics import read_lines

STEPS = 12
RECIPE = [
    "model.vision.layers=1",
    "model.vision.width=32",
    "model.vision.image_size=32",
    "model.text.layers=1",
    "model.text.width=32",
    "model.text.vocab_size=300",
    "model.embed_dim=16",
    "train.global_batch=16",
    f"train.steps={STEPS}",
    "train.warmup=4",
    "train.log_every=1",
    "checkpoint.every=5",
    "eval.every=0",
    "eval.samples=20",
    "data.workers=1",
    "data.crop_scale=[0.7, 1.0]",
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    synthesise(folder, train=100, test=20, size=32, sound=False, processes=1)
    return folder


def overrides(data: Path, run: Path, *more: str) -> list[str]:
    return [f"data.train={data / 'train'}", f"data.test={data / 'test'}", f"run.dir={run}", *RECIPE, *more]


def weft(arguments: list[str]) -> subprocess.Popen[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "pretrain.cli", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def losses(run: Path) -> list[tuple[int, float, float]]:
    return [(line["step"], line["loss"], line["grad_norm"]) for line in read_lines(run / "metrics.jsonl")]


def wait_for_steps(run: Path, steps: int, process: subprocess.Popen[str]) -> None:
    limit = time.monotonic() + 600
    while len(read_lines(run / "metrics.jsonl")) < steps:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < limit, f"{run} did not reach step {steps}"
        time.sleep(0.02)


@pytest.mark.timeout(2000)
@pytest.mark.parametrize("nproc", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_killed_and_interrupted_runs_go_on_as_if_nothing_had_happened(data: Path, tmp_path: Path, nproc: int) -> None:
    # A thousand steps: however late this process is, the run is still there to be killed. The run that is not
    # interrupted comes last, when the step is known up to which it has to go.
    # Saved by the step itself, so that step 11 has one behind it; test_killed.py kills runs that save while they train.
    longer = ["checkpoint.asynchronous=false", "checkpoint.every=10", "train.steps=1000"]
    longer += ["--nproc", str(nproc)] if nproc > 1 else []
    run = tmp_path / "broken"
    command = ["train", "quickstart", *overrides(data, run), *longer]
    process = weft(command)
    wait_for_steps(run, random.Random(nproc).randint(11, 19), process)
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    assert psutil.wait_procs(children, timeout=400)[1] == [], "its ranks notice that their launcher is gone"
    killed = describe(run).step
    assert killed >= 10
    assert killed % 10 == 0

    process = weft(command)
    wait_for_steps(run, killed + 6, process)
    process.send_signal(signal.SIGINT if nproc == 1 else signal.SIGTERM)
    _, told = process.communicate(timeout=300)
    assert process.returncode == (130 if nproc == 1 else 143), told
    stopped = describe(run)
    assert stopped.step >= killed + 6
    assert verify(stopped) == []
    assert f"weft {shlex.join(command)}" in told

    end = stopped.step + 8
    for folder in (run, tmp_path / "whole"):
        process = weft(["train", "quickstart", *overrides(data, folder), *longer, f"train.stop_at={end}"])
        assert process.wait(timeout=600) == 0, process.communicate()
    whole = losses(tmp_path / "whole")
    assert [step for step, _, _ in whole] == list(range(1, end + 1))
    assert losses(run) == whole


def train_in_two_parts(rank: int, world: int, data: Path, out: Path, cases: list[list[str]]) -> list[Any]:
    """For each case: losses of an uninterrupted run, and those of one that stopped at step 7 and went on."""
    from pretrain.train import train

    results = []
    for number, case in enumerate(cases):
        whole, parted = out / f"{world}-{number}-whole", out / f"{world}-{number}-parted"
        assert train(load_recipe("quickstart", overrides(data, whole, *case)), "") == 0
        assert train(load_recipe("quickstart", overrides(data, parted, *case, "train.stop_at=7")), "") == 0
        assert train(load_recipe("quickstart", overrides(data, parted, *case)), "") == 0
        results.append([losses(whole), losses(parted)] if rank == 0 else [])
    return results


@pytest.mark.timeout(2000)
@pytest.mark.parametrize(
    ("world", "cases"),
    [
        (1, [["layout.zero=0"], ["layout.zero=2"], ["layout.zero=3"], ["train.precision=bf16"]]),
        (2, [["layout.zero=1"], ["layout.zero=3"], ["layout.tp=2"], ["train.precision=bf16", "layout.zero=2"]]),
        pytest.param(
            4,
            [["layout.tp=2", "layout.zero=1"], ["layout.tp=2", "layout.zero=3", "train.precision=bf16"]],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_every_layout_resumes_to_the_last_bit(data: Path, tmp_path: Path, world: int, cases: list[list[str]]) -> None:
    for case, (whole, parted) in zip(
        cases, run_ranks(train_in_two_parts, world, data, tmp_path, cases, timeout=900)[0], strict=True
    ):
        assert len(whole) == STEPS
        assert parted == whole, case


def train_once(rank: int, world: int, arguments: list[str]) -> int:
    from pretrain.train import train

    return train(load_recipe("quickstart", arguments), "")


@pytest.mark.slow
@pytest.mark.timeout(2000)
def test_a_run_goes_on_under_another_layout(data: Path, tmp_path: Path) -> None:
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    stable = "train.eps=1e-4"
    assert run_ranks(train_once, 1, overrides(data, whole, stable)) == [0]
    layouts = [(1, 4, "layout.zero=1"), (4, 8, "layout.zero=3"), (2, 10, "layout.tp=2"), (1, STEPS, "layout.zero=0")]
    for world, stop, layout in layouts:
        arguments = overrides(data, moved, stable, f"train.stop_at={stop}", layout)
        assert run_ranks(train_once, world, arguments) == [0] * world
    torch.testing.assert_close(
        [loss for _, loss, _ in losses(moved)], [loss for _, loss, _ in losses(whole)], atol=1e-5, rtol=0
    )
