"""Memory that workers write images into and the trainer reads them from, the same pages again and again.

Design choices:
- Pages are kept, because a fresh shared page costs the kernel more than filling it: a new allocation for every batch
  took 14% on top of decoding and resizing (512 x 384 JPEG to 224, AMD EPYC in a virtual machine, 2026).
- One anonymous shared mapping, made before the workers are forked. It has no name: nothing is left in /dev/shm however
  the processes die, and the size of /dev/shm, 64 MiB in many containers, is no limit.
- The trainer's process keeps the books: it sends a free slot along with what a worker is to make, and a slot is free
  again when the last tensor that looks into it is gone. There is no lock, and a batch that someone keeps is safe.
"""

from __future__ import annotations

import itertools
import math
import mmap
import weakref

import numpy as np
import torch


class Slots:
    """`count` places for one uint8 tensor of `shape`. Pickled from a worker, it is the trainer's own object again."""

    def __init__(self, count: int, shape: tuple[int, ...]) -> None:
        memory = mmap.mmap(-1, max(1, count * math.prod(shape)))
        self._memory = np.frombuffer(memory, np.uint8, count * math.prod(shape)).reshape(count, *shape)
        self._free = list(reversed(range(count)))
        self._number = next(_numbers)
        _slots[self._number] = self

    def take(self) -> int | None:
        """A free slot, from now on taken; None when all are."""
        return self._free.pop() if self._free else None

    def tensor(self, slot: int) -> torch.Tensor:
        """What lies in a slot: for a worker, to write it."""
        return torch.from_numpy(self._memory[slot])

    def lend(self, slot: int) -> torch.Tensor:
        """What lies in a slot: for the trainer, the slot being free again when nobody holds the tensor any more."""
        view = self._memory[slot]
        weakref.finalize(view, self._free.append, slot).atexit = False
        return torch.from_numpy(view)  # whose storage holds `view`, as does every tensor made from it

    def __reduce__(self) -> tuple[object, tuple[int]]:
        return _find, (self._number,)


_numbers = itertools.count()
_slots: weakref.WeakValueDictionary[int, Slots] = weakref.WeakValueDictionary()  # those of this process, by number


def _find(number: int) -> Slots:
    return _slots[number]
