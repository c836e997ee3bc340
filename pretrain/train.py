"""The training loop, top to bottom: one process of however many a launcher started.

A run is its recipe. Step k trains on the samples at positions k * global_batch and on of the order, with the learning
rate of step k; so what happens at a step depends on the step and the parameters before it, and on nothing else. That is
why resuming needs weights, moments and one integer.
"""

from __future__ import annotations

import os
import signal
import time
from contextlib import ExitStack, suppress
from pathlib import Path

import torch

import kernels
from data_pipeline import Dataset, Joined
from data_pipeline.errors import printable
from data_pipeline.fork_server import start_server
from pretrain import run_folder
from pretrain.agreement import refuse_different_ranks
from pretrain.certificate import Certificate
from pretrain.checkpoint.format import Checkpoint, step_folder
from pretrain.checkpoint.load import load_warm_start, restore_checkpoint, whole_checkpoint
from pretrain.checkpoint.save import Saver
from pretrain.checkpoint.warm_start import find_warm_start
from pretrain.config import Recipe
from pretrain.errors import DivergedError, MemoryFullError, WeftError, is_memory_full
from pretrain.evaluations import Evaluations
from pretrain.flops import peak_tflops, training_flops_per_sample
from pretrain.guard import Guard
from pretrain.ingest import ingest
from pretrain.job import this_job
from pretrain.metrics import Clock, ProgressLine, RunLog, WaitHint, duration, peak_memory_gib
from pretrain.parallel.build import build_model
from pretrain.parallel.choose import with_layout
from pretrain.parallel.engine import Engine
from pretrain.parallel.first import from_first
from pretrain.parallel.groups import TIMEOUT, Ranks, pick_device, start_ranks, stop_ranks
from pretrain.parallel.layout import Layout
from pretrain.parallel.meeting import SLOWEST_START, telling_others
from pretrain.preflight import check
from pretrain.quarantine import Quarantine
from pretrain.run_lock import RunLock, refuse_if_held
from pretrain.schedule import learning_rate
from pretrain.signals import Interruptible, StopAskedError, stop_on_signal
from pretrain.sources import picture_aspects, reading_order, samples_read, shapes_of
from pretrain.tokenizer import given_tokenizer, tokenizer_of
from pretrain.watchdog import Phase, Watchdog, collective_timeout


def train(recipe: Recipe, command: str) -> int:
    """Train, evaluate and save as the recipe says; returns the exit code. `command` is what resumes the run."""
    job, limit = this_job(), recipe.train.watchdog
    patience = max(limit, SLOWEST_START) if limit else TIMEOUT.total_seconds()
    if recipe.data.loader == "inprocess" and recipe.data.workers:
        start_server()  # it imports what the loader's workers need while this process gets ready
    with ExitStack() as held:
        with telling_others(job, patience):
            if job.rank == 0:
                refuse_if_held(recipe.run.dir)
            recipe = with_layout(recipe, job.world)
            layout, dataset, test, checkpoint = check(recipe, job.world)
            recipe = run_folder.as_begun(recipe, checkpoint)
            device = pick_device(recipe.run.device)
            if job.rank == 0:
                held.enter_context(RunLock(recipe.run.dir))
        return _with_ranks(recipe, command, layout, dataset, test, checkpoint, device, patience)


def _with_ranks(
    recipe: Recipe,
    command: str,
    layout: Layout,
    dataset: Dataset | Joined,
    test: Dataset | None,
    checkpoint: Checkpoint | None,
    device: torch.device,
    patience: float,
) -> int:
    limit = recipe.train.watchdog
    ranks = start_ranks(layout, device, collective_timeout(limit), patience)
    with Watchdog(recipe.run.dir, ranks, checkpoint.step if checkpoint else 0, limit) as watchdog:
        try:
            code = _train(recipe, command, layout, dataset, test, checkpoint, ranks, watchdog)
        except BaseException as error:
            with suppress(ValueError, RuntimeError):  # groups with a rank that is gone: that error is the one to tell
                stop_ranks(ranks)
            if is_memory_full(error):
                raise _memory_full(*watchdog.place, checkpoint.step if checkpoint else 0) from error
            raise
        stop_ranks(ranks)
        return code


def _train(
    recipe: Recipe,
    command: str,
    layout: Layout,
    dataset: Dataset | Joined,
    test: Dataset | None,
    checkpoint: Checkpoint | None,
    ranks: Ranks,
    watchdog: Watchdog,
) -> int:
    refuse_different_ranks(recipe, dataset, test, checkpoint, ranks)
    run, settings = recipe.run.dir, recipe.train
    start = checkpoint.step if checkpoint else 0
    stop = min(settings.steps, settings.stop_at or settings.steps)
    line = ProgressLine(stop, settings.global_batch)
    evaluations = Evaluations(recipe, test, stop, ranks, line.say)
    guard = Guard(settings, run, checkpoint.guard if checkpoint else None)
    if start >= stop and not evaluations.missing(start):
        if problem := guard.problem or evaluations.problem:
            raise _diverged(run, start, problem)
        if ranks.is_first:
            line.say(
                f"{run} is trained to step {start} of {settings.steps}: nothing to do; `weft eval {run}` scores it"
            )
        return 0
    if checkpoint:
        candidates = run_folder.checkpoints_to_resume(recipe, dataset.fingerprint)
        checkpoint = whole_checkpoint(candidates, ranks, line.say)
        start = checkpoint.step if checkpoint else 0
        guard = Guard(settings, run, checkpoint.guard if checkpoint else None)  # an older one, where that was damaged
    warm = None if checkpoint else find_warm_start(recipe)
    if start < stop:
        record = warm.record() if warm else None
        from_first(lambda: run_folder.begin(recipe, layout, dataset.fingerprint, start, record), ranks)
    tokenizer = tokenizer_of(recipe, dataset, given_tokenizer(checkpoint, warm), ranks)

    model = build_model(recipe, layout, ranks)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    share = "all" if trained == parameters else f"{trained / 1e6:.2f} M"
    engine = Engine(model, recipe, layout, ranks)
    if checkpoint:
        restore_checkpoint(engine, checkpoint)
    elif warm:
        load_warm_start(engine, warm)
    flops = training_flops_per_sample(recipe.model)
    if ranks.is_first:
        line.say(
            f"{run}: {parameters / 1e6:.2f} M parameters{' per rank' if layout.tp * layout.pp > 1 else ''}, "
            f"{share} trained, {flops / 1e9:.3f} GFLOP per sample; {layout}; {len(dataset)} samples, "
            f"{settings.steps * settings.global_batch / len(dataset):.1f} epochs"
            + (f"; resuming at step {start}" if start else f"; starting from {warm}" if warm else "")
        )

    if start >= stop:
        watchdog.phase("evaluate", start)
        with ExitStack() as stack:
            stack.callback(engine.close)
            log = stack.enter_context(RunLog(run, start)) if ranks.is_first else None
            if ranks.is_first:
                line.say(f"{run} is trained to step {start}, and its last evaluation is missing: evaluating")
            evaluations.run(engine, tokenizer, start, log)
            _refuse_diverged(run, start, engine, guard, evaluations)
        return 0

    order = reading_order(recipe, dataset, picture_aspects(recipe, dataset, ranks))
    if ranks.is_first and (shapes := shapes_of(order)):
        line.say(shapes)
    if ranks.is_first:
        for remark in (*dataset.remarks(), *(test.remarks() if test else ())):
            line.say(printable(remark))
    quarantine = Quarantine(recipe, start, ranks, len(dataset), line.say)
    waiting_hint = WaitHint(recipe.data.loader, recipe.data.workers, layout.world, os.cpu_count() or 1)
    certificate = Certificate(dataset.fingerprint, checkpoint.order if checkpoint else "")
    with ExitStack() as stack:
        stack.callback(engine.close)
        log = stack.enter_context(RunLog(run, start)) if ranks.is_first else None
        batches = stack.enter_context(ingest(recipe, dataset, order, tokenizer, ranks, start, stop))
        stop_signal = stack.enter_context(stop_on_signal())
        clock = Clock()
        saver = stack.enter_context(Saver(engine, run, recipe, tokenizer, dataset.fingerprint))
        save_due = False
        for step in range(start, stop):
            watchdog.phase("data", step + 1)
            asked = time.perf_counter()
            batch = next(batches)
            clock.waited(time.perf_counter() - asked)
            lr = learning_rate(settings, step)
            watchdog.phase("forward and backward", step + 1)
            stepped = engine.step(batch.shortened(layout.text_step).to(ranks.device), lr, guard.loss_limit)
            clock.computed(training_flops_per_sample(recipe.model, batch.caption_length) * layout.share)
            done = step + 1
            try:
                guard.judge(stepped, done, saver.finish)
                watchdog.phase("agree", done)
                rows = certificate.terms(batch) if ranks.is_reader else [0, 0]
                told, sums = quarantine.agree(batch.corrupt, bool(stop_signal), done * settings.global_batch, rows)
                certificate.add(*sums)
                stopping = told and done < stop  # who is told to stop at the last step is done anyway
            except WeftError:
                saver.finish()  # every rank is here: what is being saved will be there to go on from
                raise
            last = done == stop or stopping
            if done == start + 1 and ranks.is_first:
                line.say("kernels: " + "; ".join(kernels.why().splitlines()))
            if last:
                batches.close()  # no worker is left to fail while a job that is being ended saves

            watchdog.phase("log", done)
            if log and (done % settings.log_every == 0 or done == start + 1 or last):
                seconds, waiting, operations = clock.lap()
                speed = settings.global_batch / seconds
                tflops = operations / (layout.world // layout.dp) / 1e12  # of a rank
                peak = peak_tflops(ranks.device)
                metrics = {
                    "step": done,
                    "epoch": round(done * settings.global_batch / len(dataset), 4),
                    "samples": done * settings.global_batch,
                    **samples_read(recipe, order, done * settings.global_batch),
                    "loss": stepped.loss,
                    **{f"loss_{name}": value for name, value in stepped.losses.items()},
                    "grad_norm": stepped.grad_norm,
                    "lr": lr,
                    "skipped": guard.skipped,
                    "logit_scale": stepped.logit_scale,
                    "order": str(certificate) or None,
                    "samples_per_s": round(speed, 2),
                    "tflops": tflops,
                    "mfu": tflops / peak if peak else None,
                    "data_wait": round(waiting, 4),
                    "memory_gib": round(peak_memory_gib(ranks.device), 3),
                    "time": time.time(),
                }
                log.step(metrics)
                line.show(metrics)
                if hint := waiting_hint.look(waiting):
                    line.say(hint)

            paused = time.perf_counter()
            watchdog.phase("save", done)
            save_due = save_due or done % recipe.checkpoint.every == 0
            saved = last or (save_due and guard.steady)  # before an evaluation, which may fail
            if saved:
                saver.save(done, guard.memory(), str(certificate))
                save_due = False
            evaluating = evaluations.due(done) and not stopping
            if last or (saved and evaluating):
                saver.finish()  # an error of one rank in it would leave what is still being written without a name
            if evaluating:
                watchdog.phase("evaluate", done)
                try:
                    evaluations.run(Interruptible(engine, ranks, stop_signal), tokenizer, done, log)
                except StopAskedError:  # raised on every rank
                    stopping = True
                except Exception as error:
                    # ours are raised on every rank; another may be this rank's alone, and saving takes all of them
                    if isinstance(error, WeftError) or ranks.world == 1:
                        watchdog.phase("save", done)
                        if not saved:
                            saver.save(done, guard.memory(), str(certificate))
                        saver.finish()
                    raise
            watchdog.phase("save", done)
            if stopping and not last:  # while it evaluated
                batches.close()
                if not saved:
                    saver.save(done, guard.memory(), str(certificate))
                saver.finish()
            saver.poll()
            clock.pause(time.perf_counter() - paused)

            if stopping:
                if ranks.is_first:
                    line.say(f"stopped at step {done} and saved to {step_folder(run, done)}; to go on: {command}")
                return 128 + (stop_signal[0] if stop_signal else signal.SIGTERM)
        watchdog.phase("finish", stop)
        _refuse_diverged(run, stop, engine, guard, evaluations)
    if ranks.is_first:
        if damaged := quarantine.sum_up():
            line.say(damaged)
        line.say(f"trained to step {stop} in {duration(time.perf_counter() - clock.began)}: {step_folder(run, stop)}")
    return 0


def _memory_full(phase: Phase, step: int, start: int) -> MemoryFullError:
    """The sentence about a run that began at step `start`. What was too much at its first step will be again."""
    way_out = {
        "start": "use a smaller model, more ranks, or layout.auto=true",
        "data": "use a smaller train.global_batch, fewer data.workers, or more ranks",
        "evaluate": "use a smaller eval.batch",
        "save": "use more ranks, or a machine with more memory",
    }.get(phase, "use a smaller train.micro_batch, layout.recompute=full, or layout.auto=true")
    where = "while the model was made" if phase == "start" else f"in step {step} (`{phase}`)"
    return MemoryFullError(f"the memory is full {where}: {way_out}", lasting=step <= start + 1)


def _refuse_diverged(run: Path, step: int, engine: Engine, guard: Guard, evaluations: Evaluations) -> None:
    """DivergedError when a run ends with a model that is of no use; every rank calls this."""
    problem = guard.problem or ("" if engine.parameters_are_finite() else "its parameters are not finite")
    if problem or evaluations.problem:
        raise _diverged(run, step, problem or evaluations.problem)


def _diverged(run: Path, step: int, problem: str) -> DivergedError:
    return DivergedError(
        f"{run} diverged: at step {step}, {problem}; start again in another run.dir with a lower train.lr or a longer "
        "train.warmup, from the beginning or from an earlier checkpoint (train.init_from)",
        step,
        problem,
    )
