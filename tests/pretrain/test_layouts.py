"""One recipe under many layouts: the same global batches, the same losses, the same parameters.

Each world of ranks is started once and runs all its cases; the truth is one process on the whole batch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks

from data_pipeline.scenes.synth import synthesise
from pretrain.config import load_recipe
from pretrain.metrics import read_lines

STEPS = 20
RECIPE = [
    "model.vision.layers=2",
    "model.vision.width=32",
    "model.vision.heads=4",
    "model.vision.image_size=32",
    "model.text.layers=2",
    "model.text.width=48",
    "model.text.heads=4",
    "model.text.vocab_size=300",
    "model.embed_dim=24",
    "train.global_batch=24",
    f"train.steps={STEPS}",
    "train.warmup=5",
    "train.lr=3e-3",
    # a tiny epsilon would turn rounding on gradients that are 0 in truth into steps of full size
    "train.eps=1e-4",
    "train.log_every=1",
    "eval.every=0",
    "eval.samples=40",
]
ALONE: list[list[str]] = [
    [],
    ["data.workers=0"],
    ["data.workers=3"],
    ["train.micro_batch=4"],
    ["layout.zero=0"],
    ["layout.zero=2", "train.micro_batch=12"],
    ["layout.zero=3"],
]
PAIR: list[list[str]] = [
    ["layout.zero=0"],
    ["layout.zero=1", "data.workers=0"],
    ["layout.zero=2", "train.micro_batch=3"],
    ["layout.zero=3"],
    ["layout.zero=3", "train.micro_batch=6"],
    ["layout.tp=2"],
    ["layout.tp=2", "train.micro_batch=8", "layout.zero=2"],
]
FOUR: list[list[str]] = [
    ["layout.zero=1", "data.workers=3"],
    ["layout.zero=3", "train.micro_batch=2"],
    ["layout.tp=2", "layout.zero=1"],
    ["layout.tp=2", "layout.zero=3"],
]


def train_cases(
    rank: int, world: int, data: Path, out: Path, common: list[str], cases: list[list[str]]
) -> list[list[Any]]:
    """[losses, gradient norms, scores] of each case, trained one after the other in this job."""
    from pretrain.train import train

    results = []
    for number, case in enumerate(cases):
        run = out / f"world{world}-{number}"
        overrides = [f"data.train={data / 'train'}", f"data.test={data / 'test'}", f"run.dir={run}", *common, *case]
        assert train(load_recipe("quickstart", overrides), "weft train") == 0
        lines = read_lines(run / "metrics.jsonl") if rank == 0 else []
        scores = read_lines(run / "evaluation.jsonl") if rank == 0 else []
        results.append([[line["loss"] for line in lines], [line["grad_norm"] for line in lines], scores])
    return results


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    synthesise(folder, train=200, test=40, size=32, sound=False, processes=1)
    return folder


@pytest.mark.slow
@pytest.mark.timeout(2000)
@pytest.mark.parametrize("objective", ["contrastive", "sigmoid"])
def test_losses_are_those_of_one_process(data: Path, tmp_path: Path, objective: str) -> None:
    common = [*RECIPE, f"objectives=[{{name: {objective}}}]"]
    if objective == "sigmoid":
        common += ["train.lr=1e-3", "model.logit_scale_init=5"]
    [truth] = run_ranks(train_cases, 1, data, tmp_path, common, ALONE[:1])[0]
    assert len(truth[0]) == STEPS
    assert truth[0][-1] < truth[0][0]
    worlds = [(1, ALONE[1:]), (2, PAIR), (4, FOUR)] if objective == "contrastive" else [(1, ALONE[3:4]), (2, PAIR[-3:])]
    for world, cases in worlds:
        results = run_ranks(train_cases, world, data, tmp_path / "other", common, cases, timeout=900)[0]
        for case, (losses, norms, scores) in zip(cases, results, strict=True):
            torch.testing.assert_close(losses, truth[0], atol=1e-5, rtol=0, msg=f"losses of {world} rank(s), {case}")
            torch.testing.assert_close(norms, truth[1], atol=1e-4, rtol=1e-4, msg=f"norms of {world} rank(s), {case}")
            found = {way: score for way, score in scores[0]["retrieval"].items() if way != "chance"}
            assert found == {way: score for way, score in truth[2][0]["retrieval"].items() if way != "chance"}, case
