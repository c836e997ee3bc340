"""Ranks that would train on different things refuse, each with the same sentence; so do ranks without work."""

from __future__ import annotations

import os
import re
import shutil
import signal
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks

from data_pipeline import Batch
from data_pipeline.scenes.synth import synthesise
from pretrain import agreement
from pretrain.certificate import compare_orders
from pretrain.checkpoint.format import describe
from pretrain.config import load_recipe
from pretrain.errors import WeftError
from pretrain.ingest import _shared
from pretrain.metrics import read_lines
from pretrain.parallel.engine import Engine
from pretrain.parallel.groups import start_ranks, stop_ranks
from pretrain.parallel.layout import lay_out

TINY = [
    "model.vision={layers: 2, width: 32, heads: 2, image_size: 32, patch: 16, mlp_ratio: 2}",
    "model.text={layers: 2, width: 32, heads: 2, context: 16, vocab_size: 300, mlp_ratio: 2}",
    "model.embed_dim=16",
    "train={steps: 2, global_batch: 8, warmup: 1, log_every: 1, lr: 1.0e-3, watchdog: 0}",
    "eval={every: 0, samples: 16, batch: 8}",
    "data.workers=0",
]
HALF_FROZEN = "train.freeze=[vision., text.block, text.projection, text.positions, logit_scale, logit_bias]"
# what is asked of rank 0 and of rank 1, and what both say
REFUSED: list[tuple[list[str], list[str], str]] = [
    (
        ["data.train=A"],
        ["data.train=B"],
        r"differ in data\.train: 40 samples \(\w+\) on rank 0, 24 samples",
    ),
    (["data.test=A"], ["data.test=B"], r"differ in data\.test: 40 samples .* on rank 0, 24 samples"),
    (["data.test=A"], ["data.test=null"], r"differ in data\.test: .* none on rank 1"),
    (["train.lr=1e-3"], ["train.lr=2e-3"], r"differ in train\.lr: 0\.001 on rank 0, 0\.002 on rank 1"),
    (["layout.pp=2", HALF_FROZEN], ["layout.pp=2", HALF_FROZEN], r"train\.freeze is .* leaves pipeline stage 1 of"),
    (["run.dir=A-0"], ["run.dir=A-1"], r"run\.dir is not the same folder on rank 0 and rank 1: .*A-0 is not in .*A-1"),
    (
        ["train.init_from=A/../alone"],
        ["train.init_from=A/../tp"],
        r"init_from: step 2 \(.*\) on rank 0, step 2 \(",
    ),
    ([], ["train.init_from=A/../alone"], r"differ in train\.init_from: none on rank 0, step 2 \(\w+\) on rank 1"),
    (["train.freeze=[vision., text., logit_]"], ["train.freeze=[vision., text., logit_]"], r"leaves nothing to train"),
]


class OddError(Exception):
    """One that cannot be made again from its arguments."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


def broken(error: Exception) -> Generator[Batch, None, None]:
    raise error
    yield


def in_two_ranks(rank: int, world: int, folder: Path) -> dict[str, Any]:
    from pretrain.train import train

    found: dict[str, Any] = {"refused": []}

    def recipe(run: str, keys: list[str]) -> Any:
        asked = [f"data.train={folder / 'A'}", "data.test=null", f"run.dir={folder / run}", *TINY]
        asked += [key.replace("=A", f"={folder / 'A'}").replace("=B", f"={folder / 'B'}") for key in keys]
        return load_recipe("quickstart", asked)

    for name, keys in (("alone", []), ("parts", ["train.micro_batch=2"]), ("tp", ["layout.tp=2"])):
        found[name] = train(recipe(name, keys), "weft train")
    if rank == 0:
        shutil.copytree(folder / "alone", folder / "draft")
        (folder / "draft").rename(folder / "A-copy")
    while not (folder / "A-copy").exists():  # a run that has ended joins its ranks no more
        time.sleep(0.05)
    found["copy"] = train(recipe("copied", ["train.init_from=A/../" + ("A-copy" if rank else "alone")]), "weft train")

    agreement.APPEARS = 1.0
    for number, (first, second, _) in enumerate(REFUSED):
        try:
            train(recipe(f"refused{number}", second if rank else first), "weft train")
            found["refused"].append("trained")
        except WeftError as error:
            found["refused"].append(str(error))

    encode = Engine.encode_image

    def told_to_stop(self: Engine, image: torch.Tensor) -> torch.Tensor:
        if rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return encode(self, image)

    Engine.encode_image = told_to_stop  # type: ignore[method-assign]
    found["stopped"] = train(recipe("stopped", ["data.test=A", "eval.every=1"]), "weft train")
    Engine.encode_image = encode  # type: ignore[method-assign]

    tensor_parallel = recipe("none", ["layout.tp=2"])
    for name, error in (("key", KeyError("x")), ("odd", OddError(1, 2))):
        ranks = start_ranks(lay_out(tensor_parallel, world), torch.device("cpu"))
        try:
            next(_shared(broken(error), ranks, range(2)))
        except Exception as raised:
            found[name] = repr(raised)
        stop_ranks(ranks)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    for name, samples in (("A", 40), ("B", 24)):
        synthesise(folder / f"{name}-all", train=samples, test=1, size=32, sound=False, processes=1)
        (folder / f"{name}-all" / "train").rename(folder / name)
    return folder


@pytest.fixture(scope="module")
def found(folder: Path) -> list[dict[str, Any]]:
    return run_ranks(in_two_ranks, 2, folder, timeout=900)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("number", range(len(REFUSED)))
def test_what_differs_is_said_on_every_rank(found: list[dict[str, Any]], number: int) -> None:
    sentences = {each["refused"][number] for each in found}
    assert len(sentences) == 1
    assert re.search(REFUSED[number][2], sentences.pop())


def test_a_warm_start_is_compared_by_its_bytes(found: list[dict[str, Any]]) -> None:
    assert [each["copy"] for each in found] == [0, 0]


def test_the_order_certificate_is_that_of_any_layout(found: list[dict[str, Any]], folder: Path) -> None:
    for name in ("parts", "tp"):
        assert [each[name] for each in found] == [0, 0]
        compared = compare_orders(folder / "alone", folder / name)
        assert compared.same
        assert compared.samples == 16


def test_one_rank_that_is_told_to_stop_ends_an_evaluation_on_all(found: list[dict[str, Any]], folder: Path) -> None:
    assert [each["stopped"] for each in found] == [128 + signal.SIGTERM] * 2
    assert describe(folder / "stopped").step == 1
    assert read_lines(folder / "stopped" / "evaluation.jsonl") == []


def test_any_error_of_a_shared_reader_reaches_all_ranks(found: list[dict[str, Any]]) -> None:
    assert [each["key"] for each in found] == ["KeyError('x')"] * 2
    assert "1 and 2" in found[0]["odd"]
    assert found[1]["odd"] == "RuntimeError('OddError: 1 and 2')"
