"""What only the command itself can show from its start to its end: exit codes, JSON and words of a whole run."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from data_pipeline.scenes.synth import synthesise
from pretrain.cli import main
from pretrain.parallel.engine import Engine

TINY = [
    "model.vision.image_size=32",
    "model.vision.patch=16",
    "train={steps: 3, global_batch: 8, warmup: 0, log_every: 1, lr: 1.0e-3, watchdog: 0}",
    "eval={every: 0, samples: 16, batch: 8}",
    "data.workers=0",
]
TOWER = "layers: 1, width: 32, heads: 2, mlp_ratio: 2"
TEXT = f"{{{TOWER}, context: 16, vocab_size: 300}}"
MODELS = {
    "dual encoder": [f"model.text={TEXT}", f"model.vision={{{TOWER}}}", "model.embed_dim=16"],
    "captioner": [f"model={{kind: captioner, text: {TEXT}}}", "objectives=[{name: caption}]"],
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    synthesise(folder, train=40, test=16, size=32, sound=False, processes=1)
    return folder


def training(data: Path, run: Path, kind: str = "dual encoder", *more: str) -> list[str]:
    folders = [f"data.train={data / 'train'}", f"data.test={data / 'test'}", f"run.dir={run}"]
    return ["train", "quickstart", *folders, *MODELS[kind], *TINY, *more]


def refuse(word: str) -> None:
    raise ValueError(f"{word} is no JSON")


@pytest.mark.parametrize("kind", MODELS)
def test_a_model_of_nans_has_no_score(
    data: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert main(training(data, run, kind, "train.lr=1e12", "train.max_skipped=50")) == 1
    capsys.readouterr()
    assert main(["eval", str(run), "--json"]) == 1
    told = [*(run / "evaluation.jsonl").read_text().splitlines(), capsys.readouterr().out]
    assert len(told) > 1
    for line in told:
        json.loads(line, parse_constant=refuse)


def test_a_captioner_has_no_retrieval(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert main(training(data, run, "captioner")) == 0
    capsys.readouterr()
    assert main(["eval", str(run), "--task", "retrieval"]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert "captioner" in said.err
    assert len(said.err.splitlines()) == 1


def test_train_says_what_it_does_not_read(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(data, tmp_path / "data")
    (tmp_path / "data/train/more.tar.gz").write_bytes(b"x")
    assert main(training(tmp_path / "data", tmp_path / "run")) == 0
    said = capsys.readouterr().err
    assert "more.tar.gz" in said[: said.index("step 1/3")]


def test_a_second_run_in_the_folder_is_refused(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    long = training(data, run, "dual encoder", "train.steps=1000000")
    with subprocess.Popen([sys.executable, "-m", "pretrain.cli", *long], stderr=subprocess.DEVNULL) as first:
        try:
            ends = time.monotonic() + 400
            while not (run / "metrics.jsonl").exists():
                assert first.poll() is None
                assert time.monotonic() < ends
                time.sleep(0.1)
            assert main(training(data, run)) == 1
            assert f"process {first.pid} on " in (said := capsys.readouterr().err)
            assert f"trains in {run}" in said
            assert len(said.splitlines()) == 1
        finally:
            first.kill()


def test_memory_that_is_full_is_one_sentence(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tower = "model.vision.mlp_ratio=1e12"  # petabytes, more than there are addresses
    assert main(training(data, tmp_path / "large", "dual encoder", tower)) == 1
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith("weft: the memory is full while the model was made: use ")

    step, words = Engine.step, tmp_path / "words"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(words))
    for full_at in (1, 2):
        steps = iter(range(1, 9))

        def full(self: Engine, *its: object) -> object:
            if next(steps) == full_at:  # noqa: B023 (called in this turn of the loop)
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return step(self, *its)  # type: ignore[arg-type]

        monkeypatch.setattr(Engine, "step", full)
        assert main(training(data, tmp_path / f"step-{full_at}")) == 1
        told = capsys.readouterr().err.splitlines()[-1]
        assert told.startswith(f"weft: the memory is full in step {full_at} (`forward and backward`): use a smaller ")
        assert "train.micro_batch" in told
        assert json.loads(words.read_text())["lasting"] == (full_at == 1), "a launcher starts a later one again"
