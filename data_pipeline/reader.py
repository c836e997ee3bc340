"""Random access to the samples of a folder of shards, here or at a URL: `open_dataset(path).read(i)`.

Design choices:
- A sample is one positioned read: its fields lie side by side in the tar, from its first byte to its last. Who reads
  is the folder's affair: files.py here, remote.py at a URL. Rows of Parquet are read by parquet.py.
- Every field read is held against its checksum in the table: bytes that changed are found when they are used.
- Tables of offsets stay once read, at some 100 bytes a sample.
"""

from __future__ import annotations

import math
import zlib
from bisect import bisect_right
from collections.abc import Collection
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.damage import opened
from data_pipeline.decode import image_aspect
from data_pipeline.errors import DamagedSampleError, DataError
from data_pipeline.files import LocalFiles
from data_pipeline.folder import hint_of_pattern
from data_pipeline.index import Index, ShardTable, load_index
from data_pipeline.order import ReadingOrder
from data_pipeline.parquet import ParquetFiles, is_parquet, is_parquet_at, open_parquet
from data_pipeline.read_only import may_write, open_read_only
from data_pipeline.remote import Cache, RemoteFiles, is_url, open_remote
from data_pipeline.sample import Sample

CACHE = Cache(Path.home() / ".cache" / "weft")  # for data sets at a URL


def open_dataset(path: str | Path, cache: Cache = CACHE) -> Dataset:
    """The data set in the folder `path`, or at the URL, indexed now if it has no index; or that of Parquet at `path`.

    Raises FileNotFoundError when there is no folder or no tar in it, DataError when index and shards disagree; for
    Parquet as parquet.open_parquet does.
    """
    if is_url(path):
        if (hint := hint_of_pattern(str(path))) and not str(path).endswith(".parquet"):
            raise FileNotFoundError(f"no data set at {path}{hint}")
        if is_parquet_at(str(path), cache):
            return Dataset(*open_parquet(path, cache))
        return Dataset(*open_remote(str(path), cache))
    folder = Path(path).expanduser()
    if is_parquet(folder):
        return Dataset(*open_parquet(folder, cache))
    if not may_write(folder):
        return Dataset(*open_read_only(folder, cache.folder))
    return Dataset(folder, load_index(folder))


class Dataset:
    """Samples 0 to len - 1 of a folder of shards; picklable, and safe to use in forked processes."""

    def __init__(self, source: Path | LocalFiles | RemoteFiles | ParquetFiles, index: Index) -> None:
        self.files = LocalFiles(source) if isinstance(source, Path) else source
        self.index = index
        self._first = [0, *accumulate(shard.samples for shard in index.shards)]  # sample id each shard starts at
        self._tables: dict[int, ShardTable] = {}

    @property
    def folder(self) -> Path | str:
        """Where it is: a folder, or the URL."""
        return self.files.url if isinstance(self.files, RemoteFiles) else self.files.folder

    @property
    def source(self) -> LocalFiles | RemoteFiles | ParquetFiles:
        """What another data set of the same files is made of."""
        return self.files

    def __len__(self) -> int:
        return self.index.samples

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) of what is in the shards; see `Index.fingerprint`."""
        return self.index.fingerprint

    def remarks(self) -> list[str]:
        """What lies there and is not read, or is missing in some samples: one line, or none."""
        found = self.index.remarks()
        return [f"{self.folder}: {'; '.join(found)}"] if found else []

    def alike(self, sample: int) -> range:
        """The ids of samples that may stand for this one when it cannot be used: all of its source."""
        return range(len(self))

    def locate(self, sample: int) -> tuple[int, int]:
        """(shard number, number of the sample in that shard); IndexError outside 0 .. len - 1."""
        if not 0 <= sample < len(self):
            raise IndexError(f"sample {sample} of {self.folder}, which has samples 0 to {len(self) - 1}")
        shard = bisect_right(self._first, sample) - 1
        return shard, sample - self._first[shard]

    def key(self, sample: int) -> str:
        """The key of a sample; its bytes are not read."""
        shard, offset = self.locate(sample)
        if isinstance(self.files, ParquetFiles):
            return self.files.key(self.index.shards[shard], offset)
        return self._table(self.files, shard).key(offset)

    def shard_file(self, sample: int) -> str:
        """The file name of the shard that holds a sample."""
        return self.index.shards[self.locate(sample)[0]].file

    def read(self, sample: int, only: Collection[str] | None = None) -> Sample:
        """The sample's key and bytes; with `only`, of the fields of these names where it has them, and no more is read.

        Raises DataError when the shard is not there or ends before, DamagedSampleError when its bytes changed.
        """
        shard, offset = self.locate(sample)
        if isinstance(self.files, ParquetFiles):
            return self.files.sample(self.index.shards[shard], offset)
        table, file = self._table(self.files, shard), self.index.shards[shard].file
        key, places, checksums = table.key(offset), table.places(offset), table.crcs(offset)
        if only is not None:
            wanted = [number for number, place in enumerate(places) if place[0] in only]
            if not wanted:
                return Sample(key, {})
            places, checksums = [places[number] for number in wanted], [checksums[number] for number in wanted]
        start = places[0][1]
        length = places[-1][1] + places[-1][2] - start
        data = self.files.read(file, start, length)
        damaged = _first_damaged(data, start, places, checksums)
        if damaged:
            self.files.forget(file, start, length)  # it may have been damaged on its way here
            data = self.files.read(file, start, length)
            damaged = _first_damaged(data, start, places, checksums)
        if len(data) < length:
            raise DataError(f"{self.folder}/{file} is truncated: sample {key!r} should end at byte {start + length}")
        if damaged:
            name, at, size = damaged
            raise DamagedSampleError(
                key,
                f"{self.folder}/{file} is damaged: bytes {at} to {at + size - 1}, its {name!r}, changed since indexed",
            )
        return Sample(key, {name: data[at - start : at - start + size] for name, at, size in places})

    def aspects(self) -> np.ndarray:
        """float32 [samples]: width / height of each sample's picture, upright; nan where there is none that is whole.

        From the tables of offsets, which are not kept. Where they say nothing (Parquet has none, those of early
        versions have no aspects) every picture is read.
        """
        parts = []
        for shard, start in zip(self.index.shards, self._first, strict=False):
            told = None if isinstance(self.files, ParquetFiles) else self.files.table(shard).aspect
            if told is None:
                told = np.array([self._aspect_of(start + offset) for offset in range(shard.samples)], np.float32)
            parts.append(told)
        return np.concatenate(parts)

    def _aspect_of(self, sample: int) -> float:
        try:
            with opened(self, sample) as read:
                return math.nan if read.image_field is None else image_aspect(read.fields[read.image_field])
        except DamagedSampleError:  # the loader will name it
            return math.nan

    def close(self) -> None:
        """Close every file; the next read opens what it needs."""
        self.files.close()

    def _table(self, files: LocalFiles | RemoteFiles, shard: int) -> ShardTable:
        if shard not in self._tables:
            self._tables[shard] = files.table(self.index.shards[shard])
        return self._tables[shard]

    def __getstate__(self) -> dict[str, Any]:
        return {"source": self.source, "index": self.index}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["source"], state["index"])  # type: ignore[misc]  # state is the constructor's arguments


def _first_damaged(
    data: bytes, start: int, places: list[tuple[str, int, int]], checksums: list[int]
) -> tuple[str, int, int] | None:
    """The first place whose bytes in `data`, which begins at byte `start`, do not have their checksum."""
    whole = memoryview(data)
    for place, checksum in zip(places, checksums, strict=True):
        at = place[1] - start
        if zlib.crc32(whole[at : at + place[2]]) != checksum:
            return place
    return None


def read_order(dataset: Dataset, order: ReadingOrder, start: int, count: int) -> list[dict[str, Any]]:
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
                "epoch": position // len(dataset),
                "sample": sample,
                "shard": dataset.index.shards[shard].file,
                "offset": offset,
                "key": dataset.key(sample),
            }
        )
    return rows
