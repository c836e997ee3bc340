"""What a run of filters came to: for each step how many samples it saw, removed and changed, why, and a few of them.

The report lies as filters.json beside the shards. It says nothing of where or when it was made, and so is the same
bytes whenever the same steps meet the same data.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_pipeline.index import written_whole

REPORT_FILE = "filters.json"
FORMAT = "weft-filters"
VERSION = 1


@dataclass(frozen=True)
class Example:
    """One sample that was removed: its key, its shard in the source, and why."""

    key: str
    shard: str
    reason: str
    detail: str


@dataclass(frozen=True)
class StepReport:
    """What one step did; `reasons` adds up to `removed`, while a sample may be changed in several ways."""

    step: str
    options: dict[str, Any]
    seen: int
    removed: int
    changed: int
    reasons: dict[str, int]  # why removed -> samples, the most frequent first
    changes: dict[str, int]  # how changed -> samples, the most frequent first
    examples: tuple[Example, ...]


@dataclass(frozen=True)
class DatasetName:
    """Which data set: its folder as it was given, the fingerprint of its index, its samples."""

    path: str
    fingerprint: str
    samples: int


@dataclass(frozen=True)
class FilterReport:
    """What a run did: `seen` = `kept` + what each of the steps removed; `changed` of the kept ones."""

    source: DatasetName
    against: DatasetName | None
    against_unreadable: int  # samples of the test set that could not be read, and so were compared with nothing
    seen: int
    kept: int
    changed: int
    steps: tuple[StepReport, ...]

    def as_tree(self) -> dict[str, Any]:
        """The report as JSON has it."""
        return {"format": FORMAT, "version": VERSION, **asdict(self)}

    def save(self, folder: Path) -> None:
        """Write filters.json into `folder`; the file appears whole or not at all."""
        with written_whole(folder / REPORT_FILE) as unfinished:
            unfinished.write_text(json.dumps(self.as_tree(), indent=1) + "\n", encoding="utf-8")
