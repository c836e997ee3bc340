"""Steps from words: "captions:min_words=3,max_words=60", or from what a list in YAML holds.

    - image-size: {min_side: 64}
    - near-duplicates
    - personal-data: {action: mask, kinds: [email, phone]}

An option is a field of the step's dataclass; in a word, the parts of a list are joined by "+".
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import typing
from collections.abc import Iterable
from pathlib import Path
from types import UnionType
from typing import Any

from data_pipeline.filters.captions import Captions
from data_pipeline.filters.duplicates import Duplicates
from data_pipeline.filters.image_size import ImageSize
from data_pipeline.filters.language import Language
from data_pipeline.filters.near_duplicates import NearDuplicates
from data_pipeline.filters.personal_data import PersonalData
from data_pipeline.filters.scores import PseudoLabels, Scores, TopScores
from data_pipeline.filters.step import Step

_ALL = (
    Captions,
    Duplicates,
    ImageSize,
    Language,
    NearDuplicates,
    PersonalData,
    PseudoLabels,
    Scores,
    TopScores,
)
STEPS: dict[str, type[Step]] = {step.name: step for step in _ALL}  # type: ignore[type-abstract]  # all are whole


def parse_steps(items: Iterable[str | dict[str, Any]]) -> list[Step]:
    """The steps that `items` name, in order: each a word, or {name: options} as YAML has it.

    Raises ValueError for a step, an option or a value that there is not.
    """
    return [_from_word(item) if isinstance(item, str) else _from_mapping(item) for item in items]


def step_line(step: type[Step]) -> str:
    """A step in one line: its name, what it is for, its options."""
    fields = dataclasses.fields(typing.cast(Any, step))
    purpose = (step.__doc__ or "").strip().splitlines()[0].rstrip(".")
    return f"{step.name}: {purpose} ({', '.join(field.name for field in fields)})"


def _from_mapping(item: Any) -> Step:
    if not isinstance(item, dict) or len(item) != 1 or not isinstance(next(iter(item.values())) or {}, dict):
        raise ValueError(f"a filter step is {item!r}: write `- name` or `- name: {{option: value}}`")
    ((name, options),) = item.items()
    return _build(str(name), {str(key): value for key, value in (options or {}).items()})


def _from_word(word: str) -> Step:
    name, _, rest = word.partition(":")
    options: dict[str, Any] = {}
    for part in filter(None, rest.split(",")):
        key, equals, value = part.partition("=")
        if not equals:
            raise ValueError(f"filter step {word!r}: {part!r} is no option=value")
        if key.strip() in options:
            raise ValueError(f"filter step {word!r}: {key.strip()!r} is given twice: keep one of them")
        options[key.strip()] = value.strip()
    return _build(name.strip(), options)


def _build(name: str, options: dict[str, Any]) -> Step:
    if name not in STEPS:
        raise ValueError(f"there is no filter step {name!r}{_nearest(name, STEPS)}: use one of {', '.join(STEPS)}")
    step = STEPS[name]
    fields = {field.name: field for field in dataclasses.fields(typing.cast(Any, step))}
    kinds = typing.get_type_hints(step)
    values = {}
    for key, value in options.items():
        if key not in fields:
            known = ", ".join(fields)
            raise ValueError(
                f"filter step {name} has no option {key!r}{_nearest(key, fields)}: its options are {known}"
            )
        values[key] = _value(f"{name}:{key}", kinds[key], value)
    for key, field in fields.items():
        if key not in values and field.default is dataclasses.MISSING:
            raise ValueError(f"filter step {name} needs the option {key}: write {name}:{key}=...")
    return step(**values)


def _value(option: str, kind: Any, value: Any) -> Any:
    """A value of the field's type, from a text or from YAML; ValueError when it is of another."""
    if isinstance(kind, UnionType):
        if value is None or value == "none":
            return None
        (kind,) = (each for each in typing.get_args(kind) if each is not type(None))
    if typing.get_origin(kind) is tuple:
        parts = value.split("+") if isinstance(value, str) else value
        if not isinstance(parts, list):
            parts = [parts]
        return tuple(_value(option, typing.get_args(kind)[0], part) for part in parts)
    if kind is bool:
        if str(value).lower() in ("true", "false"):
            return str(value).lower() == "true"
    elif kind in (int, float):
        try:
            if not isinstance(value, bool) and (kind is float or not isinstance(value, float)):
                number = kind(value)
                if math.isfinite(number):  # comparisons with nan hold for nothing
                    return number
        except (ValueError, TypeError, OverflowError):
            pass
    elif isinstance(value, str) and value:
        return kind(value)
    raise ValueError(f"{option} is {value!r}: give {_WORDS[kind]}")


_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a finite number",
    str: "a text",
    Path: "the path of a file",
}


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), 1)
    return f" (did you mean {near[0]!r}?)" if near else ""
