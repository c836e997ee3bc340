"""Score a checkpoint by itself, on one process: what `weft eval` does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data_pipeline import open_dataset
from pretrain.checkpoint.load import load_model
from pretrain.errors import RequestError
from pretrain.evaluation.evaluate import TASKS, Evaluation, evaluate
from pretrain.parallel.groups import pick_device, start_alone, stop_ranks
from pretrain.sources import cache_of


def evaluate_checkpoint(
    path: Path, data: str | None, task: str, samples: int | None
) -> tuple[dict[str, Any], Evaluation]:
    """({"checkpoint", "data", "scores", ...}, the evaluation) of a run's newest checkpoint or a given one.

    Raises RequestError when nothing says what data to use, or the model or the data has no such task.
    """
    device = pick_device("auto")
    ranks = start_alone(device)
    try:
        model, tokenizer, recipe = load_model(path, str(device))
        known = TASKS[recipe.model.kind]
        if task not in ("all", *known):
            kind = "dual encoder" if recipe.model.kind == "dual" else recipe.model.kind
            raise RequestError(
                f"--task is {task}, but {path} is a {kind}, which has no {task}: use {' or '.join([*known, 'all'])}"
            )
        folder = recipe.data.test if data is None else data
        if folder is None:
            raise RequestError(f"the recipe of {path} names no data.test: give --data")
        settings = recipe.eval if samples is None else recipe.eval.model_copy(update={"samples": samples})
        cache = cache_of(recipe)
        found = evaluate(
            model,
            open_dataset(folder, cache),
            tokenizer,
            recipe.model,
            settings,
            ranks,
            memory=cache.folder,
            tasks=None if task == "all" else (task,),
        )
    finally:
        stop_ranks(ranks)
    told = found.as_tree()
    scores = {name: told.pop(name) for name in found.scores}
    return {"checkpoint": str(path), "data": str(folder), "scores": scores, **told}, found
