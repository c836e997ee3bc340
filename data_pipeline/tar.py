"""A tar reader that gives every member's place and refuses what a data set must not hold.

Design choices:
- Ours, because `tarfile` builds an object a member and says "unexpected end of data" without a place; this one walks
  headers over a buffer (an mmap) and knows the byte. It reads ustar, GNU and PAX archives, long names included.
- A tar is whole only with its end mark, a block of zeros: one cut exactly between two members is found too. Behind the
  mark lies padding, and nothing else: joined tars and tails of zeros, which other readers pass over, are found.
- Refused as DataError: damaged headers (checksum), truncation, absolute and ".." names, links, devices, sparse files,
  compression (no random access) and pickles (reading one runs its author's code).
- Names that `webdataset` does not count as part of a sample (no dot, hidden, `__meta__`) are left out here too, and so
  are entries that are no files: volume labels, listings of incremental archives, links that no sample has. These are
  counted for whoever asks.
- A file is read through a window of a mebibyte, so that an archive of any size takes no memory, and one that shrinks
  while it is read is an error (a mapped file would end the process).

Format: POSIX.1-2017 pax(1), "ustar Interchange Format" and "pax Header Block"; GNU tar manual, "Basic Tar Format".
"""

from __future__ import annotations

import mmap
import os
import zlib
from collections import Counter
from collections.abc import Generator
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from data_pipeline.errors import DataError

BLOCK = 512
MAGIC = 257  # byte of a header at which "ustar" stands
ZEROS = bytes(BLOCK)
PICKLE_EXTENSIONS = frozenset({"pkl", "pickle", "pyd", "pt", "pth", "joblib", "dill"})
LARGEST_NAME = 1 << 20  # no honest path is a mebibyte long
WINDOW = 1 << 20  # bytes of a file in memory
RECORDS = (10240, 20480, *(BLOCK << doubled for doubled in range(1, 12)))  # writers pad to one of these, up to 1 MiB
LONGEST_NUMBER = 20  # digits of 2^64

OLD_REGULAR, DIRECTORY, SPARSE, CONTINUED = b"\0", b"5", b"S", b"M"
REGULAR = (b"0", OLD_REGULAR, b"7")
GNU_LONG_NAME, GNU_LONG_LINK, PAX, PAX_GLOBAL = b"L", b"K", b"x", b"g"
NO_FILES = {b"V": "volume label", b"D": "listing of an incremental archive"}  # GNU's entries about the archive itself
REFUSED = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a character device",
    b"4": "a block device",
    b"6": "a named pipe",
    SPARSE: "a sparse file",
    CONTINUED: "the rest of a file that begins in another volume",
}
COMPRESSED = (
    *(b"\x1f\x8b", b"\x1f\x9d", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd", b"\x04\x22\x4d\x18"),
    *(b"PK\3\4", b"7z\xbc\xaf\x27\x1c", b"Rar!\x1a\7"),
)  # first bytes of gzip, compress, bzip2, xz, zstd, lz4, and of other archives


class TarError(DataError):
    """What is wrong with a tar; `byte` is where, `resume_at` the header after a refused member, where that is known."""

    def __init__(self, message: str, byte: int = 0, resume_at: int | None = None) -> None:
        super().__init__(message)
        self.byte = byte
        self.resume_at = resume_at


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


class Window:
    """A file as a buffer that is sliced from front to back, of which little is in memory. A context manager.

    Raises TarError when the file is empty, or shrinks while it is read.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._held, self._start = path, b"", 0
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._size = os.fstat(self._descriptor).st_size
        if self._size == 0:
            os.close(self._descriptor)
            raise TarError(f"{path} is empty: not even an end mark")

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, part: slice) -> bytes:
        start, stop = part.start or 0, min(part.stop, self._size)
        if start < self._start or stop > self._start + len(self._held):
            self._held, self._start = self._read(start, max(stop - start, min(WINDOW, self._size - start))), start
        return self._held[start - self._start : stop - self._start]

    def _read(self, start: int, length: int) -> bytes:
        parts = []
        while length > 0:
            part = os.pread(self._descriptor, length, start)
            if not part:
                raise TarError(f"{self._path} shrank while it was read: it ends at byte {start}", start)
            parts.append(part)
            start += len(part)
            length -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def __enter__(self) -> Window:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        os.close(self._descriptor)


Buffer = mmap.mmap | bytes | Window


def whole_members(buffer: Buffer, shard: str, skipped: Counter[str] | None = None) -> Generator[Member, None, None]:
    """Every regular file of a tar, found to be whole to its last byte: as `read_members`, and as `tail_problem`."""
    end = yield from read_members(buffer, shard, skipped=skipped)
    problem = tail_problem(buffer, shard, end)
    if problem:
        raise problem


def read_members(
    buffer: Buffer, shard: str, start: int = 0, skipped: Counter[str] | None = None
) -> Generator[Member, None, int]:
    """Every regular file of the tar in `buffer` from the header at byte `start`; returns the byte of the end mark.

    `shard` is the name that errors give; `skipped` counts entries that are no files, by what they are. Raises TarError
    for what the module docstring lists.
    """
    total = len(buffer)
    if buffer[:8].startswith(COMPRESSED) and buffer[MAGIC : MAGIC + 5] != b"ustar":  # no file's name
        raise TarError(f"{shard} is compressed, so no sample in it can be found directly: decompress it to plain .tar")
    position = start
    longer_name: str | None = None  # from a GNU or PAX header, for the next member
    longer_size: int | None = None
    while True:
        header = buffer[position : position + BLOCK]
        if len(header) < BLOCK:
            where = "inside a header" if header else "without its end mark"
            raise TarError(f"{shard} is truncated: it ends {where} at byte {total}", total)
        if header == ZEROS:
            return position
        _verify_checksum(header, shard, position)
        kind = header[156:157]
        size = _number(header[124:136], shard, position)
        body_start = position + BLOCK
        following = body_start + _padded(size)
        if kind in (GNU_LONG_NAME, GNU_LONG_LINK, PAX, PAX_GLOBAL):
            if size > LARGEST_NAME:
                sentence = f"{shard} has an extended header of {size} bytes at byte {position}: it is damaged"
                raise TarError(sentence, position)
            _refuse_overrun(shard, "an extended header", body_start, size, total)
            body = buffer[body_start : body_start + size]
            if kind == GNU_LONG_NAME:
                longer_name = _text(body.rstrip(b"\0"))
            elif kind == PAX:
                records = _pax_records(body, shard, position)
                if any(key.startswith(b"GNU.sparse") for key in records):
                    sentence = f"{shard} holds a sparse file at byte {position}: only plain files are read"
                    file = buffer[following : following + BLOCK]  # under a made-up name
                    size = _number(file[124:136], shard, following) if len(file) == BLOCK else 0
                    raise TarError(sentence, position, following + BLOCK + _padded(size))
                if b"path" in records:
                    longer_name = _text(records[b"path"])
                if b"size" in records:
                    longer_size = _decimal(records[b"size"], shard, position)
            position = following
            continue
        name = longer_name if longer_name is not None else _name(header)
        size = longer_size if longer_size is not None else size
        following = body_start + (_padded(size) if kind != DIRECTORY else 0)
        longer_name = longer_size = None
        other = NO_FILES.get(kind)
        if other is None and kind not in REGULAR and kind != DIRECTORY and kind != SPARSE and not split_name(name):
            other = REFUSED.get(kind, "entry of an unknown type").removeprefix("a ")
        if other is not None:
            _refuse_overrun(shard, repr(name), body_start, size, total)
            if skipped is not None:
                skipped[other] += 1
            position = body_start if kind in REFUSED and kind != CONTINUED else following
            continue
        if kind in REFUSED:
            sentence = f"{shard} holds {REFUSED[kind]}, {name!r} at byte {position}: only plain files are read"
            resume_at = None if kind == SPARSE else following if kind == CONTINUED else body_start
            raise TarError(sentence, position, resume_at)
        reason = refusal_of_name(name)
        if reason:
            sentence = f"{shard} holds {name!r} at byte {position}, which {reason}: it is refused"
            raise TarError(sentence, position, following)
        if kind == DIRECTORY or (kind == OLD_REGULAR and name.endswith("/")):  # so did tar before POSIX
            position = body_start
            continue
        if kind not in REGULAR:
            sentence = f"{shard} holds {name!r} of unknown type {kind!r} at byte {position}: it is refused"
            raise TarError(sentence, position, following)
        _refuse_overrun(shard, repr(name), body_start, size, total)
        yield Member(name, body_start, size)
        position = following


def tail_problem(buffer: Buffer, shard: str, end: int) -> TarError | None:
    """What is wrong with the bytes behind the end mark at byte `end`; None when they are padding.

    A file whose end was never written (an interrupted download into space that was set aside) ends in zeros, and the
    first block of them reads as the end mark. Writers pad with zeros too, but no further than to a whole record.
    """
    total = len(buffer)
    position = end
    while position < total:
        part = buffer[position : min(position + WINDOW, total)]
        zeros = len(part) - len(part.lstrip(b"\0"))
        position += zeros
        if zeros < len(part):
            return _hidden(buffer, shard, end, position // BLOCK * BLOCK)
    tail = total - end
    if tail < 2 * BLOCK + BLOCK or any(total % record == 0 and tail < record + 2 * BLOCK for record in RECORDS):
        return None
    return TarError(
        f"{shard} ends in {tail} bytes of zeros from byte {end} on, more than a tar is padded with: files are missing, "
        f"as after an interrupted download; fetch it again, or if nothing is missing cut it: truncate -s {end + 1024}",
        end,
    )


def _hidden(buffer: Buffer, shard: str, end: int, start: int) -> TarError:
    """The error for bytes other than zeros behind the end mark, the first of them in the block at byte `start`."""
    where = f"after the end mark, which is at byte {end}: no reader sees"
    header = buffer[start : min(start + BLOCK, len(buffer))]
    try:
        _verify_checksum(header.ljust(BLOCK, b"\0"), shard, start)
    except TarError:
        return TarError(f"{shard} has more data {where} it (zeros where files were, or two tars joined?)", start)
    return TarError(f"{shard} has more files {where} them (two tars joined?); take it apart, or write it anew", start)


def next_header(buffer: mmap.mmap | bytes, start: int) -> int | None:
    """The byte of the first sound header from byte `start` on, to go on reading after damage; None without one."""
    magic = buffer.find(b"ustar", start + MAGIC)
    while magic >= 0:
        position = magic - MAGIC
        header = buffer[position : position + BLOCK]
        if position % BLOCK == 0 and len(header) == BLOCK:
            try:
                _verify_checksum(header, "", position)
                return position
            except TarError:
                pass
        magic = buffer.find(b"ustar", magic + 1)
    return None


def _is_metadata(name: str) -> bool:
    """Whether `webdataset` takes the file for metadata: its first path part is `__something__`."""
    first = name.split("/", 1)[0]
    return len(first) >= 4 and first.startswith("__") and first.endswith("__")


def _padded(size: int) -> int:
    return (size + BLOCK - 1) // BLOCK * BLOCK


def _refuse_overrun(shard: str, what: str, start: int, size: int, total: int) -> None:
    if start + size > total:
        sentence = f"{shard} is truncated: it ends at byte {total}, inside {what}, which takes bytes"
        raise TarError(f"{sentence} {start} to {start + size}", total)


def _verify_checksum(header: bytes, shard: str, position: int) -> None:
    """The header's bytes summed, its checksum field counted as blanks; some old tars summed signed bytes."""
    stored = _number(header[148:156], shard, position)
    # adler32 adds bytes up, modulo a number above the sum of 256 of them
    added = (zlib.adler32(header[:256]) & 0xFFFF) + (zlib.adler32(header[256:]) & 0xFFFF) - 2
    unsigned = added - sum(header[148:156]) + 8 * ord(" ")
    if stored == unsigned:
        return
    signed = unsigned - 256 * sum(byte > 127 for byte in header[:148] + header[156:])
    if stored != signed:
        raise TarError(f"{shard} is damaged: the header at byte {position} does not match its checksum", position)


def _number(field: bytes, shard: str, position: int) -> int:
    """A numeric header field: octal digits, or big-endian base 256 when its first bit is set (GNU)."""
    if field[0] & 0x80:
        number = int.from_bytes(field, "big", signed=False) - (0x80 << 8 * (len(field) - 1))
        if field[0] == 0xFF:
            raise TarError(f"{shard} is damaged: a negative number in the header at byte {position}", position)
        return number
    digits = field.split(b"\0", 1)[0].strip()
    if digits.strip(b"01234567"):  # int() would also take a sign, which could send a reader round in circles
        sentence = f"{shard} is damaged or no tar at all: the header at byte {position} has {digits!r} for a number"
        raise TarError(sentence, position)
    return int(digits or b"0", 8)


def _decimal(digits: bytes, shard: str, position: int) -> int:
    if not digits.isdigit() or len(digits) > LONGEST_NUMBER:
        sentence = f"{shard} is damaged: the extended header at byte {position} has {digits[:40]!r} for a size"
        raise TarError(sentence, position)
    return int(digits)


def _name(header: bytes) -> str:
    name = header[:100].split(b"\0", 1)[0]
    if header[MAGIC : MAGIC + 6] == b"ustar\0":  # POSIX; in GNU archives these bytes hold other things
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
    start, end = 0, len(body.rstrip(b"\0"))
    while start < end:
        length, blank, _ = body[start : start + LONGEST_NUMBER + 1].partition(b" ")
        if not blank or not length.isdigit() or not len(length) + 3 < int(length) <= len(body) - start:
            raise TarError(f"{shard} is damaged: the extended header at byte {position} cannot be read", position)
        key, _, value = body[start + len(length) + 1 : start + int(length) - 1].partition(b"=")
        records[key] = value
        start += int(length)
    return records
