"""Write a checkpoint: gather whole tensors, write aside, rename, move `latest`, drop what is too old."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from data_pipeline import Tokenizer
from pretrain.checkpoint.format import (
    DESCRIPTION,
    FORMAT,
    LATEST,
    VERSION,
    checksum_of,
    complete_steps,
    step_folder,
)
from pretrain.checkpoint.state import PARTS, gather_state
from pretrain.config import Recipe
from pretrain.errors import WeftError
from pretrain.parallel.engine import Engine


def save_checkpoint(
    engine: Engine, run: Path, recipe: Recipe, tokenizer: Tokenizer, *, step: int, data_fingerprint: str
) -> Path:
    """Save the engine after `step` steps into the run folder; every rank calls this. Returns the checkpoint's folder.

    Raises WeftError when the disk is full; nothing half-written is left and the checkpoints before stay.
    """
    tensors: dict[str, dict[str, torch.Tensor]] = {part: {} for part in PARTS}
    for part, name, tensor in gather_state(engine):
        if engine.ranks.is_first:
            tensors[part][name] = tensor.contiguous()
    folder = step_folder(run, step)
    failure = ""
    if engine.ranks.is_first:
        description = {
            "format": FORMAT,
            "version": VERSION,
            "step": step,
            "samples": step * recipe.train.global_batch,
            "data_fingerprint": data_fingerprint,
            "recipe": recipe.model_dump(mode="json"),
            "parameters": {name: list(tensor.shape) for name, tensor in tensors["weight"].items()},
        }
        try:
            _write(folder, tensors, tokenizer, description)
            _point_latest(folder)
            _drop_old(folder, recipe.checkpoint.keep)
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            why = "the disk is full" if full else str(error)
            failure = f"step {step} could not be saved to {folder}: {why}; the checkpoints before it are whole"
    # every rank learns whether the first one could write, so that all stop together
    failed = engine.ranks.agree(torch.tensor([int(bool(failure))]))
    if int(failed):
        raise WeftError(failure or f"step {step} could not be saved: see rank 0")
    return folder


def _write(
    folder: Path, tensors: dict[str, dict[str, torch.Tensor]], tokenizer: Tokenizer, description: dict[str, object]
) -> None:
    """The whole folder, under its name only when every byte is on disk."""
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)  # of a run that was killed while it wrote
    unfinished.mkdir(parents=True)
    try:
        for part, by_name in tensors.items():
            _save_tensors(by_name, unfinished / f"{part}.safetensors")
        tokenizer.save(unfinished / "tokenizer.json")
        files = {path.name: checksum_of(path) for path in sorted(unfinished.iterdir())}
        text = json.dumps({**description, "files": files}, indent=1)
        (unfinished / DESCRIPTION).write_text(text + "\n", encoding="utf-8")
        for path in unfinished.iterdir():
            _flush(path)
        shutil.rmtree(folder, ignore_errors=True)
        unfinished.rename(folder)
        _flush(folder.parent)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _save_tensors(by_name: dict[str, torch.Tensor], path: Path) -> None:
    try:
        save_file(by_name, path)
    except Exception as error:  # safetensors' own error type says "No space left on device" only in its text
        if "os error 28" in str(error) or "No space left" in str(error):
            raise OSError(errno.ENOSPC, str(error)) from error
        raise


def _point_latest(folder: Path) -> None:
    aside = folder.parent / f".{LATEST}.new"
    aside.unlink(missing_ok=True)
    aside.symlink_to(folder.name)
    aside.replace(folder.parent / LATEST)


def _drop_old(newest: Path, keep: int) -> None:
    """Keep `newest` and the keep - 1 checkpoints before it; those of later steps are of a run that was rolled back."""
    steps = complete_steps(newest.parent)
    end = steps.index(newest) + 1
    for old in steps[: max(0, end - keep)] + steps[end:]:
        shutil.rmtree(old, ignore_errors=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
