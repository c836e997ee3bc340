"""A rank whose microbatches have no images takes part in every collective: nothing hangs, and gradients are right."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from layout_cases import BATCH, LR, made_up_batch, recipe_of
from ranks import run_ranks

from pretrain.checkpoint.state import own_numbers
from pretrain.parallel.build import build_model
from pretrain.parallel.engine import Engine
from pretrain.parallel.groups import start_ranks, stop_ranks
from pretrain.parallel.layout import lay_out

LAYOUTS = {
    "ZeRO-1": [],
    "ZeRO-2": ["layout.zero=2"],
    "ZeRO-3": ["layout.zero=3"],
    "TP2 ZeRO-3": ["layout.tp=2", "layout.zero=3"],
    "PP2": ["layout.pp=2"],
}


def train_without_images(rank: int, world: int, without: list[int]) -> dict[str, tuple[list[float], float]]:
    """By layout: losses and the sum of squares of this rank's weights. Ranks `without` have captions alone."""
    found = {}
    for name, overrides in LAYOUTS.items():
        recipe = recipe_of("caption", ["train.micro_batch=4", *overrides])
        layout = lay_out(recipe, world)
        ranks = start_ranks(layout, torch.device("cpu"))
        engine = Engine(build_model(recipe, layout, ranks), recipe, layout, ranks)
        losses = []
        for step in range(3):
            first = ranks.dp_rank * layout.share
            batch = made_up_batch(step).rows(slice(first, first + layout.share))
            if ranks.dp_rank in without:
                batch = replace(batch, image=torch.empty(layout.share, 3, 0, 0, dtype=torch.uint8))
            losses.append(engine.step(batch, LR).loss)
        squares = sum(
            own_numbers(engine, each, "weight").double().square().sum() for _, each in engine.named_parameters()
        )
        found[name] = (losses, float(squares))
        engine.close()
        stop_ranks(ranks)
    return found


def test_no_rank_waits_for_one_without_images() -> None:
    ranks = run_ranks(train_without_images, 4, [1], timeout=900)
    with_images = run_ranks(train_without_images, 4, [], timeout=900)
    assert BATCH // 4 == 4, "a microbatch is the share of a data parallel rank of four"
    for mine, theirs in zip(ranks, with_images, strict=True):
        # ZeRO-1 reduces once, at the end: nothing in it can hang, and it is the truth for the others
        for name in ("ZeRO-2", "ZeRO-3"):
            assert mine[name][0] == pytest.approx(mine["ZeRO-1"][0], abs=1e-5), name
        assert mine["PP2"][0] == pytest.approx(mine["TP2 ZeRO-3"][0], abs=1e-5)
        for name in LAYOUTS:
            assert abs(mine[name][0][0] - theirs[name][0][0]) > 1e-5, f"{name}: images are really missing"
    for name in ("ZeRO-2", "ZeRO-3"):
        assert sum(each[name][1] for each in ranks) == pytest.approx(sum(each["ZeRO-1"][1] for each in ranks), rel=1e-6)
