"""A tar reader that gives every member's place and refuses what a data set must not hold.

Design choices:
- Ours, because `tarfile` builds an object a member and says "unexpected end of data" without a place; this one walks
  headers over a buffer (an mmap) and knows the byte. It reads ustar, GNU and PAX archives, long names included.
- A tar is whole only with its end mark, a block of zeros: one cut exactly between two members is found too.
- Refused as DataError: damaged headers (checksum), truncation, absolute and ".." names, links, devices, sparse files,
  compression (no random access) and pickles (reading one runs its author's code).
- Names that `webdataset` does not count as part of a sample (no dot, hidden, `__meta__`) are left out here too.

Format: POSIX.1-2017 pax(1), "ustar Interchange Format" and "pax Header Block"; GNU tar manual, "Basic Tar Format".
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from data_pipeline.errors import DataError

BLOCK = 512
ZEROS = bytes(BLOCK)
PICKLE_EXTENSIONS = frozenset({"pkl", "pickle", "pyd", "pt", "pth", "joblib", "dill"})
LARGEST_NAME = 1 << 20  # no honest path is a mebibyte long

REGULAR, DIRECTORY = (b"0", b"\0", b"7"), b"5"
GNU_LONG_NAME, GNU_LONG_LINK, PAX, PAX_GLOBAL = b"L", b"K", b"x", b"g"
REFUSED = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a character device",
    b"4": "a block device",
    b"6": "a named pipe",
    b"S": "a sparse file",
}


class Member(NamedTuple):
    """One file in a tar: its name, and the place of its bytes in the archive."""

    name: str
    offset: int
    size: int


def split_name(name: str) -> tuple[str, str] | None:
    """(sample key, lower-case field name), split at the base name's first dot; None for what is no field."""
    folder, slash, base = name.rpartition("/")
    if _is_metadata(name):
        return None
    stem, dot, field = base.partition(".")
    if not stem or not dot or not field:
        return None
    return folder + slash + stem, field.lower()


def refusal_of_name(name: str) -> str | None:
    """Why a file of this name may not be in a shard, as the end of a sentence; None when it may."""
    path = name.replace("\\", "/")
    if path.startswith("/") or path[1:3] == ":/":
        return "is an absolute path"
    if ".." in path.split("/"):
        return 'climbs out of its folder with ".."'
    split = split_name(name)
    if split and not PICKLE_EXTENSIONS.isdisjoint(split[1].split(".")):
        return "is a pickle, and reading one can run any code"
    return None


def open_members(path: Path) -> list[Member]:
    """Every regular file in the tar at `path`, in order; DataError names the byte where it is bad."""
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty: not even an end mark")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as buffer:
        return list(read_members(buffer, str(path)))


def read_members(buffer: mmap.mmap | bytes, shard: str) -> Iterator[Member]:
    """Every regular file of the tar in `buffer`, in order; `shard` is the name that errors give.

    Raises DataError for what the module docstring lists.
    """
    total = len(buffer)
    if buffer[:2] == b"\x1f\x8b" or buffer[:3] == b"BZh" or buffer[:6] == b"\xfd7zXZ\0":
        raise DataError(f"{shard} is compressed, so no sample in it can be found directly: decompress it to plain .tar")
    position = 0
    longer_name: str | None = None  # from a GNU or PAX header, for the next member
    longer_size: int | None = None
    while True:
        header = buffer[position : position + BLOCK]
        if len(header) < BLOCK:
            where = "inside a header" if header else "without its end mark"
            raise DataError(f"{shard} is truncated: it ends {where} at byte {total}")
        if header == ZEROS:
            return
        _verify_checksum(header, shard, position)
        kind = header[156:157]
        size = _number(header[124:136], shard, position)
        start = position + BLOCK
        if kind in (GNU_LONG_NAME, GNU_LONG_LINK, PAX, PAX_GLOBAL):
            if size > LARGEST_NAME:
                raise DataError(f"{shard} has an extended header of {size} bytes at byte {position}: it is damaged")
            _refuse_overrun(shard, "an extended header", start, size, total)
            body = buffer[start : start + size]
            if kind == GNU_LONG_NAME:
                longer_name = _text(body.rstrip(b"\0"))
            elif kind == PAX:
                records = _pax_records(body, shard, position)
                if any(key.startswith(b"GNU.sparse") for key in records):
                    raise DataError(f"{shard} holds a sparse file at byte {position}: only plain files are read")
                if b"path" in records:
                    longer_name = _text(records[b"path"])
                if b"size" in records:
                    longer_size = _decimal(records[b"size"], shard, position)
            position = start + _padded(size)
            continue
        name = longer_name if longer_name is not None else _name(header)
        size = longer_size if longer_size is not None else size
        longer_name = longer_size = None
        if kind in REFUSED:
            raise DataError(f"{shard} holds {REFUSED[kind]}, {name!r} at byte {position}: only plain files are read")
        reason = refusal_of_name(name)
        if reason:
            raise DataError(f"{shard} holds {name!r} at byte {position}, which {reason}: it is refused")
        if kind == DIRECTORY or name.endswith("/"):
            position = start
            continue
        if kind not in REGULAR:
            raise DataError(f"{shard} holds {name!r} of unknown type {kind!r} at byte {position}: it is refused")
        _refuse_overrun(shard, repr(name), start, size, total)
        yield Member(name, start, size)
        position = start + _padded(size)


def _is_metadata(name: str) -> bool:
    """Whether `webdataset` takes the file for metadata: its first path part is `__something__`."""
    first = name.split("/", 1)[0]
    return len(first) >= 4 and first.startswith("__") and first.endswith("__")


def _padded(size: int) -> int:
    return (size + BLOCK - 1) // BLOCK * BLOCK


def _refuse_overrun(shard: str, what: str, start: int, size: int, total: int) -> None:
    if start + size > total:
        raise DataError(
            f"{shard} is truncated: it ends at byte {total}, inside {what}, which takes bytes {start} to {start + size}"
        )


def _verify_checksum(header: bytes, shard: str, position: int) -> None:
    """The header's bytes summed, its checksum field counted as blanks; some old tars summed signed bytes."""
    stored = _number(header[148:156], shard, position)
    unsigned = sum(header) - sum(header[148:156]) + 8 * ord(" ")
    if stored == unsigned:
        return
    signed = unsigned - 256 * sum(byte > 127 for byte in header[:148] + header[156:])
    if stored != signed:
        raise DataError(f"{shard} is damaged: the header at byte {position} does not match its checksum")


def _number(field: bytes, shard: str, position: int) -> int:
    """A numeric header field: octal digits, or big-endian base 256 when its first bit is set (GNU)."""
    if field[0] & 0x80:
        number = int.from_bytes(field, "big", signed=False) - (0x80 << 8 * (len(field) - 1))
        if field[0] == 0xFF:
            raise DataError(f"{shard} is damaged: a negative number in the header at byte {position}")
        return number
    digits = field.split(b"\0", 1)[0].strip()
    try:
        return int(digits or b"0", 8)
    except ValueError as error:
        raise DataError(
            f"{shard} is damaged or no tar at all: the header at byte {position} has {digits!r} for a number"
        ) from error


def _decimal(digits: bytes, shard: str, position: int) -> int:
    if not digits.isdigit():
        raise DataError(f"{shard} is damaged: the extended header at byte {position} has {digits!r} for a size")
    return int(digits)


def _name(header: bytes) -> str:
    name = header[:100].split(b"\0", 1)[0]
    if header[257:263] == b"ustar\0":  # POSIX; in GNU archives these bytes hold other things
        prefix = header[345:500].split(b"\0", 1)[0]
        if prefix:
            name = prefix + b"/" + name
    return _text(name)


def _text(name: bytes) -> str:
    """A name as text; bytes that are not UTF-8 stay visible and distinct."""
    return name.split(b"\0", 1)[0].decode("utf-8", "backslashreplace")


def _pax_records(body: bytes, shard: str, position: int) -> dict[bytes, bytes]:
    """The "LENGTH KEY=VALUE\\n" records of a PAX header."""
    records = {}
    while body.strip(b"\0"):
        length, blank, _ = body.partition(b" ")
        if not blank or not length.isdigit() or not len(length) + 3 < int(length) <= len(body):
            raise DataError(f"{shard} is damaged: the extended header at byte {position} cannot be read")
        key, _, value = body[len(length) + 1 : int(length) - 1].partition(b"=")
        records[key] = value
        body = body[int(length) :]
    return records
