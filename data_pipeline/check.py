"""Lint for a folder of shards, or Parquet files: every defect with its shard, byte and key, not only the first.

Design choices:
- Nothing is written and no index is needed; where there is one, it is held against the shards, checksums included.
- Reading goes on after a defect (check_shard.py): at the next file, or at the next sound header after damage.
- An error is what a run would trip over or silently lose, what lies beside the tars and is not read included; a warning
  is what is odd and may be meant.
- What holds for every sample of a shard (no image, say) is said once for the shard.
- Shards are checked side by side. Keys come back as 8-byte hashes, so data sets of any size fit in memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.check_parquet import check_parquet_file
from data_pipeline.check_sample import Problem, nothing_to_learn
from data_pipeline.check_shard import Finding, check_shard, key_at
from data_pipeline.errors import DataError
from data_pipeline.folder import gap_in, ignored_in, shard_files
from data_pipeline.index import INDEX_FILE, Index, ShardEntry, disagreements
from data_pipeline.parallel import run_jobs
from data_pipeline.parquet import is_parquet, open_files, parquet_paths, refuse_several_splits

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class CheckReport:
    """What a check found: problems in order of shard and byte, samples and shards as far as they could be read."""

    problems: tuple[Problem, ...]
    samples: int
    shards: int

    @property
    def errors(self) -> tuple[Problem, ...]:
        """The problems that are errors."""
        return tuple(problem for problem in self.problems if problem.severity == "error")

    @property
    def ok(self) -> bool:
        """Whether there is no error; warnings do not count."""
        return not self.errors


def check_dataset(
    folder: Path, *, decode: bool = True, processes: int | None = None, progress: Progress | None = None
) -> CheckReport:
    """Read every byte of the shards in `folder` and report all that is wrong with them.

    decode=False leaves pictures and sound undecoded. `processes`: default all cores, 0 or 1 = this one.
    `progress(done, total)` counts shards. Raises FileNotFoundError when there is neither a tar nor an index.
    """
    if is_parquet(folder):
        return _check_parquet(folder, decode, processes, progress)
    if not folder.is_dir():
        raise FileNotFoundError(f"no data set at {folder}: there is no such folder")
    paths = shard_files(folder)
    if not paths and not (folder / INDEX_FILE).is_file():
        raise FileNotFoundError(f"no data set at {folder}: there is no .tar file in it")
    entries, problems = _check_index(folder)
    jobs = [(path, entries.get(path.name), decode) for path in paths]
    findings = _check_shards(check_shard, jobs, processes, progress)
    problems += _keys_in_several_shards(paths, findings)
    problems += [
        Problem(
            "error",
            name,
            None,
            None,
            f"{why}: nothing in it is read; make a plain .tar of it here, or move it elsewhere",
        )
        for name, why in ignored_in(folder)
    ]
    if gap := gap_in(path.name for path in paths):
        problems.append(Problem("warning", INDEX_FILE, None, None, gap))
    return _report(paths, findings, problems)


def _check_parquet(folder: Path, decode: bool, processes: int | None, progress: Progress | None) -> CheckReport:
    """The same of Parquet files: each on its own, then whether they go together."""
    paths = parquet_paths(folder)
    if not paths:
        raise FileNotFoundError(f"no data set at {folder}: there is no such Parquet file")
    refuse_several_splits(folder, paths)
    findings = _check_shards(check_parquet_file, [(path, decode) for path in paths], processes, progress)
    return _report(paths, findings, list(_apart(folder, paths, findings)))


def _apart(folder: Path, paths: list[Path], findings: list[Finding]) -> Iterator[Problem]:
    """One error for each Parquet file that is good alone and cannot be read with the first such file."""
    told = {problem.reason for finding in findings for problem in finding.problems}
    first: list[Path] = []
    for path in paths:
        try:
            open_files(folder, [*first, path])
            first = first or [path]
        except DataError as error:
            if str(error) not in told:
                yield Problem("error", path.name, None, None, str(error))


def _report(paths: list[Path], findings: list[Finding], problems: list[Problem]) -> CheckReport:
    """The report of these shards; `problems` are those of the whole set."""
    problems += [problem for finding in findings for problem in finding.problems]
    samples = sum(finding.samples for finding in findings)
    if samples == 0:
        problems.append(Problem("error", INDEX_FILE, None, None, "there is no sample in the whole data set"))
    elif not any(finding.usable for finding in findings):
        fields = sum((finding.fields for finding in findings), Counter[str]())
        elsewhere = next((finding.elsewhere for finding in findings if finding.elsewhere), "")
        problems.append(Problem("error", INDEX_FILE, None, None, nothing_to_learn(fields, elsewhere)))
    places = {INDEX_FILE: -1} | {path.name: number for number, path in enumerate(paths)}
    problems.sort(key=lambda problem: (places.get(problem.shard, -1), problem.byte or 0))
    return CheckReport(tuple(problems), samples, len(paths))


def _check_index(folder: Path) -> tuple[dict[str, ShardEntry], list[Problem]]:
    """The entries of the index by file, and what is wrong between it and the shards, their bytes unread."""
    try:
        index = Index.load(folder)
    except FileNotFoundError:
        return {}, [
            Problem("warning", INDEX_FILE, None, None, "there is none yet: the first to open the data makes it")
        ]
    except DataError as error:
        return {}, [Problem("error", INDEX_FILE, None, None, str(error))]
    found = [Problem("error", shard, None, None, reason) for shard, reason in disagreements(index, folder)]
    return {entry.file: entry for entry in index.shards}, found


def _check_shards(
    check: Callable[..., Finding], jobs: Sequence[tuple[Any, ...]], processes: int | None, progress: Progress | None
) -> list[Finding]:
    findings: dict[int, Finding] = {}
    with run_jobs(check, jobs, processes=processes) as results:
        for number, finding in results:
            findings[number] = finding
            if progress:
                progress(len(findings), len(jobs))
    return [findings[number] for number in range(len(jobs))]


def _keys_in_several_shards(paths: list[Path], findings: list[Finding]) -> Iterator[Problem]:
    """One warning for each shard that has keys of earlier shards."""
    hashes = np.concatenate([finding.key_hashes for finding in findings] or [np.empty(0, np.uint64)])
    shards = np.repeat(np.arange(len(findings)), [len(finding.key_hashes) for finding in findings])
    places = np.concatenate([finding.key_bytes for finding in findings] or [np.empty(0, np.int64)])
    order = np.argsort(hashes, kind="stable")  # stable: of equal hashes, that of the earlier shard comes first
    repeated = np.flatnonzero(hashes[order][1:] == hashes[order][:-1])
    earlier, later = order[repeated], order[repeated + 1]
    for shard in np.unique(shards[later]).tolist():
        of_shard = shards[later] == shard
        first = np.flatnonzero(of_shard)[0]
        place, other = int(places[later[first]]), int(shards[earlier[first]])
        key = key_at(paths[shard], place)
        reason = f"{np.count_nonzero(of_shard)} of its keys are in other shards too, this one in {paths[other].name}"
        yield Problem("warning", paths[shard].name, place, key, reason)
