"""Several data sets as one: ids count through them, in the order given. What a Mixture reads from."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

import numpy as np

from data_pipeline.reader import Dataset
from data_pipeline.sample import Sample


class Joined:
    """Samples 0 to len - 1 of all `parts`; picklable, and used as a Dataset is."""

    def __init__(self, parts: Sequence[Dataset]) -> None:
        self.parts = tuple(parts)
        self._first = [0, *accumulate(len(part) for part in self.parts)]

    def __len__(self) -> int:
        return self._first[-1]

    @property
    def folder(self) -> str:
        """Where the parts are."""
        return " + ".join(str(part.folder) for part in self.parts)

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) of what is in the parts, in their order."""
        return hashlib.sha256(" ".join(part.fingerprint for part in self.parts).encode()).hexdigest()

    def part(self, sample: int) -> tuple[int, int]:
        """(number of the part, id within it) of a sample; IndexError outside 0 .. len - 1."""
        if not 0 <= sample < len(self):
            raise IndexError(f"sample {sample} of {self.folder}, which has samples 0 to {len(self) - 1}")
        number = bisect_right(self._first, sample) - 1
        return number, sample - self._first[number]

    def read(self, sample: int) -> Sample:
        """The sample's key and bytes; as Dataset.read."""
        number, own = self.part(sample)
        return self.parts[number].read(own)

    def key(self, sample: int) -> str:
        """The key of a sample; its bytes are not read."""
        number, own = self.part(sample)
        return self.parts[number].key(own)

    def shard_file(self, sample: int) -> str:
        """Folder and file name of the shard that holds a sample."""
        number, own = self.part(sample)
        return f"{self.parts[number].folder}/{self.parts[number].shard_file(own)}"

    def remarks(self) -> list[str]:
        """As Dataset.remarks, of every part."""
        return [remark for part in self.parts for remark in part.remarks()]

    def alike(self, sample: int) -> range:
        """The ids of samples that may stand for this one when it cannot be used: all of its part."""
        number, _ = self.part(sample)
        return range(self._first[number], self._first[number + 1])

    def aspects(self) -> np.ndarray:
        """float32 [samples]: as Dataset.aspects."""
        return np.concatenate([part.aspects() for part in self.parts])

    def close(self) -> None:
        """Close every file; the next read opens what it needs."""
        for part in self.parts:
            part.close()
