"""Samples that cannot be used, all the way: a run replaces and names them, and tells when there are too many."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tars import picture, tar_of

from data_pipeline import Corrupt
from pretrain.cli import main
from pretrain.config import load_recipe
from pretrain.errors import WeftError
from pretrain.metrics import read_lines
from pretrain.parallel.groups import Ranks, start_ranks, stop_ranks
from pretrain.parallel.layout import lay_out
from pretrain.quarantine import Quarantine

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
    more = ["train.steps=3", "data.max_corrupt_share=1"]  # 41 samples: all are read
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


@pytest.fixture
def ranks() -> Iterator[Ranks]:
    ranks = start_ranks(lay_out(load_recipe("quickstart", []), 1), torch.device("cpu"))
    yield ranks
    stop_ranks(ranks)


def test_rows_of_parquet_are_quarantined_as_samples_of_tars_are(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows: list[tuple[bytes | None, bytes | None]] = [(picture(n), b"caption %d" % n) for n in range(60)]
    rows += [(picture(1)[:60], b"cut"), (b"", b"empty"), (None, b"none"), (picture(1), b" \n"), (picture(2), None)]
    rows += [(picture(3), b"caf\xe9")]
    images, captions = zip(*rows, strict=True)
    text = pyarrow.array(captions, pyarrow.binary()).view(pyarrow.string())  # as a careless writer does
    parquet.write_table(pyarrow.table({"image": images, "caption": text}), tmp_path / "rows.parquet", row_group_size=22)
    assert train(tmp_path / "rows.parquet", tmp_path / "run", "train.global_batch=22", "train.steps=3") == 0
    named = {line["key"]: line["reason"] for line in read_lines(tmp_path / "run" / "quarantine.jsonl")}
    assert set(named) == {f"rows/{number}" for number in range(60, 66)}
    assert "damaged PNG" in named["rows/60"]
    assert named["rows/62"] == "it has no image"
    assert named["rows/63"] == named["rows/64"] == "it has no caption"
    assert "cannot be read" in named["rows/65"] or "Unicode" in named["rows/65"]


def corrupt(*numbers: int) -> list[Corrupt]:
    return [Corrupt(number, f"s{number}", "0.tar", "damaged JPEG", "ValueError in decode.py") for number in numbers]


def quarantine(folder: Path, ranks: Ranks, said: list[str], samples: int, *keys: str, start: int = 0) -> Quarantine:
    recipe = load_recipe("quickstart", [f"run.dir={folder}", *keys])
    return Quarantine(recipe, start, ranks, samples, said.append)


def test_the_screen_tells_of_the_first_and_whenever_they_double(tmp_path: Path, ranks: Ranks) -> None:
    said: list[str] = []
    kept = quarantine(tmp_path, ranks, said, 1000)
    for number in range(20):
        kept.agree(corrupt(number), False, 1000)
        kept.agree(corrupt(number), False, 1000)  # another epoch: the same sample once more
    assert [line.split(" could")[0] for line in said] == [
        "1 sample", "2 samples", "4 samples", "8 samples", "16 samples"
    ]  # fmt: skip
    assert "'s0' in 0.tar: damaged JPEG" in said[0]
    assert str(tmp_path / "quarantine.jsonl") in said[0]
    assert kept.sum_up().startswith("20 samples could not be used")
    assert len(read_lines(tmp_path / "quarantine.jsonl")) == 20
    again = quarantine(tmp_path, ranks, said, 1000, start=5)
    assert again.sum_up() == ""
    again.agree(corrupt(3), False, 1000)
    assert len(said) == 5, "it is known from before"


@pytest.mark.parametrize(
    ("samples", "bad", "position", "ends"),
    [
        (16, 8, 16, True),  # half of a tiny set
        (16, 8, 4000, True),  # over many epochs
        (80, 40, 80, True),
        (17, 1, 17, False),
        (20, 7, 20, False),
        (1000, 30, 200, True),
        (1000, 30, 400, False),
        (100_000, 100, 100_000, False),
        (100_000, 101, 100_000, True),
    ],
)
def test_too_many_by_count_or_by_share(
    tmp_path: Path, ranks: Ranks, samples: int, bad: int, position: int, ends: bool
) -> None:
    kept = quarantine(tmp_path, ranks, [], samples)
    if not ends:
        kept.agree(corrupt(*range(bad)), False, position)
        return
    with pytest.raises(WeftError, match=r"data\.max_corrupt(_share)?=.*'s\d+' in 0.tar: damaged JPEG"):
        kept.agree(corrupt(*range(bad)), False, position)


@pytest.mark.parametrize(("share", "ends"), [(0.5, True), (0.7, False), (1.0, False)])
def test_stand_ins_that_cannot_be_used_count_as_tried(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], share: float, ends: bool
) -> None:
    """60% are bad: a batch of 8 tries some 20 samples, and what is bad is a share of those."""
    bad = {f"{n}": {"txt": b"fine", "png": b"broken"} for n in range(60)}
    data = write(tmp_path / "data", bad, good=40)
    assert train(data, tmp_path / "run", f"data.max_corrupt_share={share}") == int(ends)
    told = re.search(r"(\d+) of the (\d+) samples tried so far could not be used", capsys.readouterr().err)
    assert bool(told) == ends
    if told:
        assert share < int(told[1]) / int(told[2]) <= 1


def test_half_of_a_set_ends_the_run_and_a_few_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    half = write(tmp_path / "half", {f"{n}": {"txt": b"fine", "png": b"broken"} for n in range(30)})
    assert train(half, tmp_path / "run") == 1
    assert "more than data.max_corrupt_share=0.1 of them" in capsys.readouterr().err
    few = write(tmp_path / "few", {"one": {"txt": b"fine", "png": b"broken"}}, good=20)
    assert train(few, tmp_path / "other") == 0
    assert "1 sample could not be used so far" in capsys.readouterr().err
