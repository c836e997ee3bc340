"""What a caption must be like: long enough, made of words, and no file name, address or other text that says nothing.

Bad captions leave their sample; a sample whose captions are all bad leaves the data set.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from dataclasses import dataclass
from functools import cached_property

from data_pipeline.filters.step import Drop, Outcome, SampleStep
from data_pipeline.filters.texts import keep_captions, words_of
from data_pipeline.sample import Sample

_IMAGE_FILE = r"jpe?g|png|gif|webp|bmp|tiff?|heic|svg|raw|cr2|nef"
BOILERPLATE = {
    "file name": rf"^\S*\.({_IMAGE_FILE})$|^[\w\s().-]{{1,80}}\.({_IMAGE_FILE})$",
    "name of a camera's file": r"^(img|dscn?|dscf|dcim|pxl|p|mvi|vid|gopr|screenshot|image|photo|picture|untitled)"
    r"[\s_-]{0,4}\(?[\d\s_.:-]*\)?$",
    "web address": r"\bhttps?://|\bwww\.\w",
    "markup": r"</?(a|b|br|div|em|font|h\d|i|img|li|p|span|strong|table|td|tr|ul)\b[^>]{0,500}>"
    r"|&(amp|lt|gt|quot|nbsp|#\d+);",
    "placeholder": r"^(no (image|photo|picture|caption|description|title)( available| found)?|n/?a|none|null|nan|"
    r"(this )?image (not found|unavailable|placeholder)|placeholder|lorem ipsum\b.{0,500}|"
    r"click (here|to (enlarge|zoom|view))\b.{0,80}|stock (photo|image|illustration)s?)[.!]?$",
}


@dataclass(frozen=True)
class Captions(SampleStep):
    """Take out captions that are too short or long, not made of words, repetitive or boilerplate.

    `min_letters`: share of the characters that are letters, blanks aside. `max_repeated`: share of the words that the
    most frequent one may have, from 5 words on. `boilerplate`: whether what looks like a file name, a web address,
    markup or a placeholder goes. `patterns`: regular expressions of yours; a caption that one of them is found in goes.
    `required`: samples without a caption go.
    """

    name = "captions"

    min_words: int = 2
    max_words: int = 256
    min_characters: int = 5
    max_characters: int = 2000
    min_letters: float = 0.5
    max_repeated: float = 0.5
    boilerplate: bool = True
    patterns: tuple[str, ...] = ()
    required: bool = False

    def __post_init__(self) -> None:
        for low, high in (("min_words", "max_words"), ("min_characters", "max_characters")):
            if getattr(self, low) > getattr(self, high):
                raise ValueError(f"captions:{low} is {getattr(self, low)}, above {high}, {getattr(self, high)}")
        for share in ("min_letters", "max_repeated"):
            if not 0 <= getattr(self, share) <= 1:
                raise ValueError(f"captions:{share} is {getattr(self, share)}: give a share, 0 to 1")
        for pattern in self.patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"captions:patterns has {pattern!r}, no regular expression: {error}") from error

    def look(self, sample: Sample) -> Outcome:
        if self.required and not sample.captions():
            return Drop("no caption")
        return keep_captions(sample, self.judge)

    def judge(self, caption: str) -> Drop | None:
        """What is wrong with a caption."""
        caption = caption.strip()
        if len(caption) < self.min_characters:
            return Drop(f"fewer than {self.min_characters} characters", f"{len(caption)} characters")
        if len(caption) > self.max_characters:
            return Drop(f"more than {self.max_characters} characters", f"{len(caption)} characters")
        for reason, pattern in self._patterns:
            if pattern.search(caption):
                return Drop(reason)
        words = words_of(caption)
        if len(words) < self.min_words:
            return Drop(f"fewer than {self.min_words} words", f"{len(words)} words")
        if len(words) > self.max_words:
            return Drop(f"more than {self.max_words} words", f"{len(words)} words")
        letters = letter_share(caption)
        if letters < self.min_letters:
            return Drop(f"share of letters below {self.min_letters:g}", f"{letters:.2f}")
        repeated = repeated_share(words)
        if repeated > self.max_repeated:
            return Drop(f"share of one word above {self.max_repeated:g}", f"{repeated:.2f}")
        return None

    @cached_property
    def _patterns(self) -> list[tuple[str, re.Pattern[str]]]:
        """(reason, pattern) of everything that a caption may not have."""
        found = [(name, re.compile(pattern, re.IGNORECASE)) for name, pattern in BOILERPLATE.items()]
        mine = [(f"pattern {pattern}", re.compile(pattern)) for pattern in self.patterns]
        return (found if self.boilerplate else []) + mine


def letter_share(text: str) -> float:
    """Share of the characters that are letters or belong to one, as vowel signs do; blanks aside, 0 to 1."""
    kinds = [unicodedata.category(character)[0] for character in text if not character.isspace()]
    return sum(kind in "LM" for kind in kinds) / len(kinds) if kinds else 0.0


def repeated_share(words: list[str]) -> float:
    """Share of the words that the most frequent one has, in any case; 0 for fewer than 5."""
    if len(words) < 5:
        return 0.0
    return max(Counter(word.casefold() for word in words).values()) / len(words)
