"""Images and captions from the web, as img2dataset has downloaded them.

Source, its output folder, in either of two formats:
  files      00000/000000000.jpg (or .png, .webp), .txt and .json of each image, and 00000.parquet about all of them
  parquet    00000.parquet with the bytes in a column "jpg" (or "png", "webp")
Both have the columns key, status, error_message, url and, with captions, caption. Its third format, webdataset, is what
a shard is already: it needs no import, and this says so.
Format: https://github.com/rom1504/img2dataset, "Output format choice".

Design choices:
- What could not be downloaded is told with its reason, summed up as img2dataset's own statistics do: the row is there.
- The id of a sample is its URL: keys are numbers of one download.
- There is no published split; it is by caption.
- Checksums of Parquet pages are verified: a damaged row group ends the import, unless it is images that are damaged.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Unpack

from data_pipeline.errors import DataError, first_line
from data_pipeline.importers.gather import Gathered, Options, run_import
from data_pipeline.importers.split import Imported
from data_pipeline.importers.table import NOT_UTF8, Cell, read_place
from data_pipeline.parquet import load_pyarrow

TOLD = ("status", "error_message", "url")
CAPTIONS = ("caption", "txt")
ENCODED = ("jpg", "png", "webp")  # columns of bytes, and extensions of files


def import_img2dataset(source: Path, out: Path, **options: Unpack[Options]) -> Imported:
    """Write the downloaded images of `source` that have captions into out/train and out/test.

    `options` and errors: see `gather.Options` and `gather.run_import`; ValueError also when pyarrow is not installed or
    `source` holds tars.
    """
    return run_import("img2dataset", source, out, options, gather_img2dataset, read_place)


def gather_img2dataset(source: Path, found: Gathered) -> None:
    """Every downloaded image with a caption."""
    found.source = source.absolute().name
    if source.is_dir() and any(source.glob("*.tar")):
        raise ValueError(f"{source} holds shards already: they need no import, see `weft data check {source}`")
    tables = [source] if source.is_file() else sorted(source.glob("*.parquet"))
    if not tables:
        raise FileNotFoundError(
            f"no *.parquet in {source}: give the folder that img2dataset wrote, as files or parquet"
        )
    folder = source.parent if source.is_file() else source
    for table in tables:
        for row in _rows(table):
            _take(row, table, folder if found.media is None else found.media, found)
    shards = {table.stem for table in tables}
    for unfinished in sorted(path for path in folder.iterdir() if path.is_dir() and path.name.isdigit()):
        if unfinished.name not in shards and source.is_dir():
            found.skip(unfinished.name, "has no .parquet beside it: its download was not finished")


def _take(row: dict[str, Any], table: Path, folder: Path, found: Gathered) -> None:
    """One row: an image, or what was not downloaded, or has no caption."""
    name = f"{table.stem}/{row['key']}"
    status = row["status"]
    if status not in (None, "success"):
        error = row["error_message"]
        found.skip(name, f"{status}: {error}" if error else str(status))
        return
    place: Path | Cell | None = row["place"]
    if place is None:
        there = (f"{name}.{extension}" for extension in ENCODED if os.path.isfile(folder / f"{name}.{extension}"))
        written = next(there, f"{name}.{ENCODED[0]}")
        place = found.file(written, folder)
    if place is not None:
        caption, url = row["caption"], row["url"]
        told = url if isinstance(url, str) else name
        found.add(name, place, caption if isinstance(caption, list) else [caption], id=told)


def _rows(table: Path) -> Iterator[dict[str, Any]]:
    """The rows of one shard; "place" is the cell of the image, or None where it is in a file."""
    arrow, parquet = load_pyarrow(table)
    where = str(table)
    try:
        file = parquet.ParquetFile(table, page_checksum_verification=True)
        columns = list(file.schema_arrow.names)
        missing = [column for column in ("key", "status", "url") if column not in columns]
        if missing:
            raise DataError(f"{table} lacks {', '.join(map(repr, missing))}: img2dataset did not write it")
        told = [column for column in TOLD if column in columns]
        captions = next((column for column in CAPTIONS if column in columns), None)
        image = next((column for column in ENCODED if column in columns), None)
        wanted = ["key", *told, *([captions] if captions else [])]
        for group in range(file.num_row_groups):
            where = f"row group {group} of {table}"
            rows = _records(file.read_row_group(group, wanted, use_threads=False))
            for number, row in enumerate(rows):
                if row is None:
                    untold = dict.fromkeys((*TOLD, "caption", "place"))
                    yield {**untold, "key": f"row group {group}, row {number}", "status": NOT_UTF8}
                    continue
                yield {
                    "key": row["key"],
                    **{column: row.get(column) for column in TOLD},
                    "caption": row[captions] if captions else None,
                    "place": Cell(table.absolute(), image, group, number) if image else None,
                }
    except (arrow.ArrowException, OSError) as error:
        raise DataError(f"{where} is damaged: {first_line(error)}") from error


def _records(rows: Any) -> list[dict[str, Any] | None]:
    """The rows of an Arrow table; None for one that holds text which is not UTF-8."""
    try:
        return list(rows.to_pylist())
    except UnicodeDecodeError:
        if rows.num_rows == 1:
            return [None]
        half = rows.num_rows // 2
        return _records(rows.slice(0, half)) + _records(rows.slice(half))
