"""Samples that cannot be used, all the way: a run replaces and names them, and tells when there are too many."""

from __future__ import annotations

from pathlib import Path

import pytest
from tars import picture, tar_of

from pretrain.cli import main
from pretrain.metrics import read_lines

TINY = [
    "model.vision.layers=1", "model.vision.width=32", "model.vision.heads=2", "model.vision.image_size=16",
    "model.text.layers=1", "model.text.width=32", "model.text.heads=2", "model.text.vocab_size=300",
    "train.global_batch=20", "train.steps=2", "train.warmup=1", "train.log_every=1", "eval.every=0", "data.workers=0",
]  # fmt: skip
DAMAGE: dict[str, dict[str, bytes]] = {
    "latin": {"txt": b"caf\xe9"},
    "wide": {"txt": "two bytes each".encode("utf-16")},
    "open": {"json": b"{"},
    "list": {"json": b"[]"},
    "texts": {"json": b'{"captions": "x"}'},
    "half": {"json": b'{"captions": ["\\ud800"]}'},
    "deep": {"json": b'{"captions": ' + b"[" * 100_000},
    "huge": {"json": b'{"captions": ' + b"9" * 5000 + b"}"},
    "blank": {"txt": b" \n"},
    "none": {},
    "pixels": {"txt": b"fine", "png": picture(1)[:60]},
}


def write(folder: Path, damaged: dict[str, dict[str, bytes]], good: int = 30) -> Path:
    samples = {f"good{n:02d}": {"png": picture(n), "txt": f"caption {n}".encode()} for n in range(good)}
    samples |= {f"bad-{name}": {"png": picture(0), **fields} for name, fields in damaged.items()}
    folder.mkdir()
    files = [(f"{key}.{name}", data) for key, fields in samples.items() for name, data in fields.items()]
    (folder / "0.tar").write_bytes(tar_of(files))
    return folder


def train(data: Path, run: Path, *more: str) -> int:
    return main(["train", "quickstart", f"data.train={data}", "data.test=null", f"run.dir={run}", *TINY, *more])


@pytest.mark.parametrize("tokenizer", [False, True])
def test_every_damage_of_a_caption_is_named_and_training_goes_on(tmp_path: Path, tokenizer: bool) -> None:
    data, run = write(tmp_path / "data", DAMAGE), tmp_path / "run"
    more = ["train.steps=3"]  # 41 samples: all are read
    if tokenizer:
        assert train(write(tmp_path / "other", {}), tmp_path / "other-run") == 0
        more.append(f"data.tokenizer={tmp_path / 'other-run' / 'tokenizer.json'}")
    assert train(data, run, *more) == 0
    named = read_lines(run / "quarantine.jsonl")
    assert {line["key"] for line in named} == {f"bad-{name}" for name in DAMAGE}
    assert {line["shard"] for line in named} == {"0.tar"}
    assert all(line["reason"] and line["cause"] for line in named)
    causes = {line["key"]: line["cause"] for line in named}
    assert causes["bad-latin"].startswith("UnicodeDecodeError in sample.py, line ")
    assert causes["bad-deep"].startswith("RecursionError")


def test_captions_none_of_which_can_be_read_end_the_run_with_the_first_cause(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write(tmp_path / "data", {f"{n}": DAMAGE["latin"] for n in range(30)}, good=0)
    assert train(data, tmp_path / "run") == 1
    told = capsys.readouterr().err
    assert "no caption of" in told
    assert "the first: sample 'bad-0' in 0.tar: the txt field of sample 'bad-0' is not UTF-8" in told
    assert "Traceback" not in told
