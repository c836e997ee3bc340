"""A table of images and captions: CSV, TSV or Parquet, one row a caption.

Design choices:
- Columns are found by their usual names, unless they are given.
- An image is a path relative to the table, or the bytes themselves: Parquet binary, or the {bytes, path} that Hugging
  Face data sets are written with. A URL is skipped: what is fetched while it is imported is another data set each time.
- A path must lie in the table's folder (`gather.locate`).
- Rows with the same image are one sample with several captions.
- "nan", "None" or "['a', 'b']" is no caption; a value of several lines that hold rows is a quote gone astray.
- A row with more cells than there are columns is skipped: a caption with a comma and no quotes around it has been cut.
- Parquet is read a row group at a time: captions first, image bytes when they are written. Checksums of its pages are
  verified. A row group whose captions are damaged ends the import; one whose images are costs the samples in it.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from data_pipeline.errors import DataError, first_line
from data_pipeline.importers.annotations import LONGEST_VALUE, csv_reason, refuse_twice, swallowed_row
from data_pipeline.importers.captions import NO_CAPTION, usable
from data_pipeline.importers.gather import NO_FILE, locate, part_named
from data_pipeline.importers.image import image_field
from data_pipeline.importers.leftovers import unnamed
from data_pipeline.importers.split import (
    TEST_SHARE,
    Candidate,
    Imported,
    Provenance,
    Request,
    refuse_existing,
    write_split,
)
from data_pipeline.parquet import load_pyarrow
from data_pipeline.parquet_columns import TEXT
from data_pipeline.sample import Skipped
from data_pipeline.shards import Progress

CSV_EXTENSIONS, PARQUET_EXTENSIONS = (".csv", ".tsv", ".txt"), (".parquet", ".pq")
DELIMITERS = ",\t;|"
IMAGE_COLUMNS = (
    *("image", "image_path", "imagepath", "image_file", "image_name", "filepath", "file_path", "path", "filename"),
    *("file_name", "file", "img", "img_path", "picture", "photo", "jpg", "png", "webp", "image_url", "url"),
)
CAPTION_COLUMNS = (
    *("caption", "captions", "text", "texts", "title", "description", "sentence", "sentences", "comment", "alt"),
    *("alt_text", "txt", "prompt", "label"),
)
BYTES = ("binary", "large_binary", "binary_view")  # types by Arrow's names
NO_IMAGE = "has no image"
NO_QUOTES = "write a quote in a text twice, or give --no-quotes where quotes are only letters"
NOT_UTF8 = "holds text that is not UTF-8"


def import_table(
    source: Path,
    out: Path,
    *,
    image_column: str | None = None,
    caption_column: str | None = None,
    quotes: bool = True,
    licence: str | None = None,
    test_share: float = TEST_SHARE,
    seed: int = 0,
    processes: int | None = None,
    on: str | None = None,
    progress: Progress | None = None,
) -> Imported:
    """Write the rows of the table `source` into out/train and out/test; `licence` is noted with each sample.

    `quotes`: False reads a quote in a CSV or TSV as a letter like others.
    Raises FileNotFoundError when there is no such table, ValueError when it is of no known kind, has no such columns,
    needs pyarrow which is not installed, or `out` holds a data set; DataError when the table is damaged or no row can
    be used.
    """
    columns = {"image_column": image_column, "caption_column": caption_column}
    if not quotes:
        columns["quotes"] = "none"
    request = Request.of("table", source, **columns, licence=licence, test_share=test_share, seed=seed)
    refuse_existing(out, request)
    if not source.is_file():
        raise FileNotFoundError(f"there is no table {source}: give a CSV, TSV or Parquet file")
    extension = source.suffix.lower()
    if extension in PARQUET_EXTENSIONS:
        if not quotes:
            raise ValueError(f"{source} is Parquet, which has no quotes: leave --no-quotes out")
        rows = parquet_rows(source, image_column, caption_column)
    elif extension in CSV_EXTENSIONS:
        rows = csv_rows(source, image_column, caption_column, quotes=quotes)
    else:
        known = ", ".join(CSV_EXTENSIONS + PARQUET_EXTENSIONS)
        raise ValueError(f"{source} is no table by its name: give one that ends in {known}")
    candidates, skipped, named = _gather(rows, source, licence)
    return write_split(
        out,
        candidates,
        read_place,
        skipped=skipped,
        notes=_note_unnamed(named, source),
        test_share=test_share,
        seed=seed,
        request=request,
        processes=processes,
        on=on,
        reads=[source],
        progress=progress,
    )


class Cell(NamedTuple):
    """Where image bytes lie in a Parquet file; `row` counts in its row group."""

    table: Path
    column: str
    group: int
    row: int


class Row(NamedTuple):
    """One row: how to name it, its image (a path as it was written, bytes in the table, or none), its captions.

    `reason`: why the row itself cannot be used, where that is so; `problem`: why it has no caption. `part`: its set.
    """

    name: str
    image: str | Cell | None = None
    captions: tuple[str, ...] = ()
    reason: str = ""
    problem: str = ""
    part: str | None = None


def read_place(candidate: Candidate) -> dict[str, bytes]:
    """The image of a candidate, from its file or its cell."""
    place: Path | Cell = candidate.place
    if isinstance(place, Path):
        return image_field(place.read_bytes())
    return image_field(read_cell(place))


def find_column(columns: list[str], wanted: str | None, usual: tuple[str, ...], what: str, table: Path) -> str:
    """The column `wanted`, or the first of the `usual` names that is there, in any case.

    Raises ValueError that lists the columns there are.
    """
    there_are = f"{table} has the columns {', '.join(map(repr, columns)) or 'of an empty file'}"
    if wanted is not None:
        if wanted not in columns:
            raise ValueError(f"{there_are}, and no {what} column {wanted!r}")
        return wanted
    found = column_among(columns, usual)
    if found is not None:
        return found
    raise ValueError(f"{there_are}, and none is called as {what} columns are ({', '.join(usual[:4])}, ...): name it")


def column_among(columns: list[str], usual: tuple[str, ...]) -> str | None:
    """The first of the `usual` names that there is a column of; None when there is none.

    In any case of letters, but of "Caption" and "caption" the one that is written as usual.
    """
    by_name = {column.strip().lower(): column for column in reversed(columns)}
    by_name |= {column: column for column in columns if column in usual}
    return next((by_name[name] for name in usual if name in by_name), None)


def _gather(rows: Iterator[Row], source: Path, licence: str | None) -> tuple[list[Candidate], list[Skipped], set[Path]]:
    """(candidates in order of first appearance, captions of one file together; the rows left out; the files named)."""
    named: set[Path] = set()
    places: dict[Path | Cell, tuple[str, Path | Cell, list[str]]] = {}
    skipped = []
    for row in rows:
        reason = row.reason
        place: Path | Cell | None = None
        if reason:
            pass
        elif not row.image:
            reason = NO_IMAGE
        elif isinstance(row.image, Cell):
            place = row.image
        else:
            place, reason = locate(row.image, source.parent)
            if place is not None and not os.path.isfile(place):
                reason = NO_FILE.format("image")
            elif place is not None:
                named.add(place)
        if place is not None and not reason and not row.captions:
            reason = row.problem or NO_CAPTION
        if reason or place is None:
            skipped.append(Skipped(row.name, reason))
            continue
        name = row.name if isinstance(place, Cell) else os.path.relpath(place, source.parent)
        places.setdefault(place, (name, place, []))[2].extend(row.captions)
    if not places:
        why = f"; the first, {skipped[0].source}: {skipped[0].reason}" if skipped else ""
        raise DataError(f"no row of {source} can be used, of {len(skipped)}{why}")
    candidates = [
        Candidate(name, tuple(dict.fromkeys(captions)), place, provenance=Provenance(source.name, licence, name))
        for name, place, captions in places.values()
    ]
    return candidates, skipped, named


def _note_unnamed(named: set[Path], source: Path) -> list[str]:
    """What to say of images that lie beside those that the table names: there may be another table for them."""
    others = unnamed(named, source.parent)
    if not others:
        return []
    return [
        f"{source.name} does not name {len(others)} of the images beside those it names, such as {others[0].source}"
    ]


def csv_columns(table: Path) -> list[str]:
    """The columns of a CSV or TSV by its first line; DataError when it is not UTF-8 or two of them have one name."""
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            header = file.readline(LONGEST_VALUE)
            delimiter = _delimiter(header)
            blanks = _blanks_behind(delimiter, header)
            columns = next(csv.reader([header], delimiter=delimiter, skipinitialspace=blanks), [])
    except UnicodeDecodeError as error:
        raise DataError(f"{table} is not UTF-8 ({error}): save it as UTF-8") from error
    except csv.Error as error:
        raise DataError(f"{table} is damaged in line 1: {csv_reason(error)}") from error
    refuse_twice(columns, table)
    return columns


def csv_rows(
    table: Path,
    image_column: str | None,
    caption_column: str | None,
    *,
    split: str | None = None,
    quotes: bool = True,
    known: Callable[[str], bool] | None = None,
) -> Iterator[Row]:
    """The rows of a CSV, whatever of DELIMITERS its header is divided by.

    `split`: a column that says which set a row is of. `quotes`: False reads a quote as a letter like others. `known`:
    whether something is the name of an image; default: of a file beside the table.
    """
    known = known or (lambda name: os.path.isfile(table.parent / name))
    csv.field_size_limit(LONGEST_VALUE)
    number, line = 0, 1  # of the last row, and where the next one begins
    quoting: Any = csv.QUOTE_MINIMAL if quotes else csv.QUOTE_NONE
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            header = file.readline()
            delimiter = _delimiter(header)
            file.seek(0)
            blanks = quotes and _blanks_behind(delimiter, header)
            reader = csv.reader(file, delimiter=delimiter, quoting=quoting, skipinitialspace=blanks, strict=True)
            columns = next(reader, [])
            if not columns:
                raise DataError(f"{table} is empty, or its first line is: it must begin with the names of its columns")
            refuse_twice(columns, table)
            image = find_column(columns, image_column, IMAGE_COLUMNS, "image", table)
            caption = find_column(columns, caption_column, CAPTION_COLUMNS, "caption", table)
            line = reader.line_num + 1
            for cells in reader:
                began, line = line, reader.line_num + 1
                if not cells:
                    continue
                number += 1
                row = dict(zip(columns, cells, strict=False))  # cells may be missing at the end
                path = row.get(image, "").strip()
                swallowed = swallowed_row(cells, delimiter, len(columns), path, known) if line > began + 1 else ""
                if swallowed:
                    raise DataError(
                        f"{table} line {began}: a quote that opens there closes in line {line - 1}, with rows between "
                        f"({swallowed[:60]!r}): {NO_QUOTES}"
                    )
                if any(map(str.strip, cells[len(columns) :])):
                    too_many = f"has {len(cells)} cells, where the table has {len(columns)} columns"
                    behind = any(cell.startswith(' "') for cell in cells)
                    way_out = "take the blanks before its quotes away" if behind else "quote its texts"
                    yield Row(f"row {number}", reason=f"{too_many}: {way_out}")
                    continue
                captions, problem = usable(row.get(caption))
                part = row.get(split) if split else None
                yield Row(path or f"row {number}", path, captions, problem=problem, part=part_named(part))
    except UnicodeDecodeError as error:
        raise DataError(f"{table} is not UTF-8 ({error}): save it as UTF-8") from error
    except csv.Error as error:
        reason = csv_reason(error)
        way_out = f"; {NO_QUOTES}" if "quote" in reason else ""
        raise DataError(f"{table} is damaged in the row that begins in line {line}: {reason}{way_out}") from error


def _blanks_behind(delimiter: str, header: str) -> bool:
    """Whether a blank stands after each delimiter, which belongs to no cell: quotes stand behind it."""
    return f"{delimiter} " in header


def _delimiter(header: str) -> str:
    """What divides the columns of a table, by its first line."""
    return max(DELIMITERS, key=lambda delimiter: len(next(csv.reader([header], delimiter=delimiter), [])))


def parquet_columns(table: Path) -> list[str]:
    """The columns of a Parquet file; DataError when it is damaged or two of them have one name."""
    arrow, parquet = load_pyarrow(table)
    try:
        columns = list(parquet.ParquetFile(table).schema_arrow.names)
    except (arrow.ArrowException, OSError) as error:
        raise DataError(f"{table} is damaged: {first_line(error)}") from error
    refuse_twice(columns, table)
    return columns


def parquet_rows(table: Path, image_column: str | None, caption_column: str | None) -> Iterator[Row]:
    """The rows of a Parquet file; a column of image bytes is not read for it."""
    columns = parquet_columns(table)
    image = find_column(columns, image_column, IMAGE_COLUMNS, "image", table)
    caption = find_column(columns, caption_column, CAPTION_COLUMNS, "caption", table)
    arrow, parquet = load_pyarrow(table)
    where = str(table)
    try:
        file = parquet.ParquetFile(table, page_checksum_verification=True)
        has_bytes = _holds_bytes(file.schema_arrow.field(image).type, image, table)
        number = 0
        for group in range(file.num_row_groups):
            where = f"row group {group} of {table}"
            captions = file.read_row_group(group, [caption], use_threads=False).column(0)
            paths = None if has_bytes else file.read_row_group(group, [image], use_threads=False).column(0)
            for row in range(len(captions)):
                number += 1
                try:
                    path = paths[row].as_py() if paths is not None else None
                    texts, problem = usable(captions[row].as_py())
                except UnicodeDecodeError:
                    yield Row(f"row {number}", reason=NOT_UTF8)
                    continue
                source = Cell(table.absolute(), image, group, row) if has_bytes else path
                yield Row(path or f"row {number}", source, texts, problem=problem)
    except (arrow.ArrowException, OSError) as error:
        raise DataError(f"{where} is damaged: {first_line(error)}") from error


def _holds_bytes(kind: Any, column: str, table: Path) -> bool:
    """Whether an Arrow type is that of images and not of their paths; ValueError when it is neither."""
    kind = kind.value_type if hasattr(kind, "index_type") else kind  # of a dictionary
    if hasattr(kind, "get_field_index") and kind.get_field_index("bytes") >= 0:
        return True
    if str(kind) in BYTES:
        return True
    if str(kind) in TEXT:
        return False
    raise ValueError(
        f"the image column {column!r} of {table} holds {kind}: it must hold paths, bytes or {{bytes, path}}"
    )


def read_cell(cell: Cell) -> bytes:
    """The image bytes in a cell, or in the file that it names instead; DataError when there are none, or damaged."""
    column = _column_of_group(cell.table, cell.column, cell.group)
    if isinstance(column, DataError):
        raise column
    try:
        value = column[cell.row].as_py()
    except UnicodeDecodeError as error:  # the path beside the bytes
        raise DataError(NOT_UTF8) from error
    path = None
    if isinstance(value, dict):
        value, path = value["bytes"], value.get("path")
    if value:
        return bytes(value)
    if not path:
        raise DataError(NO_IMAGE)
    file, reason = locate(path, cell.table.parent)
    if file is None:
        raise DataError(reason)
    return file.read_bytes()


@lru_cache(maxsize=1)
def _column_of_group(table: Path, column: str, group: int) -> Any:
    """One column of one row group: samples are written in order, so the last one is most likely the next one.

    A damaged one is a DataError that is returned, and so kept: it is not read again for each of its rows.
    """
    arrow, parquet = load_pyarrow(table)
    try:
        file = parquet.ParquetFile(table, page_checksum_verification=True)
        return file.read_row_group(group, [column], use_threads=False).column(0)
    except (arrow.ArrowException, OSError) as error:
        return DataError(f"row group {group} of {table.name} is damaged: {first_line(error)}")
