"""Pictures that keep their shape: batches of one height and width each, chosen by what the pictures are.

    order = BucketOrder(dataset.aspects(), bucket_sizes(224, patch=16), global_batch=256, seed=0)
    Loader(maker, order, global_batch=256, stop_step=1000)            # batch.image is [b, 3, H, W], another H, W a step

Buckets are sizes in whole patches with at most the pixels of the square; a picture belongs to the one nearest in aspect
(width / height, by ratio), is cut to its aspect exactly and resized to it. Every global batch is of one bucket.

Design choices:
- A pure function of the position, as any order. Each bucket has a reading order and epochs of its own, and which bucket
  a step reads is a Mixture over steps, in proportion to the buckets' samples. So nothing is dropped to fill a batch up:
  what is left of a bucket's epoch begins a batch that its next epoch fills. Epochs of two buckets do not end together.
- A bucket of fewer samples than a global batch would repeat samples within a batch, and the share of one with less than
  a 256th of all is kept to no better than 3% by a Mixture: these are closed, and their pictures go to the next nearest.
- One integer a sample is kept. That is memory in proportion to the data set, which the other orders do without.

Cutting a picture to another's aspect loses a part of it that other ways keep: packing patches of whole pictures under a
budget of tokens (Dehghani et al. 2023, "Patch n' Pack: NaViT"). That needs attention within pictures only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from data_pipeline.mixture import PERIOD, Mixture, Phase
from data_pipeline.order import Order, split

LEAST_SHARE = 1 / 256

Size = tuple[int, int]  # height, width


def bucket_sizes(size: int, patch: int, most: float = 2.0) -> list[Size]:
    """Sizes in whole patches, each with at most size x size pixels and the longer side at most `most` times the other.

    For each height the greatest width and for each width the greatest height. Raises ValueError when size is not whole
    patches, or `most` is below 1.
    """
    if patch < 1 or size < patch or size % patch:
        raise ValueError(f"image size {size} is not whole patches of {patch}")
    if most < 1:
        raise ValueError(f"the longer side is at most {most} times the other: give 1 or more")
    tokens = (size // patch) ** 2
    tall = {(tokens // columns, columns) for columns in range(1, size // patch + 1)}
    kept = {sides for sides in tall if sides[0] <= most * sides[1]}
    return sorted((patch * rows, patch * columns) for rows, columns in kept | {(b, a) for a, b in kept})


def assign(aspects: np.ndarray, sizes: Sequence[Size]) -> np.ndarray:
    """int64 [samples]: the place in `sizes` nearest to each aspect, by ratio; an aspect of nan counts as a square."""
    bucket_aspects = np.log([width / height for height, width in sizes])
    by_aspect = np.argsort(bucket_aspects, kind="stable")
    borders = (bucket_aspects[by_aspect][1:] + bucket_aspects[by_aspect][:-1]) / 2
    wanted = np.log(np.where(np.isfinite(aspects) & (aspects > 0), aspects, 1.0))
    return by_aspect[np.searchsorted(borders, wanted)]


@dataclass(frozen=True, eq=False)
class BucketOrder:
    """The endless reading order of pictures of these aspects, each global batch from one bucket of `sizes`.

    aspects: float [samples], width / height. Raises ValueError when there is no size, or no global batch.
    """

    aspects: np.ndarray
    sizes: Sequence[Size]
    global_batch: int
    seed: int

    def __post_init__(self) -> None:
        if not len(self.sizes) or not 1 <= self.global_batch <= len(self.aspects):
            raise ValueError(
                f"{len(self.sizes)} sizes and a global batch of {self.global_batch} for {len(self.aspects)} samples: "
                "give a size or more, and at most a batch of all"
            )

    @property
    def samples(self) -> int:
        """Samples in all buckets."""
        return len(self.aspects)

    @cached_property
    def open_sizes(self) -> list[Size]:
        """The sizes that are used."""
        counts = np.bincount(assign(self.aspects, self.sizes), minlength=len(self.sizes))
        least = max(self.global_batch, LEAST_SHARE * self.samples)
        enough = np.flatnonzero(counts >= least).tolist() or [int(counts.argmax())]
        return [self.sizes[number] for number in enough]

    @cached_property
    def members(self) -> list[np.ndarray]:
        """For each open size its samples, int64, ascending."""
        buckets = assign(self.aspects, self.open_sizes)
        return [np.flatnonzero(buckets == number) for number in range(len(self.open_sizes))]

    @cached_property
    def _orders(self) -> list[Order]:
        return [Order(len(members), self.seed + number) for number, members in enumerate(self.members)]

    @cached_property
    def _steps(self) -> Mixture:
        """A position of it is a step of ours."""
        return Mixture(self._orders, [Phase(0, tuple(len(members) for members in self.members))], self.seed)

    def size_of(self, step: int) -> Size:
        """(height, width) of the pictures of a step."""
        return self.open_sizes[int(self._steps.sources(np.array([step]))[0])]

    def sample_ids(self, positions: np.ndarray) -> np.ndarray:
        """Sample ids (int64, the shape of `positions`) at int64 positions; ValueError for a negative one."""
        buckets, own = self._locate(positions)
        ids = np.empty_like(own)
        for number, (members, order) in enumerate(zip(self.members, self._orders, strict=True)):
            mine = buckets == number
            ids[mine] = members[order.sample_ids(own[mine])]
        return ids

    def epochs(self, positions: np.ndarray) -> np.ndarray:
        """The epoch of its own bucket that each position lies in, int64; ValueError for a negative one."""
        buckets, own = self._locate(positions)
        return own // np.array([len(members) for members in self.members])[buckets]

    def _locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(bucket, position in its own order) of each position, int64."""
        steps, rows = split(positions, self.global_batch)
        buckets, before = np.empty_like(steps), np.empty_like(steps)
        for period in np.unique(steps // PERIOD).tolist():
            mine, start = steps // PERIOD == period, period * PERIOD
            inside = steps[mine] - start
            read = self._steps.sources(np.arange(start, start + inside.max() + 1))  # the bucket of each step
            count = np.cumsum(read[:, None] == np.arange(len(self.members)), axis=0)[np.arange(len(read)), read] - 1
            buckets[mine] = read[inside]
            before[mine] = np.array(self._steps.counts(start))[read[inside]] + count[inside]
        return buckets, before * self.global_batch + rows
