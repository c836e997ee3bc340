"""Exact duplicates: sha256 of the picture's bytes, of its pixels, or of the captions; the first of each stays.

By pixels, a PNG and a lossless WebP of one picture are the same, and so are two files that differ in their metadata
alone. What is in the test set, too, leaves, whether it is the first or not.
"""

from __future__ import annotations

import hashlib
import unicodedata
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import numpy as np

from data_pipeline.decode import decode_image
from data_pipeline.filters.step import Removed, SetStep, Signatures
from data_pipeline.sample import Sample

OF = ("pixels", "bytes", "captions")


@dataclass(frozen=True)
class Duplicates(SetStep):
    """Remove samples whose picture (or captions) an earlier one has, or one of the test set.

    of: "pixels", "bytes" of the image field, or "captions" (in one case, blanks aside). `same_captions`: only where the
    captions are equal as well, so that pictures with a caption a row keep all of them.
    """

    name = "duplicates"
    width: ClassVar[int] = 32
    compares: ClassVar[bool] = True

    of: str = "pixels"
    same_captions: bool = False

    def __post_init__(self) -> None:
        if self.of not in OF:
            raise ValueError(f"duplicates:of is {self.of!r}: use one of {', '.join(OF)}")

    def signature(self, sample: Sample) -> bytes | None:
        digest = hashlib.sha256()
        if self.of != "captions":
            if sample.image_field is None:
                return None
            data = sample.fields[sample.image_field]
            if self.of == "pixels":
                pixels = decoded(data)
                digest.update(repr(pixels.shape).encode())
                digest.update(pixels.data)
            else:
                digest.update(data)
        if self.of == "captions" or self.same_captions:
            captions = [
                " ".join(unicodedata.normalize("NFKC", caption).casefold().split()) for caption in sample.captions()
            ]
            if self.of == "captions" and not captions:
                return None
            digest.update(repr(sorted(captions)).encode("utf-8"))
        return digest.digest()

    def decide(self, mine: Signatures, test: Signatures | None) -> list[Removed]:
        in_test: dict[bytes, int] = {}
        for row, signature in enumerate(test.rows if test else ()):
            in_test.setdefault(signature.tobytes(), row)
        first: dict[bytes, int] = {}
        leaked: dict[int, int] = {}
        repeated: dict[int, int] = {}
        for row, signature in enumerate(mine.rows):
            key = signature.tobytes()
            if key in in_test:
                leaked[row] = in_test[key]
            elif first.setdefault(key, row) != row:
                repeated[row] = first[key]
        return as_removed(f"same {self.of}", mine, test, repeated, leaked)


def as_removed(
    what: str, mine: Signatures, test: Signatures | None, repeated: dict[int, int], leaked: dict[int, int]
) -> list[Removed]:
    """What a search for duplicates found, as removals: row -> row of the earlier sample, or of the test set's."""
    removed = [_removed(f"{what} as an earlier sample", repeated, mine)]
    if test is not None:
        removed.append(_removed(f"{what} as a sample of the test set", leaked, test))
    return removed


def _removed(reason: str, matches: dict[int, int], others: Signatures) -> Removed:
    rows = np.array(sorted(matches), np.int64)
    return Removed(reason, rows, lambda row: f"as {others.place(matches[row])}")


@lru_cache(maxsize=1)
def decoded(data: bytes) -> np.ndarray:
    """The pixels of a picture, not to be written to; the last one's are kept, as the next step wants them too."""
    pixels = decode_image(data)
    pixels.flags.writeable = False
    return pixels
