"""Caption rules: each finds what it is for and leaves good captions in many languages alone."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from data_pipeline.filters import Change, Drop, parse_steps, run_filters
from data_pipeline.filters.captions import Captions, letter_share
from data_pipeline.sample import Sample

GOOD = [
    "A dog runs on the beach.",
    "two dogs",
    "Ein Hund läuft am Strand entlang",
    "猫が窓辺に座っている",
    "一只狗在海滩上奔跑",
    "หมาวิ่งบนชายหาด",
    "समुद्र तट पर एक कुत्ता",
    "собака бежит по пляжу",
    "كلب يركض على الشاطئ",
    "Route 66 sign, 1950s",
    "the cat and the dog and the bird",
    "a picture of the image of a stock exchange",
    "A man wearing a none-slip shirt & a hat",
    "an open file.cabinet in a room",
    "Photo of 3 dogs",
    "Image of a woman",
]

BAD = {
    "IMG_20240105_123456.jpg": "file name",
    "my holiday photo (3).JPEG": "file name",
    "images/0001/a.png": "file name",
    "DSC_0042": "name of a camera's file",
    "IMG 1234": "name of a camera's file",
    "Screenshot 2024-01-05 10.30.12": "name of a camera's file",
    "untitled": "name of a camera's file",
    "image (12)": "name of a camera's file",
    "see more at https://example.org/dogs": "web address",
    "visit www.example.org now": "web address",
    "a dog <br/> on the <b>beach</b>": "markup",
    "dogs &amp; cats": "markup",
    "Click to enlarge": "placeholder",
    "No image available": "placeholder",
    "stock photo": "placeholder",
    "null ": "fewer than 5 characters",
    "dog": "fewer than 5 characters",
    "elephant": "fewer than 2 words",
    "12345 67890 ... 333": "share of letters below 0.5",
    "buy buy buy buy buy now": "share of one word above 0.5",
    "dog " * 300: "more than 256 words",
    "long words " * 200: "more than 2000 characters",
}


@pytest.mark.parametrize("caption", GOOD)
def test_good_captions_stay(caption: str) -> None:
    assert Captions().judge(caption) is None


@pytest.mark.parametrize(("caption", "reason"), BAD.items())
def test_each_rule_finds_what_it_is_for(caption: str, reason: str) -> None:
    drop = Captions().judge(caption)
    assert drop is not None
    assert drop.reason == reason


def test_the_limits_are_where_they_are_set() -> None:
    rules = Captions(min_words=3, max_words=4, min_characters=1, min_letters=0.0)
    assert [rules.judge(" ".join(["ab"] * count)) is None for count in (2, 3, 4, 5)] == [False, True, True, False]
    rules = Captions(min_words=1, min_characters=4, max_characters=6, min_letters=0.5)
    assert [rules.judge("abcdefgh"[:length]) is None for length in (3, 4, 6, 7)] == [False, True, True, False]
    assert rules.judge("ab 12") is None
    assert rules.judge("ab 123") == Drop("share of letters below 0.5", "0.40")


def test_vowel_signs_belong_to_letters() -> None:
    assert letter_share("कुत्ता หมาที่") == 1.0
    assert letter_share("a1 b2") == 0.5
    assert letter_share(" ") == 0.0


def test_bad_captions_leave_their_sample_and_samples_without_a_good_one_the_set(
    captioned: Callable[..., Sample],
    write_set: Callable[..., Path],
    read_all: Callable[[Path], list[Sample]],
    tmp_path: Path,
) -> None:
    samples = [
        captioned("all good", "a dog", "two dogs", provenance={"id": 1}),
        captioned("first bad", "DSC_0042", "a dog", "IMG 1234", "two dogs", provenance={"id": 2}),
        captioned("later bad", "a dog", "DSC_0042"),
        captioned("all bad", "DSC_0042", "IMG 1234"),
        Sample("text alone", {"txt": b" a dog \n"}),
        Sample("bad text alone", {"txt": b"DSC_0042"}),
        Sample("no text", {"json": b"{}"}),
    ]
    report = run_filters(write_set("in", samples), tmp_path / "out", parse_steps(["captions"]), processes=1)
    found = {sample.key: sample for sample in read_all(tmp_path / "out")}
    assert list(found) == ["all good", "first bad", "later bad", "text alone", "no text"]
    for key in ("all good", "text alone", "no text"):
        assert found[key] == next(sample for sample in samples if sample.key == key)
    assert json.loads(found["first bad"].fields["json"]) == {
        "captions": ["a dog", "two dogs"], "provenance": {"id": 2},
    }  # fmt: skip
    assert found["first bad"].fields["txt"] == b"a dog"
    assert found["later bad"].captions() == ("a dog",)
    (step,) = report.steps
    assert step.reasons == {"name of a camera's file": 2}
    assert step.changes == {"caption removed: name of a camera's file": 2}
    assert step.changed == 2


def test_captions_may_be_required_and_patterns_added(captioned: Callable[..., Sample]) -> None:
    assert Captions(required=True).look(Sample("a", {"jpg": b""})) == Drop("no caption")
    rules = Captions(patterns=("(?i)shutterstock", r"^\d"))
    assert rules.look(captioned("a", "a dog, Shutterstock")) == Drop("pattern (?i)shutterstock")
    assert isinstance(rules.look(captioned("a", "a dog", "2 dogs")), Change)
    assert Captions(boilerplate=False).look(captioned("a", "see http://example.org")) is None


def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="min_words is 9, above max_words, 3"):
        parse_steps(["captions:min_words=9,max_words=3"])
    with pytest.raises(ValueError, match="min_letters is 40"):
        parse_steps(["captions:min_letters=40"])
    with pytest.raises(ValueError, match="no regular expression"):
        Captions(patterns=("(",))
