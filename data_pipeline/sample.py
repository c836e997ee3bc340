"""What one sample is: a key and named byte fields, exactly what lies in the tar and nothing decoded.

Design choices:
- A field's name is everything after the first dot of the file's base name, lower-case, as `webdataset` splits it:
  `animals/cat-7.jpg` and `animals/cat-7.txt` are the fields "jpg" and "txt" of the sample "animals/cat-7".
- Modality follows from the field's extension alone, so an index can be built without opening a single image.
- Captions: those in the field "json" ({"captions": [...]}), or else the one in the field "txt". A blank one is no
  caption, wherever it stands: it is left out, and when a place has no other the next place is looked at.
- {"label": ...} is the class for zero-shot classification, {"qa": [{"question": ..., "answer": ...}]} what is asked
  about the sample; blank ones are none either.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from data_pipeline.errors import DataError

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
AUDIO_EXTENSIONS = ("flac", "wav", "ogg")
MARKS_OF_OTHERS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)  # no UTF-8 begins with them
CONTROLS = bytes(set(range(32)) - set(b"\t\n\v\f\r"))  # NUL is among the first bytes of UTF-16 characters, as are these
READ = ("captions", "label", "qa", "question", "answer")  # names in the json field that weft reads
# What may stand around a text: white space, and the mark that some editors put before one
AROUND = "".join(letter for letter in map(chr, range(0x3001)) if letter.isspace()) + "\ufeff"


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON; DataError when a name that is read stands in it twice, with different values."""
    tree = dict(pairs)
    if len(tree) < len(pairs):
        for name, value in pairs:
            if name in READ and value != tree[name]:
                raise DataError(f"has the name {name!r} twice, with different values")
    return tree


JSON = json.JSONDecoder(object_pairs_hook=_object)  # json.loads would make one for each sample


@dataclass(frozen=True)
class Sample:
    """One sample: its key and its fields, extension (lower-case, without the leading dot) -> bytes."""

    key: str
    fields: dict[str, bytes]

    @property
    def image_field(self) -> str | None:
        """The name of the field that holds the image; None when there is none."""
        return find_field(self.fields, IMAGE_EXTENSIONS)

    @property
    def audio_field(self) -> str | None:
        """The name of the field that holds the sound; None when there is none."""
        return find_field(self.fields, AUDIO_EXTENSIONS)

    def metadata(self) -> dict[str, Any]:
        """The object in the field "json", {} when there is none.

        Raises DataError when it is not a JSON object, or has a name that is read twice: one value would be lost.
        """
        if "json" not in self.fields:
            return {}
        try:
            data = self.fields["json"]
            metadata = JSON.decode(data.decode(json.detect_encoding(data), "surrogatepass"))
        except DataError as error:
            raise DataError(f"the json field of sample {self.key!r} {error}") from error
        except (ValueError, RecursionError) as error:
            raise DataError(f"the json field of sample {self.key!r} is not JSON ({error})") from error
        if not isinstance(metadata, dict):
            raise DataError(f"the json field of sample {self.key!r} holds {type(metadata).__name__}, not an object")
        return metadata

    def captions(self) -> tuple[str, ...]:
        """Every caption, the first being the one to evaluate with; () when there is none.

        Raises DataError when a caption is not text.
        """
        for _, texts in self.written_captions():
            captions = tuple(text for text in texts if text)
            if captions:
                return captions
        return ()

    def written_captions(self) -> Iterator[tuple[str, list[str]]]:
        """(field, its captions without white space around them, blank ones included), in the order of looking.

        Raises DataError when a caption is not text, once that field is come to.
        """
        captions = self.metadata().get("captions")
        if captions:
            if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
                raise DataError(f"the json field of sample {self.key!r} has captions that are not a list of texts")
            yield "json", [trimmed(_storable(caption, self.key)) for caption in captions]
        if "txt" in self.fields:
            yield "txt", [trimmed(_utf8(self.fields["txt"], self.key))]

    def questions(self) -> list[tuple[str, str]]:
        """Every open question with its answer, the first being the one to evaluate with; [] when there is none.

        Raises DataError when they are not of the form that importers/questions.py describes.
        """
        asked = self.metadata().get("qa") or []
        try:
            pairs = [(each["question"], each["answer"]) for each in asked]
        except (TypeError, KeyError) as error:
            raise DataError(f"the json field of sample {self.key!r} has a qa that is no list of questions") from error
        if not all(isinstance(text, str) for pair in pairs for text in pair):
            raise DataError(f"the json field of sample {self.key!r} has a question or an answer that is not text")
        pairs = [(_storable(question, self.key), _storable(answer, self.key)) for question, answer in pairs]
        return [pair for pair in pairs if all(map(trimmed, pair))]

    def label(self) -> str | None:
        """The class name in the json field; None when there is none, or what is there names no class (`odd_label`)."""
        label = self.metadata().get("label")
        if label is None or _names_no_class(label):
            return None
        return trimmed(_storable(str(label), self.key)) or None

    def odd_label(self) -> str:
        """What kind of value the label is if it names no class; "" for text, a whole number, and none at all.

        Lists of labels, boxes and NaN stand there in sets of other uses, whose captions are good all the same.
        """
        label = self.metadata().get("label")
        return type(label).__name__ if label is not None and _names_no_class(label) else ""


def _names_no_class(label: Any) -> bool:
    whole = type(label) is int or (isinstance(label, float) and label.is_integer())  # True is an int, too
    return not isinstance(label, str) and not whole


@dataclass(frozen=True)
class Skipped:
    """What could not be turned into a sample: where it was, and why."""

    source: str
    reason: str


def trimmed(text: str) -> str:
    """The text without white space around it, and without the mark (U+FEFF) that some editors put before a text."""
    return text.strip(AROUND)


def _storable(text: str, key: str) -> str:
    """The text itself; DataError when JSON escapes have put half a character in it, which no encoder takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"the json field of sample {key!r} holds text that is not Unicode ({error})") from error
    return text


def _utf8(data: bytes, key: str) -> str:
    """Text from bytes; DataError when they are none."""
    try:
        return text_of(data)
    except DataError as error:
        raise DataError(f"the txt field of sample {key!r} {error}") from error


def text_of(data: bytes) -> str:
    """Text from the bytes of a file; DataError, which says in a few words what is wrong, when they are no UTF-8 text.

    UTF-16 without a mark is valid UTF-8 where its characters are below U+0080, U+0400 or the like: every second byte is
    then NUL or another control character. A quarter of them is taken for it; a single NUL within a text is none.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        if data.startswith(MARKS_OF_OTHERS):
            raise DataError("is not UTF-8 but UTF-16 or UTF-32, by its first bytes: save it as UTF-8") from error
        raise DataError(f"is not UTF-8 ({error})") from error
    written = data.rstrip(b"\0")
    controls = len(written) - len(written.translate(None, CONTROLS))
    if controls > 1 and 4 * controls >= len(written):
        raise DataError("is not UTF-8 but UTF-16 or UTF-32, by the NUL or control characters in it: save it as UTF-8")
    if len(written) < len(data):
        raise DataError("ends in zero bytes: its end was never written?")
    return text


def find_field(names: Iterable[str], extensions: tuple[str, ...]) -> str | None:
    """The field name with one of these extensions, "jpg" before "left.jpg"; None when there is none."""
    matching = [name for name in names if name.rpartition(".")[2] in extensions]
    if not matching:
        return None
    return min(matching, key=lambda name: (name.count("."), extensions.index(name.rpartition(".")[2]), name))


def modalities_of(names: Iterable[str]) -> tuple[str, ...]:
    """Which of "audio", "image", "text" the fields of these names hold, sorted."""
    names = tuple(names)
    found = set()
    if find_field(names, AUDIO_EXTENSIONS):
        found.add("audio")
    if find_field(names, IMAGE_EXTENSIONS):
        found.add("image")
    if "txt" in names:
        found.add("text")
    return tuple(sorted(found))
