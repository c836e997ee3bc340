"""A user with bad luck: each mistake is one clear sentence and the right exit code, and nothing is half-written."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import webdataset
from PIL import Image

from data_pipeline import open_dataset
from data_pipeline.scenes.synth import synthesise
from pretrain.checkpoint.format import describe
from pretrain.cli import main
from pretrain.metrics import read_lines

TINY = [
    "model.vision.layers=1",
    "model.vision.width=32",
    "model.vision.image_size=32",
    "model.text.layers=1",
    "model.text.width=32",
    "model.text.vocab_size=300",
    "train.global_batch=16",
    "train.steps=6",
    "train.warmup=1",
    "train.log_every=1",
    "eval.every=0",
    "eval.samples=12",
    "data.workers=0",
]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    synthesise(folder, train=60, test=12, size=32, sound=False, processes=1)
    return folder


def train(data: Path, run: Path, *more: str) -> int:
    return main(["train", "quickstart", f"data.train={data}", "data.test=null", f"run.dir={run}", *TINY, *more])


def sentence(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr that starts with the command's name, and says what is wrong."""
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("weft: ")]
    told = [line for line in lines if "another takes its place" not in line]  # of a slow worker, on a busy machine
    assert len(told) == 1, told
    assert "Traceback" not in told[0]
    return told[0]


def write_shard(folder: Path, samples: list[dict[str, object]]) -> Path:
    """A shard as plain webdataset writes it, without any index of ours."""
    folder.mkdir()
    with webdataset.TarWriter(str(folder / "foreign-0.tar")) as tar:
        for sample in samples:
            tar.write(sample)
    return folder


def picture(colour: tuple[int, int, int], kind: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), colour).save(buffer, kind)
    return buffer.getvalue()


def foreign_samples(count: int) -> list[dict[str, object]]:
    return [
        {"__key__": f"pic{number:03d}", "jpg": picture((number * 3 % 256, 50, 90)), "txt": f"picture number {number}"}
        for number in range(count)
    ]


def test_shards_of_plain_webdataset_are_indexed_and_trained_on(tmp_path: Path) -> None:
    data = write_shard(tmp_path / "data", foreign_samples(40))
    assert train(data, tmp_path / "run") == 0
    assert len(read_lines(tmp_path / "run" / "metrics.jsonl")) == 6
    assert describe(tmp_path / "run").step == 6


def test_corrupt_pictures_are_named_and_the_run_goes_on_to_a_limit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    samples = foreign_samples(40)
    for number in (3, 17):
        samples[number]["jpg"] = picture((1, 2, 3))[:-200]
    samples[29]["jpg"] = b"not a picture"
    data = write_shard(tmp_path / "data", samples)
    assert train(data, tmp_path / "run") == 0
    named = read_lines(tmp_path / "run" / "quarantine.jsonl")
    assert {line["key"] for line in named} == {"pic003", "pic017", "pic029"}
    assert all(line["shard"] == "foreign-0.tar" and line["reason"] for line in named)
    assert len(read_lines(tmp_path / "run" / "metrics.jsonl")) == 6

    assert train(data, tmp_path / "strict", "data.max_corrupt=2") == 1
    told = sentence(capsys)
    assert "data.max_corrupt=2" in told
    assert "quarantine.jsonl" in told


def test_a_truncated_tar_is_named_with_its_byte(
    scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    shutil.copytree(scenes / "train", data)
    shard = next(data.glob("*.tar"))
    with shard.open("r+b") as file:
        file.truncate(50_000)
    assert train(data, tmp_path / "run") == 1
    assert shard.name in sentence(capsys)
    (data / "index.json").unlink()
    assert train(data, tmp_path / "run") == 1
    told = sentence(capsys)
    assert shard.name in told
    assert "50000" in told
    assert not (tmp_path / "run").exists()
    assert main(["data", "check", str(data), "--json"]) == 1
    assert "50000" in capsys.readouterr().out


@pytest.mark.parametrize(("bad", "good"), [(5, 0), (5, 1), (0, 1)])
def test_a_test_set_that_cannot_be_used_is_refused_before_the_start(
    scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], bad: int, good: int
) -> None:
    samples = [{"__key__": f"bad{number}", "jpg": b"no picture", "txt": "nothing"} for number in range(bad)]
    test, run = write_shard(tmp_path / "bad", [*samples, *foreign_samples(good)]), tmp_path / "run"
    assert train(scenes / "train", run, f"data.test={test}") == 2
    told = sentence(capsys)
    assert f"the test set {test} has {good} usable sample" in told
    assert ("'bad" in told) == bool(bad)
    assert not run.exists()


def test_a_shard_that_goes_before_training_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Not as a data set without text, though captions for the tokenizer are the first that is read."""
    data = write_shard(tmp_path / "data", foreign_samples(40))
    open_dataset(data)
    table = next(data.glob("*.npz"))
    table.write_bytes(b"")
    assert train(data, tmp_path / "run") == 1
    assert f"{table} is damaged" in sentence(capsys)


def test_long_captions_are_cut_with_a_word(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    samples = foreign_samples(20)
    samples[5]["txt"] = "a very long story " * 200
    data = write_shard(tmp_path / "data", samples)
    assert train(data, tmp_path / "run", "model.text.context=8") == 0
    assert "captions are longer than model.text.context=8" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "code", "words"),
    [
        (["train.warmpu=1"], 2, ["train.warmpu", "train.warmup"]),
        (["train.steps=many"], 2, ["train.steps", "many"]),
        (["train.global_batch=1000"], 2, ["train.global_batch", "1000", "60"]),
        (["train.micro_batch=5"], 2, ["train.micro_batch", "5", "16"]),
        (["layout.pp=2"], 2, ["layout.pp"]),
        (["data.tokenizer=nowhere.json"], 2, ["data.tokenizer", "nowhere.json"]),
        (["run.device=cuda"], 2, ["run.device"]),
    ],
)
def test_wrong_recipes_are_refused_before_anything_is_written(
    scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], code: int, words: list[str]
) -> None:
    assert train(scenes / "train", tmp_path / "run", *more) == code
    told = sentence(capsys)
    assert all(word in told for word in words), told
    assert not (tmp_path / "run").exists()


def test_more_ranks_than_the_batch_divides_into(
    scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", "quickstart", f"data.train={scenes / 'train'}", f"run.dir={tmp_path / 'run'}", *TINY]
    assert main([*command, "--nproc", "3"]) == 2
    told = sentence(capsys)
    assert "train.global_batch is 16" in told
    assert "3 data parallel ranks" in told
    assert not (tmp_path / "run").exists()


def test_missing_and_empty_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(tmp_path / "nowhere", tmp_path / "run") == 2
    assert "nowhere" in sentence(capsys)
    (tmp_path / "empty").mkdir()
    assert train(tmp_path / "empty", tmp_path / "run") == 2
    assert ".tar" in sentence(capsys)
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_of_another_model(scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert train(scenes / "train", run) == 0
    before = (run / "metrics.jsonl").read_bytes()
    assert train(scenes / "train", run, "model.embed_dim=64", "train.steps=8") == 2
    told = sentence(capsys)
    assert "model.embed_dim" in told
    assert (run / "metrics.jsonl").read_bytes() == before

    # even with a recipe that claims to fit: the tensors have the last word
    description = describe(run).path / "checkpoint.json"
    tree = json.loads(description.read_text())
    tree["parameters"]["text.projection.weight"][0] += 1
    description.write_text(json.dumps(tree))
    assert train(scenes / "train", run, "train.stop_at=6", "train.resume=auto") == 0  # nothing left to do, nothing read
    tree["step"] = 5
    description.write_text(json.dumps(tree))
    capsys.readouterr()
    assert train(scenes / "train", run) == 2
    told = sentence(capsys)
    assert "another model" in told
    assert "text.projection.weight" in told


def test_a_damaged_checkpoint_is_named(scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert train(scenes / "train", run, "train.stop_at=4") == 0
    weights = describe(run).path / "weight.safetensors"
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    assert main(["checkpoint", "verify", str(run)]) == 1
    capsys.readouterr()
    assert train(scenes / "train", run) == 1
    assert "weight.safetensors" in sentence(capsys)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    if mount is None or subprocess.run([mount, "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]).returncode:
        pytest.skip("needs the right to mount a small tmpfs")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk(scenes: Path, tmp_path: Path, small_disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wide = ["model.vision.width=96", "model.text.width=96", "train.stop_at=2"]
    assert train(scenes / "train", small_disk / "run", *wide) == 1
    told = sentence(capsys)
    assert "disk is full" in told
    assert not list((small_disk / "run" / "checkpoints").iterdir())

    assert main(["data", "synth", str(small_disk / "scenes"), "--train", "2000", "--test", "8"]) == 1
    assert "disk is full" in sentence(capsys)
    assert not (small_disk / "scenes").exists() or not list((small_disk / "scenes").iterdir())


def test_data_that_changes_under_a_run(scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert train(scenes / "train", run, "train.stop_at=2") == 0
    other = write_shard(tmp_path / "other", foreign_samples(40))
    assert train(other, run) == 2
    assert "other data" in sentence(capsys)
    assert len(open_dataset(other)) == 40


def test_two_ranks_end_together_with_one_sentence(tmp_path: Path) -> None:
    samples = foreign_samples(40)
    for sample in samples[10:20]:
        sample["jpg"] = b"not a picture"
    data = write_shard(tmp_path / "data", samples)
    keys = [f"data.train={data}", "data.test=null", f"run.dir={tmp_path / 'run'}", *TINY, "data.max_corrupt=3"]
    command = [sys.executable, "-m", "pretrain.cli", "train", "quickstart", *keys, "--nproc", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 1
    assert done.stderr.count("weft: ") == 1
    assert "data.max_corrupt=3" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"files": {}}, "no checksum of weight.safetensors"),
        ({"parameters": {"logit_scale.log": "x"}}, "does not describe a checkpoint"),
        ({"parameters": [1]}, "does not describe a checkpoint"),
        ({"recipe": {"data": {"train": "x"}, "trian": {}}}, "unknown key 'trian'"),
    ],
)
def test_an_edited_checkpoint_is_one_sentence(
    scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, object], words: str
) -> None:
    run = tmp_path / "run"
    assert train(scenes / "train", run, "train.stop_at=2") == 0
    description = describe(run).path / "checkpoint.json"
    description.write_text(json.dumps({**json.loads(description.read_text()), **change}))
    capsys.readouterr()
    assert train(scenes / "train", run) in (1, 2)
    assert words in sentence(capsys)


def test_broken_metrics_do_not_stop_a_resume(scenes: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert train(scenes / "train", run, "train.stop_at=3") == 0
    metrics = run / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes().splitlines()[0] + b'\n{"no": "step"}\nnull\n\x9b\xff\n')
    assert train(scenes / "train", run) == 0
    assert [line["step"] for line in read_lines(metrics)] == [1, 4, 5, 6]


def test_a_lost_link_neither_starts_again_nor_drops_the_newest(scenes: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    saving = ["checkpoint.every=2", "checkpoint.keep=2"]
    assert train(scenes / "train", run, *saving, "train.stop_at=4") == 0
    (run / "checkpoints" / "latest").unlink()  # as after a copy without links
    assert describe(run).step == 4
    assert train(scenes / "train", run, *saving) == 0
    assert [line["step"] for line in read_lines(run / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    assert sorted(path.name for path in (run / "checkpoints").glob("step_*")) == ["step_00000004", "step_00000006"]
    (run / "checkpoints" / "latest").unlink()
    (run / "checkpoints" / "latest").symlink_to("step_00000004")  # rolled back by hand
    assert train(scenes / "train", run, *saving, "train.stop_at=5") == 0
    assert describe(run).step == 5
    assert sorted(path.name for path in (run / "checkpoints").glob("step_*")) == ["step_00000004", "step_00000005"]


def test_the_folder_given_to_import_is_pointed_into(
    scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(scenes, tmp_path / "run") == 2
    assert str(scenes / "train") in sentence(capsys)
