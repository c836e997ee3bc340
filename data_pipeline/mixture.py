"""Several data sets read as one, by weights: which source each position reads, and which of its samples.

    mixture = Mixture([Order(3000, 0), Order(500, 0)], [Phase(0, (3, 1)), Phase(10_000, (1, 1))], seed=0)
    mixture.sample_ids(np.arange(8))      # ids count through the sources: those of the second begin at 3000

Each source keeps an order and epochs of its own: a small one is read again and again while a large one is not through.

Design choices:
- A pure function of the position, as any order. Every PERIOD positions hold each source exactly in proportion to its
  weight, in a shuffled arrangement; so how many samples of a source come before a position is arithmetic, and the
  position within the source's own order is that count. Nothing is drawn at random, nothing is stored.
- Weights may change with the position, in phases: a curriculum. A source may have weight 0 for a while; it goes on
  later where it was.
- Weights are rounded to parts of PERIOD, largest remainders first. One too small for a part is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from data_pipeline.order import ReadingOrder, mix, permute

PERIOD = 4096


@dataclass(frozen=True)
class Phase:
    """From position `start` on, sources are read in proportion to `weights`."""

    start: int
    weights: tuple[float, ...]


@dataclass(frozen=True)
class Mixture:
    """The endless reading order over sources with orders of their own; ValueError for weights that make no sense."""

    orders: Sequence[ReadingOrder]
    phases: Sequence[Phase]
    seed: int

    def __post_init__(self) -> None:
        starts = [phase.start for phase in self.phases]
        if not starts or starts[0] != 0 or starts != sorted(set(starts)):
            raise ValueError(f"phases start at {starts}: the first at 0, and each after the one before")
        for phase in self.phases:
            if len(phase.weights) != len(self.orders):
                raise ValueError(f"{len(phase.weights)} weights for {len(self.orders)} sources: give one each")
            _parts(phase.weights)

    @cached_property
    def samples(self) -> int:
        """Samples in all sources."""
        return sum(order.samples for order in self.orders)

    @cached_property
    def first_ids(self) -> np.ndarray:
        """int64 [sources + 1]: where each source's ids begin, and the end."""
        return np.cumsum([0, *(order.samples for order in self.orders)])

    def sources(self, positions: np.ndarray) -> np.ndarray:
        """Which source each position reads, int64."""
        return self._locate(np.asarray(positions, np.int64))[0]

    def counts(self, position: int) -> list[int]:
        """How many samples of each source come before a position."""
        return self._before(position).tolist()

    def sample_ids(self, positions: np.ndarray) -> np.ndarray:
        """Sample ids (int64, the shape of `positions`) at int64 positions; ValueError for a negative one."""
        sources, own = self._locate(np.asarray(positions, np.int64))
        ids = np.empty_like(own)
        for number, order in enumerate(self.orders):
            mine = sources == number
            ids[mine] = self.first_ids[number] + order.sample_ids(own[mine])
        return ids

    def epochs(self, positions: np.ndarray) -> np.ndarray:
        """The epoch of its own source that each position lies in, int64."""
        sources, own = self._locate(np.asarray(positions, np.int64))
        epochs = np.empty_like(own)
        for number, order in enumerate(self.orders):
            mine = sources == number
            epochs[mine] = order.epochs(own[mine])
        return epochs

    # --- arithmetic

    def _locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(source, position in its own order) of each position, int64."""
        if positions.size and positions.min() < 0:
            raise ValueError(f"positions count from 0, but {positions.min()} was asked for")
        sources, own = np.empty_like(positions), np.empty_like(positions)
        phases = np.searchsorted([phase.start for phase in self.phases], positions, side="right") - 1
        periods = (positions - np.array([phase.start for phase in self.phases])[phases]) // PERIOD
        for phase, period in {*zip(phases.ravel().tolist(), periods.ravel().tolist(), strict=True)}:
            mine = (phases == phase) & (periods == period)
            start = self.phases[phase].start + period * PERIOD
            slots = positions[mine] - start
            arrangement, rank = _arrangement(self.seed, phase, period, self.phases[phase].weights)
            sources[mine] = arrangement[slots]
            own[mine] = self._before_period(phase, period)[arrangement[slots]] + rank[slots]
        return sources, own

    def _before_period(self, phase: int, period: int) -> np.ndarray:
        """int64 [sources]: samples of each source before a period of a phase."""
        return self._before(self.phases[phase].start) + period * _parts(self.phases[phase].weights)

    def _before(self, position: int) -> np.ndarray:
        """int64 [sources]: samples of each source before a position."""
        before = np.zeros(len(self.orders), np.int64)
        for number, phase in enumerate(self.phases):
            end = self.phases[number + 1].start if number + 1 < len(self.phases) else position
            length = min(end, position) - phase.start
            if length <= 0:
                break
            periods, rest = divmod(length, PERIOD)
            before += periods * _parts(phase.weights)
            if rest:
                arrangement, _ = _arrangement(self.seed, number, periods, phase.weights)
                before += np.bincount(arrangement[:rest], minlength=len(self.orders))
        return before


@lru_cache(maxsize=16)  # ids, epochs and counts of a batch ask for the same one
def _arrangement(seed: int, phase: int, period: int, weights: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Of each slot of a period: (its source, how many slots before it have the same one), int64 [PERIOD]."""
    key = mix(mix(np.uint64(seed % 2**64)) + np.uint64(phase)) + np.uint64(period)
    places = permute(np.arange(PERIOD), np.full(PERIOD, mix(key), np.uint64), PERIOD)
    parts = _parts(weights)
    arrangement = np.searchsorted(np.cumsum(parts), places, side="right")
    rank = np.empty(PERIOD, np.int64)
    for number, part in enumerate(parts.tolist()):
        rank[arrangement == number] = np.arange(part)
    return arrangement, rank


def _parts(weights: Sequence[float]) -> np.ndarray:
    """Weights as whole numbers that add up to PERIOD, int64; ValueError where one cannot be."""
    wanted = np.asarray(weights, float)
    if wanted.min() < 0 or not np.isfinite(wanted).all() or wanted.sum() <= 0:
        raise ValueError(f"weights are {list(weights)}: give numbers of 0 or more, one of them above 0")
    wanted = wanted / wanted.sum() * PERIOD
    parts = np.floor(wanted).astype(np.int64)
    missing = PERIOD - int(parts.sum())
    parts[np.argsort(parts - wanted, kind="stable")[:missing]] += 1
    if ((parts == 0) & (wanted > 0)).any():
        raise ValueError(f"weights are {list(weights)}: one is below 1/{PERIOD} of all, too small to be kept to")
    return parts
