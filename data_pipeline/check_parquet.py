"""Lint for Parquet files: every page, row group and row, as `check.py` does for tars.

A row group that cannot be read is one error, and the next is gone on with. Places are keys (<file>/<row>): bytes of a
row cannot be told in Parquet.
"""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from data_pipeline.check_sample import Lacks, Problem, check_media, check_text
from data_pipeline.check_shard import Finding
from data_pipeline.errors import DamagedSampleError, DataError
from data_pipeline.index import ShardEntry
from data_pipeline.parquet import ParquetFiles, open_files


def check_parquet_file(path: Path, decode: bool) -> Finding:
    """All that is wrong with one Parquet file."""
    finding, lacks = Finding(), Lacks(path.name)
    try:
        files, index = open_files(path, [path])
        if not index.samples:
            finding.problems.append(Problem("warning", path.name, None, None, "it holds no row"))
            return finding
        lacks.column = files.columns.caption
        with closing(files):
            _check_rows(files, index.shards[0], decode, lacks, finding)
    except (DataError, OSError) as error:
        finding.problems.append(Problem("error", path.name, None, None, str(error)))
        return finding
    finding.problems += lacks.problems()
    finding.samples, finding.usable, finding.fields = lacks.samples, lacks.usable, lacks.fields
    finding.elsewhere = lacks.elsewhere or (
        f"captions are read from the column {lacks.column!r}" if lacks.column else "there is no column of captions"
    )
    return finding


def _check_rows(files: ParquetFiles, entry: ShardEntry, decode: bool, lacks: Lacks, finding: Finding) -> None:
    for group, rows in enumerate(files.groups(entry)):
        for row in rows:
            try:
                sample = files.sample(entry, row)
            except DamagedSampleError as error:
                if isinstance(error.__cause__, Exception) and not isinstance(error.__cause__, UnicodeDecodeError):
                    reason = (
                        f"row group {group}, rows {rows.start} to {rows.stop - 1}, cannot be read: {error.__cause__}"
                    )
                    finding.problems.append(Problem("error", entry.file, None, None, reason))
                    break
                finding.problems.append(Problem("error", entry.file, None, error.key, str(error)))
                continue
            offsets: dict[str, int | None] = dict.fromkeys(sample.fields)
            if decode:
                finding.problems += check_media(entry.file, sample, offsets)
            problems, words = check_text(entry.file, sample, offsets)
            finding.problems += problems
            lacks.add(sample, None, words)
