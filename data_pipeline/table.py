"""The table of one shard: where each sample and field lies, and what statistics need to know of them.

Design choices:
- `<shard>.tar.idx.npz` holds plain arrays of numbers (and so never a pickle) and is loaded when a shard is first read.
  It carries the checksum of the tar that it describes, and a digest of itself.
- Whatever the file holds, loading it gives a table whose every number is in range and fits the others, or a DataError.
  Sizes are looked at before memory is taken for them.
- Tables of version 1 have no details (sizes of images, lengths of captions, ...); earlier ones have no aspects.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from array import array
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy

from data_pipeline.errors import DataError, first_line
from data_pipeline.tar import BLOCK

PLACES = {
    "first": np.int64, "offset": np.int64, "size": np.int64, "field": np.int32, "crc": np.uint32, "key_end": np.int64,
    "keys": np.uint8,
}  # fmt: skip
DETAILS = {
    "width": np.int32, "height": np.int32, "captions": np.int32, "caption_characters": np.int32,
    "caption_words": np.int32, "label": np.int32, "seconds": np.float32, "unreadable": np.uint8,
}  # fmt: skip
TEXTS = {"field_names": np.uint8, "checksum": np.uint8, "label_names": np.uint8, "digest": np.uint8}
KINDS = {**PLACES, **DETAILS, **TEXTS, "aspect": np.float32}  # every array of a table, and of what it is
SPARE = 1 << 20  # bytes that a table may have beyond those of the tar itself


@dataclass(frozen=True)
class Details:
    """What the fields of a shard's samples hold, so that nobody has to open them to count."""

    width: np.ndarray  # int32 [samples]: pixels of the image, upright; 0: no image, or damaged. So is
    height: np.ndarray
    captions: np.ndarray  # int32 [samples]: how many; -1: they cannot be read
    caption_characters: np.ndarray  # int32 [all captions]
    caption_words: np.ndarray  # int32 [all captions]
    label: np.ndarray  # int32 [samples]: into label_names; -1: none
    seconds: np.ndarray  # float32 [samples]: of sound; nan: none, or damaged
    unreadable: np.ndarray  # uint8 [samples]: 1 where an image header, a sound header, captions or label are damaged
    label_names: tuple[str, ...]


@dataclass(frozen=True)
class ShardTable:
    """Where everything in one shard lies: samples are rows of `first`, their fields rows of the other arrays."""

    first: np.ndarray  # int64 [samples + 1]: the fields of sample i are first[i]:first[i + 1]
    offset: np.ndarray  # int64 [fields]: byte in the tar
    size: np.ndarray  # int64 [fields]: bytes
    field: np.ndarray  # int32 [fields]: into field_names
    crc: np.ndarray  # uint32 [fields]: CRC-32 of the bytes
    key_end: np.ndarray  # int64 [samples]: where each key ends in `keys`
    keys: np.ndarray  # uint8 [bytes of all keys]: UTF-8, one after another
    field_names: tuple[str, ...]
    # float32 [samples]: width / height of the image, upright; nan: none, or damaged. None in tables of early versions
    aspect: np.ndarray | None = None
    details: Details | None = None  # None in tables of version 1

    def __len__(self) -> int:
        return len(self.key_end)

    def key(self, sample: int) -> str:
        """The key of the shard's sample number `sample`."""
        start = int(self.key_end[sample - 1]) if sample else 0
        return self.keys[start : int(self.key_end[sample])].tobytes().decode("utf-8", "surrogatepass")

    def key_hashes(self) -> np.ndarray:
        """int64 [samples]: a hash of each key, which another process does not come to."""
        keys, start, hashes = self.keys.tobytes(), 0, array("q")
        for end in self.key_end.tolist():
            hashes.append(hash(keys[start:end]))
            start = end
        return np.array(hashes, np.int64)

    def repeated_keys(self) -> tuple[int, str]:
        """(how many keys are those of more than one sample, the first such key), or (0, "")."""
        _, first, count = np.unique(self.key_hashes(), return_index=True, return_counts=True)
        repeated = first[count > 1]
        return repeated.size, self.key(int(repeated.min())) if repeated.size else ""

    def crcs(self, sample: int) -> list[int]:
        """The checksum of each field of the shard's sample number `sample`, in file order."""
        checksums: list[int] = self.crc[int(self.first[sample]) : int(self.first[sample + 1])].tolist()
        return checksums

    def places(self, sample: int) -> list[tuple[str, int, int]]:
        """(field name, offset, size) of each field of the shard's sample number `sample`, in file order."""
        rows = range(int(self.first[sample]), int(self.first[sample + 1]))
        return [(self.field_names[self.field[row]], int(self.offset[row]), int(self.size[row])) for row in rows]

    def same_places(self, other: ShardTable) -> bool:
        """Whether both describe the same samples and fields, at the same bytes."""
        return self.field_names == other.field_names and all(
            np.array_equal(getattr(self, name), getattr(other, name)) for name in PLACES
        )


def write_table(path: Path, table: ShardTable, checksum: str) -> None:
    """Write the table of the tar with this checksum as an npz file."""
    arrays = {name: getattr(table, name) for name in PLACES}
    arrays |= {"field_names": _json_bytes(table.field_names), "checksum": np.frombuffer(checksum.encode(), np.uint8)}
    if table.aspect is not None:
        arrays["aspect"] = table.aspect
    if table.details is not None:
        arrays |= {name: getattr(table.details, name) for name in DETAILS}
        arrays["label_names"] = _json_bytes(table.details.label_names)
    arrays["digest"] = np.frombuffer(_digest(arrays), np.uint8)
    with path.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)


def read_stored(path: Path, tar_bytes: int) -> tuple[ShardTable, str]:
    """The table in the npz file at `path`, of a tar of so many bytes, and the checksum of that tar.

    Raises FileNotFoundError, or DataError for anything else that is wrong.
    """
    try:
        arrays = _read_arrays(path, tar_bytes)
        if "crc" not in arrays:
            raise DataError("it was made by an earlier version, without checksums")
        stored = arrays.pop("digest", None)
        if stored is not None and stored.tobytes() != _digest(arrays):
            raise DataError("its digest is that of another table")
        table = ShardTable(
            **{name: arrays[name] for name in PLACES},
            field_names=_texts(arrays["field_names"]),
            aspect=arrays.get("aspect"),
            details=_details(arrays) if "width" in arrays else None,
        )
        checksum = arrays["checksum"].tobytes().decode()
        _refuse(_unsound(table, tar_bytes))
    except FileNotFoundError:
        raise
    except Exception as error:  # readers of zip files, array headers and JSON raise whatever comes of noise
        raise DataError(f"{path} is damaged ({first_line(error)})") from error
    return table, checksum


def _details(arrays: dict[str, np.ndarray]) -> Details:
    return Details(**{name: arrays[name] for name in DETAILS}, label_names=_texts(arrays["label_names"]))


def _read_arrays(path: Path, tar_bytes: int) -> dict[str, np.ndarray]:
    """The arrays of an npz file, each of the one dimension and type that it should have, in bounded memory."""
    arrays: dict[str, np.ndarray] = {}
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        whole = sum(entry.file_size for entry in entries)
        if whole > tar_bytes + SPARE:
            raise DataError(f"it would take {whole} bytes, more than its tar")
        for entry in entries:
            name = entry.filename.removesuffix(".npy")
            if name not in KINDS or name in arrays:
                raise DataError(f"it holds {entry.filename!r}, which no table has, or has once")
            with archive.open(entry) as file:
                version = npy.read_magic(file)
                read_header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
                shape, _, kind = read_header(file)
                data = file.read(entry.file_size)  # bounded: what is packed may be more than it says
            if kind != KINDS[name] or len(shape) != 1 or shape[0] * kind.itemsize != len(data):
                raise DataError(f"its {name!r} is {kind} of shape {shape} in {len(data)} bytes")
            arrays[name] = np.frombuffer(data, kind) if data else np.empty(0, kind)
    return arrays


def _unsound(table: ShardTable, tar_bytes: int) -> str | None:
    """What in a table cannot be, as the end of a sentence; None when all of it fits together and into the tar."""
    samples, count = len(table), len(table.offset)
    names = table.field_names
    if len(table.first) != samples + 1 or table.first[0] != 0 or table.first[-1] != count:
        return "its samples have other fields than it lists"
    if np.any(np.diff(table.first) < 1) or {len(table.size), len(table.field), len(table.crc)} != {count}:
        return "its samples have other fields than it lists"
    if len(set(names)) != len(names) or np.any((table.field < 0) | (table.field >= len(names))):
        return "its fields have no names"
    rows = np.repeat(np.arange(samples), np.diff(table.first))
    if len(np.unique(rows * max(1, len(names)) + table.field)) != count:
        return "a sample has a field twice"
    start, size = table.offset, table.size
    if np.any((start < BLOCK) | (start > tar_bytes) | (start % BLOCK != 0) | (size < 0) | (size > tar_bytes)):
        return "its places are none of a tar"
    ends = start + size
    if np.any(ends > tar_bytes) or np.any(start[1:] < ends[:-1] + BLOCK):
        return "its places overlap, or lie outside the tar"
    ends = table.key_end
    if np.any(np.diff(ends, prepend=0) < 1) or (ends[-1] if samples else 0) != len(table.keys):
        return "its keys are not those of its samples"
    table.keys.tobytes().decode("utf-8", "surrogatepass")  # a ValueError is told by the caller
    if np.any(table.keys[ends[:-1]] & 0xC0 == 0x80):  # a key begins inside a character
        return "its keys are not UTF-8"
    aspect = table.aspect
    if aspect is not None and (len(aspect) != samples or np.any(aspect <= 0) or np.any(np.isinf(aspect))):
        return "its aspects are none of images"
    return _unsound_details(table.details, samples) if table.details is not None else None


def _unsound_details(details: Details, samples: int) -> str | None:
    """The same of the details."""
    per_sample = {field.name for field in fields(details)} - {"caption_characters", "caption_words", "label_names"}
    if any(len(getattr(details, name)) != samples for name in per_sample):
        return "its details are of another number of samples"
    if np.any((details.width < 0) | (details.height < 0) | ((details.width == 0) != (details.height == 0))):
        return "its sizes of images cannot be"
    texts = int(np.sum(np.maximum(details.captions, 0), dtype=np.int64))
    lengths = (details.caption_characters, details.caption_words)
    if np.any(details.captions < -1) or any(len(each) != texts or np.any(each < 0) for each in lengths):
        return "its lengths of captions are of other captions"
    if np.any((details.label < -1) | (details.label >= len(details.label_names))):
        return "its labels have no names"
    if np.any(details.seconds < 0) or np.any(np.isinf(details.seconds)) or np.any(details.unreadable > 1):
        return "its details are out of range"
    return None


def _refuse(problem: str | None) -> None:
    if problem:
        raise DataError(problem)


def _texts(array: np.ndarray) -> tuple[str, ...]:
    """The texts in the bytes of a JSON list."""
    texts: Any = json.loads(array.tobytes())
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise DataError("its names are no texts")
    return tuple(texts)


def _json_bytes(texts: tuple[str, ...]) -> np.ndarray:
    return np.frombuffer(json.dumps(texts).encode(), np.uint8)


def _digest(arrays: dict[str, np.ndarray]) -> bytes:
    """sha256 over the names and bytes of arrays."""
    whole = hashlib.sha256()
    for name in sorted(arrays):
        whole.update(f"{name} {len(arrays[name])} ".encode())
        whole.update(np.ascontiguousarray(arrays[name]).data)
    return whole.digest()
