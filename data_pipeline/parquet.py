"""Parquet with the pictures inside, read as it lies: a row is a sample, a file is a shard.

    open_dataset("photos")  open_dataset("photos/train-*.parquet")  open_dataset("s3://bucket/photos/train.parquet")

A column of image bytes (binary, or the struct {bytes, path} of Hugging Face data sets) becomes the field "jpg", "png"
or "webp" by what the bytes are, one of sound likewise "flac", "wav" or "ogg", one of captions (text, or a list of
texts) "txt". Every other column that JSON can hold is in the field "json" under its name; columns of other types are
left out. A class label of Hugging Face is told by its name, not by its number. A key is <file>/<row>, rows from 0.

What reading costs: a row can only be had by reading its row group, of the columns named above. The groups used last are
kept, HELD_BYTES of them in each process that reads. A full shuffle of more than that reads about a row group for each
sample: with groups of 100 rows 100 times the bytes, and a file written as one group is read whole for one row. So
set data.block to the rows of a group (or a multiple) and data.window so that a window of blocks is less than
HELD_BYTES: then each loader process reads each group once an epoch.

Design choices:
- A file is known, and a run's data fingerprinted, by the sha256 of its footer and by its size. The footer holds the
  place, the size and (mostly) the smallest and largest value of each column of each group. So it tells contents apart,
  but not pictures that are exchanged for others of the very same sizes, or rows that change places within a group:
  finding these would take reading it all. A file that changes under a run is refused.
- What is damaged inside a group is found by the checksums of pages, where the writer made them, by decompressing, or by
  decoding the picture. Its rows are damaged samples, which the loader replaces and names.
- Everything is read in the calling thread: nothing of Arrow's threads is there for a forked worker to miss.
- At a URL the same, by ranges through the cache and with the patience of remote.py.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import ExitStack, closing, suppress
from fnmatch import fnmatchcase
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

from data_pipeline.errors import DamagedSampleError, DataError, first_line
from data_pipeline.folder import shard_files
from data_pipeline.index import INDEX_FILE, Index, ShardEntry
from data_pipeline.parquet_columns import Columns, check_columns, class_names, find_columns, is_json
from data_pipeline.remote import Cache, RemoteFiles, is_url
from data_pipeline.remote_file import RemotePath, find_remote
from data_pipeline.sample import Sample, trimmed
from data_pipeline.scan import LeftOut
from data_pipeline.strict_json import strict_json

AnyPath = Path | RemotePath
EXTENSIONS = (".parquet", ".pq")
HELD_BYTES = 1 << 30  # of row groups in memory, in each process
HELD_GROUPS = 1024
MOST_OPEN = 64  # files, with their footers
MAGIC = b"PAR1"
OF_A_SPLIT = re.compile(r"(?<![^\W\d_])(train|validation|valid|val|dev|test)(?![^\W\d_])", re.IGNORECASE)  # a word


def is_parquet(path: Path) -> bool:
    """Whether `path` is Parquet: by its name, or a folder of such files with neither tars nor an index of tars."""
    if not path.is_dir():
        return path.suffix.lower() in EXTENSIONS
    return bool(_files_in(path)) and not shard_files(path) and not (path / INDEX_FILE).is_file()


def open_parquet(path: str | Path, cache: Cache) -> tuple[ParquetFiles, Index]:
    """The Parquet files that `path` means (a folder, a file, or a pattern of names; a URL of these) and what they hold.

    Raises FileNotFoundError when there is none, ValueError when pyarrow is not installed, a folder holds several splits
    or files whose rows have equal keys, DataError when a file is damaged, lacks columns or has them of
    a wrong type, or there is no row.
    """
    paths: Sequence[AnyPath]
    if is_url(path):
        paths = _refuse_equal_keys(find_remote(str(path), cache, EXTENSIONS))
    else:
        path = Path(path)
        paths = parquet_paths(path)
    if not paths:
        raise FileNotFoundError(f"no data set at {path}: there is no such Parquet file")
    refuse_several_splits(path, paths)
    files, index = open_files(path, paths)
    if index.samples == 0:
        raise DataError(f"there is no row in the {len(paths)} Parquet files of {path}")
    return files, index


def is_parquet_at(url: str, cache: Cache) -> bool:
    """Whether there is Parquet at a URL: by its name, or a folder of such files with neither tars nor an index."""
    return url.lower().endswith(EXTENSIONS) or bool(find_remote(url, cache, EXTENSIONS))


def open_files(given: str | Path, paths: Sequence[AnyPath]) -> tuple[ParquetFiles, Index]:
    """These files, one or more, and what is in them; `given`: as the user wrote it.

    Raises DataError when a file is damaged, lacks columns or has them of a wrong type.
    """
    load_pyarrow(given)
    entries, first, columns = [], None, Columns(None, None, None)
    for each in paths:
        with closing(_File(each)) as file:
            if first is None:
                first, columns = file, find_columns(file.path, file.schema)
            elif not file.schema.equals(first.schema):
                check_columns(file.path, file.schema, columns, first.path, first.schema)
        modalities = zip(("audio", "image", "text"), (columns.sound, columns.image, columns.caption), strict=True)
        held = tuple(name for name, column in modalities if column is not None)
        left_out = LeftOut(without_image=file.nulls(columns.image), without_caption=file.nulls(columns.caption))
        entries.append(ShardEntry(each.name, file.rows, file.bytes, file.checksum, held, left_out))
    first_path = paths[0]
    base = first_path.absolute().parent if isinstance(first_path, Path) else first_path.files
    return ParquetFiles(given, base, columns), Index(tuple(entries))


class ParquetFiles:
    """The Parquet files of one data set. Picklable; safe to use in forked processes."""

    def __init__(self, folder: str | Path, base: Path | RemoteFiles, columns: Columns) -> None:
        self.folder = folder  # as it was given
        self.base = base  # where the files lie
        self.columns = columns
        self._open: OrderedDict[str, _File] = OrderedDict()  # least recently used first, as are
        self._held: OrderedDict[tuple[str, int], Any] = OrderedDict()  # (file, row group) -> Arrow table
        self._held_bytes = 0
        self._process = os.getpid()

    def key(self, entry: ShardEntry, row: int) -> str:
        """The key of a row of a file."""
        return f"{Path(entry.file).stem}/{row}"

    def groups(self, entry: ShardEntry) -> list[range]:
        """The rows of each row group of a file."""
        return self._file(entry).groups()

    def sample(self, entry: ShardEntry, row: int) -> Sample:
        """A row of a file as a sample.

        Raises DataError when the file is gone or another one, DamagedSampleError when its row group cannot be read.
        """
        file = self._file(entry)
        group, inside = file.locate(row)
        where, key = f"{file.path}, row group {group}, row {row}", self.key(entry, row)
        try:
            table = self._group_at_last(file, group)
            values = {name: table.column(name)[inside].as_py() for name in table.column_names}
        except (file.arrow.ArrowException, OSError, UnicodeDecodeError) as error:
            self._open.pop(entry.file).close()
            self._file(entry)  # a file that is gone, or changed while it was open, says so
            raise DamagedSampleError(key, f"{where} cannot be read: {first_line(error)}") from error
        return Sample(key, self._fields(values, file, f"{where} is damaged", key))

    def close(self) -> None:
        """Close every file and let go of every row group; the next read opens what it needs."""
        while self._open:
            self._open.popitem()[1].close()
        self._held.clear()
        self._held_bytes = 0

    def _fields(self, values: dict[str, Any], file: _File, problem: str, key: str) -> dict[str, bytes]:
        """The fields of a sample from the cells of its row, which are used up."""
        fields = {}
        for column, name_of in ((self.columns.image, _image_field), (self.columns.sound, _sound_field)):
            cell = values.pop(column, None) if column else None
            if isinstance(cell, dict):
                if cell["bytes"] is None and cell.get("path"):
                    raise DamagedSampleError(key, f"{problem}: its {column!r} is the path {cell['path']!r}, not bytes")
                cell = cell["bytes"]
            if cell is not None:
                fields[name_of(cell)] = cell
        caption = self.columns.caption
        captions = _captions(values.pop(caption, None)) if caption else []
        if captions:
            fields["txt"] = captions[0].encode()
        for column, names in file.class_names.items():
            number = values.get(column)
            if isinstance(number, int) and 0 <= number < len(names):
                values[column] = names[number]
        metadata = _object({name: cell for name, cell in values.items() if cell is not None})
        if caption:
            metadata.pop("captions", None)  # of another column: it would stand in the way of those chosen
            metadata |= {"captions": captions} if len(captions) > 1 else {}
        if metadata:
            fields["json"] = _json(metadata)
        return fields

    def _file(self, entry: ShardEntry) -> _File:
        """The open file, found to be the one that was indexed."""
        if self._process != os.getpid():  # a forked process uses no descriptor of its parent
            self._process = os.getpid()
            self._open = OrderedDict()
        if entry.file in self._open:
            self._open.move_to_end(entry.file)
            return self._open[entry.file]
        file = _File(self._path(entry.file))
        if (file.bytes, file.checksum) != (entry.bytes, entry.checksum):
            file.close()
            raise DataError(
                f"{file.path} changed while it was in use: it had {entry.bytes} bytes and {entry.samples} rows, "
                f"and is now another file of {file.bytes} bytes and {file.rows} rows"
            )
        file.select(self.columns)
        if len(self._open) >= MOST_OPEN:
            self._open.popitem(last=False)[1].close()
        self._open[entry.file] = file
        return file

    def _path(self, file: str) -> AnyPath:
        return self.base / file if isinstance(self.base, Path) else RemotePath(self.base, file)

    def _group_at_last(self, file: _File, group: int) -> Any:
        """The same as `_group`, tried again at a URL: the bytes may have been damaged on their way here."""
        try:
            return self._group(file, group)
        except (file.arrow.ArrowException, OSError):
            if not isinstance(file.path, RemotePath):
                raise
            file.path.forget()
            return self._group(file, group)

    def _group(self, file: _File, group: int) -> Any:
        """The wanted columns of a row group; it is kept, and those used longest ago are dropped above the bounds."""
        place = (file.path.name, group)
        if place in self._held:
            self._held.move_to_end(place)
            return self._held[place]
        table = file.read(group)
        self._held[place] = table
        self._held_bytes += table.nbytes
        while len(self._held) > 1 and (self._held_bytes > HELD_BYTES or len(self._held) > HELD_GROUPS):
            self._held_bytes -= self._held.popitem(last=False)[1].nbytes
        return table

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "base": self.base, "columns": self.columns}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]  # state is the constructor's arguments


class _File:
    """One Parquet file, open. DataError when it is missing, damaged or no Parquet file."""

    def __init__(self, path: AnyPath) -> None:
        self.path = path
        self.arrow, parquet = load_pyarrow(path)
        self._columns: list[str] = []
        with ExitStack() as unless_whole:
            try:
                self.bytes, self.checksum = _size_and_checksum(path)
                here = isinstance(path, Path)
                opened = self.arrow.OSFile(str(path)) if here else self.arrow.PythonFile(path.open(), mode="r")
                self._source = unless_whole.enter_context(opened)
                # by Arrow's defaults, threads would fetch columns in advance
                self._reader = parquet.ParquetFile(self._source, pre_buffer=False, page_checksum_verification=True)
                self.schema = self._reader.schema_arrow
                metadata = self._reader.metadata
                sizes = (metadata.row_group(number).num_rows for number in range(metadata.num_row_groups))
                self._first = [0, *accumulate(sizes)]  # row that each group starts at
            except FileNotFoundError as error:
                raise DataError(f"{path} is missing: there is no such file") from error
            except (self.arrow.ArrowException, OSError) as error:
                raise DataError(f"{path} cannot be read as Parquet: {first_line(error)}") from error
            twice = next((name for name in self.schema.names if self.schema.names.count(name) > 1), None)
            if twice is not None:
                raise DataError(f"{path} has the column {twice!r} twice: give it columns of different names")
            self.class_names = class_names(self.schema.metadata)
            unless_whole.pop_all()  # it stays open

    @property
    def rows(self) -> int:
        """Rows in all row groups."""
        return self._first[-1]

    def groups(self) -> list[range]:
        """The rows of each row group."""
        return [range(start, stop) for start, stop in pairwise(self._first)]

    def locate(self, row: int) -> tuple[int, int]:
        """(row group, row within it) of a row."""
        group = bisect_right(self._first, row) - 1
        return group, row - self._first[group]

    def nulls(self, column: str | None) -> int:
        """Rows that hold nothing in a column, as far as the footer tells: of lists and blank texts it does not."""
        if column is None or str(self.schema.field(column).type) == "null":
            return self.rows
        metadata = self._reader.metadata
        places = {metadata.schema.column(number).path: number for number in range(metadata.num_columns)}
        place = places.get(column, places.get(f"{column}.bytes"))
        if place is None:
            return 0
        groups = (metadata.row_group(number).column(place).statistics for number in range(metadata.num_row_groups))
        return sum(told.null_count for told in groups if told is not None and told.has_null_count)

    def select(self, columns: Columns) -> None:
        """Read these columns, and all others that JSON can hold."""
        self._columns = []
        for field in self.schema:
            if field.name in columns or is_json(field.type):
                self._columns.append(field.name)

    def read(self, group: int) -> Any:
        """The selected columns of a row group, as an Arrow table."""
        return self._reader.read_row_group(group, columns=self._columns, use_threads=False)

    def close(self) -> None:
        """Let go of the file."""
        self._source.close()


# --- which files


def parquet_paths(path: Path) -> list[Path]:
    """The files that `path` means, in order of name. ValueError for two files of one key."""
    paths: list[Path]
    if path.is_dir():
        paths = _files_in(path)
    elif path.is_file():  # whatever its name has in it
        paths = [path]
    elif any(letter in path.name for letter in "*?["):
        paths = sorted(each for each in path.parent.glob(path.name) if each.suffix.lower() in EXTENSIONS)
    else:
        paths = []
    _refuse_equal_keys(paths)
    return paths


def _refuse_equal_keys(paths: Sequence[AnyPath]) -> Sequence[AnyPath]:
    """The same paths; ValueError when two of them differ in their extension only."""
    by_stem: dict[str, AnyPath] = {}
    for each in paths:
        other = by_stem.setdefault(each.stem, each)
        if other is not each:
            raise ValueError(
                f"{other} and {each.name} beside it differ in their extension only, so that their rows would have the "
                "same keys: rename one, or give the one that is meant"
            )
    return paths


def refuse_several_splits(folder: str | Path, paths: Sequence[AnyPath]) -> None:
    """ValueError, with a pattern for one of them, when the names of files tell of more than one split."""
    if not _is_folder(folder):
        return
    splits: dict[str, list[AnyPath]] = {}
    for each in paths:
        words = OF_A_SPLIT.findall(each.stem)
        if words:
            splits.setdefault("-".join(words).lower(), []).append(each)
    if len(splits) < 2:
        return
    patterns = {}
    for split in sorted(splits, key=lambda split: "train" not in split.split("-")):
        first = splits[split][0]
        words = OF_A_SPLIT.findall(first.stem)
        start = "" if all(each.name.startswith(words[0]) for each in splits[split]) else "*"
        patterns[split] = f"{start}{'*'.join(words)}*{first.suffix}"
    for split, pattern in patterns.items():
        if [each for each in paths if fnmatchcase(each.name, pattern)] == splits[split]:
            break
    else:  # none of them picks the files of one split only
        pattern = splits[next(iter(patterns))][0].name
    given = str(folder).rstrip("/")
    raise ValueError(f"{folder} holds files of several splits ({', '.join(splits)}): give one, as {given}/{pattern}")


def _is_folder(given: str | Path) -> bool:
    """Whether what was given is a folder, and not a file or a pattern."""
    return given.is_dir() if isinstance(given, Path) else not given.lower().endswith(EXTENSIONS)


def _files_in(folder: Path) -> list[Path]:
    return sorted(each for each in folder.iterdir() if each.suffix.lower() in EXTENSIONS and each.name[0] not in "._")


def _size_and_checksum(path: AnyPath) -> tuple[int, str]:
    """(bytes of the file, "sha256:<hex>" of its footer); DataError when it does not end as Parquet does."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 8))
        end = file.read()
        length = int.from_bytes(end[:4], "little")
        if end[4:] != MAGIC or length + 12 > size:
            raise DataError(f"{path} is truncated, or no Parquet file: its {size} bytes do not end in a whole footer")
        file.seek(size - 8 - length)
        return size, "sha256:" + hashlib.sha256(file.read(length)).hexdigest()


# --- from cells to fields


def _image_field(data: bytes) -> str:
    """What an image is, by its first bytes; what is none is left to the decoder to refuse."""
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return "png"
    return "webp" if data[:4] == b"RIFF" and data[8:12] == b"WEBP" else "jpg"


def _sound_field(data: bytes) -> str:
    """What a sound is, by its first bytes; what is neither is left to the decoder to refuse."""
    return {b"fLaC": "flac", b"OggS": "ogg"}.get(data[:4], "wav")


def _captions(cell: Any) -> list[str]:
    """The captions in a cell, without those of white space."""
    texts = cell if isinstance(cell, list) else [cell]
    return [trimmed(text) for text in texts if isinstance(text, str) and trimmed(text)]


def _object(values: dict[str, Any]) -> dict[str, Any]:
    """The cells by name; those of a column "json" that holds an object, as a struct or as text, beside the others."""
    whole = values.get("json")
    if isinstance(whole, str):
        with suppress(ValueError, RecursionError):
            whole = json.loads(whole)
    return {**whole, **{name: values[name] for name in values if name != "json"}} if isinstance(whole, dict) else values


def _json(tree: dict[str, Any]) -> bytes:
    """A tree as JSON, which has no NaN and no infinity: null stands for them."""
    text = strict_json(tree, ensure_ascii=False)
    return text.encode("utf-8", "backslashreplace")  # half a character stays the escape that it was


def load_pyarrow(path: object) -> tuple[Any, Any]:
    """pyarrow and its module for Parquet; ValueError that says how to get them, for reading `path`."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ValueError(
            f"reading {path} needs pyarrow, which is not installed: pip install 'weft[parquet]'"
        ) from error
    return pyarrow, parquet
