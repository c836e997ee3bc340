"""Steps from words and from YAML; what is wrong is told with what would be right."""

from pathlib import Path

import pytest

from data_pipeline.filters import STEPS, parse_steps
from data_pipeline.filters.captions import Captions
from data_pipeline.filters.duplicates import Duplicates
from data_pipeline.filters.image_size import ImageSize
from data_pipeline.filters.parse import step_line
from data_pipeline.filters.personal_data import PersonalData
from pretrain.filter_commands import step_items


def test_words_become_steps_in_order() -> None:
    words = ["image-size:min_side=64,max_side=none,max_aspect=2.5", "personal-data:kinds=email+phone", "duplicates"]
    assert parse_steps([*words, "duplicates:same_captions=True"]) == [
        ImageSize(min_side=64, max_side=None, max_aspect=2.5),
        PersonalData(kinds=("email", "phone")),
        Duplicates(),
        Duplicates(same_captions=True),
    ]


def test_a_yaml_file_becomes_steps_among_others(tmp_path: Path) -> None:
    (tmp_path / "steps.yaml").write_text(
        "- image-size: {min_side: 64, max_aspect: null}\n"
        "- duplicates\n"
        "- captions:min_words=3\n"
        "- captions:\n    patterns: ['^a, b', c+d]\n"
        "- personal-data: {kinds: email}\n"
        "- duplicates:\n"
    )
    assert parse_steps(step_items([str(tmp_path / "steps.yaml"), "duplicates:of=bytes"])) == [
        ImageSize(min_side=64, max_aspect=None),
        Duplicates(),
        Captions(min_words=3),
        Captions(patterns=("^a, b", "c+d")),
        PersonalData(kinds=("email",)),
        Duplicates(),
        Duplicates(of="bytes"),
    ]


@pytest.mark.parametrize(
    ("word", "answer"),
    [
        ("captoins", r"no filter step 'captoins' \(did you mean 'captions'\?\): use one of captions, duplicates"),
        ("captions:min_word=3", r"no option 'min_word' \(did you mean 'min_words'\?\): its options are min_words"),
        ("captions:min_words", "'min_words' is no option=value"),
        ("captions:min_words=many", "captions:min_words is 'many': give a whole number"),
        ("captions:min_words=2.5", "captions:min_words is '2.5': give a whole number"),
        ("captions:min_letters=half", "captions:min_letters is 'half': give a finite number"),
        ("captions:min_letters=nan", "captions:min_letters is 'nan': give a finite number"),
        ("image-size:max_aspect=inf", "image-size:max_aspect is 'inf': give a finite number"),
        ("scores:table=s.jsonl,min=nan", "scores:min is 'nan': give a finite number"),
        ("top-scores:table=s.jsonl,share=-inf", "top-scores:share is '-inf': give a finite number"),
        ("pseudo-labels:table=s.jsonl,min=NaN", "pseudo-labels:min is 'NaN': give a finite number"),
        ("captions:min_words=3,min_words=4", "'min_words' is given twice: keep one of them"),
        ("captions:boilerplate=perhaps", "captions:boilerplate is 'perhaps': give true or false"),
        ("duplicates:of=", "duplicates:of is '': give a text"),
        ("scores:min=0", "scores needs the option table: write scores:table=..."),
    ],
)
def test_what_is_wrong_is_told_with_what_is_right(word: str, answer: str) -> None:
    with pytest.raises(ValueError, match=answer):
        parse_steps([word])


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("captions: {min_words: 3}", "holds no list of steps"),
        ("[]", "holds no list of steps"),
        ("- {captions: {}, duplicates: {}}", "a filter step is"),
        ("- [captions]", "a filter step is"),
        ("- captions: 3", "a filter step is"),
        ("- captions: {min_words: 2.5}", "min_words is 2.5: give a whole number"),
        ("- captions: {min_words: true}", "min_words is True: give a whole number"),
        ("- 'captions", "is not YAML"),
        ("- image-size: {max_aspect: .nan}", "max_aspect is nan: give a finite number"),
        ("- captions: {max_words: .inf}", "max_words is inf: give a whole number"),
        ("- captions:\n    min_words: 9\n    min_words: 1", r"'min_words' is given twice \(lines 2 and 3\): keep one"),
        ("- captions: {}\n  captions: {}", "'captions' is given twice"),
    ],
)
def test_a_bad_yaml_file_is_refused(tmp_path: Path, text: str, answer: str) -> None:
    (tmp_path / "steps.yaml").write_text(text)
    with pytest.raises(ValueError, match=answer):
        parse_steps(step_items([str(tmp_path / "steps.yaml")]))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.yaml"):
        step_items([str(tmp_path / "none.yaml")])


def test_every_step_says_what_it_is_for() -> None:
    for name, step in STEPS.items():
        assert step_line(step).startswith(f"{name}: ")
        assert step.__doc__
