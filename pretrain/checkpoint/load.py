"""Read a checkpoint: into an engine under any layout, or as a plain model for evaluation and export."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from data_pipeline import Tokenizer
from pretrain.checkpoint.format import (
    PARTS,
    TOKENIZER,
    Checkpoint,
    describe,
    description_problem,
    file_problem,
    verify,
)
from pretrain.checkpoint.state import (
    Run,
    make_moments,
    model_weight_run,
    own_run,
    set_model_weight,
    set_own_numbers,
    whole_shape,
)
from pretrain.checkpoint.warm_start import WarmStart
from pretrain.config import Recipe, recipe_of
from pretrain.errors import RequestError, WeftError
from pretrain.models.captioner import Captioner
from pretrain.models.dual import DualEncoder
from pretrain.models.initialise import sharded_axis
from pretrain.models.pieces import parameters_by_name
from pretrain.parallel.build import MODELS
from pretrain.parallel.engine import Engine
from pretrain.parallel.groups import Ranks, start_alone


def whole_checkpoint(
    candidates: Iterable[Checkpoint | WeftError], ranks: Ranks, say: Callable[[str], None]
) -> Checkpoint | None:
    """The first of `candidates` whose every byte is as it was written; every rank calls this, each reads a share.

    `say` is told on the first rank which ones are damaged, if another is used instead of them. None when there are no
    candidates at all; WeftError when all are damaged.
    """
    damage: list[str] = []
    for found in candidates:
        problems = [str(found)] if isinstance(found, WeftError) else _file_problems(found, ranks)
        if not problems and isinstance(found, Checkpoint):
            if damage and ranks.is_first:
                say(f"{'; '.join(damage)}; going on from step {found.step} instead, {found.path}")
            return found
        damage += problems
    if damage:
        raise WeftError("; ".join(damage))
    return None


def _file_problems(checkpoint: Checkpoint, ranks: Ranks) -> list[str]:
    """What is wrong with the files beside `checkpoint.json`, the same on every rank."""
    names = sorted(checkpoint.files)[ranks.rank :: ranks.world]
    found = ranks.of_all([problem for name in names if (problem := file_problem(checkpoint, name))])
    return [problem for problems in found for problem in problems]


def restore_checkpoint(engine: Engine, checkpoint: Checkpoint) -> None:
    """Put the weights and moments of a checkpoint into an engine of the same model, whatever its layout.

    Each rank reads only what it keeps. That the files are whole is `whole_checkpoint`'s to find out, before.
    Raises RequestError for a checkpoint of another model, WeftError for a changed `checkpoint.json`, on every rank.
    """
    mine = {name: list(whole_shape(each, engine.ranks.tp_size)) for name, each in engine.named_parameters()}
    _check_same_model({name: shape for each in engine.ranks.of_all(mine) for name, shape in each.items()}, checkpoint)
    if not checkpoint.description_is_whole:
        raise WeftError(description_problem(checkpoint))
    make_moments(engine, checkpoint.updates)
    with _Reader(checkpoint, engine.ranks) as reader:
        for name, parameter in engine.named_parameters():
            axis, run = sharded_axis(parameter), own_run(engine, parameter)
            for part in PARTS if parameter.requires_grad else PARTS[:1]:
                set_own_numbers(engine, parameter, part, reader.read(part, name, axis, run))
            set_model_weight(engine, parameter, reader.read("weight", name, axis, model_weight_run(engine, parameter)))


def load_warm_start(engine: Engine, warm: WarmStart) -> None:
    """Put the weights into an engine under any layout; every rank calls this, and reads only what it keeps.

    Raises RequestError, the same on every rank, for parameters that do not fit or are not finite; WeftError for a
    damaged checkpoint.
    """
    ranks = engine.ranks
    whole_checkpoint([warm.checkpoint], ranks, lambda _: None)
    mine = {
        name: list(whole_shape(each, ranks.tp_size))
        for name, each in engine.named_parameters()
        if not warm.only or name.startswith(warm.only)
    }
    _refuse_misfits({name: shape for each in ranks.of_all(mine) for name, shape in each.items()}, warm)
    spoilt = []
    with _Reader(warm.checkpoint, ranks) as reader:
        for name, parameter in engine.named_parameters():
            if name not in mine:
                continue
            axis, run = sharded_axis(parameter), own_run(engine, parameter)
            numbers = reader.read("weight", name, axis, run)
            spoilt += [] if numbers.isfinite().all() else [name]
            set_own_numbers(engine, parameter, "weight", numbers)
            set_model_weight(engine, parameter, reader.read("weight", name, axis, model_weight_run(engine, parameter)))

    if found := [name for names in ranks.of_all(spoilt) for name in names]:
        raise RequestError(
            f"train.init_from: {found[0]} in {warm.checkpoint.path} has numbers that are not finite: begin with an "
            "earlier checkpoint, or without train.init_from"
        )


def _refuse_misfits(mine: dict[str, list[int]], warm: WarmStart) -> None:
    theirs = {name: warm.checkpoint.parameters[name] for name in warm.names}
    wrong = [name for name in dict.fromkeys([*mine, *theirs]) if mine.get(name) != theirs.get(name)]
    if not wrong:
        return
    name, more = wrong[0], f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
    there, here = (str(shapes[name]) if name in shapes else "missing" for shapes in (theirs, mine))
    raise RequestError(
        f"train.init_from: {name} is {there} in {warm.checkpoint.path} and {here} in this model{more}: use the model "
        "of that checkpoint, or take over a part of it, such as train.init_only=[vision.]"
    )


def load_model(path: str | Path, device: str = "cpu") -> tuple[DualEncoder | Captioner, Tokenizer, Recipe]:
    """The model of a checkpoint (or of a run's newest one) in fp32 on one device, its tokenizer and its recipe.

    Raises RequestError when there is no checkpoint at `path`, WeftError when its bytes are damaged.
    """
    checkpoint = describe(path)
    problems = verify(checkpoint)
    if problems:
        raise WeftError("; ".join(problems))
    recipe = recipe_of(checkpoint.recipe, str(checkpoint.path))
    ranks = start_alone(torch.device(device))
    model = MODELS[recipe.model.kind](recipe.model)
    _check_same_model({name: list(each.shape) for name, each in parameters_by_name(model)}, checkpoint)
    with _Reader(checkpoint, ranks) as reader, torch.no_grad():
        for name, parameter in parameters_by_name(model):
            numbers = reader.read("weight", name, None, Run(0, parameter.numel()))
            parameter.copy_(numbers.view(parameter.shape))
    return model.to(device).eval(), Tokenizer.load(checkpoint.path / TOKENIZER), recipe


class _Reader:
    """Reads runs of numbers of this rank's tensor parallel pieces, and nothing beside them but the rest of a row."""

    def __init__(self, checkpoint: Checkpoint, ranks: Ranks) -> None:
        self._checkpoint, self._ranks = checkpoint, ranks
        self._open = ExitStack()
        self._files: dict[str, Any] = {}

    def read(self, part: str, name: str, axis: int | None, run: Run) -> torch.Tensor:
        """Numbers of the flat piece along `axis` (None: of the whole tensor), on CPU; zeros where nothing was kept."""
        file = self._checkpoint.tensors[part].get(name)
        if file is None or run.numel == 0:  # what was frozen has no moments
            return torch.zeros(run.numel)
        tensor = self._file(file).get_slice(name)
        shape = tensor.get_shape()
        if not shape:
            whole: torch.Tensor = self._file(file).get_tensor(name)
            return whole.flatten()
        ranges = [slice(0, side) for side in shape]
        if axis is not None:
            side = shape[axis] // self._ranks.tp_size
            ranges[axis] = slice(side * self._ranks.tp_rank, side * (self._ranks.tp_rank + 1))
        row = math.prod(each.stop - each.start for each in ranges[1:])
        first, last = run.start // row, -(-(run.start + run.numel) // row)
        rows = slice(ranges[0].start + first, ranges[0].start + last)
        found: torch.Tensor = tensor[(rows, *ranges[1:])]
        return found.flatten()[run.start - first * row :][: run.numel]

    def _file(self, name: str) -> Any:
        if name not in self._files:
            opened = safe_open(self._checkpoint.path / name, framework="pt")
            self._files[name] = self._open.enter_context(opened)
        return self._files[name]

    def __enter__(self) -> _Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()


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
