"""Read a tar through, once and from front to back: the table of its samples, and what of it no run reads.

Design choices:
- What is kept is numbers in compact arrays; bytes of a field go when the next one is read. So a tar of a million
  members takes some hundred megabytes, whatever their size.
- A field is looked into no further than its header; captions and labels are read.
"""

from __future__ import annotations

import io
import math
import sys
import time
import zlib
from array import array
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipeline.decode import image_size
from data_pipeline.errors import DataError
from data_pipeline.sample import AUDIO_EXTENSIONS, IMAGE_EXTENSIONS, Sample, find_field
from data_pipeline.table import Details, ShardTable
from data_pipeline.tar import Member, Window, split_name, whole_members

QUIET = 5.0  # seconds of work before anything is said of it, and between two lines
LONGEST_LABEL = 200  # characters of a label that are kept
MOST_NUMBER = 2**31 - 1
HIDDEN = "as their names begin with a dot or with a folder __x__"


@dataclass(frozen=True)
class LeftOut:
    """What of a shard, or of several, no run reads, and what some of its samples lack."""

    images: int = 0  # of samples that have several: all but the one that is read
    without_image: int = 0  # samples
    without_caption: int = 0  # samples, where others have one; a label or sound is none
    files: int = 0  # that belong to no sample, as their names have no extension
    entries: int = 0  # that are no files: volume labels, links and the like
    hidden: int = 0  # images and sounds that belong to no sample, as their names hide them

    def __add__(self, other: LeftOut) -> LeftOut:
        return LeftOut(*(one + two for one, two in zip(self.counts, other.counts, strict=True)))

    @property
    def counts(self) -> tuple[int, ...]:
        """All counts, in the order of the fields."""
        return self.images, self.without_image, self.without_caption, self.files, self.entries, self.hidden


@dataclass(frozen=True)
class Scan:
    """What one tar holds."""

    table: ShardTable
    left_out: LeftOut


class Pace:
    """Says on stderr how far long work is: nothing in its first seconds, then a line now and then."""

    def __init__(self, what: str) -> None:
        self._what, self._next = what, time.monotonic() + QUIET

    def at(self, done: int, total: int) -> None:
        """So much of it is done."""
        now = time.monotonic()
        if now >= self._next:
            self._next = now + QUIET
            print(f"{self._what}: {done / max(total, 1):.0%}", file=sys.stderr, flush=True)


def scan_tar(path: Path) -> Scan:
    """Read the tar at `path`: neighbouring files of one key are one sample.

    Raises DataError when the tar is bad or a sample has a field twice.
    """
    found, skipped = _Found(path), Counter[str]()
    pace, loose, hidden = Pace(f"indexing {path}"), 0, 0
    with Window(path) as buffer:
        for number, member in enumerate(whole_members(buffer, str(path), skipped)):
            split = split_name(member.name)
            if split is None:
                loose += is_loose(member.name)
                hidden += is_hidden(member.name)
                continue
            found.add(*split, member, buffer[member.offset : member.offset + member.size])
            if number % 1024 == 0:
                pace.at(member.offset, len(buffer))
    found.end_sample()
    return Scan(found.table(), found.left_out(loose, skipped.total(), hidden))


def read_table(path: Path) -> ShardTable:
    """The table of the tar at `path`, from the tar itself; as `scan_tar`."""
    return scan_tar(path).table


def is_loose(name: str) -> bool:
    """Whether a file that is no field is one by mistake: hidden files and `__meta__` are left out on purpose."""
    base = name.rpartition("/")[2]
    return not base.startswith(".") and not name.startswith("__")


def is_hidden(name: str) -> bool:
    """Whether a file that is no field is an image or a sound, which no reader of webdataset sees under such a name.

    Those that macOS puts beside a file (`._x.jpg`) are none.
    """
    base = name.rpartition("/")[2]
    extension = base.rpartition(".")[2].lower() if "." in base and not base.startswith("._") else ""
    return extension in IMAGE_EXTENSIONS or extension in AUDIO_EXTENSIONS


class _Found:
    """The table of a shard as it grows."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._numbers: dict[str, int] = {}  # field name -> its number
        self._labels: dict[str, int] = {}
        self._keys = bytearray()
        self._key: str | None = None  # of the sample at hand, whose are the next four
        self._names: dict[str, None] = {}  # of its fields, in order
        self._sizes: dict[str, tuple[int, int] | None] = {}  # image field -> width and height
        self._seconds: dict[str, float | None] = {}
        self._texts: dict[str, bytes] = {}
        self._first, self._key_end = array("q", [0]), array("q")
        self._offset, self._size, self._field, self._crc = array("q"), array("q"), array("i"), array("I")
        self._aspect, self._width, self._height = array("f"), array("i"), array("i")
        self._captions, self._characters, self._words = array("i"), array("i"), array("i")
        self._label, self._duration, self._unreadable = array("i"), array("f"), array("B")
        self._more_images, self._without_image, self._without_caption = 0, 0, 0

    def add(self, key: str, field: str, member: Member, data: bytes) -> None:
        """One file: a field of the sample of that key."""
        if key != self._key:
            self.end_sample()
            self._key = key
        if field in self._names:
            raise DataError(
                f"{self._path} has the field {field!r} of sample {key!r} twice, again at byte {member.offset}"
            )
        self._names[field] = None
        self._offset.append(member.offset)
        self._size.append(member.size)
        self._field.append(self._numbers.setdefault(field, len(self._numbers)))
        self._crc.append(zlib.crc32(data))
        extension = field.rpartition(".")[2]
        if extension in IMAGE_EXTENSIONS:
            self._sizes[field] = image_size(data)
        elif extension in AUDIO_EXTENSIONS:
            self._seconds[field] = sound_length(data)
        elif field in ("txt", "json"):
            self._texts[field] = data

    def end_sample(self) -> None:
        """The sample at hand, if any, has no more fields."""
        if self._key is None:
            return
        image, sound = find_field(self._sizes, IMAGE_EXTENSIONS), find_field(self._seconds, AUDIO_EXTENSIONS)
        width, height = (self._sizes[image] if image is not None else None) or (0, 0)
        seconds = self._seconds[sound] if sound is not None else None
        bad = (image is not None and not width) + (sound is not None and seconds is None)
        self._aspect.append(width / height if height else math.nan)
        self._width.append(width)
        self._height.append(height)
        self._duration.append(math.nan if seconds is None else seconds)
        self._unreadable.append(1 if bad + self._end_text() else 0)
        self._more_images += max(0, len(self._sizes) - 1)
        self._without_image += image is None
        self._keys += self._key.encode("utf-8", "surrogatepass")
        self._key_end.append(len(self._keys))
        self._first.append(len(self._offset))
        self._key = None
        for each in (self._names, self._sizes, self._seconds, self._texts):
            each.clear()

    def _end_text(self) -> bool:
        """Take in the captions and the label of the sample at hand; returns whether they cannot be read."""
        assert self._key is not None
        sample, bad = Sample(self._key, self._texts), False
        captions: tuple[str, ...] = ()
        label: str | None = None
        try:
            label, captions = sample.label(), sample.captions()
        except Exception:  # whatever it is, `weft data check` and the loader name it
            bad = True
        self._captions.append(-1 if bad else len(captions))
        self._without_caption += not captions and not bad
        self._characters.extend(min(len(caption), MOST_NUMBER) for caption in captions)
        self._words.extend(len(caption.split()) for caption in captions)
        label = None if label is None else label[:LONGEST_LABEL]
        self._label.append(-1 if label is None else self._labels.setdefault(label, len(self._labels)))
        return bad

    def left_out(self, files: int, entries: int, hidden: int) -> LeftOut:
        """What is not read."""
        return LeftOut(self._more_images, self._without_image, self._without_caption, files, entries, hidden)

    def table(self) -> ShardTable:
        """All of it."""
        details = Details(
            width=_numbers(self._width, np.int32),
            height=_numbers(self._height, np.int32),
            captions=_numbers(self._captions, np.int32),
            caption_characters=_numbers(self._characters, np.int32),
            caption_words=_numbers(self._words, np.int32),
            label=_numbers(self._label, np.int32),
            seconds=_numbers(self._duration, np.float32),
            unreadable=_numbers(self._unreadable, np.uint8),
            label_names=tuple(self._labels),
        )
        return ShardTable(
            first=_numbers(self._first, np.int64),
            offset=_numbers(self._offset, np.int64),
            size=_numbers(self._size, np.int64),
            field=_numbers(self._field, np.int32),
            crc=_numbers(self._crc, np.uint32),
            key_end=_numbers(self._key_end, np.int64),
            keys=np.frombuffer(bytes(self._keys), np.uint8) if self._keys else np.empty(0, np.uint8),
            field_names=tuple(self._numbers),
            aspect=_numbers(self._aspect, np.float32),
            details=details,
        )


def _numbers(grown: array, kind: type) -> np.ndarray:  # type: ignore[type-arg]  # array of any type code
    return np.frombuffer(grown, kind) if len(grown) else np.empty(0, kind)


def sound_length(data: bytes) -> float | None:
    """Seconds of a sound as its header has it; None when it cannot be read."""
    import soundfile  # loads libsndfile, which only data with sound needs

    try:
        seconds = float(soundfile.info(io.BytesIO(data)).duration)
    except (soundfile.LibsndfileError, RuntimeError, ValueError, TypeError):
        return None
    return seconds if math.isfinite(seconds) and seconds >= 0 else None


def sentences(left_out: LeftOut, samples: int) -> Iterable[str]:
    """What is to be said of it, each in a few words; nothing of what all samples lack."""
    images, without_image, without_caption, files, entries, hidden = left_out.counts
    if images:
        yield f"{_many(images, 'image')} not read: a sample has several (its name ends at its first dot)"
    if 0 < without_image < samples:
        yield f"{_many(without_image, 'sample')} without an image"
    if 0 < without_caption < samples:
        yield f"{_many(without_caption, 'sample')} without a caption"
    if files:
        yield f"{_many(files, 'file')} without an extension, in no sample"
    if hidden:
        yield f"{_many(hidden, 'file')} of images or sound left out, {HIDDEN}"
    if entries:
        yield f"{entries} tar {'entry' if entries == 1 else 'entries'} left out that are no files (labels, links)"


def _many(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
