"""What weft writes for itself comes back, and what a damaged file can hold is one error."""

from __future__ import annotations

import json
import math

import pytest

from data_pipeline.strict_json import LARGEST, read_json, strict_json


def test_what_is_written_is_standard_and_comes_back() -> None:
    tree = {"a": [1, -2.5, "é\n", None, True], "b": {"big": LARGEST - 1, "nan": math.nan, "inf": [math.inf, -math.inf]}}
    text = strict_json(tree)
    json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert read_json(text) == tree | {"b": {"big": LARGEST - 1, "nan": None, "inf": [None, None]}}


@pytest.mark.parametrize("word", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999"])
def test_a_number_that_is_not_finite_is_none(word: str) -> None:
    assert read_json(f'{{"a": [{word}]}}') == {"a": [None]}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        '{"a": }',
        "[" * 100_000 + "]" * 100_000,
        '{"a": ' * 100_000,
        str(LARGEST),
        f"[-{LARGEST}]",
        "9" * 10_000,
    ],
)
def test_all_else_is_one_error(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  of the json module, of int, or ours
        read_json(text)
    with pytest.raises(ValueError):  # noqa: PT011
        read_json(text.encode())
