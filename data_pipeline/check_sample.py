"""What is wrong with one sample, whatever it was read from: its media, its texts, and what it lacks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from data_pipeline.damage import EMPTY
from data_pipeline.decode import decode_and_remark
from data_pipeline.errors import DataError
from data_pipeline.parquet_columns import CAPTION_COLUMNS
from data_pipeline.sample import AUDIO_EXTENSIONS, IMAGE_EXTENSIONS, Sample

NAMED = 6  # fields in a sentence


@dataclass(frozen=True)
class Problem:
    """One defect: where it is (`byte` in the shard, `key` of the sample, None where unknown or no matter) and why."""

    severity: Literal["error", "warning"]
    shard: str  # file name, or index.json
    byte: int | None
    key: str | None
    reason: str

    def __str__(self) -> str:
        place = [self.shard]
        if self.byte is not None:
            place.append(f"byte {self.byte}")
        if self.key is not None and repr(self.key) not in self.reason:
            place.append(f"sample {self.key!r}")
        return f"{', '.join(place)}: {self.reason}"


@dataclass
class Lacks:
    """What the samples of a shard lack or have too much of, gathered to be said once where it holds for all."""

    shard: str
    column: str | None = None  # of Parquet, that captions are read from
    samples: int = 0
    usable: int = 0  # samples with two of image, sound and words, which is what a run learns from
    fields: Counter[str] = field(default_factory=Counter)
    elsewhere: str = ""  # where captions seem to be that no run reads, the first such place in words
    _bare: dict[str, list[Problem]] = field(default_factory=lambda: {"an image": [], "a caption": []})
    _hidden: list[Problem] = field(default_factory=list)  # captions in a field that no run reads
    _odd_labels: list[Problem] = field(default_factory=list)
    _several: dict[str, list[Problem]] = field(default_factory=lambda: {"error": [], "warning": []})

    def add(self, sample: Sample, start: int | None, words: str, torn: bool = False) -> None:
        """One sample, at byte `start`. `words`: "caption", "label" or "" by what it has; `torn`: damage took of it."""
        self.samples += 1
        self.fields.update(sample.fields.keys())
        image = sample.image_field is not None
        self.usable += torn or image + (sample.audio_field is not None) + bool(words) > 1
        names = ", ".join(list(sample.fields)[:NAMED]) + (", ..." if len(sample.fields) > NAMED else "")
        empty = "" if sample.fields else f"{EMPTY}, and it is skipped"
        if not torn and not image:
            self._note("an image", sample, start, empty or f"no image among its fields ({names})")
        images = [name for name in sample.fields if name.rpartition(".")[2] in IMAGE_EXTENSIONS]
        hidden = [] if words or torn or len(images) != 1 else _behind_a_dot(images[0], sample)
        if hidden:
            reason = (
                f"its caption is not read: the field is called {hidden[0]}, because a name ends at its first dot, and "
                "a run reads captions from txt and json: take the dots out of the names"
            )
            self._hidden.append(Problem("error", self.shard, start, sample.key, reason))
        elif not torn and words != "caption":
            elsewhere = self._elsewhere(sample)
            self.elsewhere = self.elsewhere or elsewhere
            more = f": {elsewhere}" if elsewhere else ""
            self._note("a caption", sample, start, empty or f"no caption in its fields ({names}){more}")
        if odd := _odd_label(sample):
            reason = f"its label is neither text nor a whole number ({odd}), and is read as none"
            self._odd_labels.append(Problem("warning", self.shard, start, sample.key, reason))
        if len(images) > 1:
            severity: Literal["error", "warning"] = "error" if _merged(images, sample) else "warning"
            why = (
                "a name ends at its first dot, so these were meant as samples of their own: "
                if _merged(images, sample)
                else ""
            )
            reason = f"{len(images)} images in one sample ({names}): {why}a run reads {sample.image_field} only"
            self._several[severity].append(Problem(severity, self.shard, start, sample.key, reason))

    def _elsewhere(self, sample: Sample) -> str:
        """Where the captions of a sample without any seem to be, in words; or ""."""
        place = unread_caption(sample)
        if place is None:
            return ""
        if self.column:
            return f"captions are read from the column {self.column!r}, and not from {place!r}"
        return f"captions are read from txt and, as a list of texts, from 'captions' in json, and not from {place!r}"

    def _note(self, what: str, sample: Sample, start: int | None, reason: str) -> None:
        self._bare[what].append(Problem("warning", self.shard, start, sample.key, reason))

    def problems(self) -> Iterator[Problem]:
        """What is to be said of the whole shard, and of single samples."""
        lacking: list[Problem] = []
        for what, without in self._bare.items():
            more = f": {self.elsewhere}" if self.elsewhere and what == "a caption" else ""
            none = Problem("warning", self.shard, None, None, f"none of its {self.samples} samples has {what}{more}")
            lacking += [none] if len(without) == self.samples > 1 else without
        yield from dict.fromkeys(lacking)  # an empty row lacks both, and is told once
        for several in (self._hidden, self._odd_labels, *self._several.values()):
            if several:
                first = several[0]
                more = f"; so in {len(several) - 1} more of its samples" if len(several) > 1 else ""
                yield Problem(first.severity, self.shard, first.byte, first.key, first.reason + more)
        if self.samples == 0:
            yield Problem("warning", self.shard, None, None, "no sample in it could be read")


def _odd_label(sample: Sample) -> str:
    try:
        return sample.odd_label()
    except DataError:  # told of its json field
        return ""


def unread_caption(sample: Sample) -> str | None:
    """The key in the json of a sample without captions that seems to hold some: "caption", not "captions"."""
    try:
        metadata = sample.metadata()
    except DataError:
        return None
    names = (name for name in CAPTION_COLUMNS if name != "captions")
    return next((name for name in names if metadata.get(name) and isinstance(metadata[name], str | list)), None)


def nothing_to_learn(fields: Counter[str], elsewhere: str) -> str:
    """The sentence for a data set of which no sample has two of image, sound and words.

    fields: name of a field -> samples that have it. `elsewhere`: where captions are, or are not, in words; or "".
    """
    names = ", ".join(name for name, _ in fields.most_common(NAMED))
    cut = " (what follows a name's first dot)" if any("." in name for name in fields) else ""
    usual = (
        "a run reads images from jpg, jpeg, png and webp, captions from txt and from 'captions' in json, of files with "
        "one name"
    )
    return f"no sample has both an image and a caption: the fields are called {names}{cut}; {elsewhere or usual}"


def _behind_a_dot(image: str, sample: Sample) -> list[str]:
    """The caption fields that belong to an image by a name with a dot, as `2.txt` and `2.jpg` of 1.2.jpg do."""
    stem = image.rpartition(".")[0]
    return [name for name in (f"{stem}.txt", f"{stem}.json") if stem and name in sample.fields]


def _merged(images: list[str], sample: Sample) -> bool:
    """Whether several images look like samples that one name swallowed: numbered, or with a caption of their own."""
    stems = [name.rpartition(".")[0] for name in images]
    own = any(f"{stem}.{kind}" in sample.fields for stem in stems if stem for kind in ("txt", "json"))
    return own or any(character.isdigit() for stem in stems for character in stem)


def check_media(shard: str, sample: Sample, offsets: dict[str, int | None]) -> Iterator[Problem]:
    """Decode every picture and every sound of a sample."""
    for name, data in sample.fields.items():
        extension = name.rpartition(".")[2]
        try:
            if extension in IMAGE_EXTENSIONS:
                _, odd = decode_and_remark(data)
                if odd:
                    reason = f"the {name} field is an odd JPEG, which Pillow reads whole ({odd})"
                    yield Problem("warning", shard, offsets[name], sample.key, reason)
            elif extension in AUDIO_EXTENSIONS:
                from data_pipeline.sound import decode_sound  # loads scipy, which only data with sound needs

                decode_sound(data)
        except DataError as error:
            yield Problem("error", shard, offsets[name], sample.key, f"the {name} field: {error}")


def check_text(shard: str, sample: Sample, offsets: dict[str, int | None]) -> tuple[list[Problem], str]:
    """What is wrong with a sample's captions and metadata, and what words it has.

    These are "caption", also where it should have had one, "label" for a class or questions, or "".
    """
    found: list[Problem] = []
    captions: list[str] = []
    readable, label = True, False
    for name in ("json", "txt"):  # each alone, so that a bad one does not hide the other
        if name not in sample.fields:
            continue
        alone = Sample(sample.key, {name: sample.fields[name]})
        try:
            mine = [text for _, texts in alone.written_captions() for text in texts]
            label |= alone.label() is not None or bool(alone.questions())
        except DataError as error:
            readable = False
            found.append(Problem("error", shard, offsets[name], sample.key, str(error)))
            continue
        if not captions:  # those of the json field are read instead of the txt field
            found += [
                Problem("warning", shard, offsets[name], sample.key, f"caption {number} in the {name} field is empty")
                for number, caption in enumerate(mine, start=1)
                if not caption
            ]
            captions = mine
    return found, "caption" if captions or not readable else "label" if label else ""
