"""Shards in a folder of this machine, read by positions.

Design choices:
- pread and not mmap: when a file shrinks under an mmap the process dies of SIGBUS, where a short read is an error
  that names the shard. There is no seek position, so forked workers may share the descriptors.
- Files are opened when first read, at most MOST_OPEN at a time.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

from data_pipeline.index import ShardEntry, ShardTable, load_table

MOST_OPEN = 256  # descriptors; the usual limit of a process is 1024


class LocalFiles:
    """The files of a folder. RemoteFiles has the same methods."""

    def __init__(self, folder: Path, tables: Path | None = None) -> None:
        self.folder = folder
        self.tables = tables  # where tables of offsets lie, if not beside the shards
        self._open: OrderedDict[str, int] = OrderedDict()  # descriptors, least recently used first

    def read(self, file: str, start: int, length: int) -> bytes:
        """Bytes start .. start + length - 1 of a file, fewer where it ends before. FileNotFoundError."""
        return os.pread(self._descriptor(file), length, start)

    def forget(self, file: str, start: int, length: int) -> None:
        """What was read of these bytes is wrong: nothing is kept here, so nothing is to be forgotten."""

    def table(self, entry: ShardEntry) -> ShardTable:
        """The table of offsets of a shard; DataError when it is missing, damaged or of another tar."""
        return load_table((self.tables or self.folder) / entry.file, entry)

    def close(self) -> None:
        """Close every file; the next read opens what it needs."""
        while self._open:
            os.close(self._open.popitem()[1])

    def _descriptor(self, file: str) -> int:
        if file in self._open:
            self._open.move_to_end(file)
            return self._open[file]
        if len(self._open) >= MOST_OPEN:
            os.close(self._open.popitem(last=False)[1])
        self._open[file] = os.open(self.folder / file, os.O_RDONLY | os.O_CLOEXEC)
        return self._open[file]

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "tables": self.tables}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]  # state is the constructor's arguments

    def __del__(self) -> None:
        self.close()
