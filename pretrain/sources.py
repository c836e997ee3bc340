"""What a run trains on, and in which order: data.train alone, or mixed with data.also by weights."""

from __future__ import annotations

from pathlib import PurePosixPath

from data_pipeline import BlockOrder, Cache, Dataset, Joined, Mixture, Order, Phase, ReadingOrder, open_dataset
from pretrain.config import Recipe


def cache_of(recipe: Recipe) -> Cache:
    """Where what is fetched of shards at a URL is kept."""
    return Cache(recipe.data.cache.expanduser(), int(recipe.data.cache_gib * (1 << 30)))


def open_training_data(recipe: Recipe) -> Dataset | Joined:
    """All sources as one data set. Raises FileNotFoundError and DataError for what is not there or not good."""
    cache = cache_of(recipe)
    parts = [open_dataset(path, cache) for path in _paths(recipe)]
    return Joined(parts) if recipe.data.also else parts[0]


def reading_order(recipe: Recipe, dataset: Dataset | Joined) -> ReadingOrder:
    """Which sample is read when. Raises ValueError for weights that make no sense."""
    settings, seed = recipe.data, recipe.run.seed

    def order(samples: int, number: int) -> ReadingOrder:
        # two sources of the same size are not to be read in the same order
        own = seed + number * 1_000_003
        return BlockOrder(samples, own, settings.block, settings.window) if settings.block else Order(samples, own)

    if isinstance(dataset, Dataset):
        return order(len(dataset), 0)
    batch = recipe.train.global_batch
    phases = [Phase(0, (settings.weight, *(source.weight for source in settings.also)))]
    phases += [Phase(phase.step * batch, phase.weights) for phase in settings.schedule]
    return Mixture(tuple(order(len(part), number) for number, part in enumerate(dataset.parts)), tuple(phases), seed)


def samples_read(recipe: Recipe, order: ReadingOrder, position: int) -> dict[str, int]:
    """For the metrics of a mixture: samples_<source>, how many of each source come before a position."""
    if not isinstance(order, Mixture):
        return {}
    names: list[str] = []
    for path in _paths(recipe):
        parts = [part for part in PurePosixPath(path).parts if part not in ("train", "/")]
        name = parts[-1] if parts else "train"
        names.append(name if name not in names else f"{name}_{len(names)}")
    return {f"samples_{name}": count for name, count in zip(names, order.counts(position), strict=True)}


def _paths(recipe: Recipe) -> list[str]:
    return [recipe.data.train, *(source.data for source in recipe.data.also)]
