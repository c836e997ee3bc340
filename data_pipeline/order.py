"""Which sample is read when: a pure function of (seed, epoch, position), in constant memory.

Each epoch is a permutation of 0 .. N - 1. It is computed and never stored, so any stretch of a run's order can be
asked for by anyone, and resuming at a step is one integer. Nothing depends on ranks or workers.

Design choices:
- A Feistel network on pairs (left, right) with left < a, right < b and a b >= N, a and b near sqrt(N). A round adds a
  keyed hash of one half to the other, modulo its radix; each round can be undone, so all rounds together permute
  the a b pairs whatever the hash is.
- Pairs beyond N are encrypted again until they fall below N ("cycle walking"), which makes it a permutation of N.
  a b - N < a, so few positions walk, and each only a little.
- Everything is numpy over whole arrays; the epoch is part of the key, so one call may span epochs.
- A single position would spend some 300 microseconds in numpy's calls: it goes the same way in Python's integers.

Black and Rogaway 2002, "Ciphers with Arbitrary Finite Domains" (generalised Feistel, cycle walking).
Hash: the finaliser of SplitMix64 (Steele, Lea and Flood 2014, "Fast Splittable Pseudorandom Number Generators").
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt
from typing import Protocol

import numpy as np

ROUNDS = 10
LARGEST = 1 << 62  # positions and ids are int64
WORD = (1 << 64) - 1


class ReadingOrder(Protocol):
    """What a loader needs to know: Order, BlockOrder and Mixture are three."""

    @property
    def samples(self) -> int:
        """How many different samples there are."""

    def sample_ids(self, positions: np.ndarray) -> np.ndarray:
        """Sample ids at positions, both int64 [...]."""

    def epochs(self, positions: np.ndarray) -> np.ndarray:
        """How often the sample at each position has been read before, int64 [...]; draws depend on it."""


@dataclass(frozen=True)
class Order:
    """The endless reading order of `samples` samples: epoch after epoch, each shuffled anew from `seed`.

    With shuffle=False every epoch is 0 .. samples - 1. ValueError unless 1 <= samples < 2^62.
    """

    samples: int
    seed: int
    shuffle: bool = True

    def __post_init__(self) -> None:
        if not 1 <= self.samples < LARGEST:
            raise ValueError(f"an order needs 1 to 2^62 samples, not {self.samples}")

    def epochs(self, positions: np.ndarray) -> np.ndarray:
        """The epoch that each position lies in, int64."""
        return np.asarray(positions, dtype=np.int64) // self.samples

    def sample_ids(self, positions: np.ndarray) -> np.ndarray:
        """Sample ids (int64, the shape of `positions`) at int64 positions; ValueError for a negative one."""
        positions = np.asarray(positions, dtype=np.int64)
        if positions.size == 1 and self.shuffle and (position := positions.item()) >= 0:
            return np.array(self._sample_id(position)).reshape(positions.shape)
        epochs, places = split(positions, self.samples)
        if not self.shuffle:
            return places
        keys = mix(mix(np.uint64(self.seed % 2**64)) + epochs.astype(np.uint64))
        return permute(places.ravel(), keys.ravel(), self.samples).reshape(places.shape)

    def _sample_id(self, position: int) -> int:
        """The same for one position."""
        epoch, place = divmod(position, self.samples)
        key = _mix_one(_mix_one(self.seed % 2**64) + epoch)
        place = _feistel_one(place, key, self.samples)
        while place >= self.samples:
            place = _feistel_one(place, key, self.samples)
        return place


def split(positions: np.ndarray, samples: int) -> tuple[np.ndarray, np.ndarray]:
    """(epoch, place within it) of each position, int64; ValueError for a negative one."""
    positions = np.asarray(positions, dtype=np.int64)
    if positions.size and positions.min() < 0:
        raise ValueError(f"positions count from 0, but {positions.min()} was asked for")
    return np.divmod(positions, samples)


def permute(places: np.ndarray, keys: np.ndarray, count: int) -> np.ndarray:
    """Where each place goes in the permutation of 0 .. count - 1 under its key; int64, uint64 -> int64, all [n]."""
    moved = _feistel(places.astype(np.uint64), keys, count)
    (walking,) = np.nonzero(moved >= count)
    while walking.size:
        moved[walking] = _feistel(moved[walking], keys[walking], count)
        walking = walking[moved[walking] >= count]
    return moved.astype(np.int64)


def _radices(count: int) -> tuple[int, int]:
    """a and b near the square root of count, with a b >= count."""
    a = isqrt(count - 1) + 1
    return a, -(-count // a)


def _feistel(places: np.ndarray, keys: np.ndarray, count: int) -> np.ndarray:
    """One permutation of 0 .. a b - 1 a key; places and keys uint64 [n]."""
    radix_left, radix_right = map(np.uint64, _radices(count))
    left: np.ndarray = places // radix_right
    right: np.ndarray = places % radix_right
    for number in range(0, ROUNDS, 2):
        left = (left + mix(keys + mix(right + np.uint64(number << 32))) % radix_left) % radix_left
        right = (right + mix(keys + mix(left + np.uint64(number + 1 << 32))) % radix_right) % radix_right
    return left * radix_right + right


def mix(numbers: np.ndarray | np.uint64) -> np.ndarray:
    """The finaliser of SplitMix64: uint64 -> uint64 of the same shape, every bit depending on every bit."""
    mixed = np.atleast_1d(numbers) + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (mixed ^ (mixed >> np.uint64(31))).reshape(np.shape(numbers))


# --- one number at a time


def _feistel_one(place: int, key: int, count: int) -> int:
    """What `_feistel` does, of one place."""
    radix_left, radix_right = _radices(count)
    left, right = divmod(place, radix_right)
    for number in range(0, ROUNDS, 2):
        left = (left + _mix_twice(right + (number << 32), key)) % radix_left
        right = (right + _mix_twice(left + (number + 1 << 32), key)) % radix_right
    return left * radix_right + right


def _mix_twice(number: int, key: int) -> int:
    """mix(key + mix(number)), written out: calls are half of the time."""
    number = (number + 0x9E3779B97F4A7C15) & WORD
    number = ((number ^ (number >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    number = ((number ^ (number >> 27)) * 0x94D049BB133111EB) & WORD
    return _mix_one(key + (number ^ (number >> 31)))


def _mix_one(number: int) -> int:
    """What `mix` does, of one number, taken modulo 2^64."""
    number = (number + 0x9E3779B97F4A7C15) & WORD
    number = ((number ^ (number >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    number = ((number ^ (number >> 27)) * 0x94D049BB133111EB) & WORD
    return number ^ (number >> 31)
