"""The training loop, top to bottom: one process of however many a launcher started.

A run is its recipe. Step k trains on the samples at positions k * global_batch and on of the order, with the learning
rate of step k; so what happens at a step depends on the step and the parameters before it, and on nothing else. That is
why resuming needs weights, moments and one integer.
"""

from __future__ import annotations

import json
import math
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import torch.distributed as dist

from data_pipeline import (
    BatchMaker,
    DataError,
    Dataset,
    ImageTransform,
    Loader,
    Order,
    TextTransform,
    Tokenizer,
)
from data_pipeline.index import written_whole
from pretrain import run_folder
from pretrain.checkpoint.format import Checkpoint, step_folder
from pretrain.checkpoint.load import restore_checkpoint
from pretrain.checkpoint.save import save_checkpoint
from pretrain.config import Recipe
from pretrain.errors import RequestError, WeftError
from pretrain.evaluation.evaluate import evaluate, summary
from pretrain.flops import peak_tflops, training_flops_per_sample
from pretrain.metrics import EXAMPLES, Clock, ProgressLine, RunLog, duration, peak_memory_gib
from pretrain.models.dual import DTYPES, DualEncoder
from pretrain.models.initialise import initialise
from pretrain.parallel.engine import Engine, Stepped
from pretrain.parallel.groups import Ranks, pick_device, start_ranks, stop_ranks, world_size
from pretrain.parallel.layout import Layout
from pretrain.preflight import check
from pretrain.quarantine import Quarantine
from pretrain.schedule import learning_rate

CAPTIONS_FOR_TOKENIZER = 200_000


def train(recipe: Recipe, command: str) -> int:
    """Train, evaluate and save as the recipe says; returns the exit code. `command` is what resumes the run."""
    layout, dataset, test, checkpoint = check(recipe, world_size())
    ranks = start_ranks(layout, pick_device(recipe.run.device))
    try:
        return _train(recipe, command, layout, dataset, test, checkpoint, ranks)
    finally:
        stop_ranks(ranks)


def _train(
    recipe: Recipe,
    command: str,
    layout: Layout,
    dataset: Dataset,
    test: Dataset | None,
    checkpoint: Checkpoint | None,
    ranks: Ranks,
) -> int:
    run, settings = recipe.run.dir, recipe.train
    start = checkpoint.step if checkpoint else 0
    stop = min(settings.steps, settings.stop_at or settings.steps)
    line = ProgressLine(stop, settings.global_batch)
    if start >= stop:
        if ranks.is_first:
            line.say(f"{run} is trained to step {start} of {settings.steps}: nothing to do")
        return 0
    if ranks.is_first:
        run_folder.begin(recipe, layout, dataset.fingerprint, start)
    tokenizer = _tokenizer(recipe, dataset, checkpoint, ranks)

    model = DualEncoder(recipe.model, tp=layout.tp, dtype=DTYPES[settings.precision])
    initialise(model, recipe.run.seed, tp_rank=ranks.tp_rank, tp_size=ranks.tp_size)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    engine = Engine(model.to(ranks.device), recipe, layout, ranks)
    if checkpoint:
        restore_checkpoint(engine, checkpoint)
    order = Order(len(dataset), recipe.run.seed)
    maker = BatchMaker(
        dataset,
        ImageTransform(recipe.model.vision.image_size, recipe.data.crop_scale, recipe.data.flip),
        TextTransform(tokenizer, recipe.model.text.context),
        recipe.run.seed,
        training=True,
    )
    loader = Loader(
        maker,
        order,
        global_batch=settings.global_batch,
        rank=ranks.dp_rank,
        world=ranks.dp_size,
        workers=recipe.data.workers,
        start_step=start,
        stop_step=stop,
        pin=ranks.device.type == "cuda",
    )
    flops = training_flops_per_sample(recipe.model)
    if ranks.is_first:
        line.say(
            f"{run}: {parameters / 1e6:.2f} M parameters{' a rank' if layout.tp > 1 else ''}, "
            f"{flops / 1e9:.3f} GFLOP a sample; {layout}; {len(dataset)} samples, "
            f"{settings.steps * settings.global_batch / len(dataset):.1f} epochs"
            + (f"; going on from step {start}" if start else "")
        )

    quarantine = Quarantine(recipe, start, ranks)
    with ExitStack() as stack:
        log = stack.enter_context(RunLog(run, start)) if ranks.is_first else None
        stop_signal = stack.enter_context(_stop_on_signal())
        clock = Clock()
        batches = stack.enter_context(closing(iter(loader)))
        for step in range(start, stop):
            asked = time.perf_counter()
            batch = next(batches)
            clock.waited(time.perf_counter() - asked)
            lr = learning_rate(settings, step)
            stepped = engine.step(batch.to(ranks.device), lr)
            done = step + 1
            _refuse_non_finite(stepped, done, run)
            # who is told to stop at the last step is done anyway
            stopping = quarantine.agree(batch.corrupt, bool(stop_signal)) and done < stop
            last = done == stop or stopping
            if last:
                batches.close()  # no worker is left to fail while a job that is being ended saves

            if log and (done % settings.log_every == 0 or done == start + 1 or last):
                seconds, waiting = clock.lap()
                speed = settings.global_batch / seconds
                tflops = speed * flops / layout.world / 1e12
                peak = peak_tflops(ranks.device)
                metrics = {
                    "step": done,
                    "epoch": round(done * settings.global_batch / len(dataset), 4),
                    "samples": done * settings.global_batch,
                    "loss": stepped.loss,
                    **{f"loss_{name}": value for name, value in stepped.losses.items()},
                    "grad_norm": stepped.grad_norm,
                    "lr": lr,
                    "logit_scale": stepped.logit_scale,
                    "samples_per_s": round(speed, 2),
                    "tflops": tflops,
                    "mfu": tflops / peak if peak else None,
                    "data_wait": round(waiting, 4),
                    "memory_gib": round(peak_memory_gib(ranks.device), 3),
                    "time": time.time(),
                }
                log.step(metrics)
                line.show(metrics)

            paused = time.perf_counter()
            every = recipe.eval.every
            if test is not None and not stopping and (done == stop or (every and done % every == 0)):
                evaluation = evaluate(engine.model, test, tokenizer, recipe.model, recipe.eval, ranks)
                if log:
                    log.evaluation({"step": done, "samples": done * settings.global_batch, **evaluation.scores})
                    with written_whole(run / EXAMPLES) as unfinished:
                        unfinished.write_text(json.dumps(evaluation.examples) + "\n", encoding="utf-8")
                    line.say(f"step {done}: " + summary(evaluation.scores))
            if last or done % recipe.checkpoint.every == 0:
                save_checkpoint(engine, run, recipe, tokenizer, step=done, data_fingerprint=dataset.fingerprint)
            clock.pause(time.perf_counter() - paused)

            if stopping:
                if ranks.is_first:
                    line.say(f"stopped at step {done} and saved to {step_folder(run, done)}; to go on: {command}")
                return 128 + (stop_signal[0] if stop_signal else signal.SIGTERM)
    if ranks.is_first:
        line.say(f"trained to step {stop} in {duration(time.perf_counter() - clock.began)}: {step_folder(run, stop)}")
    return 0


def _tokenizer(recipe: Recipe, dataset: Dataset, checkpoint: Checkpoint | None, ranks: Ranks) -> Tokenizer:
    """The checkpoint's, the one the recipe names, or one trained now on the data's captions; saved with the run."""
    path = recipe.run.dir / "tokenizer.json"
    if checkpoint:
        return Tokenizer.load(checkpoint.path / "tokenizer.json")
    limit, context = recipe.model.text.vocab_size, recipe.model.text.context
    if ranks.is_first:
        captions = _captions(dataset)
        if recipe.data.tokenizer:
            made = Tokenizer.load(recipe.data.tokenizer)
        else:
            made = Tokenizer.train(captions, limit)
        made.save(path)
        cut = sum(made.length(caption) > context for caption in captions)
        if cut:
            print(
                f"{cut} of {len(captions)} captions are longer than model.text.context={context} tokens "
                "and will be cut",
                file=sys.stderr,
            )
    dist.barrier(group=ranks.control_group)
    tokenizer = Tokenizer.load(path)
    if tokenizer.vocab_size > limit:
        raise RequestError(
            f"the tokenizer has {tokenizer.vocab_size} ids, more than model.text.vocab_size={limit}: "
            f"set model.text.vocab_size={tokenizer.vocab_size} or more"
        )
    return tokenizer


def _captions(dataset: Dataset) -> list[str]:
    """The captions of at most CAPTIONS_FOR_TOKENIZER samples, evenly spread; unreadable ones left out."""
    every = -(-len(dataset) // CAPTIONS_FOR_TOKENIZER)
    captions: list[str] = []
    for sample in range(0, len(dataset), every):
        try:
            captions += dataset.read(sample).captions()
        except DataError:
            continue  # named when training meets it
    return captions


def _refuse_non_finite(stepped: Stepped, step: int, run: Path) -> None:
    """Every rank sees the same loss and norm, so all stop together."""
    if not (math.isfinite(stepped.loss) and math.isfinite(stepped.grad_norm)):
        raise WeftError(
            f"step {step}: loss {stepped.loss}, gradient norm {stepped.grad_norm}; "
            f"lower train.lr, or raise train.warmup, and go on from the last checkpoint in {run / 'checkpoints'}"
        )


@contextmanager
def _stop_on_signal() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM instead of dying of them; a single process gives up at the second Ctrl-C."""
    received: list[int] = []

    def note(number: int, _: object) -> None:
        # with several ranks the terminal and the launcher both pass on the same Ctrl-C
        if received and number == signal.SIGINT and world_size() == 1:
            raise KeyboardInterrupt
        received.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
