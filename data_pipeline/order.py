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

Black and Rogaway 2002, "Ciphers with Arbitrary Finite Domains" (generalised Feistel, cycle walking).
Hash: the finaliser of SplitMix64 (Steele, Lea and Flood 2014, "Fast Splittable Pseudorandom Number Generators").
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt

import numpy as np

ROUNDS = 10
LARGEST = 1 << 62  # positions and ids are int64


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

    def epoch(self, position: int) -> int:
        """The epoch that a position lies in."""
        return position // self.samples

    def sample_ids(self, positions: np.ndarray) -> np.ndarray:
        """Sample ids (int64, the shape of `positions`) at int64 positions; ValueError for a negative one."""
        positions = np.asarray(positions, dtype=np.int64)
        if positions.size and positions.min() < 0:
            raise ValueError(f"positions count from 0, but {positions.min()} was asked for")
        epochs, places = np.divmod(positions, self.samples)
        if not self.shuffle:
            return places
        keys = _hash(_hash(np.uint64(self.seed % 2**64)) + epochs.astype(np.uint64))
        return self._permute(places.astype(np.uint64).ravel(), keys.ravel()).astype(np.int64).reshape(positions.shape)

    def _permute(self, places: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """Where each place goes under its key; both uint64 [n]."""
        places = self._feistel(places, keys)
        (walking,) = np.nonzero(places >= self.samples)
        while walking.size:
            places[walking] = self._feistel(places[walking], keys[walking])
            walking = walking[places[walking] >= self.samples]
        return places

    def _feistel(self, places: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """One permutation of 0 .. a b - 1 a key; places and keys uint64 [n]."""
        a = isqrt(self.samples - 1) + 1
        b = -(-self.samples // a)
        radix_left, radix_right = np.uint64(a), np.uint64(b)
        left: np.ndarray = places // radix_right
        right: np.ndarray = places % radix_right
        for number in range(0, ROUNDS, 2):
            left = (left + _hash(keys + _hash(right + np.uint64(number << 32))) % radix_left) % radix_left
            right = (right + _hash(keys + _hash(left + np.uint64(number + 1 << 32))) % radix_right) % radix_right
        return left * radix_right + right


def _hash(numbers: np.ndarray | np.uint64) -> np.ndarray:
    """The finaliser of SplitMix64: uint64 -> uint64 of the same shape, every bit depending on every bit."""
    mixed = np.atleast_1d(numbers) + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (mixed ^ (mixed >> np.uint64(31))).reshape(np.shape(numbers))
