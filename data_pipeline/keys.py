"""Keys that repeat, where samples are written anew: two of one key in one shard would be read back as one sample.

Keys of different shards may be equal: they stay as long as they come into different shards again, and can be made to
differ by the name of their shard. Within a shard nothing tells which sample of a key is meant.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from data_pipeline.parquet import ParquetFiles
from data_pipeline.reader import Dataset


def written_key(dataset: Dataset, sample: int, key: str, shard_keys: bool) -> str:
    """The key that a sample is written under: its own, or <shard>/<key>; a row of Parquet has such a key already."""
    if not shard_keys or isinstance(dataset.files, ParquetFiles):
        return key
    return f"{Path(dataset.shard_file(sample)).stem}/{key}"


def refuse_equal_keys(
    dataset: Dataset, kept: np.ndarray, samples_per_shard: int | None = None, shard_keys: bool = False
) -> None:
    """ValueError when two samples of one key would come into one shard: told before anything is written.

    kept: int64 [samples], the ids in the order in which they are written. `samples_per_shard`: None where they come
    into one table, whose rows are found by their keys.
    """
    if isinstance(dataset.files, ParquetFiles):  # a key is a file and a row
        return
    hashes = [dataset.files.table(shard).key_hashes() for shard in dataset.index.shards]
    source = np.repeat(np.arange(len(hashes)), [len(each) for each in hashes])[kept]
    written = np.arange(len(kept)) // (samples_per_shard or max(1, len(kept)))
    names = (np.concatenate(hashes)[kept], source if shard_keys else np.zeros_like(source), written)
    order = np.lexsort(names)
    same = np.logical_and.reduce([name[order][1:] == name[order][:-1] for name in names])
    if same.any():
        pair = min(zip(order[:-1][same].tolist(), order[1:][same].tolist(), strict=True), key=lambda pair: pair[1])
        one, two = (int(kept[each]) for each in pair)
        raise ValueError(_sentence(dataset, one, two, int(np.count_nonzero(same)), table=samples_per_shard is None))


def _sentence(dataset: Dataset, one: int, two: int, number: int, table: bool) -> str:
    """What is wrong with so many keys, of which two samples are an example, and the way out."""
    folder, first, second = dataset.folder, dataset.shard_file(one), dataset.shard_file(two)
    keys, such = (f"1 key of {folder} is", "") if number == 1 else (f"{number:,} keys of {folder} are", "such as ")
    if first == second:
        return (
            f"{keys} there twice, {such}{dataset.key(two)!r} in {first}, and nothing tells which sample is meant: "
            f"unpacking {first} and packing it anew keeps the later one (`weft data check {folder}` names all)"
        )
    where = f"{such}{dataset.key(two)!r} in {first} and {second}"
    if table:
        return (
            f"{keys} there in several shards, {where}, and rows of a table are found by their keys: "
            "`weft data bake` and `weft data filter` with --shard-keys make keys differ"
        )
    return (
        f"{keys} there in several shards, {where}, and would come into one: give --shard-keys, and samples are called "
        "<shard>/<key>"
    )
