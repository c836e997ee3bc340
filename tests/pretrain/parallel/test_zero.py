"""DeepSpeed's own wishes about sizes and precisions are met for every model, not only for round ones."""

from __future__ import annotations

import math
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from layout_cases import made_up_batch, recipe_of
from ranks import run_ranks

from pretrain.parallel import zero
from pretrain.parallel.build import build_model
from pretrain.parallel.engine import Engine
from pretrain.parallel.groups import start_ranks, stop_ranks
from pretrain.parallel.layout import lay_out
from pretrain.parallel.zero import LARGEST_BUCKET, Zero, deepspeed_config

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
    settings = deepspeed_config(recipe, lay_out(recipe, 1), [parameters])["zero_optimization"]
    for key in ("reduce_bucket_size", "allgather_bucket_size"):
        assert settings[key] % 2 == 0
        assert 0 <= settings[key] - min(parameters, LARGEST_BUCKET) <= 1


@pytest.mark.parametrize(
    ("overrides", "world", "overlaps"),
    [
        (["layout.zero=1"], 2, True),
        (["layout.zero=1", "train.precision=bf16", "train.micro_batch=2"], 2, True),
        (["layout.zero=3"], 2, True),
        (["layout.zero=1", "layout.tp=2"], 4, True),
        (["layout.zero=2"], 2, False),
        (["layout.zero=1"], 1, False),
        (["layout.zero=1", "layout.tp=2"], 2, False),
        (["layout.zero=1", "layout.offload=true"], 2, False),
        (["layout.zero=1", "layout.pp=2"], 4, False),
    ],
)
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_what_deepspeed_is_given_on_a_card(
    monkeypatch: pytest.MonkeyPatch, device: str, overrides: list[str], world: int, overlaps: bool
) -> None:
    """Fused AdamW everywhere; gradients that travel during backward where that is safe, in several buckets."""
    import deepspeed

    given: dict[str, Any] = {}
    engine = SimpleNamespace(module=None)
    monkeypatch.setattr(deepspeed, "initialize", lambda **named: given.update(named) or (engine, None, None, None))
    recipe = recipe_of("contrastive", overrides)
    model = torch.nn.ModuleDict({name: torch.nn.Linear(7168, 5000, device="meta") for name in "abcd"})
    ranks: Any = SimpleNamespace(device=torch.device(device), tp_group=None)
    Zero(model, recipe, lay_out(recipe, world), ranks)
    assert all(group["fused"] for group in given["optimizer"].param_groups)
    settings = given["config"]["zero_optimization"]
    assert settings["overlap_comm"] == (overlaps and device == "cuda")
    whole = sum(each.numel() for each in model.parameters())
    assert settings["reduce_bucket_size"] == (7168 * 5000 if settings["overlap_comm"] else whole)


OVERLAPPED = [["layout.zero=1"], ["layout.zero=1", "train.precision=bf16", "train.micro_batch=2"], ["layout.zero=3"]]


def settings_of(*arguments: Any, overlap: bool, asked: bool) -> dict[str, Any]:
    """As for a card where `asked`."""
    found = deepspeed_config(*arguments, overlap=asked)
    assert found["zero_optimization"]["overlap_comm"] == asked
    return found


def train_overlapped(rank: int, world: int) -> list[list[list[tuple[float, float]]]]:
    """Of each case, without and with overlap in small buckets: loss and gradient norm of each step."""
    found = []
    for overrides in OVERLAPPED:
        recipe = recipe_of("contrastive", overrides)
        layout = lay_out(recipe, world)
        ways = []
        for overlap in (False, True):
            zero.deepspeed_config = partial(settings_of, asked=overlap)
            zero.OVERLAPPED_BUCKET = 0  # as large as the largest parameter
            ranks = start_ranks(layout, torch.device("cpu"))
            engine = Engine(build_model(recipe, layout, ranks), recipe, layout, ranks)
            rows = slice(ranks.dp_rank * layout.share, (ranks.dp_rank + 1) * layout.share)
            steps = [engine.step(made_up_batch(step).rows(rows), 1e-3) for step in range(3)]
            ways.append([(each.loss, each.grad_norm) for each in steps])
            engine.close()
            stop_ranks(ranks)
        found.append(ways)
    return found


def test_gradients_that_travel_during_backward_are_the_same() -> None:
    """Which hook sends what; the order of streams is a card's to show."""
    for rank in run_ranks(train_overlapped, 2, timeout=900):
        for case, (apart, overlapped) in zip(OVERLAPPED, rank, strict=True):
            assert overlapped == apart, case


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
