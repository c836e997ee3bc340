"""A checkpoint knows no layout: saved under any, loaded under any, it is the same training run.

Each family is a model that is trained for three steps and saved under each of its layouts, then loaded under each of
them. Loaded state is saved again at once, which must give the same tensors to the last bit; the losses of the next
steps must be those of the run that was not interrupted. And what was saved is what one process has after three steps,
so that a layout which saves and loads in the same wrong order is found out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from safetensors import safe_open

from data_pipeline import Batch, Tokenizer
from data_pipeline.tokenizer import EOS
from pretrain.checkpoint.format import MOMENTS, PARTS, Checkpoint, describe, verify
from pretrain.config import load_recipe

STEPS, BATCH = 3, 16
MODEL = [
    "model.text={layers: 4, width: 48, heads: 4, vocab_size: 300, context: 16}",
    f"train.global_batch={BATCH}",
    "train.eps=1e-4",  # a tiny eps makes large steps of the rounding of gradients that are zero
    "data.train=none",
]
TOWERS = ["model.vision={layers: 4, width: 32, heads: 4, image_size: 32, patch: 8}", "model.embed_dim=24"]
FAMILIES = {
    "dual": TOWERS,
    "captioner": ["model.kind=captioner", "objectives=[{name: caption}]", "model.vision={image_size: 32, patch: 8}"],
    "bf16": [*TOWERS, "train.precision=bf16"],
    "frozen": [*TOWERS, "train.freeze=[vision.]"],
}


@dataclass(frozen=True)
class Case:
    family: str
    layout: str
    world: int
    keys: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.family}-{self.layout}"

    @property
    def quick(self) -> bool:
        """Whether `make test` runs it; the others are for `make test-all`."""
        return self.family == "captioner"


CASES = [
    Case("dual", "one", 1, ("layout.zero=0",)),
    Case("dual", "dp2-zero3", 2, ("layout.zero=3",)),
    Case("dual", "tp2-sp", 2, ("layout.tp=2", "layout.sequence_parallel=true")),
    Case("dual", "pp2-vpp2", 2, ("layout.pp=2", "layout.vpp=2", "train.micro_batch=4")),
    Case("dual", "tp2-pp2", 4, ("layout.tp=2", "layout.pp=2", "train.micro_batch=4")),
    Case("dual", "tp2-cp2-zero3", 4, ("layout.tp=2", "layout.cp=2", "layout.zero=3")),
    Case("captioner", "one", 1, ()),
    Case("captioner", "pp2", 2, ("layout.pp=2", "train.micro_batch=4")),
    Case("captioner", "tp2-pp2", 4, ("layout.tp=2", "layout.pp=2", "layout.zero=0", "train.micro_batch=4")),
    Case("bf16", "one", 1, ("layout.zero=3",)),
    Case("bf16", "dp2", 2, ("layout.zero=1",)),
    Case("frozen", "tp2", 2, ("layout.tp=2",)),
    Case("frozen", "dp2-zero3", 2, ("layout.zero=3",)),
    Case("frozen", "dp2-tp2", 4, ("layout.tp=2", "layout.zero=2")),
]
PAIRS = [(saved, loaded) for saved in CASES for loaded in CASES if saved.family == loaded.family]


def marked(cases: Sequence[Any]) -> list[Any]:
    """Cases, or pairs of them, as parameters of a test."""
    slow = [not (case if isinstance(case, Case) else case[0]).quick for case in cases]
    return [
        pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=[pytest.mark.slow] if each else [])
        for case, each in zip(cases, slow, strict=True)
    ]


def batch_of(step: int) -> Batch:
    generator = torch.Generator().manual_seed(step)
    image = torch.randint(0, 256, (BATCH, 3, 32, 32), generator=generator, dtype=torch.uint8)
    text = torch.randint(4, 300, (BATCH, 16), generator=generator)
    for row, end in enumerate(torch.randint(5, 16, (BATCH,), generator=generator).tolist()):
        text[row, end], text[row, end + 1 :] = EOS, 0
    positions = torch.arange(BATCH)
    return Batch(image, text, positions, positions, [])


class Running:
    """An engine under a layout, and its saver."""

    def __init__(self, case: Case, world: int, run: Path) -> None:
        from pretrain.checkpoint.save import Saver
        from pretrain.parallel.build import build_model
        from pretrain.parallel.engine import Engine
        from pretrain.parallel.groups import start_ranks
        from pretrain.parallel.layout import lay_out

        recipe = load_recipe("quickstart", [*MODEL, *FAMILIES[case.family], *case.keys])
        self.layout = lay_out(recipe, world)
        self.ranks = start_ranks(self.layout, torch.device("cpu"))
        self.engine = Engine(build_model(recipe, self.layout, self.ranks), recipe, self.layout, self.ranks)
        self.saver = Saver(self.engine, run, recipe, Tokenizer.train(["a red square"], 300), "fingerprint")

    def step(self, number: int) -> float:
        first = self.ranks.dp_rank * self.layout.share
        rows = batch_of(number).rows(slice(first, first + self.layout.share))
        return self.engine.step(rows, lr=3e-3).loss

    def save(self, step: int) -> None:
        self.saver.save(step)
        self.saver.finish()

    def stop(self) -> None:
        from pretrain.parallel.groups import stop_ranks

        self.engine.close()
        stop_ranks(self.ranks)


def train_and_save(rank: int, world: int, folder: Path, cases: list[Case]) -> list[list[float]]:
    """For each case the losses of the two steps after the one that was saved."""
    losses = []
    for case in cases:
        running = Running(case, world, folder / case.name)
        for step in range(STEPS):
            running.step(step)
        running.save(STEPS)
        losses.append([running.step(STEPS), running.step(STEPS + 1)])
        running.stop()
    return losses


def load_and_save(rank: int, world: int, folder: Path, pairs: list[tuple[Case, Case]]) -> list[list[float]]:
    """Each pair's checkpoint loaded and saved again; the losses of the two steps after it."""
    from pretrain.checkpoint.load import restore_checkpoint

    losses = []
    for saved, loaded in pairs:
        running = Running(loaded, world, folder / f"{saved.name}-{loaded.name}")
        restore_checkpoint(running.engine, describe(folder / saved.name))
        running.save(STEPS)
        losses.append([running.step(STEPS), running.step(STEPS + 1)])
        running.stop()
    return losses


class Runs:
    """The jobs of these tests, each started once and only when asked for: those of the quick family, or all others."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._going_on: dict[bool, dict[Case, list[float]]] = {}
        self._loaded_again: dict[bool, dict[tuple[Case, Case], list[float]]] = {}

    def going_on(self, quick: bool) -> dict[Case, list[float]]:
        """The two losses of the runs that were not interrupted."""
        if quick not in self._going_on:
            found: dict[Case, list[float]] = {}
            for world in sorted({case.world for case in CASES}):
                cases = [case for case in CASES if case.world == world and case.quick == quick]
                found |= dict(
                    zip(cases, run_ranks(train_and_save, world, self.folder, cases, timeout=600)[0], strict=True)
                )
            self._going_on[quick] = found
        return self._going_on[quick]

    def loaded_again(self, quick: bool) -> dict[tuple[Case, Case], list[float]]:
        """The same two losses of runs that went on from a checkpoint."""
        if quick not in self._loaded_again:
            self.going_on(quick)
            found: dict[tuple[Case, Case], list[float]] = {}
            for world in sorted({case.world for case in CASES}):
                pairs = [pair for pair in PAIRS if pair[1].world == world and pair[0].quick == quick]
                found |= dict(
                    zip(pairs, run_ranks(load_and_save, world, self.folder, pairs, timeout=800)[0], strict=True)
                )
            self._loaded_again[quick] = found
        return self._loaded_again[quick]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("checkpoints"))


def tensors_of(checkpoint: Checkpoint) -> dict[tuple[str, str], torch.Tensor]:
    """By (part, parameter name), read by what `checkpoint.json` says of them."""
    found: dict[tuple[str, str], Any] = {}
    for part, by_name in checkpoint.tensors.items():
        for name, file in by_name.items():
            with safe_open(checkpoint.path / file, framework="pt") as opened:
                found[part, name] = opened.get_tensor(name)
    return found


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("case", marked(CASES), ids=lambda case: case.name)
def test_what_is_saved_is_whole_and_what_one_process_has(runs: Runs, case: Case) -> None:
    runs.going_on(case.quick)
    folder = runs.folder
    checkpoint = describe(folder / case.name)
    assert verify(checkpoint) == []
    assert (checkpoint.step, checkpoint.samples, checkpoint.updates) == (STEPS, STEPS * BATCH, STEPS)
    tensors = tensors_of(checkpoint)
    owned: list[str] = []
    for file in checkpoint.path.glob("weight*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            owned += opened.keys()
    assert sorted(owned) == sorted(checkpoint.parameters), "each parameter is in exactly one file"
    assert len(list(checkpoint.path.glob("weight*.safetensors"))) == case.world, "every rank writes"
    trained = [name for name in checkpoint.parameters if not (case.family == "frozen" and name.startswith("vision."))]
    for part in PARTS:
        assert set(checkpoint.tensors[part]) == set(trained if part in MOMENTS else checkpoint.parameters)

    reference = next(each for each in CASES if each.family == case.family)
    tolerance = 1e-2 if case.family == "bf16" else 1e-5
    for key, expected in tensors_of(describe(folder / reference.name)).items():
        assert list(tensors[key].shape) == checkpoint.parameters[key[1]]
        assert (tensors[key] - expected).abs().max() < tolerance * (1 + expected.abs().max()), key
        if key[0] != "weight" and key[1] != "logit_bias.value":  # which InfoNCE does not use
            assert tensors[key].abs().max() > 0, f"{key} was never updated"


@pytest.mark.timeout(2400)
@pytest.mark.parametrize(("saved", "loaded"), marked(PAIRS), ids=lambda case: case.name)
def test_it_loads_under_any_layout(runs: Runs, saved: Case, loaded: Case) -> None:
    going_on, loaded_again = runs.going_on(saved.quick), runs.loaded_again(saved.quick)
    original = describe(runs.folder / saved.name)
    again = describe(runs.folder / f"{saved.name}-{loaded.name}")
    assert again.updates == original.updates
    expected, found = tensors_of(original), tensors_of(again)
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), key
    rounding = 1e-2 if saved.family == "bf16" else 1e-6
    assert loaded_again[saved, loaded] == pytest.approx(going_on[saved], rel=rounding)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "case", marked([case for case in CASES if case.layout == "tp2-pp2"]), ids=lambda case: case.name
)
def test_one_process_loads_the_model_of_many_files(runs: Runs, case: Case) -> None:
    from pretrain import load_model
    from pretrain.models.pieces import parameters_by_name

    runs.going_on(case.quick)
    model, _, recipe = load_model(runs.folder / case.name)
    assert recipe.model.kind == ("captioner" if case.family == "captioner" else "dual")
    tensors = tensors_of(describe(runs.folder / case.name))
    found = dict(parameters_by_name(model))
    assert sorted(found) == sorted(name for part, name in tensors if part == "weight")
    for name, parameter in found.items():
        assert torch.equal(parameter.detach(), tensors["weight", name]), name
