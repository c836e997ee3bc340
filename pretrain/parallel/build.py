"""The model of a recipe as one rank of a layout holds it: its chunks and pieces, with their initial values."""

from __future__ import annotations

from collections.abc import Callable

from pretrain.config import Recipe
from pretrain.models.captioner import Captioner
from pretrain.models.dual import DTYPES, DualEncoder
from pretrain.models.initialise import initialise
from pretrain.models.pieces import Build, parameters_by_name
from pretrain.parallel.groups import Ranks
from pretrain.parallel.layout import Layout

MODELS: dict[str, Callable[..., DualEncoder | Captioner]] = {
    "dual": DualEncoder,
    "captioner": Captioner,
}  # by model.kind


def build_model(recipe: Recipe, layout: Layout, ranks: Ranks) -> DualEncoder | Captioner:
    """On the rank's device; what the recipe freezes needs no gradient."""
    model = MODELS[recipe.model.kind](recipe.model, build_of(recipe, layout))
    initialise(model, recipe.run.seed, tp_rank=ranks.tp_rank, tp_size=ranks.tp_size)
    for name, parameter in parameters_by_name(model):
        parameter.requires_grad_(not name.startswith(recipe.train.freeze))
    return model.to(ranks.device)


def build_of(recipe: Recipe, layout: Layout) -> Build:
    """What a model has to know of a layout."""
    return Build(
        dtype=DTYPES[recipe.train.precision],
        kernels=recipe.kernels,
        tp=layout.tp,
        pp=layout.pp,
        vpp=layout.vpp,
        cp=layout.cp,
        sequence_parallel=layout.sequence_parallel,
        recompute=recipe.layout.recompute,
    )
