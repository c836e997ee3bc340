"""`weft data score`: the numbers of the model itself, for every sample that can be used, ready to be filtered by."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from tars import picture, tar_of
from typer.testing import CliRunner

from data_pipeline import ImageTransform, Sample, decode_image, open_dataset, write_shards
from data_pipeline.errors import DataError
from data_pipeline.filters import parse_steps, run_filters
from data_pipeline.scenes.synth import synthesise
from pretrain import load_model
from pretrain.cli import main
from pretrain.errors import RequestError
from pretrain.filter_commands import score_command
from pretrain.score_samples import score_samples

SMALL = ["model.vision.layers=1", "model.text.layers=1", "model.vision.image_size=32", "model.text.vocab_size=300"]
BRIEF = ["train.steps=4", "train.warmup=1", "train.global_batch=16", "data.workers=0", "data.test=null"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a few steps."""
    folder = tmp_path_factory.mktemp("trained")
    synthesise(folder / "scenes", train=48, test=8, size=32, sound=False, processes=1)
    settings = [f"data.train={folder / 'scenes' / 'train'}", f"run.dir={folder / 'run'}", *SMALL, *BRIEF]
    assert main(["train", "quickstart", *settings]) == 0
    return folder / "run"


@pytest.fixture
def data(trained: Path, tmp_path: Path) -> Path:
    """Some scenes, with samples among them that cannot be used."""
    scenes = open_dataset(trained.parent / "scenes" / "train")
    samples = [scenes.read(number) for number in range(11)]
    samples[3] = Sample("no picture", {"txt": b"a caption"})
    samples[4] = Sample("bad picture", {"jpg": b"\xff\xd8 and no more", "txt": b"a caption"})
    samples[7] = Sample("no caption", {"jpg": samples[7].fields["jpg"]})
    write_shards(len(samples), samples.__getitem__, tmp_path / "data", samples_per_shard=4, processes=1)
    return tmp_path / "data"


def rows_of(table: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in table.read_text(encoding="utf-8").strip().split("\n")]


def test_a_row_is_what_the_model_says_of_the_sample_alone(trained: Path, data: Path, tmp_path: Path) -> None:
    scored = score_samples(trained, data, tmp_path / "t.jsonl", batch=4)
    model, tokenizer, recipe = load_model(trained)
    samples = [
        sample for sample in map(open_dataset(data).read, range(11)) if not sample.key.startswith(("no ", "bad"))
    ]
    names = sorted({label for sample in samples if (label := sample.label())})
    assert scored.classes == tuple(names)
    assert len(names) > 1

    def embed(texts: list[str]) -> torch.Tensor:
        tokens = tokenizer.encode_batch(texts, recipe.model.text.context)
        return model.encode_text(torch.from_numpy(tokens.astype(np.int64)))  # type: ignore[union-attr]

    rows = rows_of(tmp_path / "t.jsonl")
    assert [row["key"] for row in rows] == [sample.key for sample in samples]
    resize = ImageTransform(recipe.model.vision.image_size)
    with torch.no_grad():
        classes = torch.stack([embed([f"{name}", f"a {name}", f"a picture of a {name}"]).mean(0) for name in names])
        classes = classes / classes.norm(dim=1, keepdim=True)
        for row, sample in zip(rows, samples, strict=True):
            image = model.encode_image(resize(decode_image(sample.fields["jpg"]), None)[None])[0]  # type: ignore[union-attr]
            assert row["similarity"] == pytest.approx(float(image @ embed([sample.captions()[0]])[0]), abs=1e-4)
            logits = (model.logit_scale() * (classes @ image)).double().numpy()  # type: ignore[union-attr]
            chances = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
            assert row["confidence"] == pytest.approx(chances.max(), abs=1e-4)
            assert chances[names.index(row["label"])] == pytest.approx(chances.max(), abs=1e-4)
            entropy = -(chances * np.log(chances)).sum() / np.log(len(names))
            assert row["uncertainty"] == pytest.approx(entropy, abs=1e-4)
    assert scored.rows == 8
    assert sum(scored.left_out.values()) == 3
    assert {"it has no image": 1, "it has no caption": 1}.items() <= scored.left_out.items()


def test_pictures_alone_are_scored_by_classes_of_a_file(trained: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("\ufeffred star\r\n\nblue\u2028circle\nred star\n", encoding="utf-8")
    scored = score_samples(trained, data, tmp_path / "t.jsonl", classes=tmp_path / "classes.txt", captions=False)
    assert scored.classes == ("blue\u2028circle", "red star")
    rows = rows_of(tmp_path / "t.jsonl")
    assert "no caption" in {row["key"] for row in rows}
    assert {tuple(row) for row in rows} == {("key", "label", "confidence", "uncertainty")}
    assert all(0.5 <= row["confidence"] <= 1 and 0 <= row["uncertainty"] <= 1 for row in rows)


def test_the_table_is_what_the_filter_steps_read(trained: Path, data: Path, tmp_path: Path) -> None:
    table = tmp_path / "t.jsonl"
    app = typer.Typer()
    app.command("score")(score_command)
    result = CliRunner().invoke(app, [str(trained), str(data), str(table), "--json"], catch_exceptions=False)
    told = json.loads(result.stdout)
    assert (told["rows"], told["path"]) == (8, str(table))
    similarity = {row["key"]: row["similarity"] for row in rows_of(table)}
    middle = sorted(similarity.values())[4]
    steps = [
        f"scores:table={table},column=similarity,min={middle}",
        f"top-scores:table={table},column=uncertainty,share=0.5",
    ]
    report = run_filters(data, tmp_path / "out", parse_steps(steps), processes=1)
    assert (report.steps[0].removed, report.steps[1].removed, report.kept) == (7, 2, 2)
    kept = open_dataset(tmp_path / "out")
    assert all(similarity[kept.key(number)] >= middle for number in range(2))


def test_requests_that_make_no_sense_are_refused(trained: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("dog\n")
    (tmp_path / "there.jsonl").write_text("mine")
    with pytest.raises(RequestError, match="is there already"):
        score_samples(trained, data, tmp_path / "there.jsonl")
    with pytest.raises(RequestError, match=r"one\.txt names 1 of them"):
        score_samples(trained, data, tmp_path / "t.jsonl", classes=tmp_path / "one.txt")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\ndog\n")
    with pytest.raises(DataError, match=r"latin\.txt is not UTF-8 .*: save it as UTF-8"):
        score_samples(trained, data, tmp_path / "t.jsonl", classes=tmp_path / "latin.txt")
    with pytest.raises(RequestError, match="no checkpoint"):
        score_samples(tmp_path, data, tmp_path / "t.jsonl")
    twice = tmp_path / "twice"
    twice.mkdir()
    for name in ("0.tar", "1.tar"):
        (twice / name).write_bytes(tar_of({"a.jpg": picture(kind="JPEG"), "a.txt": b"text"}))
    bare = tmp_path / "pictures"
    write_shards(2, [Sample(key, {"jpg": picture(kind="JPEG")}) for key in "ab"].__getitem__, bare, processes=1)
    samples = [Sample("a", {"txt": b"text"})]
    write_shards(1, samples.__getitem__, tmp_path / "bare", processes=1)
    with pytest.raises(RequestError, match="--no-captions leaves classes"):
        score_samples(trained, tmp_path / "bare", tmp_path / "t.jsonl", captions=False)
    with pytest.raises(RequestError, match=r"no sample of .* has a caption: --no-captions, with --classes FILE scores"):
        score_samples(trained, bare, tmp_path / "t.jsonl")
    with pytest.raises(ValueError, match=r"1 key of .* several shards, 'a' in 0\.tar and 1\.tar, and rows of a table"):
        score_samples(trained, twice, tmp_path / "t.jsonl")
    assert not (tmp_path / "t.jsonl").exists()


def test_a_model_of_nans_scores_nothing(
    trained: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, tokenizer, recipe = load_model(trained)
    with torch.no_grad():
        next(model.parameters()).fill_(torch.nan)
    monkeypatch.setattr("pretrain.score_samples.load_model", lambda *_: (model, tokenizer, recipe))
    assert main(["data", "score", str(trained), str(data), str(tmp_path / "t.jsonl")]) == 1
    (sentence,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("weft: ")]
    assert "not finite" in sentence
    assert not list(tmp_path.glob("t.jsonl*")), "a table appears whole or not at all"
