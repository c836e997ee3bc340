"""Exact duplicates: found by pixels whatever the file, by bytes only where the files are equal; the first stays."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.filters import parse_steps, run_filters
from data_pipeline.sample import Sample

WriteSet = Callable[..., Path]
ReadAll = Callable[[Path], list[Sample]]


@pytest.fixture(scope="module")
def samples(encoded: Callable[..., bytes]) -> list[Sample]:
    noise = np.random.default_rng(0).integers(0, 256, (3, 12, 20, 3), np.uint8)
    same_bytes_turned = noise[0].reshape(20, 12, 3)
    return [
        Sample("first", {"png": encoded(noise[0], "PNG"), "txt": b"A dog  runs"}),
        Sample("other", {"png": encoded(noise[1], "PNG"), "txt": b"a cat"}),
        Sample("as webp", {"webp": encoded(noise[0], "WEBP", lossless=True), "txt": b"a dog runs"}),
        Sample("again", {"png": encoded(noise[0], "PNG"), "txt": b"it is a dog"}),
        Sample("turned", {"png": encoded(same_bytes_turned, "PNG"), "txt": b"stripes"}),
        Sample("no picture", {"txt": b"a cat"}),
        Sample("no picture either", {"json": b"{}"}),
    ]


@pytest.mark.parametrize(
    ("step", "gone"),
    [
        ("duplicates", {"as webp": "first", "again": "first"}),
        ("duplicates:of=bytes", {"again": "first"}),
        ("duplicates:of=captions", {"as webp": "first", "no picture": "other"}),
        ("duplicates:same_captions=true", {"as webp": "first"}),
    ],
)
def test_the_first_of_each_stays(
    samples: list[Sample], write_set: WriteSet, read_all: ReadAll, tmp_path: Path, step: str, gone: dict[str, str]
) -> None:
    folder = write_set("in", samples)
    report = run_filters(folder, tmp_path / "out", parse_steps([step]), processes=1)
    assert read_all(tmp_path / "out") == [sample for sample in samples if sample.key not in gone]
    details = {example.key: example.detail for example in report.steps[0].examples}
    assert {key: detail.removeprefix("as ").split(" in shard")[0] for key, detail in details.items()} == gone
    assert report.steps[0].reasons.keys() == {f"same {step_of(step)} as an earlier sample"}


def step_of(step: str) -> str:
    return step.partition("of=")[2] or "pixels"


def test_what_is_in_the_test_set_leaves_even_where_it_is_the_first(
    samples: list[Sample], write_set: WriteSet, read_all: ReadAll, tmp_path: Path
) -> None:
    train, test = write_set("in", samples), write_set("test", [samples[2], samples[5]])
    report = run_filters(train, tmp_path / "out", parse_steps(["duplicates"]), against=test, processes=1)
    assert {sample.key for sample in samples} - {sample.key for sample in read_all(tmp_path / "out")} == {
        "first", "as webp", "again",
    }  # fmt: skip
    assert report.steps[0].reasons == {"same pixels as a sample of the test set": 3}
    assert report.steps[0].examples[0].detail == "as as webp in shard-000000.tar"
    assert report.against is not None
    assert (report.against.samples, report.against_unreadable) == (2, 0)


def test_test_samples_that_cannot_be_read_are_counted(
    samples: list[Sample], write_set: WriteSet, tmp_path: Path
) -> None:
    test = write_set("test", [Sample("bad", {"png": b"\x89PNG\r\n\x1a\n"}), samples[1]])
    steps = parse_steps(["duplicates", "near-duplicates"])
    report = run_filters(write_set("in", samples), tmp_path / "out", steps, against=test, processes=1)
    assert report.against_unreadable == 1
    assert report.steps[0].reasons["same pixels as a sample of the test set"] == 1


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="'colour': use one of pixels, bytes, captions"):
        parse_steps(["duplicates:of=colour"])
