"""Training on a mixture: exact shares in the metrics, and a run that is stopped goes on as if it had not been."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ranks import run_ranks

from data_pipeline import BlockOrder, Mixture, Order, open_dataset
from data_pipeline.scenes.synth import synthesise
from pretrain.config import Recipe, load_recipe
from pretrain.errors import RequestError
from pretrain.sources import open_training_data, reading_order, samples_read

TINY = ["data.test=null", "model.vision={layers: 1, image_size: 32}", "model.text={layers: 1}", "train.log_every=1"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {}
    for seed, (name, count) in enumerate({"large": 120, "small": 30}.items()):
        folder = tmp_path_factory.mktemp("sources") / name
        synthesise(folder, train=count, test=10, size=32, sound=False, processes=1, seed=seed)
        folders[name] = folder / "train"
    return folders


def recipe_of(data: dict[str, Path], *more: str) -> Recipe:
    return load_recipe("quickstart", [f"data.train={data['large']}", *TINY, *more])


def mixed(data: dict[str, Path], *more: str) -> Recipe:
    also = f"data.also=[{{data: {data['small']}, weight: 1}}]"
    length = ["train.global_batch=16", "train.steps=10", "train.warmup=2"]
    return recipe_of(data, also, "data.weight=3", *length, *more)


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_the_order_that_a_recipe_names(data: dict[str, Path]) -> None:
    recipe = recipe_of(data)
    assert reading_order(recipe, open_training_data(recipe)) == Order(120, 0)
    recipe = recipe_of(data, "data.block=16", "data.window=4")
    assert reading_order(recipe, open_training_data(recipe)) == BlockOrder(120, 0, 16, 4)
    recipe = mixed(data, "data.schedule=[{step: 4, weights: [0, 1]}]")
    dataset = open_training_data(recipe)
    order = reading_order(recipe, dataset)
    assert isinstance(order, Mixture)
    assert len(dataset) == 150
    sources = order.sources(np.arange(160))
    assert set(sources[:64]) == {0, 1}
    assert set(sources[64:]) == {1}
    counts = samples_read(recipe, order, 160)
    assert counts == {"samples_large": int((sources == 0).sum()), "samples_small": int((sources == 1).sum())}


def test_two_sources_of_one_size_are_not_read_alike(data: dict[str, Path]) -> None:
    recipe = recipe_of(data, f"data.also=[{{data: {data['large']}}}]")
    order = reading_order(recipe, open_training_data(recipe))
    assert isinstance(order, Mixture)
    first, second = (each.sample_ids(np.arange(120)) for each in order.orders)
    assert not np.array_equal(first, second)
    assert set(samples_read(recipe, order, 10)) == {"samples_large", "samples_large_1"}


def train_whole_and_in_parts(rank: int, world: int, data: dict[str, Path], folder: Path) -> None:
    from pretrain.train import train

    options = ["data.schedule=[{step: 6, weights: [1, 1]}]", "data.block=8", "data.window=2"]
    whole, parts = [f"run.dir={folder / 'whole'}", *options], [f"run.dir={folder / 'parts'}", *options]
    assert train(mixed(data, *whole), "") == 0
    assert train(mixed(data, *parts, "train.stop_at=4"), "") == 0
    assert train(mixed(data, *parts, "data.workers=0"), "") == 0
    with pytest.raises(RequestError, match=r"holds a run with data\.schedule=.*step"):
        train(mixed(data, whole[0], *options[1:]), "")


def test_a_mixture_goes_on_where_it_stopped(data: dict[str, Path], tmp_path: Path) -> None:
    run_ranks(train_whole_and_in_parts, 1, data, tmp_path)
    whole, stopped = lines(tmp_path / "whole"), lines(tmp_path / "parts")
    assert [line["loss"] for line in whole] == [line["loss"] for line in stopped]
    for line in whole:
        assert line["samples_large"] + line["samples_small"] == line["samples"]
    assert 0.5 < whole[4]["samples_large"] / whole[4]["samples"] < 0.95


def test_what_does_not_fit_is_refused(data: dict[str, Path]) -> None:
    with pytest.raises(RequestError, match="schedule has 1 weights at step 3 for 2 sources"):
        mixed(data, "data.schedule=[{step: 3, weights: [1]}]")
    with pytest.raises(RequestError, match="each must come after the one before"):
        mixed(data, "data.schedule=[{step: 3, weights: [1, 1]}, {step: 3, weights: [1, 2]}]")
    assert open_dataset(data["small"]).fingerprint != open_training_data(mixed(data)).fingerprint
