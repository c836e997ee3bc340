"""Killed at any moment of a save, a run finds a whole checkpoint to go on from.

This file is also the program that is killed: run by itself it imports everything once, and forks a run for each line
that it reads, so that twenty runs cost one import.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from pretrain.checkpoint.format import LATEST, UNFINISHED, describe, verify

KILLS = 20
RECIPE = [
    "model.vision={layers: 1, width: 64, heads: 4, image_size: 32, patch: 8}",
    "model.text={layers: 1, width: 64, heads: 4, vocab_size: 1024, context: 16}",
    "model.embed_dim=16",
    "train.global_batch=4",
    "train.steps=1000000",
    "data.train=none",
    "checkpoint.every=1",
    "checkpoint.keep=2",
]


def kill(run: int, checkpoints: Path, draw: random.Random, in_a_save: bool) -> None:
    """Kill a run at a random moment; if it must be in a save, hold the run and look, until it is in one."""
    time.sleep(draw.uniform(0, 0.4))
    while in_a_save:
        os.kill(run, signal.SIGSTOP)
        while psutil.Process(run).status() != psutil.STATUS_STOPPED:
            time.sleep(0.001)
        if list(checkpoints.glob(f".step_*{UNFINISHED}")):
            break
        os.kill(run, signal.SIGCONT)
        time.sleep(draw.uniform(0, 0.02))
    os.kill(run, signal.SIGKILL)


@pytest.mark.timeout(1000)
def test_a_run_that_is_killed_while_it_saves_goes_on_from_a_whole_checkpoint(tmp_path: Path) -> None:
    checkpoints = tmp_path / "checkpoints"
    draw = random.Random(0)
    program = subprocess.Popen(
        [sys.executable, __file__, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )
    assert program.stdin is not None
    assert program.stdout is not None
    step, half_written = 0, 0
    try:
        for number in range(KILLS):
            program.stdin.write("go\n")
            program.stdin.flush()
            told = program.stdout.readline().split()
            assert told[:1] == ["resumed"], told
            assert int(told[1]) == step, "the last whole checkpoint is the one to go on from"
            further = step + draw.randint(1, 3)
            while not any(int(path.name[5:]) >= further for path in checkpoints.glob("step_*")):
                time.sleep(0.01)
            kill(int(told[2]), checkpoints, draw, in_a_save=number % 2 == 0)
            assert program.stdout.readline() == "ended\n"

            half_written += bool(list(checkpoints.glob(f".step_*{UNFINISHED}")))
            newest = describe(tmp_path)
            assert (checkpoints / LATEST).resolve() == newest.path
            for path in checkpoints.glob("step_*"):
                assert verify(describe(path)) == []
            assert newest.step >= further
            step = newest.step
    finally:
        program.kill()
        program.wait()
    assert half_written >= KILLS // 2


def run_for_ever(run: Path) -> None:
    """Resume, say so, then train and save at every step."""
    import torch

    from data_pipeline import Batch, Tokenizer
    from pretrain.checkpoint.load import restore_checkpoint, whole_checkpoint
    from pretrain.checkpoint.save import Saver
    from pretrain.config import load_recipe
    from pretrain.parallel.build import build_model
    from pretrain.parallel.engine import Engine
    from pretrain.parallel.groups import start_ranks
    from pretrain.parallel.layout import lay_out
    from pretrain.run_folder import checkpoints_to_resume

    recipe = load_recipe("quickstart", [f"run.dir={run}", *RECIPE])
    layout = lay_out(recipe, 1)
    ranks = start_ranks(layout, torch.device("cpu"))
    engine = Engine(build_model(recipe, layout, ranks), recipe, layout, ranks)
    checkpoint = whole_checkpoint(checkpoints_to_resume(recipe, "data"), ranks, print)
    if checkpoint:
        restore_checkpoint(engine, checkpoint)
    step = checkpoint.step if checkpoint else 0
    saver = Saver(engine, run, recipe, Tokenizer.train(["a red square"], 300), "data")
    text = torch.tensor([[1, 5, 6, 2] + [0] * 12] * 4)
    batch = Batch(torch.zeros(4, 3, 32, 32, dtype=torch.uint8), text, torch.arange(4), torch.arange(4), [])
    engine.step(batch, lr=1e-3)
    if not checkpoint:
        saver.save(0)
        saver.finish()
    print("resumed", step, os.getpid(), flush=True)
    while True:
        engine.step(batch, lr=1e-3)
        step += 1
        saver.save(step)
        saver.poll()


def main(run: Path) -> None:
    import pretrain.checkpoint.load
    import pretrain.checkpoint.save
    import pretrain.run_folder  # noqa: F401  all of it once, for every run that is forked

    for _ in sys.stdin:
        child = os.fork()
        if not child:
            run_for_ever(run)
        os.waitpid(child, 0)
        print("ended", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
