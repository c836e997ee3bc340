"""`weft bench checkpoint`: how long training stands still for a checkpoint, beside one that is written at once.

One model under one engine saves in turns with checkpoint.asynchronous true and false, into the same folder. A turn
trains the same number of steps either way, from before the save until the checkpoint is complete; its stall is the
time that it takes beyond as many steps without a save. So whatever the writing thread takes from training counts, not
only the copy that training waits for.
"""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from data_pipeline import Batch, Tokenizer
from data_pipeline.tokenizer import EOS
from pretrain.checkpoint.format import describe
from pretrain.checkpoint.save import Saver
from pretrain.config import Recipe
from pretrain.parallel.build import build_model
from pretrain.parallel.choose import with_layout
from pretrain.parallel.engine import Engine
from pretrain.parallel.groups import pick_device, start_ranks, stop_ranks, world_size
from pretrain.parallel.layout import lay_out

ROUNDS = 3


@dataclass(frozen=True)
class CheckpointBench:
    """Seconds are medians over rounds; ratio = stall of an asynchronous save / time of a synchronous one."""

    layout: str
    device: str
    threads: int
    megabytes: float
    step_seconds: float
    synchronous_seconds: float  # of one save that is complete on return
    copy_seconds: float  # what `save` itself takes when a thread writes
    written_seconds: float  # from the call of `save` until the checkpoint is complete
    stall_seconds: float  # by which the steps until then take longer than without a save, the copy included

    @property
    def copy_ratio(self) -> float:
        """Waiting for an asynchronous save over waiting for a synchronous one."""
        return self.copy_seconds / self.synchronous_seconds

    @property
    def ratio(self) -> float:
        """The same with what the writing thread takes from the steps beside it."""
        return self.stall_seconds / self.synchronous_seconds

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        return {**asdict(self), "copy_ratio": self.copy_ratio, "ratio": self.ratio}

    def __str__(self) -> str:
        return (
            f"{self.layout}, {self.device}, {self.threads} thread(s) a rank, {self.megabytes:.0f} MB\n"
            f"  synchronous save  {self.synchronous_seconds:8.3f} s\n"
            f"  asynchronous save {self.copy_seconds:8.3f} s  {self.copy_ratio:6.1%}  (complete after "
            f"{self.written_seconds:.3f} s)\n"
            f"  with slower steps {self.stall_seconds:8.3f} s  {self.ratio:6.1%}  (a step takes "
            f"{self.step_seconds:.3f} s)"
        )


def bench_checkpoint(recipe: Recipe, rounds: int = ROUNDS) -> CheckpointBench | None:
    """Measure the recipe's model, layout and run.dir's disk; None on ranks other than the first."""
    recipe = with_layout(recipe, world_size())
    layout = lay_out(recipe, world_size())
    ranks = start_ranks(layout, pick_device(recipe.run.device))
    folder = recipe.run.dir / "bench-checkpoint"
    try:
        engine = Engine(build_model(recipe, layout, ranks), recipe, layout, ranks)
        batch = _batch(recipe, layout.share).to(ranks.device)
        tokenizer = Tokenizer.train(["a red square"], recipe.model.text.vocab_size)
        savers = [
            Saver(engine, folder, recipe.model_copy(update={"checkpoint": kept}), tokenizer, "bench")
            for asynchronous in (True, False)
            for kept in [recipe.checkpoint.model_copy(update={"asynchronous": asynchronous, "keep": 1})]
        ]

        def step() -> float:
            began = time.perf_counter()
            engine.step(batch, recipe.train.lr)
            if ranks.device.type == "cuda":
                torch.cuda.synchronize()
            return time.perf_counter() - began

        # the first of either also takes the memory for its copy
        turns = list(_turns(savers[0], savers[1], step, rounds + 1))[1:]
        size = describe(folder).bytes / 1e6
        medians = [statistics.median(column) for column in zip(*turns, strict=True)]
    finally:
        if ranks.is_first:
            shutil.rmtree(folder, ignore_errors=True)
        stop_ranks(ranks)
    if not ranks.is_first:
        return None
    return CheckpointBench(str(layout), ranks.device.type, torch.get_num_threads(), size, *medians)


def _turns(
    asynchronous: Saver, synchronous: Saver, step: Callable[[], float], rounds: int
) -> Iterator[tuple[float, float, float, float, float]]:
    """For each round: (step, synchronous, copy, written, stall) in seconds."""
    for number in range(1, 2 * rounds, 2):
        step()
        began = time.perf_counter()
        asynchronous.save(number)
        copied = time.perf_counter() - began
        steps = 0
        while asynchronous.pending:
            step()
            asynchronous.poll()
            steps += 1
        written = time.perf_counter() - began
        asynchronous.finish()
        alone = [step() for _ in range(steps)]
        began = time.perf_counter()
        synchronous.save(number + 1)
        saved = time.perf_counter() - began
        synchronous.finish()
        yield statistics.median(alone), saved, copied, written, written - sum(alone)


def _batch(recipe: Recipe, size: int) -> Batch:
    model, generator = recipe.model, torch.Generator().manual_seed(0)
    side = model.vision.image_size
    image = torch.randint(0, 256, (size, 3, side, side), generator=generator, dtype=torch.uint8)
    text = torch.randint(EOS + 1, model.text.vocab_size, (size, model.text.context), generator=generator)
    text[:, -1] = EOS
    positions = torch.arange(size)
    return Batch(image, text, positions, positions, [])
