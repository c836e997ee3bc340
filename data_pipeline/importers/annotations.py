"""Annotation files as data sets publish them: JSON, one JSON object a line, CSV and TSV.

Whatever is wrong with one is a DataError of one sentence that names the file and, where it is known, the place in it.
What is wrong with one row alone is a BadRowError, or is handed to a `skip`: it costs that row.
An annotation file comes from somebody else: no value is used before its type is known (`need`).
"""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from data_pipeline.errors import DataError
from data_pipeline.importers.leftovers import IMAGE_NAMES, OTHER_IMAGES, SOUND_NAMES, extension_of
from data_pipeline.sample import trimmed

Value = TypeVar("Value")
Skip = Callable[[str, str], None]  # told of a row that is left out: (where it stands, why)

LONGEST_VALUE = 1 << 24  # characters of one value in a CSV; the csv module's own limit is 131072
LONGEST_MEMBER = 1 << 26  # characters of one member of a JSON object that is read bit by bit
FILES = frozenset((*IMAGE_NAMES, *OTHER_IMAGES, *SOUND_NAMES))  # extensions
SWALLOWED = (
    "a quote closes there that was opened rows before, with a row inside it ({!r}): write a quote in a text twice"
)
CHUNK = 1 << 20  # characters read at once


class BadRowError(DataError):
    """One row, or one object of a list, that cannot be used: `where` it stands, and the `reason`."""

    def __init__(self, where: str, reason: str) -> None:
        super().__init__(where, reason)
        self.where = where
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


def lines_of(text: str) -> list[str]:
    r"""The lines of a text, which end at \n, \r\n and \r alone.

    `str.splitlines` also breaks at U+2028, U+0085, VT and FF, which stand within captions and JSON texts.
    """
    return re.split(r"\r\n|\n|\r", text)


def read_lines(path: Path) -> list[str]:
    """The lines of a text file; DataError when it is not UTF-8."""
    with _told(path):
        return lines_of(path.read_text(encoding="utf-8-sig"))


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds."""
    with _told(path):
        tree = json.loads(path.read_text(encoding="utf-8-sig"))
    if not isinstance(tree, dict):
        raise DataError(f"{path} holds {_name(tree)} where an object should be")
    return tree


def json_lines(path: Path, skip: Skip | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where it stands, object) of each line of a JSON-lines file; blank lines aside.

    A line that is no object is told to `skip`, or is a BadRowError where there is none.
    """
    skip = skip or _raise
    number = 0
    with path.open(encoding="utf-8-sig") as file:
        while True:
            number += 1
            where = f"{path} line {number}"
            with _told(where):
                line = file.readline()
            if not line:
                return
            if not line.strip():
                continue
            try:
                tree = json.loads(line.rstrip("\r\n"), object_pairs_hook=unique_names)
            except (ValueError, RecursionError) as error:
                skip(where, f"is not JSON, damaged or cut short ({json_reason(error)})")
                continue
            if isinstance(tree, dict):
                yield where, tree
            else:
                skip(where, f"holds {_name(tree)} where an object should be")


def json_members(path: Path) -> Iterator[tuple[str, Any]]:
    """(name, value) of each member of the object in a JSON file, one at a time: the file may be larger than memory."""
    decoder = json.JSONDecoder()
    with path.open(encoding="utf-8-sig") as file, _told(path):
        buffer, place = "", 0
        opened = False
        while True:
            chunk = file.read(CHUNK)
            buffer, place = buffer[place:] + chunk, 0
            if not opened:
                buffer = buffer.lstrip()
                if buffer and buffer[0] != "{":
                    raise DataError(f"{path} does not begin with {{, as a JSON object does")
                opened, place = bool(buffer), 1
            while True:
                member = _member(decoder, buffer, place)
                if member is None:
                    break
                name, value, place = member
                if name is None:
                    return
                yield name, value
            if not chunk or len(buffer) - place > LONGEST_MEMBER:
                raise DataError(f"{path} is damaged or cut short: no JSON object goes on with {buffer[place:][:40]!r}")


def rows(
    path: Path,
    columns: Sequence[str],
    skip: Skip | None = None,
    *,
    delimiter: str = ",",
    quoted: bool = True,
    encoding: str = "utf-8-sig",
) -> Iterator[tuple[str, dict[str, str]]]:
    """(where it stands, row by column) of a CSV with a header that has all of `columns`; missing cells are "".

    A row that has more cells than there are columns is told to `skip`, or is a BadRowError where there is none: a value
    has been cut. Blank ones at its end may be.
    """
    skip = skip or _raise
    csv.field_size_limit(LONGEST_VALUE)
    number = 1
    with path.open(newline="", encoding=encoding) as file:
        reader = csv.DictReader(
            file,
            delimiter=delimiter,
            quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE,
            skipinitialspace=quoted,
            restval="",
            strict=True,
        )
        with _told(path):
            there = list(reader.fieldnames or ())
        refuse_twice(there, path)
        missing = [column for column in columns if column not in there]
        if missing:
            has = ", ".join(map(repr, there)) or "of an empty file"
            raise DataError(f"{path} has the columns {has}, and lacks {', '.join(map(repr, missing))}")
        while True:
            with _told(f"{path} after line {number}"):
                row = next(reader, None)
            if row is None:
                return
            number = reader.line_num
            more: Any = row.pop(None, ())  # type: ignore[call-overload]  # where DictReader puts what is too many
            if any(cell.strip() for cell in more):
                cells = f"{len(there) + len(more)} cells, where the header has {len(there)}"
                skip(f"{path} line {number}", f"has {cells}: a value with {delimiter!r} in it has been cut")
                continue
            swallowed = swallowed_row(list(row.values()), delimiter, len(there), row[columns[0]]) if quoted else ""
            if swallowed:
                raise DataError(f"{path} line {number}: {SWALLOWED.format(swallowed[:60])}")
            yield f"{path} line {number}", row


def refuse_twice(columns: Sequence[str], path: Path) -> None:
    """DataError when two columns of a table have one name: it is not clear which is meant."""
    named = Counter(column.strip() for column in columns if column.strip())
    twice = next((column for column, number in named.items() if number > 1), None)
    if twice is not None:
        raise DataError(f"{path} has {named[twice]} columns called {twice!r}: give them different names")


def swallowed_row(
    cells: Sequence[str],
    delimiter: str,
    columns: int,
    alike: str = "",
    known: Callable[[str], bool] = lambda name: False,
) -> str:
    """The first line within a value that looks like a row of the table; "" when none does.

    A quote that opens in one row and closes in another makes one value of all between. Looks like a row: has as many
    cells as there are `columns`, and one that names a file: with the extension of `alike`, a name in this row; with
    that of another image or sound, and no blank in it, as prose has; or the `known` name of one. Where `alike` has no
    extension, more than two cells will do.
    """
    extension = extension_of(alike.strip())

    def names_a_file(cell: str) -> bool:
        ends = extension_of(cell)
        return bool(ends) and (ends == extension or (ends in FILES and (not re.search(r"\s", cell) or known(cell))))

    for cell in cells:
        for line in lines_of(cell)[1:]:
            inner = [each.strip(" \"'") for each in line.split(delimiter)]
            if len(inner) >= columns and (
                any(map(names_a_file, inner)) or (not extension and (columns > 2 or any(map(known, inner))))
            ):
                return line
    return ""


def need(record: dict[str, Any], name: str, kind: type[Value], where: str) -> Value:
    """record[name], which must be there and a `kind` (an int is a float too); BadRowError says `where` it is not."""
    value = record.get(name)
    if kind is float and type(value) is int:
        return value  # type: ignore[return-value]  # as Python has it for annotations: int where float is wanted
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        found = f"is {_name(value)}" if name in record else "is not there"
        raise BadRowError(where, f"{name!r} {found}, where {_name(kind())} should be")
    return value


def need_id(record: dict[str, Any], name: str, where: str) -> str | int:
    """record[name], a number or a text by which data sets call their things."""
    return need(record, name, str, where) if isinstance(record.get(name), str) else need(record, name, int, where)


def objects(
    tree: dict[str, Any], name: str, path: Path, skip: Skip | None = None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where it stands, object) of each element of the list tree[name].

    What is no object is told to `skip`, or is a BadRowError where there is none.
    """
    skip = skip or _raise
    for number, element in enumerate(need(tree, name, list, str(path))):
        where = f"{path}, {name}[{number}]"
        if isinstance(element, dict):
            yield where, element
        else:
            skip(where, f"is {_name(element)} where an object should be")


def unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For json.loads: an object; ValueError when a name stands in it twice, of which the first would be lost."""
    tree = dict(pairs)
    if len(tree) < len(pairs):
        twice = next(name for name, number in Counter(name for name, _ in pairs).items() if number > 1)
        raise ValueError(f"the name {twice!r} stands twice in one object")
    return tree


def csv_reason(error: csv.Error) -> str:
    """What the csv module found wrong, in words for those who wrote the file."""
    if "unexpected end of data" in str(error):
        return "a quote that opens there is never closed"
    if "expected after" in str(error):
        return "a value goes on after its closing quote (a quote within a value is written twice)"
    return str(error)


def json_reason(error: Exception) -> str:
    """What is wrong with JSON, in words for those who wrote the file."""
    if isinstance(error, RecursionError):
        return "it is nested too deep"
    if "integer string conversion" in str(error):
        return "it holds a number with more digits than can be read"
    if isinstance(error, json.JSONDecodeError) and "\n" not in error.doc:
        return f"{error.msg.removesuffix(' at')} at character {error.pos + 1}"
    return str(error)


def clean(text: str) -> str:
    """The text without blanks around it; half characters, which JSON can spell and no encoder takes, become "?"."""
    return trimmed(text.encode("utf-8", "replace").decode("utf-8"))


def _member(decoder: json.JSONDecoder, text: str, place: int) -> tuple[str | None, Any, int] | None:
    """The member of an object at `place`: (name, value, place after it); name None at the end; None: more is needed."""
    after = _skip(text, place, ",")
    if text[after : after + 1] == "}":
        return None, None, after + 1
    try:
        name, after = decoder.raw_decode(text, after)
        colon = _skip(text, after)
        if not isinstance(name, str) or text[colon : colon + 1] != ":":
            return None
        value, after = decoder.raw_decode(text, _skip(text, colon + 1))
    except json.JSONDecodeError:
        return None
    if text[_skip(text, after) : _skip(text, after) + 1] not in (",", "}"):  # a number may go on
        return None
    return name, value, after


def _skip(text: str, place: int, also: str = "") -> int:
    """The next place that is no blank, nor one of `also`."""
    while place < len(text) and text[place] in " \t\r\n" + also:
        place += 1
    return place


@contextmanager
def _told(where: object) -> Iterator[None]:
    """Turns what parsers raise into a DataError that says where."""
    try:
        yield
    except DataError:
        raise
    except UnicodeDecodeError as error:
        raise DataError(f"{where} is not UTF-8 ({error}): save it as UTF-8") from error
    except csv.Error as error:
        raise DataError(f"{where} is damaged: {csv_reason(error)}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not JSON, damaged or cut short ({json_reason(error)})") from error


def _raise(where: str, reason: str) -> None:
    raise BadRowError(where, reason)


def _name(value: Any) -> str:
    """What a JSON value is, in words."""
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
