"""Every layout is one truth: losses, gradients, parameters and norms of one process on the whole batch.

Three models (InfoNCE, pairwise sigmoid with a bidirectional text tower, a captioner with tied token tables), each under
each layout below, in real gloo processes. The worlds are started once each and run all their cases.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from layout_cases import BATCH, MODELS, Trained, make_test_set, recipe_of, train_case
from ranks import RanksError, run_ranks

from pretrain.parallel.layout import lay_out

WORLDS: dict[int, dict[str, list[str]]] = {
    1: {
        "microbatches": ["train.micro_batch=2"],
        "ZeRO-0": ["layout.zero=0"],
        "ZeRO-0 microbatches": ["layout.zero=0", "train.micro_batch=2"],
        "ZeRO-0 recompute": ["layout.zero=0", "layout.recompute=full"],
        "recompute full": ["layout.recompute=full"],
        "recompute selective": ["layout.recompute=selective"],
    },
    2: {
        "TP2": ["layout.tp=2"],
        "TP2 SP": ["layout.tp=2", "layout.sequence_parallel=true"],
        "TP2 SP ZeRO-3": ["layout.tp=2", "layout.sequence_parallel=true", "layout.zero=3", "train.micro_batch=8"],
        "PP2": ["layout.pp=2", "train.micro_batch=2"],
        "PP2 ZeRO-0": ["layout.pp=2", "layout.zero=0", "train.micro_batch=4"],
        "PP2 one microbatch": ["layout.pp=2"],
        "PP2 VPP2": ["layout.pp=2", "layout.vpp=2", "train.micro_batch=4"],
        "PP2 recompute": ["layout.pp=2", "train.micro_batch=4", "layout.recompute=full"],
        "PP2 VPP2 ZeRO-0": ["layout.pp=2", "layout.vpp=2", "layout.zero=0", "train.micro_batch=4"],
        "TP2 SP ZeRO-0": ["layout.tp=2", "layout.sequence_parallel=true", "layout.zero=0", "train.micro_batch=8"],
        "CP2": ["layout.cp=2"],
        "CP2 ZeRO-0": ["layout.cp=2", "layout.zero=0"],
        "DP2 ZeRO-0": ["layout.zero=0", "train.micro_batch=4"],
        "DP2 ZeRO-1": ["train.micro_batch=4"],
        "DP2 ZeRO-2": ["layout.zero=2", "train.micro_batch=4"],
        "DP2 ZeRO-3": ["layout.zero=3", "train.micro_batch=4"],
        "DP2 ZeRO-1 offloaded": ["layout.offload=true", "train.micro_batch=4"],
        "DP2 ZeRO-2 offloaded": ["layout.offload=true", "layout.zero=2"],
        "DP2 ZeRO-3 offloaded": ["layout.offload=true", "layout.zero=3"],
        "PP2 offloaded": ["layout.offload=true", "layout.pp=2", "train.micro_batch=4"],
    },
    4: {
        "PP4": ["layout.pp=4", "train.micro_batch=2"],
        "TP2 PP2": ["layout.tp=2", "layout.pp=2", "train.micro_batch=4"],
        "PP2 DP2": ["layout.pp=2", "train.micro_batch=1"],
        "TP2 DP2 ZeRO-0": ["layout.tp=2", "layout.zero=0"],
        "TP2 PP2 ZeRO-0": ["layout.tp=2", "layout.pp=2", "layout.zero=0", "train.micro_batch=4"],
        "TP2 DP2 ZeRO-1": ["layout.tp=2"],
        "TP2 DP2 ZeRO-2": ["layout.tp=2", "layout.zero=2"],
        "TP2 DP2 ZeRO-3": ["layout.tp=2", "layout.zero=3", "train.micro_batch=2"],
        "TP2 SP CP2": ["layout.tp=2", "layout.cp=2", "layout.sequence_parallel=true"],
        "CP2 PP2 VPP2": ["layout.cp=2", "layout.pp=2", "layout.vpp=2", "train.micro_batch=4"],
        "DP4 ZeRO-0": ["layout.zero=0"],
        "DP4 ZeRO-1": [],
        "DP4 ZeRO-2": ["layout.zero=2"],
        "DP4 ZeRO-3": ["layout.zero=3"],
    },
    8: {
        "TP2 PP2 DP2": ["layout.tp=2", "layout.pp=2", "train.micro_batch=4"],
        "TP2 PP2 DP2 SP VPP2 recompute": [
            "layout.tp=2",
            "layout.pp=2",
            "layout.vpp=2",
            "layout.sequence_parallel=true",
            "layout.recompute=full",
            "train.micro_batch=4",
        ],
    },
}
# `make test` runs one model a layout, in turn; `make test-all` all of them
MODEL_NAMES = tuple(MODELS)
QUICK = {
    (world, name): MODEL_NAMES[number % len(MODELS)]
    for world, layouts in WORLDS.items()
    for number, name in enumerate(layouts)
}
CASES = [
    pytest.param(model, world, name, marks=[] if QUICK[world, name] == model else [pytest.mark.slow])
    for (world, name) in QUICK
    for model in MODELS
]
TIMEOUT = 900


def train_world(rank: int, world: int, folder: Path, quick: bool) -> dict[tuple[str, str], Trained]:
    """The cases that `make test` runs, or the others."""
    return {
        (model, name): train_case(model, overrides, world, folder, evaluated=True)
        for name, overrides in WORLDS[world].items()
        for model in MODELS
        if (QUICK[world, name] == model) == quick
    }


def train_truth(rank: int, world: int, folder: Path) -> dict[str, Trained]:
    make_test_set(folder)
    return {model: train_case(model, [], 1, folder, write=True, evaluated=True) for model in MODELS}


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Trained]]:
    """One process on the whole batch, in one microbatch."""
    folder = tmp_path_factory.mktemp("truth")
    (trained,) = run_ranks(train_truth, 1, folder, timeout=TIMEOUT)
    return folder, trained


Results = Callable[[str, int, str], list[Trained]]


@pytest.fixture(scope="module")
def results(truth: tuple[Path, dict[str, Trained]]) -> Results:
    """What each rank saw of a model under a layout."""

    @cache
    def of_world(world: int, quick: bool) -> list[dict[tuple[str, str], Trained]] | RanksError:
        try:
            return run_ranks(train_world, world, truth[0], quick, timeout=TIMEOUT)
        except RanksError as error:
            return error  # told by each of the world's tests, not tried again by each

    def of_case(model: str, world: int, name: str) -> list[Trained]:
        ranks = of_world(world, QUICK[world, name] == model)
        if isinstance(ranks, RanksError):
            raise ranks
        return [rank[model, name] for rank in ranks]

    return of_case


@pytest.mark.parametrize(("model", "world", "name"), CASES)
def test_a_layout_trains_as_one_process(
    truth: tuple[Path, dict[str, Trained]], results: Results, model: str, world: int, name: str
) -> None:
    expected = truth[1][model]
    assert expected.norms[0] > 0.5, "clipping is at work"
    assert max(expected.losses) - min(expected.losses) > 0.01, "and the model learns"
    for mine in results(model, world, name):
        assert mine.losses == pytest.approx(expected.losses, abs=1e-5)
        assert mine.norms == pytest.approx(expected.norms, rel=1e-5)
        assert mine.gradient_error <= 1e-6
        assert mine.parameter_error <= 1e-5


@pytest.mark.parametrize(("model", "world", "name"), CASES)
def test_a_layout_scores_as_one_process(
    truth: tuple[Path, dict[str, Trained]], results: Results, model: str, world: int, name: str
) -> None:
    """On 19 of 21 samples in batches of 3, which neither stages nor ranks divide."""
    expected = truth[1][model].scores
    for mine in results(model, world, name):
        assert mine.scores.keys() == expected.keys()
        if model == "caption":
            assert mine.scores["captioning"] == pytest.approx(expected["captioning"], rel=1e-5)
        else:
            assert mine.scores == expected


@pytest.mark.parametrize(("model", "world", "name"), CASES)
def test_the_layout_is_really_applied(
    truth: tuple[Path, dict[str, Trained]], results: Results, model: str, world: int, name: str
) -> None:
    recipe = recipe_of(model, WORLDS[world][name])
    layout, tower = lay_out(recipe, world), next(iter(recipe.model.towers.values()))
    ranks = [each.applied for each in results(model, world, name)]
    for mine in ranks:
        assert mine["groups"] == {
            "tp": layout.tp,
            "pp": layout.pp,
            "dp": layout.dp,
            "zero": layout.dp * layout.cp,
            "model": layout.tp * layout.pp,
        }
        assert layout.dp * layout.tp * layout.pp * layout.cp == world
        assert mine["offloaded"] == layout.offload
        assert mine["share"] == BATCH // layout.dp
        assert mine["chunks"] == len(recipe.model.towers) * layout.vpp
        assert mine["layers"] == tower.layers // (layout.pp * layout.vpp)
        assert mine["qkv rows"] == 3 * tower.width // layout.tp
        lengths = dict(recipe.model.sequence_lengths)
        if layout.pp == layout.cp == 1 and not layout.sequence_parallel:
            lengths.pop("text", None)  # tokens without padding
        shorter = {length - layout.text_step for name, length in lengths.items() if name != "vision"}
        assert set(mine["lengths"]) == {length // layout.sequence_pieces for length in {*lengths.values(), *shorter}}
        shared = layout.dp * layout.cp > 1  # by ZeRO; its partitions are padded
        if layout.zero == 3 and shared:
            assert mine["resident"] <= 1.05 * mine["moments"], "parameters are kept in pieces too"
        elif layout.zero and shared:
            assert mine["resident"] > 1.5 * mine["moments"], "optimizer state is kept in pieces"
        else:
            assert mine["resident"] == mine["moments"]
    # together the ranks keep each moment of a copy once under ZeRO, and each rank all of its own without
    kept = sum(mine["moments"] for mine in ranks)
    alone = truth[1][model].applied["moments"]
    copies = layout.dp * layout.cp if layout.zero == 0 else 1
    assert kept >= alone * copies
    # what tensor parallel ranks do not cut is on each of them, and a tied token table on both ends
    assert kept <= alone * copies * (1.6 if layout.tp * layout.pp > 1 else 1)
