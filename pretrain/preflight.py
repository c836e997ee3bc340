"""Everything that can be found wrong with a run before a process group exists, in one sentence each."""

from __future__ import annotations

from data_pipeline import Dataset, Joined, open_dataset
from pretrain.checkpoint.format import Checkpoint
from pretrain.checkpoint.warm_start import find_warm_start
from pretrain.config import Recipe
from pretrain.errors import RequestError
from pretrain.evaluation.test_set import require_usable
from pretrain.models.names import nearest_prefix, parameter_names
from pretrain.parallel.layout import Layout, lay_out
from pretrain.run_folder import checkpoint_to_resume
from pretrain.sources import cache_of, open_training_data, reading_order, refuse_upscaling
from pretrain.tokenizer import refuse_another_tokenizer


def check(recipe: Recipe, world: int) -> tuple[Layout, Dataset | Joined, Dataset | None, Checkpoint | None]:
    """The layout on `world` ranks, the data to train and test on, and the checkpoint to resume, all found to be good.

    Raises RequestError for what the recipe says wrong, FileNotFoundError and DataError for its data.
    """
    layout = lay_out(recipe, world)
    check_freeze(recipe, layout)
    dataset = open_training_data(recipe)
    reading_order(recipe, dataset)
    if recipe.train.global_batch > len(dataset):
        raise RequestError(
            f"train.global_batch is {recipe.train.global_batch}, "
            f"but {dataset.folder} has only {len(dataset)} samples: use a smaller batch, or more data"
        )
    test = open_dataset(recipe.data.test, cache_of(recipe)) if recipe.data.test else None
    if test is not None:
        require_usable(test, recipe.eval.samples, captioner=recipe.model.kind == "captioner")
    refuse_upscaling(recipe, dataset, test)
    if recipe.data.tokenizer and not recipe.data.tokenizer.is_file():
        raise RequestError(f"data.tokenizer is {recipe.data.tokenizer}, and there is no such file")
    checkpoint = checkpoint_to_resume(recipe, dataset.fingerprint)
    warm = None if checkpoint else find_warm_start(recipe)
    refuse_another_tokenizer(recipe, checkpoint, warm)
    return layout, dataset, test, checkpoint


def check_freeze(recipe: Recipe, layout: Layout) -> None:
    """RequestError for a prefix of train.freeze that no parameter has, and where nothing is left to train."""
    freeze = recipe.train.freeze
    if not freeze:
        return
    parameters = list(parameter_names(recipe.model, layout.pp, layout.vpp))
    names = [name for name, _ in parameters]
    for prefix in freeze:
        if not any(name.startswith(prefix) for name in names):
            near = nearest_prefix(prefix, names)
            way_out = f"did you mean {near}?" if near else f"they begin with {', '.join(_beginnings(names))}"
            raise RequestError(f"train.freeze has {prefix!r}, but no parameter begins with it: {way_out}")
    trained = {stage for name, stages in parameters for stage in stages if not name.startswith(freeze)}
    if not trained:
        raise RequestError(f"train.freeze is {list(freeze)}, which leaves nothing to train: freeze fewer parameters")
    if idle := sorted(set(range(layout.pp)) - trained):
        which = f"pipeline stage{'s' if len(idle) > 1 else ''} {', '.join(map(str, idle))}"
        raise RequestError(
            f"train.freeze is {list(freeze)}, which leaves {which} of layout.pp={layout.pp} nothing to train: "
            "use layout.pp=1, or freeze fewer parameters"
        )


def _beginnings(names: list[str]) -> list[str]:
    return list(dict.fromkeys(f"{name.partition('.')[0]}." for name in names))
