"""What a run trains on, and in which order: data.train alone, or mixed with data.also by weights."""

from __future__ import annotations

import math
from pathlib import Path, PurePosixPath

import numpy as np

from data_pipeline import (
    BlockOrder,
    BucketOrder,
    Cache,
    Dataset,
    Joined,
    Mixture,
    Order,
    Phase,
    ReadingOrder,
    bucket_sizes,
    open_dataset,
)
from data_pipeline.bake import baked_side
from data_pipeline.errors import DataError
from data_pipeline.index import written_whole
from pretrain.config import Recipe
from pretrain.errors import RequestError
from pretrain.parallel.first import from_first
from pretrain.parallel.groups import Ranks


def cache_of(recipe: Recipe) -> Cache:
    """Where what is fetched of shards at a URL is kept."""
    return Cache(recipe.data.cache.expanduser(), int(recipe.data.cache_gib * (1 << 30)))


def open_training_data(recipe: Recipe) -> Dataset | Joined:
    """All sources as one data set. Raises FileNotFoundError and DataError for what is not there or not good."""
    cache = cache_of(recipe)
    parts = [open_dataset(path, cache) for path in _paths(recipe)]
    return Joined(parts) if recipe.data.also else parts[0]


def refuse_upscaling(recipe: Recipe, dataset: Dataset | Joined, test: Dataset | None) -> None:
    """RequestError where images that `weft data bake` has made smaller would be enlarged again."""
    size, least = recipe.model.vision.image_size, recipe.data.crop_scale[0]
    trained = dataset.parts if isinstance(dataset, Joined) else (dataset,)
    for part, scale in [*((part, least) for part in trained), *([(test, 1.0)] if test is not None else [])]:
        side, needed = baked_side(part), math.ceil(size / math.sqrt(scale))
        if side is not None and side < needed:
            crop = f" with data.crop_scale from {scale}" if scale < 1 else ""
            raise RequestError(
                f"{part.folder} was baked to a short side of {side}, but model.vision.image_size={size}{crop} needs "
                f"{needed}: bake it again with --short-side {needed} or more, or use smaller images or larger crops"
            )


def reading_order(recipe: Recipe, dataset: Dataset | Joined, aspects: np.ndarray | None = None) -> ReadingOrder:
    """Which sample is read when; `aspects` [samples] are those of the pictures, where data.aspect asks for them.

    Raises ValueError for weights that make no sense, RequestError when pictures do not come in several shapes.
    """
    settings, seed = recipe.data, recipe.run.seed
    if aspects is not None:
        vision = recipe.model.vision
        sizes = bucket_sizes(vision.image_size, vision.patch, settings.aspect)
        buckets = BucketOrder(aspects, sizes, recipe.train.global_batch, seed)
        if len(buckets.open_sizes) == 1:
            height, width = buckets.open_sizes[0]
            raise RequestError(
                f"data.aspect is {settings.aspect}, but all pictures would be {width} x {height}: no second shape of "
                f"whole patches ({vision.patch}) has a global batch of pictures ({recipe.train.global_batch}); "
                "use data.aspect=1"
            )
        return buckets

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


def picture_aspects(recipe: Recipe, dataset: Dataset | Joined, ranks: Ranks, *, save: bool = True) -> np.ndarray | None:
    """Width / height of every picture, float32 [samples], where data.aspect asks for them; every rank calls this.

    `save`: the first rank collects them once, and keeps them in the run's folder.
    """
    if recipe.data.aspect == 1:
        return None
    if not save:
        return dataset.aspects()
    path = recipe.run.dir / f"aspects-{dataset.fingerprint[:12]}.npy"

    def collect() -> None:
        if _kept_aspects(path, len(dataset)) is None:
            with written_whole(path) as unfinished, unfinished.open("wb") as file:
                np.save(file, dataset.aspects())

    from_first(collect, ranks)
    if (aspects := _kept_aspects(path, len(dataset))) is None:
        raise DataError(f"{path} cannot be read here: every rank needs the run's folder")
    return aspects


def _kept_aspects(path: Path, samples: int) -> np.ndarray | None:
    """Those of an earlier start; None where the file is missing or damaged."""
    try:
        aspects: np.ndarray = np.load(path, allow_pickle=False)
    except Exception:  # NumPy's reader raises whatever comes of noise
        return None
    return aspects if aspects.dtype == np.float32 and aspects.shape == (samples,) else None


def shapes_of(order: ReadingOrder) -> str:
    """What is to be said of the pictures' shapes; nothing where all are the same."""
    if not isinstance(order, BucketOrder):
        return ""
    counted = zip(order.open_sizes, order.members, strict=True)
    return "pictures, by width x height: " + ", ".join(
        f"{len(members)} of {width} x {height}" for (height, width), members in counted
    )


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
