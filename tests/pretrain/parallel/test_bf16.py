"""In bf16 a layout is as near to the truth, one process in fp32, as one process in bf16 is.

Two layouts round differently, so nothing can be asked of their difference; what each is away from fp32 can be.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from layout_cases import MODELS, Trained, train_case
from ranks import run_ranks

BF16 = "train.precision=bf16"
WORLDS: dict[int, dict[str, list[str]]] = {
    2: {
        "DP2 ZeRO-1": ["train.micro_batch=4"],
        "DP2 ZeRO-2": ["layout.zero=2", "train.micro_batch=4"],
        "DP2 ZeRO-3": ["layout.zero=3"],
        "ZeRO-1 offloaded": ["layout.offload=true", "train.micro_batch=4"],
        "TP2 SP": ["layout.tp=2", "layout.sequence_parallel=true"],
        "PP2 VPP2": ["layout.pp=2", "layout.vpp=2", "train.micro_batch=4"],
        "CP2": ["layout.cp=2"],
    },
    4: {
        "TP2 PP2": ["layout.tp=2", "layout.pp=2", "train.micro_batch=4"],
        "PP2 DP2": ["layout.pp=2", "train.micro_batch=4"],
        "TP2 DP2 ZeRO-3": ["layout.tp=2", "layout.zero=3", "train.micro_batch=4"],
    },
}
CASES = [(model, world, name) for world, layouts in WORLDS.items() for name in layouts for model in MODELS]
pytestmark = pytest.mark.slow


def train_both(rank: int, world: int, folder: Path) -> dict[str, tuple[Trained, Trained]]:
    """One process in fp32, and in bf16."""
    return {
        model: (train_case(model, [], 1, folder, write=True), train_case(model, [BF16], 1, folder)) for model in MODELS
    }


def train_world(rank: int, world: int, folder: Path) -> dict[tuple[str, str], Trained]:
    return {
        (model, name): train_case(model, [BF16, *overrides], world, folder)
        for name, overrides in WORLDS[world].items()
        for model in MODELS
    }


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, tuple[Trained, Trained]]]:
    folder = tmp_path_factory.mktemp("truth")
    (trained,) = run_ranks(train_both, 1, folder, timeout=900)
    return folder, trained


Results = Callable[[str, int, str], list[Trained]]


@pytest.fixture(scope="module")
def results(alone: tuple[Path, dict[str, tuple[Trained, Trained]]]) -> Results:
    """What each rank saw of a model under a layout."""

    @cache
    def of_world(world: int) -> list[dict[tuple[str, str], Trained]]:
        return run_ranks(train_world, world, alone[0], timeout=900)

    return lambda model, world, name: [rank[model, name] for rank in of_world(world)]


@pytest.mark.parametrize(("model", "world", "name"), CASES)
def test_no_farther_from_fp32_than_one_process(
    alone: tuple[Path, dict[str, tuple[Trained, Trained]]], results: Results, model: str, world: int, name: str
) -> None:
    truth, rounded = alone[1][model]
    assert 1e-3 < rounded.gradient_error < 3e-2, "bf16 has 8 bits: it is at work, and right"
    for mine in results(model, world, name):
        assert mine.gradient_error <= 1.6 * rounded.gradient_error
        assert mine.parameter_error <= 1.2 * rounded.parameter_error
        assert mine.norms[0] == pytest.approx(truth.norms[0], rel=1e-2)
        farthest = max(abs(a - b) for a, b in zip(rounded.losses, truth.losses, strict=True))
        assert mine.losses == pytest.approx(truth.losses, abs=3 * farthest + 1e-3)
