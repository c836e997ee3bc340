"""Which columns of a Parquet file hold pictures, sound and captions, and which of the others JSON can hold.

Columns are found by their usual names among those of a type that fits. A single column of bytes may have any name.
Types are told by how Arrow writes them, and by what they have, so that nothing here loads pyarrow.
"""

from __future__ import annotations

import difflib
import json
import re
from typing import Any, NamedTuple

from data_pipeline.errors import DataError

IMAGE_COLUMNS = ("image", "images", "img", "jpg", "jpeg", "png", "webp", "picture", "photo", "image_bytes", "bytes")
SOUND_COLUMNS = ("audio", "sound", "flac", "wav", "ogg", "speech", "audio_bytes", "mp3")
CAPTION_COLUMNS = (
    *("caption", "captions", "text", "texts", "txt", "title", "description", "sentence", "sentences", "raw", "alt"),
    *("alt_text", "prompt", "transcription", "transcript"),
)
OTHER_TEXTS = ("qa", "label", "json")  # what questions, classes or captions may come from without a column of captions
TEXT = ("string", "large_string", "string_view")  # types by Arrow's names


class Columns(NamedTuple):
    """The names of the columns that fields are made of; None where there is none."""

    image: str | None
    sound: str | None
    caption: str | None


def find_columns(path: Any, schema: Any) -> Columns:
    """The columns of pictures, sound and captions; DataError that lists the columns when some are not to be found."""
    media = [field.name for field in schema if _is_media(field.type)]
    texts = [field.name for field in schema if _is_text(field.type)]
    image, sound = _usual(media, IMAGE_COLUMNS), _usual(media, SOUND_COLUMNS)
    if image is None and sound is None:
        if len(media) != 1:
            wanted = "image or sound bytes (binary, or a struct of bytes and path)"
            raise _no_column(path, schema, wanted, (*IMAGE_COLUMNS, *SOUND_COLUMNS))
        image = media[0]
    caption = _usual(texts, CAPTION_COLUMNS)
    if caption is None and not any(name in schema.names for name in OTHER_TEXTS):
        raise _no_column(path, schema, "captions (text, or a list of texts)", CAPTION_COLUMNS)
    return Columns(image, sound, caption)


def check_columns(path: Any, schema: Any, columns: Columns, first: Any, first_schema: Any) -> None:
    """DataError unless a file has the columns that were found in the first one, of types that fit."""
    for column, fits in zip(columns, (_is_media, _is_media, _is_text), strict=True):
        if column is None:
            continue
        if column not in schema.names:
            near = difflib.get_close_matches(column, schema.names, 1, 0)
            hint = f", only {near[0]!r}" if near else ""
            raise DataError(f"{path} has no column {column!r}, which {first.name} beside it has{hint}")
        kind = schema.field(column).type
        if not (fits(kind) or str(kind) == "null"):
            theirs = first_schema.field(column).type
            raise DataError(f"the column {column!r} of {path} holds {kind}, that of {first.name} {theirs}")


def _no_column(path: Any, schema: Any, wanted: str, usual: tuple[str, ...]) -> DataError:
    there = ", ".join(f"{field.name!r} ({field.type})" for field in schema) or "none"
    named = [name for name in schema.names if name.lower() in usual]
    near = {name: difflib.get_close_matches(name.lower(), usual, 1) for name in schema.names}
    hint = f"such a column is called {usual[0]!r}, {usual[1]!r}, {usual[2]!r} or the like"
    if named:
        hint = f"{named[0]!r} is not of such a type"
    elif typed := next((name for name in near if near[name]), None):
        hint = f"is {typed!r} meant to be {near[typed][0]!r}?"
    return DataError(f"{path} has no column of {wanted}; its columns are {there}: {hint}")


def _usual(names: list[str], usual: tuple[str, ...]) -> str | None:
    """The first of the `usual` names that is there, in any case."""
    by_name = {name.lower(): name for name in reversed(names)}
    return next((by_name[name] for name in usual if name in by_name), None)


def _is_media(kind: Any) -> bool:
    """Bytes, or a struct that holds them as "bytes"."""
    kind = _stored(kind)
    place = kind.get_field_index("bytes") if hasattr(kind, "get_field_index") else -1
    return str(_stored(kind.field(place).type) if place >= 0 else kind) in ("binary", "large_binary", "binary_view")


def _is_text(kind: Any) -> bool:
    """Text, or a list of it."""
    kind = _stored(kind)
    return str(_stored(getattr(kind, "value_type", kind))) in TEXT


def is_json(kind: Any) -> bool:
    """Whether JSON holds it: numbers, texts, truth values, and lists and structs of such."""
    kind = _stored(kind)
    if hasattr(kind, "value_type"):
        return is_json(kind.value_type)
    if hasattr(kind, "get_field_index"):
        return all(is_json(field.type) for field in kind)
    return str(kind) in TEXT or re.fullmatch(r"u?int\d+|halffloat|float|double|bool|null", str(kind)) is not None


def _stored(kind: Any) -> Any:
    """What a dictionary or an extension type stores."""
    if hasattr(kind, "storage_type"):
        return kind.storage_type
    return kind.value_type if hasattr(kind, "index_type") else kind


def class_names(metadata: dict[bytes, bytes] | None) -> dict[str, list[str]]:
    """Columns of class numbers -> the names of the classes, as Hugging Face data sets note them."""
    try:
        features = json.loads((metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
        return {name: each["names"] for name, each in features.items() if each.get("_type") == "ClassLabel"}
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}
