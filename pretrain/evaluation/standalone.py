"""Score a checkpoint by itself, on one process: what `weft eval` does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data_pipeline import open_dataset
from pretrain.checkpoint.load import load_model
from pretrain.errors import RequestError
from pretrain.evaluation.evaluate import evaluate
from pretrain.parallel.groups import pick_device, start_alone, stop_ranks
from pretrain.sources import cache_of

TASKS = ("all", "retrieval", "zero_shot")


def evaluate_checkpoint(path: Path, data: str | None, task: str, samples: int | None) -> dict[str, Any]:
    """{"checkpoint", "data", "scores"} of a run's newest checkpoint or a given one.

    Raises RequestError when nothing says what data to use, or the data has no labels for zero_shot.
    """
    device = pick_device("auto")
    ranks = start_alone(device)
    try:
        model, tokenizer, recipe = load_model(path, str(device))
        folder = data or recipe.data.test
        if folder is None:
            raise RequestError(f"the recipe of {path} names no data.test: give --data")
        settings = recipe.eval if samples is None else recipe.eval.model_copy(update={"samples": samples})
        scores = evaluate(
            model, open_dataset(folder, cache_of(recipe)), tokenizer, recipe.model, settings, ranks
        ).scores
    finally:
        stop_ranks(ranks)
    if task != "all":
        if task not in scores:
            raise RequestError(f"--task {task}: no sample of {folder} has a label in its json")
        scores = {task: scores[task]}
    return {"checkpoint": str(path), "data": str(folder), "scores": scores}
