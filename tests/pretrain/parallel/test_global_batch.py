"""The negatives of a sample are all other samples of the global batch, and the test would notice if they were not.

8 microbatches, 2 stages, 2 data parallel ranks; against one process on the whole batch, and against a loss that forgets
the other data parallel rank.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from layout_cases import Trained, train_case
from ranks import run_ranks

from pretrain.parallel.embedding_cache import JointLoss

LAYOUT = ["layout.pp=2", "train.micro_batch=1"]


def train_truth(rank: int, world: int, folder: Path) -> dict[str, Trained]:
    return {model: train_case(model, [], 1, folder, write=True) for model in ("contrastive", "sigmoid")}


def train_both_ways(rank: int, world: int, folder: Path) -> dict[tuple[str, bool], Trained]:
    """By model and whether the loss is global."""
    found = {}
    whole = JointLoss.__call__
    for model in ("contrastive", "sigmoid"):
        found[model, True] = train_case(model, LAYOUT, world, folder)

        def forgetful(self: JointLoss, outputs: object) -> object:
            alone = replace(self, ranks=replace(self.ranks, all_rows_group=self.ranks.tp_group))
            return whole(alone, outputs)  # type: ignore[arg-type]

        JointLoss.__call__ = forgetful  # type: ignore[assignment, method-assign]
        found[model, False] = train_case(model, LAYOUT, world, folder)
        JointLoss.__call__ = whole  # type: ignore[method-assign]
    return found


def test_every_other_sample_is_a_negative(tmp_path: Path) -> None:
    run_ranks(train_truth, 1, tmp_path, timeout=900)
    for rank in run_ranks(train_both_ways, 4, tmp_path, timeout=900):
        for model in ("contrastive", "sigmoid"):
            assert rank[model, True].gradient_error <= 1e-6
            assert rank[model, True].parameter_error <= 1e-5
            assert rank[model, False].gradient_error > 1e-2, "negatives of one rank only give other gradients"


FROZEN = {"contrastive": "train.freeze=[vision., text.tokens]", "caption": "train.freeze=[decoder.tokens]"}
FREEZING: dict[str, list[str]] = {
    "ZeRO-0": ["layout.zero=0"],
    "ZeRO-1": [],
    "ZeRO-3": ["layout.zero=3"],
    "PP2": ["layout.pp=2", "train.micro_batch=4"],  # the captioner's table is on both ends
    "PP2 ZeRO-0": ["layout.pp=2", "layout.zero=0", "train.micro_batch=4"],
    "microbatches": ["layout.zero=2", "train.micro_batch=2"],
}


def train_frozen(rank: int, world: int, model: str, folder: Path) -> dict[str, Trained]:
    frozen = FROZEN[model]
    if world == 1:
        return {"alone": train_case(model, [frozen], 1, folder, write=True)}
    return {name: train_case(model, [frozen, *overrides], world, folder) for name, overrides in FREEZING.items()}


@pytest.mark.parametrize("model", FROZEN)
def test_what_is_frozen_stays_and_costs_no_optimizer_memory(model: str, tmp_path: Path) -> None:
    ((alone,),) = [list(rank.values()) for rank in run_ranks(train_frozen, 1, model, tmp_path, timeout=900)]
    assert alone.applied["moments"] < (0.6 if model == "contrastive" else 0.95) * alone.applied["resident"]
    for rank in run_ranks(train_frozen, 2, model, tmp_path, timeout=900):
        for name, mine in rank.items():
            assert mine.losses == pytest.approx(alone.losses, abs=1e-5), name
            assert mine.norms == pytest.approx(alone.norms, rel=1e-5), name
            assert mine.gradient_error <= 1e-6, name
            assert mine.parameter_error <= 1e-5, name
