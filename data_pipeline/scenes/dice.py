"""The named random streams of the scene world.

Design choices:
- Every draw is a pure function of (seed, purpose, index): no stream is shared, so a scene, its picture and its
  words can each be made again alone, in any process and in any order.
- The bit generator is named (PCG64), never numpy's default, which may change between releases.
- `Dice` turns one block of uniforms into choices. Asking numpy for one integer at a time would cost more than
  drawing the picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

Item = TypeVar("Item")

PURPOSES = ("train scene", "test scene", "train look", "test look", "train words", "test words")
_BLOCK = 64


def stream(seed: int, purpose: str, index: int) -> np.random.Generator:
    """Random generator of one purpose (one of PURPOSES) of sample `index`; pure in its arguments."""
    entropy = np.random.SeedSequence((seed, PURPOSES.index(purpose), index))
    return np.random.Generator(np.random.PCG64(entropy))


class Dice:
    """Quick choices from one random stream."""

    def __init__(self, generator: np.random.Generator) -> None:
        self._generator = generator
        self._uniforms: list[float] = []

    def uniform(self) -> float:
        """One number in [0, 1)."""
        if not self._uniforms:
            self._uniforms = self._generator.random(_BLOCK).tolist()
        return self._uniforms.pop()

    def pick(self, options: Sequence[Item]) -> Item:
        """One of the options, all equally likely."""
        return options[int(self.uniform() * len(options))]

    def happens(self, probability: float) -> bool:
        """True with this probability."""
        return self.uniform() < probability

    def shuffled(self, options: Sequence[Item]) -> list[Item]:
        """The options in random order."""
        return sorted(options, key=lambda _: self.uniform())
