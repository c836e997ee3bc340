"""Saving beside training: when a checkpoint is complete, what happens when a rank cannot write, and which ones stay."""

from __future__ import annotations

import resource
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks

from data_pipeline import Tokenizer
from pretrain.checkpoint.format import DESCRIPTION, LATEST, complete_steps, describe, step_folder, verify
from pretrain.checkpoint.save import _drop_old
from pretrain.config import load_recipe

SMALL = [
    "model.vision={layers: 1, width: 32, heads: 4, image_size: 32, patch: 8}",
    "model.text={layers: 1, width: 32, heads: 4, vocab_size: 300, context: 16}",
    "train.global_batch=4",
    "data.train=none",
    "checkpoint.every=2",
]


@pytest.mark.parametrize("keep", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("there", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("keep_every", [0, 20, 30])
def test_the_newest_those_before_it_and_every_mth_stay(tmp_path: Path, keep: int, there: int, keep_every: int) -> None:
    steps = [10 * (number + 1) for number in range(there)]
    for step in [*steps, 1000]:  # the last is of a run that was rolled back
        folder = step_folder(tmp_path, step)
        folder.mkdir(parents=True)
        (folder / DESCRIPTION).write_text("{}")
    foreign = tmp_path / "checkpoints" / "step_00000005"
    foreign.mkdir()
    _drop_old(step_folder(tmp_path, steps[-1]), keep, keep_every)
    stay = [step for step in steps if step in steps[-keep:] or (keep_every and step % keep_every == 0)]
    assert complete_steps(tmp_path / "checkpoints") == [step_folder(tmp_path, step) for step in stay]
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {
        foreign.name,
        *(step_folder(tmp_path, step).name for step in stay),
    }


def start(world: int, run: Path, *keys: str) -> tuple[Any, Any, Any]:
    """(engine, saver, ranks) of a small model."""
    from pretrain.checkpoint.save import Saver
    from pretrain.parallel.build import build_model
    from pretrain.parallel.engine import Engine
    from pretrain.parallel.groups import start_ranks
    from pretrain.parallel.layout import lay_out

    recipe = load_recipe("quickstart", [*SMALL, *keys])
    layout = lay_out(recipe, world)
    ranks = start_ranks(layout, torch.device("cpu"))
    engine = Engine(build_model(recipe, layout, ranks), recipe, layout, ranks)
    return engine, Saver(engine, run, recipe, Tokenizer.train(["a red square"], 300), "data"), ranks


def save_with_a_slow_rank(rank: int, world: int, run: Path) -> list[bool]:
    """Whether the checkpoint was complete after each of three polls; the last rank's thread ends before the third."""
    import threading

    from pretrain.checkpoint import save as module
    from pretrain.parallel.groups import stop_ranks

    _, saver, ranks = start(world, run)
    disk_is_free = threading.Event()
    write = module.write_tensors

    def waiting(*arguments: Any) -> str:
        if rank == world - 1:
            disk_is_free.wait()
        return write(*arguments)

    module.write_tensors = waiting
    complete = []
    saver.save(2)
    for _ in range(2):
        saver.poll()
        complete.append((run / "checkpoints" / LATEST).exists())
    disk_is_free.set()
    saver.finish()
    complete.append((run / "checkpoints" / LATEST).exists())
    stop_ranks(ranks)
    return complete


def test_it_is_complete_when_the_last_rank_has_written(tmp_path: Path) -> None:
    assert run_ranks(save_with_a_slow_rank, 2, tmp_path) == [[False, False, True]] * 2
    assert verify(describe(tmp_path)) == []


def save_with_a_rank_that_cannot_write(rank: int, world: int, run: Path) -> list[str]:
    """What each rank is told when files of the last one may not grow: the system refuses, as a full disk does."""
    from pretrain.errors import WeftError
    from pretrain.parallel.groups import stop_ranks

    _, saver, ranks = start(world, run)
    saver.save(2)
    saver.finish()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == world - 1:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    told = []
    for end in (saver.finish, lambda: saver.save(6)):  # the next save finds out too
        saver.save(4)
        try:
            end()
        except WeftError as error:
            told.append(str(error))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    stop_ranks(ranks)
    return told


def test_a_rank_that_cannot_write_ends_all_and_leaves_nothing_half_written(tmp_path: Path) -> None:
    first, second = run_ranks(save_with_a_rank_that_cannot_write, 2, tmp_path)
    assert first == second
    assert len(first) == 2
    for sentence in first:
        assert "step 4 could not be saved" in sentence
        assert "File too large" in sentence
    left = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert left == {LATEST, step_folder(tmp_path, 2).name}
    assert describe(tmp_path).step == 2
    assert verify(describe(tmp_path)) == []


def save_into_two_folders(rank: int, world: int, run: Path) -> str:
    """What each rank is told when it has a folder of its own."""
    from pretrain.checkpoint import save as module
    from pretrain.errors import WeftError
    from pretrain.parallel.groups import stop_ranks

    module.APPEARS = 0.5
    _, saver, ranks = start(world, run / str(rank))
    told = ""
    saver.save(2)
    try:
        saver.finish()
    except WeftError as error:
        told = str(error)
    stop_ranks(ranks)
    return told


def test_what_lies_in_two_folders_is_no_checkpoint(tmp_path: Path) -> None:
    first, second = run_ranks(save_into_two_folders, 2, tmp_path)
    for told in (first, second):
        assert "step 2 could not be saved" in told
        assert "-00002-of-00002.safetensors, which rank 1 has written, is not in" in told
        assert "run.dir" in told
    assert complete_steps(tmp_path / "0" / "checkpoints") == []


def save_many(rank: int, world: int, run: Path) -> None:
    from pretrain.parallel.groups import stop_ranks

    _, saver, ranks = start(world, run, "checkpoint.asynchronous=false", "checkpoint.keep_every=6")
    for step in range(2, 18, 2):
        saver.save(step)
        assert describe(run).step == step, "complete on return"
    saver.finish()
    stop_ranks(ranks)


def test_synchronous_saving_and_what_it_keeps(tmp_path: Path) -> None:
    run_ranks(save_many, 1, tmp_path)
    assert complete_steps(tmp_path / "checkpoints") == [step_folder(tmp_path, step) for step in (6, 12, 14, 16)]
