"""What counts as a caption: text that says something, and not what a program writes where there is none."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from data_pipeline.importers.annotations import clean

NO_CAPTION = "has no caption"
WRITTEN_LIST = "its caption is a list written as text"
NUMBERS = "its caption is numbers, such as boxes or labels"
NO_TEXT = "its caption is not text"
PLACEHOLDERS = frozenset(
    (
        "nan",
        "none",
        "null",
        "nil",
        "na",
        "n/a",
        "n.a.",
        "<na>",
        "#n/a",
        "#na",
        "<null>",
        "(null)",
        "undefined",
        "-",
        "--",
    )
)
SAID = frozenset(("none", "null", "nil", "na", "undefined"))  # words that transcripts have
LIST_AS_TEXT = re.compile(r"""\[\s*(['"]).*\1\s*,?\s*\]|\(\s*(['"]).*\2\s*,?\s*\)|\[\s*\]""", re.DOTALL)
NUMBERS_ALONE = re.compile(r"([-+]?\d*\.?\d+(e[-+]?\d+)?[\s,;]+){3,}[-+]?\d*\.?\d+(e[-+]?\d+)?", re.IGNORECASE)


def usable(texts: Any, *, spoken: bool = False) -> tuple[tuple[str, ...], str]:
    """(the captions among `texts`, each once, "") or ((), why there is none). A single text is a list of one.

    A blank, "nan", "None" or "['a', 'b']" is no caption: a table was written with it where there was none, or several.
    `spoken`: it is what somebody says, and "none" or "1 2 3 4" may be just that.
    """
    listed: Iterable[Any] = texts if isinstance(texts, (list, tuple)) else [texts]
    captions: dict[str, None] = {}
    reason = ""
    for text in listed:
        if text is None:
            continue
        problem = NO_TEXT if not isinstance(text, str) else caption_problem(text, spoken)
        if problem:
            reason = reason if reason and problem == NO_CAPTION else problem
        else:
            captions[clean(text)] = None
    return tuple(captions), "" if captions else reason or NO_CAPTION


def caption_problem(text: str, spoken: bool = False) -> str:
    """Why `text` is no caption, or nothing that is `spoken`; "" when it is one."""
    text = clean(text)
    if not text:
        return NO_CAPTION
    if text.casefold() in (PLACEHOLDERS - SAID if spoken else PLACEHOLDERS):
        return f"its caption is {text!r}, which stands for none"
    if LIST_AS_TEXT.fullmatch(text):
        return WRITTEN_LIST
    return NUMBERS if not spoken and NUMBERS_ALONE.fullmatch(text) else ""
