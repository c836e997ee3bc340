"""An order for object stores: blocks of neighbours are read about the same time, and mixed with those of other blocks.

A full shuffle reads each sample from somewhere else, which costs a request a sample, or a piece of which one sample is
used. Here an epoch is the blocks in shuffled order, `window` of them at a time, the samples of a window shuffled among
each other. So each piece of a shard is needed within one window, and a batch still comes from up to `window` places.

Design choices:
- Two permutations of order.py: of all blocks, and of the samples of each window. Both are computed, never stored: any
  position is looked up in constant memory, as in a full shuffle.
- The last block may be short. Its missing samples are walked over, as order.py does it.
- What is lost against a full shuffle can be measured beforehand: `quality`.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from data_pipeline.order import Order, ReadingOrder, mix, permute, split
from data_pipeline.reader import Dataset
from data_pipeline.remote import PIECE


@dataclass(frozen=True)
class BlockOrder:
    """The endless reading order of `samples` samples in blocks of `block`, `window` blocks mixed at a time.

    ValueError unless all are 1 or more.
    """

    samples: int
    seed: int
    block: int
    window: int

    def __post_init__(self) -> None:
        Order(self.samples, self.seed)
        if self.block < 1 or self.window < 1:
            raise ValueError(f"blocks of {self.block} samples, {self.window} at a time: give 1 or more of each")
        # more is the same, and would be walked over
        object.__setattr__(self, "block", min(self.block, self.samples))
        object.__setattr__(self, "window", min(self.window, self.blocks))

    @property
    def blocks(self) -> int:
        """How many blocks there are; the last may be short."""
        return -(-self.samples // self.block)

    def epochs(self, positions: np.ndarray) -> np.ndarray:
        """The epoch that each position lies in, int64."""
        return np.asarray(positions, dtype=np.int64) // self.samples

    def sample_ids(self, positions: np.ndarray) -> np.ndarray:
        """Sample ids (int64, the shape of `positions`) at int64 positions; ValueError for a negative one."""
        epochs, places = split(positions, self.samples)
        keys = mix(mix(np.uint64(self.seed % 2**64)) + epochs.astype(np.uint64)).ravel()
        ids = self._move(places.ravel(), keys)
        (walking,) = np.nonzero(ids >= self.samples)
        while walking.size:
            ids[walking] = self._move(ids[walking], keys[walking])
            walking = walking[ids[walking] >= self.samples]
        return ids.reshape(places.shape)

    def _move(self, places: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """One permutation of 0 .. blocks * block - 1 a key; int64, uint64 -> int64, all [n]."""
        size = self.window * self.block
        windows, inside = np.divmod(places, size)
        whole = self.blocks // self.window  # windows that are not cut off at the end
        inner = mix(keys + mix(windows.astype(np.uint64)))
        mixed = np.empty_like(inside)
        cut_off = (self.blocks - whole * self.window) * self.block
        for mine, count in ((windows < whole, size), (windows >= whole, cut_off)):
            if mine.any():
                mixed[mine] = permute(inside[mine], inner[mine], count)
        slots, offsets = np.divmod(mixed, self.block)
        return permute(windows * self.window + slots, mix(keys), self.blocks) * self.block + offsets


@dataclass(frozen=True)
class Quality:
    """How well an order mixes, and what it costs to read it; means over a stretch of batches."""

    batch: int
    shards_a_batch: float  # different shards that a batch's samples come from
    shards_a_batch_shuffled: float  # the same of a full shuffle
    neighbours: float  # share of samples whose batch holds a neighbour in the shard, of distance 1
    neighbours_shuffled: float
    fetched: float  # bytes that are fetched for each byte that is used, with a cache of `cache_pieces` pieces
    fetched_shuffled: float
    cache_pieces: int

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"batches of {self.batch} come from {self.shards_a_batch:.1f} shards (a full shuffle: "
            f"{self.shards_a_batch_shuffled:.1f}); {self.neighbours:.1%} of samples meet a neighbour of theirs in the "
            f"batch ({self.neighbours_shuffled:.1%}); of shards at a URL {self.fetched:.1f} bytes are fetched for each "
            f"that is used ({self.fetched_shuffled:.1f}), with {self.cache_pieces} pieces in the cache"
        )


def quality(
    order: ReadingOrder,
    shard_of: np.ndarray,
    piece_of: np.ndarray,
    bytes_of: np.ndarray,
    *,
    batch: int,
    batches: int = 64,
    piece_bytes: int = PIECE,
    cache_pieces: int = 256,
) -> Quality:
    """Measure an order against a full shuffle, on `batches` batches from the middle of its first epoch on.

    shard_of, piece_of, bytes_of: int64 [samples], the shard, the piece (numbered over all shards) and the size of each
    sample. A cache of pieces drops what was used longest ago.
    """
    found = []
    for each in (order, Order(order.samples, 0)):
        start = order.samples // 2
        ids_NB = each.sample_ids(np.arange(start, start + batch * batches)).reshape(batches, batch)
        shards = float(np.mean([len(np.unique(shard_of[row])) for row in ids_NB]))
        ordered = np.sort(ids_NB, axis=1)
        close = np.diff(ordered, axis=1) == 1
        beside = np.zeros(ids_NB.shape, bool)
        beside[:, 1:] |= close
        beside[:, :-1] |= close
        cache: OrderedDict[int, None] = OrderedDict()
        misses = 0
        for piece in piece_of[ids_NB.ravel()].tolist():
            misses += piece not in cache
            cache[piece] = None
            cache.move_to_end(piece)
            if len(cache) > cache_pieces:
                cache.popitem(last=False)
        fetched = misses * piece_bytes / max(1, int(bytes_of[ids_NB].sum()))
        found.append((shards, float(beside.mean()), fetched))
    mine, full = found
    return Quality(batch, mine[0], full[0], mine[1], full[1], mine[2], full[2], cache_pieces)


def quality_of(order: ReadingOrder, dataset: Dataset, *, batch: int, cache_pieces: int = 256) -> Quality:
    """The same for a data set as it lies; sizes are the mean of each shard. ValueError for too large a batch."""
    shards = dataset.index.shards
    counts = np.array([shard.samples for shard in shards])
    if not 1 <= batch <= counts.sum():
        raise ValueError(f"a batch of {batch} does not fit a data set of {counts.sum()} samples")
    shard_of = np.repeat(np.arange(len(shards)), counts)
    bytes_of = np.repeat(np.array([shard.bytes for shard in shards]) // np.maximum(counts, 1), counts)
    place = np.arange(len(shard_of)) - np.repeat(np.cumsum(counts) - counts, counts)  # within its shard
    pieces = np.array([-(-shard.bytes // PIECE) for shard in shards])
    piece_of = np.repeat(np.cumsum(pieces) - pieces, counts) + place * bytes_of // PIECE
    batches = min(64, len(shard_of) // batch)
    return quality(order, shard_of, piece_of, bytes_of, batch=batch, batches=batches, cache_pieces=cache_pieces)
