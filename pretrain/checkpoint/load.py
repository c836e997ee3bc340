"""Read a checkpoint: into an engine under any layout, or as a plain model for evaluation and export."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import safe_open

from data_pipeline import Tokenizer
from pretrain.checkpoint.format import Checkpoint, describe, verify
from pretrain.checkpoint.state import PARTS, restore_state, whole_shape
from pretrain.config import Recipe, recipe_of
from pretrain.errors import RequestError, WeftError
from pretrain.models.dual import DualEncoder
from pretrain.parallel.engine import Engine
from pretrain.parallel.groups import start_alone


def restore_checkpoint(engine: Engine, checkpoint: Checkpoint) -> None:
    """Put the weights and moments of a checkpoint into an engine of the same model, whatever its layout.

    Raises RequestError for a checkpoint of another model, WeftError for one whose bytes are damaged.
    """
    _check_whole(checkpoint)
    mine = {name: whole_shape(each, engine.ranks.tp_size) for name, each in engine.named_parameters()}
    _check_same_model(mine, checkpoint)
    with ExitStack() as stack:
        files = {
            part: stack.enter_context(safe_open(checkpoint.path / f"{part}.safetensors", framework="pt"))
            for part in PARTS
        }
        restore_state(engine, lambda part, name: files[part].get_tensor(name), checkpoint.step)


def load_model(path: str | Path, device: str = "cpu") -> tuple[DualEncoder, Tokenizer, Recipe]:
    """The model of a checkpoint (or of a run's newest one) in fp32 on one device, its tokenizer and its recipe.

    Raises RequestError when there is no checkpoint at `path`, WeftError when its bytes are damaged.
    """
    checkpoint = describe(path)
    _check_whole(checkpoint)
    recipe = recipe_of(checkpoint.recipe, str(checkpoint.path))
    start_alone(torch.device(device))
    model = DualEncoder(recipe.model)
    _check_same_model({name: list(each.shape) for name, each in model.named_parameters()}, checkpoint)
    with safe_open(checkpoint.path / "weight.safetensors", framework="pt") as file, torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(file.get_tensor(name))
    return model.to(device).eval(), Tokenizer.load(checkpoint.path / "tokenizer.json"), recipe


def _check_whole(checkpoint: Checkpoint) -> None:
    problems = verify(checkpoint)
    if problems:
        raise WeftError("; ".join(problems))


def _check_same_model(mine: dict[str, list[int]], checkpoint: Checkpoint) -> None:
    theirs = checkpoint.parameters
    for name in [*mine, *theirs]:
        if mine.get(name) != theirs.get(name):
            raise RequestError(
                f"{checkpoint.path} is of another model: {name} is {_shape(theirs, name)} there and "
                f"{_shape(mine, name)} here"
            )


def _shape(shapes: dict[str, list[int]], name: str) -> str:
    return str(shapes[name]) if name in shapes else "not"
