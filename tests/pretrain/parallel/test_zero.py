"""DeepSpeed's own wishes about sizes and precisions are met for every model, not only for round ones."""

from __future__ import annotations

import math

import pytest
import torch
from layout_cases import made_up_batch, recipe_of
from ranks import run_ranks

from pretrain.parallel.build import build_model
from pretrain.parallel.engine import Engine
from pretrain.parallel.groups import start_ranks, stop_ranks
from pretrain.parallel.layout import lay_out
from pretrain.parallel.zero import LARGEST_BUCKET, deepspeed_config

ODD = ["model.text.layers=1", "model.text.mlp_ratio=2.72", "train.global_batch=12"]
ODD_OF = {"contrastive": [*ODD, "model.vision.layers=1"], "caption": ODD}
CASES: dict[int, list[tuple[str, list[str]]]] = {
    1: [
        ("contrastive", []),
        ("contrastive", ["layout.zero=2", "train.precision=bf16"]),
        ("contrastive", ["layout.offload=true", "train.micro_batch=4"]),
        ("contrastive", ["train.freeze=[vision.]"]),
        ("caption", ["layout.zero=2"]),
    ],
    2: [
        ("contrastive", []),
        ("contrastive", ["layout.zero=2"]),
        ("contrastive", ["layout.zero=3"]),
        ("caption", ["train.precision=bf16"]),
    ],
    3: [("contrastive", []), ("contrastive", ["layout.zero=2", "train.precision=bf16"])],
}


@pytest.mark.parametrize("parameters", [1, 2, 7, 1001, LARGEST_BUCKET - 1, LARGEST_BUCKET, LARGEST_BUCKET + 1])
def test_buckets_have_an_even_size(parameters: int) -> None:
    recipe = recipe_of("contrastive", [])
    settings = deepspeed_config(recipe, lay_out(recipe, 1), parameters)["zero_optimization"]
    for key in ("reduce_bucket_size", "allgather_bucket_size"):
        assert settings[key] % 2 == 0
        assert 0 <= settings[key] - min(parameters, LARGEST_BUCKET) <= 1


def train_odd(rank: int, world: int) -> list[tuple[int, float]]:
    """Of each case: how many parameters are trained, and the gradient norm of a step."""
    found = []
    for model, overrides in CASES[world]:
        recipe = recipe_of(model, [*ODD_OF[model], *overrides])
        layout = lay_out(recipe, world)
        ranks = start_ranks(layout, torch.device("cpu"))
        built = build_model(recipe, layout, ranks)
        count = sum(each.numel() for each in built.parameters())
        engine = Engine(built, recipe, layout, ranks)
        first = ranks.dp_rank * layout.share
        found.append((count, engine.step(made_up_batch(0).rows(slice(first, first + layout.share)), 1e-3).grad_norm))
        engine.close()
        stop_ranks(ranks)
    return found


@pytest.mark.parametrize("world", CASES)
def test_an_odd_number_of_parameters_trains(world: int) -> None:
    for rank in run_ranks(train_odd, world, timeout=900):
        for case, (count, norm) in zip(CASES[world], rank, strict=True):
            assert count % 2 == 1, case
            assert 0 < norm < math.inf, case
