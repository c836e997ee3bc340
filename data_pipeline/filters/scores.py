"""Keep or label samples by a table that a model has made: `weft data score` writes one, and so may anybody.

A table is JSON lines or Parquet, one row a sample: its "key", and columns of numbers ("similarity", "uncertainty",
"confidence", ...) and of texts ("label"). This floor knows no model, and needs none to read it.

    scores:table=s.jsonl,column=similarity,min=0.2              CLIP score filtering (LAION-5B, Schuhmann et al. 2022)
    top-scores:table=s.jsonl,column=uncertainty,share=0.1       the tenth to ask a person about: active selection
    pseudo-labels:table=s.jsonl,column=confidence,min=0.9       the model's own label, where it is sure of it
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from data_pipeline.errors import DataError, first_line
from data_pipeline.filters.step import Change, Drop, Outcome, Removed, SampleStep, SetStep, Signatures
from data_pipeline.filters.texts import dump
from data_pipeline.parquet import load_pyarrow
from data_pipeline.sample import Sample

PARQUET_EXTENSIONS = (".parquet", ".pq")
NO_SCORE = "not in the table of scores"
MISSING = ("drop", "keep")


@dataclass(frozen=True)
class Scores(SampleStep):
    """Keep samples whose score lies in a range.

    `min`, `max`: both included. `missing`: "drop" or "keep" what the table has no score of.
    """

    name = "scores"

    table: Path
    column: str = "score"
    min: float | None = None
    max: float | None = None
    missing: str = "drop"

    def __post_init__(self) -> None:
        if self.min is None and self.max is None:
            raise ValueError("scores:min and max are both missing: give one of them, or use top-scores")
        _refuse_unknown(self.name, self.missing)
        read_column(self.table, self.column)

    def options(self) -> dict[str, Any]:
        return super().options() | {"table_sha256": _digest(self.table)}

    def look(self, sample: Sample) -> Drop | None:
        score = read_column(self.table, self.column).get(sample.key)
        if score is None:
            return Drop(NO_SCORE) if self.missing == "drop" else None
        if self.min is not None and score < self.min:
            return Drop(f"{self.column} below {self.min:g}", f"{score:.4g}")
        if self.max is not None and score > self.max:
            return Drop(f"{self.column} above {self.max:g}", f"{score:.4g}")
        return None


@dataclass(frozen=True)
class TopScores(SetStep):
    """Keep the share of the samples that has the highest scores, or the lowest.

    `share`: of the samples that are left at this step and have a score, more than 0, to 1; rounded up. Of equal scores
    the earlier sample stays. `lowest`: keep the lowest instead. `missing`: "drop" or "keep" what has no score.
    """

    name = "top-scores"
    width: ClassVar[int] = 8

    table: Path
    share: float
    column: str = "score"
    lowest: bool = False
    missing: str = "drop"

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"top-scores:share is {self.share}: give more than 0, and at most 1")
        _refuse_unknown(self.name, self.missing)
        read_column(self.table, self.column)

    def options(self) -> dict[str, Any]:
        return super().options() | {"table_sha256": _digest(self.table)}

    def signature(self, sample: Sample) -> Drop | bytes | None:
        score = read_column(self.table, self.column).get(sample.key)
        if score is None:
            return Drop(NO_SCORE) if self.missing == "drop" else None
        return np.float64(score).tobytes()

    def decide(self, mine: Signatures, test: Signatures | None) -> list[Removed]:
        score_N = np.ascontiguousarray(mine.rows).view(np.float64)[:, 0]
        order = np.argsort(score_N if self.lowest else -score_N, kind="stable")
        kept = math.ceil(self.share * len(order) - 1e-9)  # 0.1 * 30 is 3, not a little more
        reason = f"{self.column} not among the {'lowest' if self.lowest else 'highest'} {self.share:.2%}"
        return [Removed(reason, np.sort(order[kept:]), lambda row: f"{score_N[row]:.4g}")]


@dataclass(frozen=True)
class PseudoLabels(SampleStep):
    """Label samples with what a model takes them for, where it is sure.

    The json gets "label", and "pseudo_label": {"confidence", "table"}. A sample with a label of its own keeps it, and
    one below `min` stays as it is; `only`: what has no label after this goes.
    """

    name = "pseudo-labels"

    table: Path
    min: float
    column: str = "confidence"
    label: str = "label"
    only: bool = False

    def __post_init__(self) -> None:
        read_column(self.table, self.column)
        read_texts(self.table, self.label)

    def options(self) -> dict[str, Any]:
        return super().options() | {"table_sha256": _digest(self.table)}

    def look(self, sample: Sample) -> Outcome:
        if sample.label() is not None or sample.odd_label():
            return None
        confidence = read_column(self.table, self.column).get(sample.key)
        label = read_texts(self.table, self.label).get(sample.key)
        if confidence is None or label is None:
            return Drop(NO_SCORE) if self.only else None
        if confidence < self.min:
            return Drop(f"{self.column} below {self.min:g}", f"{confidence:.4g}") if self.only else None
        metadata = sample.metadata()
        metadata["label"] = label
        metadata["pseudo_label"] = {"confidence": confidence, "table": self.table.name}
        return Change(Sample(sample.key, {**sample.fields, "json": dump(metadata)}), ("labelled",))


@lru_cache(maxsize=8)
def read_column(table: Path, column: str) -> dict[str, float]:
    """Key -> number, of one column of a table; rows that hold none there are left out.

    Raises FileNotFoundError when there is no table, ValueError when it has no such column or needs pyarrow, DataError
    when it is damaged or has a key twice.
    """
    numbers: dict[str, float] = {}
    for place, key, value in _rows(table, column):
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise DataError(f"{table} has {value!r} as {column} at {place}: give finite numbers")
        numbers[key] = float(value)
    return numbers


@lru_cache(maxsize=8)
def read_texts(table: Path, column: str) -> dict[str, str]:
    """Key -> text, of one column of a table; raises as `read_column` does."""
    texts: dict[str, str] = {}
    for place, key, value in _rows(table, column):
        if not isinstance(value, str):
            raise DataError(f"{table} has {value!r} as {column} at {place}: give texts")
        texts[key] = value
    return texts


def _rows(table: Path, column: str) -> Iterator[tuple[str, str, Any]]:
    """(place in words, key, value) of the rows that have the column; ValueError when none has."""
    if not table.is_file():
        raise FileNotFoundError(f"there is no table of scores {table}: `weft data score` makes one")
    rows = _parquet_rows(table, column) if table.suffix in PARQUET_EXTENSIONS else _json_rows(table)
    keys: set[str] = set()
    names: set[str] = set()
    some = False
    for place, row in rows:
        key = row.get("key")
        if not isinstance(key, str):
            raise DataError(f"{table} has no text as key at {place}")
        if key in keys:
            raise DataError(f"{table} has the key {key!r} twice, again at {place}")
        keys.add(key)
        names.update(row)
        if row.get(column) is not None:
            some = True
            yield place, key, row[column]
    if not some:
        columns = ", ".join(sorted(names - {"key"}, key=str)) or "none but the key"
        raise ValueError(f"{table} has no {column!r} in any row: its columns are {columns}")


def _json_rows(table: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        with table.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise DataError(f"{table} has no object in line {number}")
                    yield f"line {number}", row
    except DataError:
        raise
    except (ValueError, RecursionError) as error:
        raise DataError(f"{table} is no table of JSON lines ({first_line(error)})") from error


def _parquet_rows(table: Path, column: str) -> Iterator[tuple[str, dict[str, Any]]]:
    arrow, parquet = load_pyarrow(table)
    try:
        file = parquet.ParquetFile(table, page_checksum_verification=True)
        there = [name for name in file.schema_arrow.names if name in ("key", column)]
        if column not in there:
            raise ValueError(
                f"{table} has no column {column!r}: its columns are {', '.join(map(str, file.schema_arrow.names))}"
            )
        number = 0
        for batch in file.iter_batches(columns=there, use_threads=False):
            for row in _records(batch, number, table):
                number += 1
                yield f"row {number}", row
    except (arrow.ArrowException, OSError) as error:
        raise DataError(f"{table} is damaged: {first_line(error)}") from error


def _records(batch: Any, before: int, table: Path) -> list[dict[str, Any]]:
    """The rows of an Arrow batch; DataError that names the first one with text that is not UTF-8."""
    try:
        return list(batch.to_pylist())
    except UnicodeDecodeError:
        for row in range(batch.num_rows):
            try:
                batch.slice(row, 1).to_pylist()
            except UnicodeDecodeError as error:
                raise DataError(f"{table} holds text that is not UTF-8 at row {before + row + 1}: {error}") from error
        raise


@lru_cache(maxsize=8)
def _digest(table: Path) -> str:
    with table.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _refuse_unknown(step: str, missing: str) -> None:
    if missing not in MISSING:
        raise ValueError(f"{step}:missing is {missing!r}: use one of {', '.join(MISSING)}")
