"""The captions that lie beside images, in whatever form people keep them: a file an image, or a table of them.

    K.txt  K.caption  K.json  K.jpg.txt          beside K.jpg, or in captions/ where the images are in images/
    metadata.jsonl  metadata.csv  captions.csv   .tsv .json .parquet too: beside the images or above them

Design choices:
- A .txt or .caption has one caption a line; a .json has it as "caption" or "text", as a text or a list of them.
- Names are compared as Unicode means them: one composed otherwise (NFC, NFD) is the same name.
- A table is what has a column of image names and one of captions. A name in it means a file relative to the table, or
  the only image below that ends so. A name that fits several images is refused, and so are two files that say
  different things about one image: whoever made them knows which is meant.
- Nothing is opened that the table names: it can only mean images that were found already.
"""

from __future__ import annotations

import json
import posixpath
import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from data_pipeline.errors import DataError
from data_pipeline.importers.annotations import json_lines, json_reason, lines_of, unique_names
from data_pipeline.importers.captions import NO_CAPTION, usable
from data_pipeline.importers.gather import part_named
from data_pipeline.importers.leftovers import extension_of, looks_like_image
from data_pipeline.importers.table import (
    CAPTION_COLUMNS,
    CSV_EXTENSIONS,
    IMAGE_COLUMNS,
    PARQUET_EXTENSIONS,
    Row,
    column_among,
    csv_columns,
    csv_rows,
    parquet_columns,
    parquet_rows,
)
from data_pipeline.sample import Skipped, text_of

TEXTS = ("txt", "caption", "captions")  # extensions
TABLES = ("csv", "tsv", "jsonl", "ndjson", "json", "parquet", "pq")
JSON_FIELDS = ("caption", "captions", "text", "texts", "prompt", "description")
COLUMNS = tuple(name for name in CAPTION_COLUMNS if name != "label")  # a label is a class, or a number
SPLIT_COLUMNS = ("split", "set", "subset", "partition")
CAPTION_FOLDERS = ("captions", "caption", "texts", "text", "txt", "prompts")
IMAGE_FOLDERS = ("images", "image", "imgs", "img", "pictures", "photos", "jpegimages")
ABOUT = re.compile(
    r"read.?me|licen[cs]e|copying|copyright|notice|authors|credits|citation|classes|class.?names|labels?$",
    re.IGNORECASE,
)
TABLE_TEXT = re.compile(r"(captions?|metadata|annotations?|results|descriptions?)\b.*", re.IGNORECASE)
ORPHAN = "is a caption file without an image"
NAMES_NOTHING = "names no image that is here"
NO_NAME = "has no name of an image file"
NOT_CAPTIONS = "has no columns of images and captions"


@dataclass
class Captions:
    """What the caption files below a folder say: captions, or the reason why not, of images by their path in it."""

    of: dict[str, tuple[str, ...]] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    parts: dict[str, str] = field(default_factory=dict)  # of a table that names the split
    left: list[Skipped] = field(default_factory=list)  # caption files, and rows of tables, that no image is for
    refused: list[Skipped] = field(default_factory=list)  # files that hold captions which could not be used
    _from: dict[str, str] = field(default_factory=dict)

    def say(self, image: str, captions: tuple[str, ...], reason: str, file: str) -> None:
        """Note what `file` says about an image; DataError when another one says otherwise."""
        if not captions:
            self.reasons.setdefault(image, reason)
            self.refused.append(Skipped(file, reason))
            return
        known = self.of.get(image, ())
        if known and not (set(known) <= set(captions) or set(captions) <= set(known)):
            raise DataError(
                f"{self._from[image]} and {file} have different captions for {image}: remove the file that is not meant"
            )
        if len(captions) > len(known):
            self.of[image], self._from[image] = captions, file


def read_captions(source: Path, images: Iterable[str], files: Iterable[str]) -> Captions:
    """The captions in `files` for `images`, both by their paths below `source`.

    DataError when a table is damaged, or it is not clear which image or which file is meant.
    """
    found = Captions()
    names = _Names(images)
    tables, texts = [], []
    for file in files:
        extension = extension_of(file)
        beside = names.beside(file)
        if extension in TEXTS or (extension == "json" and beside):
            texts.append((file, beside))
        elif extension in TABLES:
            tables.append(file)
    for file, beside in texts:
        _read_beside(source, file, beside or names.mirrored(file), found, tables)
    for file in tables:
        _read_table(source, file, names, found)
    return found


def _read_beside(source: Path, file: str, images: list[str], found: Captions, tables: list[str]) -> None:
    """The caption file of some image (several of one name share it); without any it is a table, or left over."""
    stem = posixpath.basename(file)
    if not images and TABLE_TEXT.fullmatch(stem) and _is_csv(source / file):
        tables.append(file)
        return
    if not images:
        found.left.append(Skipped(file, ORPHAN))
        if not ABOUT.match(stem):
            found.refused.append(Skipped(file, ORPHAN))
        return
    if extension_of(file) == "json":
        captions, reason, is_caption = _captions_of_json(source / file)
        if not is_caption:  # metadata of another kind
            return
    else:
        captions, reason = _captions_of_text(source / file)
    for image in images:
        found.say(image, captions, reason, file)


def _captions_of_text(path: Path) -> tuple[tuple[str, ...], str]:
    """(captions, "") of a .txt, or ((), why there are none)."""
    kind = f"its .{extension_of(path.name)}"
    try:
        lines = lines_of(text_of(path.read_bytes()).removeprefix("\ufeff"))
    except DataError as error:
        return (), f"{kind} {str(error).partition(' (')[0]}"  # in the same words for all such files
    except OSError as error:
        return (), f"{kind} cannot be read: {error.strerror}"
    captions, reason = usable([line for line in lines if line.strip()])
    return captions, f"{kind} holds no caption" if reason == NO_CAPTION else reason


def _captions_of_json(path: Path) -> tuple[tuple[str, ...], str, bool]:
    """(captions, why there are none, whether it is about captions at all) of the .json of one image."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=unique_names)
    except (ValueError, RecursionError):
        return (), "its .json is damaged, or no JSON", True
    except OSError as error:
        return (), f"its .json cannot be read: {error.strerror}", True
    if isinstance(tree, (str, list)):
        return *usable(tree), True
    name = next((name for name in JSON_FIELDS if isinstance(tree, dict) and tree.get(name)), None)
    return (*usable(tree[name]), True) if name else ((), "its .json holds no caption", False)


# --- tables


def _read_table(source: Path, file: str, names: _Names, found: Captions) -> None:
    """Take the rows of a table that is about images here; what is none is left over."""
    rows, reason = _rows(source / file, file, names)
    if rows is None:
        found.left.append(Skipped(file, reason))
        if reason != NOT_CAPTIONS:
            found.refused.append(Skipped(file, reason))
        return
    said: dict[str, list[str]] = {}
    why: dict[str, list[Skipped]] = {}
    missed = []
    for row in rows:
        written = row.image if isinstance(row.image, str) else ""
        image = names.meant(written, posixpath.dirname(file), f"{file}, {row.name}") if written else None
        if row.reason or image is None:
            missed.append(Skipped(f"{file}: {row.name}", row.reason or (NAMES_NOTHING if written else NO_NAME)))
            continue
        said.setdefault(image, []).extend(row.captions)
        if not row.captions:
            why.setdefault(image, []).append(Skipped(f"{file}: {row.name}", row.problem or NO_CAPTION))
        if row.part:
            found.parts[image] = row.part
    if not said:
        missed = [Skipped(file, f"{NAMES_NOTHING}, as caption files do")]
        found.refused += missed
    found.left += missed
    for image, captions in said.items():
        blank = why.get(image, [])
        found.left += blank if captions else blank[1:]  # the image itself is told once
        found.say(image, tuple(dict.fromkeys(captions)), blank[0].reason if blank else NO_CAPTION, file)


def _rows(path: Path, file: str, names: _Names) -> tuple[Iterator[Row] | None, str]:
    """(rows, "") of a table of captions, or (None, why it is none)."""
    extension = extension_of(file)
    if extension in ("json", "jsonl", "ndjson"):
        return _json_table(path, file, names)
    columns = parquet_columns(path) if extension in ("parquet", "pq") else csv_columns(path)
    image, caption, reason = _columns(columns, path)
    if not image or not caption:
        return None, reason
    if extension in ("parquet", "pq"):
        return parquet_rows(path, image, caption), ""
    return csv_rows(path, image, caption, split=column_among(columns, SPLIT_COLUMNS), known=names.knows), ""


def _columns(columns: list[str], path: Path) -> tuple[str | None, str | None, str]:
    """(column of images, column of captions, why it is not a table of captions)."""
    image, caption = column_among(columns, IMAGE_COLUMNS), column_among(columns, COLUMNS)
    there = ", ".join(map(repr, columns[:12]))
    if not image and not caption:
        return None, None, NOT_CAPTIONS
    missing = "" if image and caption else "captions" if image else "images, so that its captions cannot be placed"
    if path.suffix.lower() in (*CSV_EXTENSIONS, *PARQUET_EXTENSIONS):
        way_out = f"name them with `weft data import table {path} OUT --image-column A --caption-column B`"
    else:
        way_out = f"call them {IMAGE_COLUMNS[0]!r} and {COLUMNS[0]!r}"
    return image, caption, f"has the columns {there}, and none called as columns of {missing}: {way_out}"


def _json_table(path: Path, file: str, names: _Names) -> tuple[Iterator[Row] | None, str]:
    """The same of JSON: lines of objects, a list of objects, or an object {image: captions}."""
    if extension_of(file) != "json":
        return _json_lines_table(path)
    try:
        tree = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=unique_names)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 ({error}): save it as UTF-8") from error
    except (ValueError, RecursionError) as error:
        reason = json_reason(error)
        raise DataError(f"{path} is not JSON, damaged or cut short ({reason}): repair it, or remove it") from error
    if isinstance(tree, dict) and {"images", "annotations"} <= tree.keys():
        return None, "holds captions in the form of COCO, or boxes: see `weft data import coco`"
    if isinstance(tree, dict):
        lists = [value for value in tree.values() if isinstance(value, list) and value and isinstance(value[0], dict)]
        if not lists:
            return _json_mapping(tree, file, names)
        tree = lists[0]
    listed = tree if isinstance(tree, list) else []
    return _object_table([(f"row {number}", each) for number, each in enumerate(listed, start=1)], path)


def _json_lines_table(path: Path) -> tuple[Iterator[Row] | None, str]:
    """The same of JSON lines; a line that is no object is a row with a reason. DataError when none is one."""
    bad: list[Row] = []

    def skip(where: str, reason: str) -> None:
        bad.append(Row(where.removeprefix(f"{path} "), reason=reason))

    objects = [(where.removeprefix(f"{path} "), each) for where, each in json_lines(path, skip)]
    if bad and not objects:
        raise DataError(f"{path} {bad[0].name} {bad[0].reason}: repair it, or remove it")
    rows, reason = _object_table(objects, path)
    return (chain(bad, rows), "") if rows is not None else (None, reason)


def _object_table(objects: list[tuple[str, Any]], path: Path) -> tuple[Iterator[Row] | None, str]:
    """The rows of objects, each with what it is called, by the columns of all of them."""
    columns = list(dict.fromkeys(name for _, each in objects if isinstance(each, dict) for name in each))
    image, caption, reason = _columns(columns, path)
    if not image or not caption:
        return None, reason
    return _object_rows(objects, image, caption, column_among(columns, SPLIT_COLUMNS)), ""


def _json_mapping(tree: dict[str, Any], file: str, names: _Names) -> tuple[Iterator[Row] | None, str]:
    """The rows of {image: caption}, {image: [captions]} or {image: {"caption": ...}}."""
    objects = [(name, {"file_name": name, **_object(value)}) for name, value in tree.items()]
    by_stem = TABLE_TEXT.fullmatch(posixpath.basename(file)) and any(map(names.knows, tree))
    named = by_stem or any(map(looks_like_image, tree))
    said = any(
        isinstance(value, dict) and "caption" in each for (_, each), value in zip(objects, tree.values(), strict=True)
    )
    return (_object_rows(objects, "file_name", "caption", None), "") if named or said else (None, NOT_CAPTIONS)


def _object(value: Any) -> dict[str, Any]:
    """{"caption": ...} of what stands behind an image's name."""
    if isinstance(value, dict):
        name = next((name for name in JSON_FIELDS if name in value), None)
        return {"caption": value[name]} if name else {}
    return {"caption": value}


def _object_rows(objects: Iterable[tuple[str, Any]], image: str, caption: str, split: str | None) -> Iterator[Row]:
    for called, each in objects:
        name = each.get(image) if isinstance(each, dict) else None
        if not isinstance(name, str) or not name.strip():
            yield Row(called, reason=NO_NAME)
            continue
        captions, problem = usable(each.get(caption))
        part = each.get(split) if split else None
        yield Row(name, name.strip(), captions, problem=problem, part=part_named(part))


def _is_csv(path: Path) -> bool:
    """Whether a .txt is a table of images and captions, as Flickr8k's captions.txt is."""
    try:
        columns = csv_columns(path)
    except (DataError, OSError):
        return False
    return bool(column_among(columns, IMAGE_COLUMNS) and column_among(columns, COLUMNS))


# --- names


class _Names:
    """The images that were found, by the ways in which they are called."""

    def __init__(self, images: Iterable[str]) -> None:
        self._whole: dict[str, list[str]] = {}  # path, composed -> images
        self._stem: dict[str, list[str]] = {}  # path without its extension
        self._last: dict[str, list[str]] = {}  # last part, with the extension and without
        self._mirror: dict[str, list[str]] = {}
        for image in images:
            whole = _composed(image)
            stem = posixpath.splitext(whole)[0]
            self._whole.setdefault(whole, []).append(image)
            self._stem.setdefault(stem, []).append(image)
            for last in dict.fromkeys((posixpath.basename(whole), posixpath.basename(stem))):
                self._last.setdefault(last, []).append(image)
            for name in (whole, stem):
                self._mirror.setdefault(_mirror(name), []).append(image)

    def knows(self, name: str) -> bool:
        """Whether some image is called `name`, with its extension or without, in whatever folder."""
        return posixpath.basename(_composed(name)) in self._last

    def beside(self, file: str) -> list[str]:
        """The images that a caption file of this name is beside: K.jpg of K.txt or of K.jpg.txt."""
        stem = posixpath.splitext(_composed(file))[0]
        return self._whole.get(stem) or self._stem.get(stem) or []

    def mirrored(self, file: str) -> list[str]:
        """The image of images/K.jpg for captions/K.txt, or for K.txt; [] when there is none, or it is not clear."""
        found = self._mirror.get(_mirror(posixpath.splitext(_composed(file))[0]), [])
        stems = {posixpath.splitext(each)[0] for each in found}
        return found if len(stems) == 1 else []

    def meant(self, written: str, folder: str, where: str) -> str | None:
        """The image that a table in `folder` calls `written`; None when there is none, DataError when several fit."""
        name = _composed(written.strip().replace("\\", "/"))
        whole = posixpath.normpath(posixpath.join(folder, name)) if name else ""
        for exact in (self._whole, self._stem):
            if whole in exact:
                return exact[whole][0]
        inside = posixpath.normpath(name).lstrip("/") if not name.startswith("/") else ""
        fits = [
            image
            for image in self._last.get(posixpath.basename(inside), [])
            if any(
                f"/{each}".endswith(f"/{inside}")
                for each in (_composed(image), posixpath.splitext(_composed(image))[0])
            )
        ]
        below = [image for image in fits if not folder or image.startswith(f"{folder}/")]
        fits = below or fits
        if len(fits) > 1:
            raise DataError(f"{where}: {written!r} may be {fits[0]} or {fits[1]}: write its path relative to the file")
        return fits[0] if fits else None


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _mirror(name: str) -> str:
    """A path without the folders that only say what is in them."""
    *folders, last = name.split("/")
    kept = [each for each in folders if each.casefold() not in (*CAPTION_FOLDERS, *IMAGE_FOLDERS)]
    return "/".join([*kept, last])
