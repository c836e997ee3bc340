"""Random access to the samples of a folder of shards: `open_dataset(path).read(i)`.

Design choices:
- A sample is one positioned read: its fields lie side by side in the tar, from its first byte to its last.
- pread and not mmap: when a file shrinks under an mmap the process dies of SIGBUS, where a short read is an error
  that names the shard. There is no seek position, so forked workers may share the descriptors.
- Files are opened when first read, at most `MOST_OPEN` at a time. Tables of offsets stay, at some 100 bytes a sample.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections import OrderedDict
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.errors import DataError
from data_pipeline.index import Index, ShardTable, load_index, load_table
from data_pipeline.order import Order
from data_pipeline.sample import Sample

MOST_OPEN = 256  # descriptors; the usual limit of a process is 1024


def open_dataset(path: str | Path) -> Dataset:
    """The data set in the folder `path`, indexed now if it has no index.

    Raises FileNotFoundError when there is no folder or no tar in it, DataError when index and shards disagree.
    """
    folder = Path(path)
    return Dataset(folder, load_index(folder))


class Dataset:
    """Samples 0 to len - 1 of a folder of shards; picklable, and safe to use in forked processes."""

    def __init__(self, folder: Path, index: Index) -> None:
        self.folder = folder
        self.index = index
        self._first = [0, *accumulate(shard.samples for shard in index.shards)]  # sample id each shard starts at
        self._tables: dict[int, ShardTable] = {}
        self._open: OrderedDict[int, int] = OrderedDict()  # shard number -> descriptor, least recently used first

    def __len__(self) -> int:
        return self.index.samples

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) of what is in the shards; see `Index.fingerprint`."""
        return self.index.fingerprint

    def locate(self, sample: int) -> tuple[int, int]:
        """(shard number, number of the sample in that shard); IndexError outside 0 .. len - 1."""
        if not 0 <= sample < len(self):
            raise IndexError(f"sample {sample} of {self.folder}, which has samples 0 to {len(self) - 1}")
        shard = bisect_right(self._first, sample) - 1
        return shard, sample - self._first[shard]

    def key(self, sample: int) -> str:
        """The key of a sample; its bytes are not read."""
        shard, offset = self.locate(sample)
        return self._table(shard).key(offset)

    def shard_file(self, sample: int) -> str:
        """The file name of the shard that holds a sample."""
        return self.index.shards[self.locate(sample)[0]].file

    def read(self, sample: int) -> Sample:
        """The sample's key and bytes; DataError when the shard no longer holds what its index says."""
        shard, offset = self.locate(sample)
        table = self._table(shard)
        places = table.places(offset)
        start = places[0][1]
        length = places[-1][1] + places[-1][2] - start
        data = os.pread(self._descriptor(shard), length, start)
        if len(data) < length:
            path = self.folder / self.index.shards[shard].file
            raise DataError(f"{path} is truncated: sample {table.key(offset)!r} should end at byte {start + length}")
        return Sample(table.key(offset), {name: data[at - start : at - start + size] for name, at, size in places})

    def close(self) -> None:
        """Close every file; the next read opens what it needs."""
        while self._open:
            os.close(self._open.popitem()[1])

    def _table(self, shard: int) -> ShardTable:
        if shard not in self._tables:
            entry = self.index.shards[shard]
            self._tables[shard] = load_table(self.folder / entry.file, entry)
        return self._tables[shard]

    def _descriptor(self, shard: int) -> int:
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        if len(self._open) >= MOST_OPEN:
            os.close(self._open.popitem(last=False)[1])
        self._open[shard] = os.open(self.folder / self.index.shards[shard].file, os.O_RDONLY | os.O_CLOEXEC)
        return self._open[shard]

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "index": self.index}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["folder"], state["index"])  # type: ignore[misc]  # state is the constructor's arguments

    def __del__(self) -> None:
        if hasattr(self, "_open"):
            self.close()


def read_order(dataset: Dataset, order: Order, start: int, count: int) -> list[dict[str, Any]]:
    """What a run reads at positions start .. start + count - 1 of the order, one row a sample.

    Rows hold position, epoch, sample (id), shard (file), offset (number in the shard) and key.
    """
    positions = np.arange(start, start + count, dtype=np.int64)
    rows = []
    for position, sample in zip(positions.tolist(), order.sample_ids(positions).tolist(), strict=True):
        shard, offset = dataset.locate(sample)
        rows.append(
            {
                "position": position,
                "epoch": position // order.samples,
                "sample": sample,
                "shard": dataset.index.shards[shard].file,
                "offset": offset,
                "key": dataset.key(sample),
            }
        )
    return rows
