"""Whole evaluations of a made-up model, whose right answers are known: which samples, which captions, what is said."""

from __future__ import annotations

import gc
import json
import math
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tars import tar_of

from data_pipeline import Dataset, Tokenizer, open_dataset
from data_pipeline.tokenizer import EOS
from pretrain.errors import RequestError, WeftError
from pretrain.evaluation import test_set
from pretrain.evaluation.evaluate import Evaluation, evaluate, summary
from pretrain.evaluation.test_set import require_usable, spread
from pretrain.parallel.groups import Ranks, start_alone, stop_ranks
from pretrain.sections import Eval, Model

MODEL = Model.model_validate(
    {"vision": {"image_size": 8, "patch": 8}, "text": {"context": 12, "vocab_size": 300}, "embed_dim": 3}
)
COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "yellow": (255, 255, 0), "grey": (99, 99, 99)}


class Colours:
    """Sees an image as its mean colour and a text as the sum of the colours it names."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    def encode_image(self, image: torch.Tensor) -> torch.Tensor:
        return F.normalize(image.float().mean((2, 3)) + 1e-6, dim=1)

    def encode_text(self, text: torch.Tensor) -> torch.Tensor:
        rows = []
        for ids in text.tolist():
            words = self.tokenizer.decode(ids[1 : ids.index(EOS)]).split()
            named = [torch.tensor(COLOURS[word]).float() for word in words if word in COLOURS]
            rows.append(F.normalize(sum(named, torch.full((3,), 1e-6)), dim=0))
        return torch.stack(rows)


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    alone = start_alone(torch.device("cpu"))
    yield alone
    stop_ranks(alone)


def png(colour: tuple[int, int, int]) -> bytes:
    import io

    file = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(file, "PNG")
    return file.getvalue()


def sample(
    key: str, colour: str, captions: list[str] | None = None, label: str | None = None
) -> list[tuple[str, bytes]]:
    told = {name: value for name, value in {"captions": captions, "label": label}.items() if value is not None}
    return [(f"{key}.png", png(COLOURS[colour])), (f"{key}.json", json.dumps(told).encode())]


Scored = Callable[..., Evaluation]


@pytest.fixture
def scored(tmp_path: Path, ranks: Ranks) -> Scored:
    """Evaluate the made-up model on these files of a tar."""

    def of(files: list[tuple[str, bytes]], model: Any = None, **settings: Any) -> Evaluation:
        (tmp_path / "test").mkdir(exist_ok=True)
        (tmp_path / "test" / "0.tar").write_bytes(tar_of(files))
        (tmp_path / "test" / "index.json").unlink(missing_ok=True)
        tokenizer = Tokenizer.train(["a b"], 300)
        tasks, memory = settings.pop("tasks", None), settings.pop("memory", None)
        chosen = Eval.model_validate({"templates": ["{}"], "batch": 3, **settings})
        dataset = open_dataset(tmp_path / "test")
        model = (model or Colours)(tokenizer)
        return evaluate(model, dataset, tokenizer, MODEL, chosen, ranks, tasks=tasks, memory=memory)

    return of


def test_every_caption_counts_as_published(scored: Scored) -> None:
    """Five captions an image, worked out by hand.

    Image to text (a mixture and a colour that is in it have similarity 0.71): red's own are alone in front: right. The
    best that green has is "yellow", 0.71; ahead are yellow's "green 1" to "green 4" at 1 and, level, "yellow 1": sixth.
    Blue's own five are level with green's four "blue": fifth, for ties count against it. Yellow's "yellow 1" is level
    with green's "yellow": second.
    Text to image, 20 captions: of red's five "red 1" to "red 5": right. Of green's: "blue a" to "blue d" find blue,
    "yellow" finds yellow: none. Of blue's five "blue 1" to "blue 5": right. Of yellow's: "green 1" to "green 4" find
    green, "yellow 1" finds yellow: one. Together 11 of 20.
    """
    found = scored(
        [
            *sample("a", "red", [f"red {number}" for number in range(1, 6)]),
            *sample("b", "green", ["blue a", "blue b", "blue c", "blue d", "yellow"]),
            *sample("c", "blue", [f"blue {number}" for number in range(1, 6)]),
            *sample("d", "yellow", ["green 1", "green 2", "green 3", "green 4", "yellow 1"]),
        ]
    )
    retrieval = found.scores["retrieval"]
    assert retrieval["image_to_text"] == {"r1": 0.25, "r5": 0.75, "r10": 1.0}
    assert retrieval["text_to_image"]["r1"] == 11 / 20
    assert (retrieval["images"], retrieval["captions"], retrieval["distinct_captions"]) == (4, 20, 20)
    assert summary(found).endswith(", 4 images, 20 captions")
    assert (found.notes, found.problem) == ([], "")


def test_a_limit_is_a_spread_and_classes_are_those_of_the_whole_set(scored: Scored, tmp_path: Path) -> None:
    names = ["red", "green", "blue", "yellow", "grey"]
    files = [
        each
        for n in range(100)
        for each in sample(f"{n:03d}", names[n // 20], [f"{names[n // 20]} {n}"], names[n // 20])
    ]
    whole = scored(files, samples=100)
    assert whole.scores["zero_shot"].items() >= {"top1": 1.0, "classes": 5, "images": 100}.items()
    assert whole.notes == []
    for count in (2, 3, 10):
        found = scored(files, samples=count, memory=tmp_path / "memory")
        assert found.scores["zero_shot"].items() >= {"classes": 5, "images": count, "chance": 0.2}.items()
        assert f"{count} of 100 images, {count} captions" in summary(found)
        assert f"scored on {count} of 100 samples, spread over the set" in found.notes[0]
        (kept,) = (tmp_path / "memory" / "classes").iterdir()
    assert json.loads(kept.read_text()) == {"names": sorted(names), "partial": False}
    kept.write_text("{")
    assert scored(files, samples=5, memory=tmp_path / "memory").scores["zero_shot"]["classes"] == 5
    kept.write_text(json.dumps({"names": ["other"], "partial": True}))
    remembered = scored(files, samples=5, memory=tmp_path / "memory")
    assert remembered.scores["zero_shot"]["classes"] == 6
    assert "a part of the set" in " ".join(remembered.notes)


@pytest.mark.parametrize(("total", "limit"), [(10, 10), (10, 99), (0, 5), (120, 10), (121, 7), (10**9, 1024), (11, 10)])
def test_a_spread_takes_one_of_each_stretch(total: int, limit: int) -> None:
    samples = spread(total, limit)
    assert len(samples) == min(total, limit)
    assert np.array_equal(samples, spread(total, limit))
    if total <= limit:
        assert samples.tolist() == list(range(total))
        return
    assert (np.diff(samples) > 0).all()
    edges = np.arange(limit + 1) * total // limit
    assert ((samples >= edges[:-1]) & (samples < edges[1:])).all()
    if total > 2 * limit:
        assert len({int(sample) - int(edge) for sample, edge in zip(samples, edges, strict=False)}) > 1, "at random"


def test_one_class_says_that_its_score_means_nothing(scored: Scored) -> None:
    one = scored([each for n in range(4) for each in sample(str(n), "red", [f"red {n}"], "red")])
    assert one.scores["zero_shot"]["top1"] == 1.0
    assert any("all labels are 'red'" in note and "means nothing" in note for note in one.notes)
    assert "zero-shot top-1 100.0% of 1 class (4 labelled images)" in summary(one)
    same = scored([each for n in range(4) for each in sample(str(n), "red", ["red", "a red one"])])
    assert any("retrieval scores mean nothing" in note for note in same.notes)


def test_classes_that_cannot_be_told_apart_are_named(scored: Scored) -> None:
    long = "a very long name of "
    cut = scored([each for n in ("red", "blue") for each in sample(n, n, [n], long + n)])
    assert cut.scores["zero_shot"]["top1"] == 0.0
    assert any(f"2 classes ('{long}blue' and '{long}red') have the same prompts" in note for note in cut.notes)
    labels = ["red", "Red", "red  x", "red x", "blue"]
    spelled = scored([each for n, name in enumerate(labels) for each in sample(str(n), "red", [f"{n}"], name)])
    assert spelled.scores["zero_shot"]["classes"] == 5
    told = "4 classes ('Red' and 'red', 'red  x' and 'red x') differ in case or spaces only"
    assert any(told in note for note in spelled.notes)
    apart = scored(
        [each for n in ("red", "blue") for each in sample(n, n, [n], long + n)], templates=[long + "{}", "{}", "red {}"]
    )
    assert any("have the same prompts" in note for note in apart.notes)
    told_once = scored([each for n in ("red", "blue") for each in sample(n, n, [n], n)], templates=[long + "{}", "{}"])
    assert told_once.notes == []  # one template tells them apart


def test_what_cannot_be_used_is_left_out_named_and_counted(scored: Scored) -> None:
    good = [each for name in ("red", "green", "blue", "yellow") for each in sample(name, name, [name])]
    bad = [
        ("0 latin.png", png(COLOURS["red"])),
        ("0 latin.txt", b"caf\xe9"),
        ("1 json.png", png(COLOURS["red"])),
        ("1 json.json", b"{"),
        ("2 list.png", png(COLOURS["red"])),
        ("2 list.json", b'{"captions": "red"}'),
        ("3 half.png", png(COLOURS["red"])),
        ("3 half.json", b'{"captions": ["\\ud800"]}'),
        ("4 image.png", b"no image"),
        ("4 image.txt", b"red"),
        ("5 none.txt", b"red"),
        ("6 silent.png", png(COLOURS["red"])),
        ("6 silent.json", b'{"captions": ["", "  "]}'),
    ]
    found = scored([*bad, *good])
    assert [each["key"][0] for each in found.test_set["unusable"]] == list("0123456")
    assert all(each["reason"] and each["shard"] == "0.tar" for each in found.test_set["unusable"])
    (note,) = found.notes
    assert note.startswith("7 of 11 samples could not be used and are left out of the scores: '0 latin' in 0.tar: ")
    assert note.endswith("; and 4 more")
    assert found.scores == scored(good).scores
    assert "4 of 11 images, 4 captions" in summary(found)
    with pytest.raises(WeftError, match=r"1 usable sample, and retrieval needs 2 or more \('6 silent' in 0.tar is"):
        scored([*bad, *sample("red", "red", ["red"])])


def test_captions_that_are_cut_are_counted(scored: Scored) -> None:
    long = "a text of many more letters than the context has tokens"
    found = scored([*sample("a", "red", ["red", long]), *sample("b", "blue", ["blue", f"{long} too"])])
    assert found.notes == ["2 of 4 captions are longer than the context of 12 tokens and were cut"]
    assert found.test_set["cut_captions"] == 2


def test_labels_need_no_captions(scored: Scored) -> None:
    files = [*sample("a", "red", None, "red"), *sample("b", "blue", None, "blue"), *sample("c", "green", ["green"])]
    found = scored(files)
    assert found.scores["zero_shot"].items() >= {"top1": 1.0, "images": 2}.items()
    assert list(found.scores) == ["zero_shot"]
    with pytest.raises(RequestError, match="fewer than 2 images with captions"):
        scored(files, tasks=("retrieval",))
    with pytest.raises(RequestError, match="has a label"):
        scored([*sample("a", "red", ["red"]), *sample("b", "blue", ["blue"])], tasks=("zero_shot",))


@pytest.mark.parametrize("tower", ["encode_image", "encode_text"])
def test_embeddings_that_are_not_finite_are_a_problem(scored: Scored, tower: str) -> None:
    class Broken(Colours):
        def __getattribute__(self, name: str) -> Any:
            found = super().__getattribute__(name)
            return (lambda rows: found(rows) * math.nan) if name == tower else found

    names = ("red", "green", "blue")
    found = scored([each for name in names for each in sample(name, name, [name], name)], Broken)
    assert found.problem.startswith("its embeddings are not finite")
    assert set(found.scores["retrieval"]["image_to_text"].values()) == {0.0}
    assert set(found.scores["retrieval"]["text_to_image"].values()) == {0.0}
    assert found.scores["zero_shot"]["top5"] == 0.0


def test_images_are_not_kept(scored: Scored, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[weakref.ref[Any]] = []
    most = 0
    read = Dataset.read

    def counted(self: Dataset, number: int, *arguments: Any, **options: Any) -> Any:
        nonlocal most
        gc.collect()
        most = max(most, sum(each() is not None for each in held))
        found = read(self, number, *arguments, **options)
        held.append(weakref.ref(found))
        return found

    monkeypatch.setattr(Dataset, "read", counted)
    names = ("red", "green", "blue", "yellow")
    scored([each for n in range(12) for each in sample(f"{n:02d}", names[n % 4], [f"{names[n % 4]} {n}"])])
    assert len(held) >= 12
    assert most <= 1


def test_too_few_usable_samples_are_refused_beforehand(tmp_path: Path) -> None:
    (tmp_path / "0.tar").write_bytes(tar_of([*sample("a", "red", ["red"]), ("b.txt", b"no image")]))
    dataset = open_dataset(tmp_path)
    with pytest.raises(RequestError, match=r"has 1 usable sample, and an evaluation needs 2 or more \('b' in 0.tar is"):
        require_usable(dataset, 1024, captioner=False)
    require_usable(dataset, 1024, captioner=True)


def test_labels_are_read_without_the_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [*sample("a", "red", None, "x"), *sample("b", "blue", None, "y"), ("c.png", b""), ("d.json", b"[")]
    (tmp_path / "0.tar").write_bytes(tar_of(files))
    dataset = open_dataset(tmp_path)
    lengths = []
    read = type(dataset.files).read
    monkeypatch.setattr(
        type(dataset.files),
        "read",
        lambda self, file, start, length: lengths.append(length) or read(self, file, start, length),
    )
    assert test_set.labels_of(dataset, range(4)) == {"x", "y"}
    assert sum(lengths) == sum(len(data) for name, data in files if name.endswith("json"))
