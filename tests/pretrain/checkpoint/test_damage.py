"""A flipped byte is found and named, and the checkpoint before is used; one that was asked for by name is an error."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest

from data_pipeline import open_dataset
from data_pipeline.scenes.synth import synthesise
from pretrain import load_model
from pretrain.checkpoint.format import DESCRIPTION, Checkpoint, describe, step_folder, verify
from pretrain.cli import main
from pretrain.config import Recipe, load_recipe
from pretrain.errors import WeftError
from pretrain.metrics import read_lines
from pretrain.run_folder import checkpoint_to_resume, checkpoints_to_resume

TINY = [
    "model.vision={layers: 1, width: 32, heads: 4, image_size: 32}",
    "model.text={layers: 1, width: 32, heads: 4, vocab_size: 300}",
    "model.embed_dim=16",
    "train.global_batch=8",
    "train.steps=6",
    "train.warmup=1",
    "train.log_every=1",
    "data.workers=0",
    "data.test=null",
    "checkpoint.every=2",
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that stopped at step 4, with the checkpoints of steps 2 and 4; beside it its data."""
    folder = tmp_path_factory.mktemp("trained")
    synthesise(folder / "scenes", train=32, test=4, size=32, sound=False, processes=1)
    assert train(folder, folder / "run", "train.stop_at=4") == 0
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    shutil.copytree(trained / "run", tmp_path / "run", symlinks=True)
    return tmp_path / "run"


def train(folder: Path, run: Path, *more: str) -> int:
    return main(["train", "quickstart", f"data.train={folder / 'scenes' / 'train'}", f"run.dir={run}", *TINY, *more])


def flip(file: Path, position: int) -> None:
    data = bytearray(file.read_bytes())
    data[position] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("name", ["weight.safetensors", "exp_avg_sq.safetensors", "tokenizer.json", DESCRIPTION])
def test_the_one_before_is_used(trained: Path, run: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    file = step_folder(run, 4) / name
    flip(file, file.stat().st_size // 2)
    capsys.readouterr()
    assert main(["checkpoint", "verify", str(step_folder(run, 4))]) == 1
    assert name in "".join(capsys.readouterr())
    with pytest.raises(WeftError, match=name):
        load_model(step_folder(run, 4))

    assert train(trained, run) == 0
    told = " ".join("".join(capsys.readouterr()).split())
    assert name in told
    assert "going on from step 2 instead" in told
    whole = [(line["step"], line["loss"]) for line in read_lines(trained / "run" / "metrics.jsonl")]
    again = [(line["step"], line["loss"]) for line in read_lines(run / "metrics.jsonl")]
    assert [step for step, _ in again] == [1, 2, 3, 4, 5, 6]
    assert again[:4] == whole, "it goes on from the state of step 2, to the last bit"
    assert verify(describe(step_folder(run, 4))) == [], "the damaged one is written anew"


def test_a_missing_file_counts_as_damage_and_no_whole_one_is_an_error(
    trained: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (step_folder(run, 4) / "exp_avg.safetensors").unlink()
    flip(step_folder(run, 2) / "weight.safetensors", 1000)
    before = (run / "metrics.jsonl").read_bytes()
    capsys.readouterr()
    assert train(trained, run) == 1
    told = " ".join(capsys.readouterr().err.split())
    assert "exp_avg.safetensors is missing" in told
    assert "weight.safetensors is damaged" in told
    assert (run / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("value", ["Infinity", "NaN", "1e999", "[1]", "9" * 400, "[" * 100_000 + "]" * 100_000])
@pytest.mark.parametrize("name", ["step", "samples", "updates"])
def test_a_description_of_which_a_number_is_none_is_refused_in_a_sentence(
    trained: Path, run: Path, name: str, value: str
) -> None:
    file = step_folder(run, 4) / DESCRIPTION
    tree = json.loads(file.read_text())
    file.write_text(json.dumps(tree | {name: "here"}).replace('"here"', value))
    with pytest.raises(WeftError, match=r"checkpoint\.json does not describe a checkpoint of ours"):
        describe(step_folder(run, 4))


def test_any_flipped_byte_of_the_description_is_noticed(trained: Path, run: Path) -> None:
    recipe = resuming(trained, run)
    data = open_dataset(recipe.data.train).fingerprint
    file = step_folder(run, 4) / DESCRIPTION
    whole = file.read_bytes()
    for position in random.Random(0).sample(range(len(whole)), 150):
        flip(file, position)
        first, second = checkpoints_to_resume(recipe, data)
        assert isinstance(first, WeftError), f"byte {position}"
        assert str(file) in str(first), f"byte {position}"
        assert isinstance(second, Checkpoint)
        assert second.step == 2
        file.write_bytes(whole)
    found = checkpoint_to_resume(recipe, data)
    assert found is not None
    assert found.step == 4


def resuming(trained: Path, run: Path) -> Recipe:
    return load_recipe("quickstart", [f"data.train={trained / 'scenes' / 'train'}", f"run.dir={run}", *TINY])
