"""Which of many 64-bit codes are within a distance of one: multi-index hashing (Norouzi, Punjani and Fleet 2012).

A code is cut into m bands. If two codes differ in at most d = m * r + a bits, then one of the first a + 1 bands differs
in at most r bits, or one of the others in at most r - 1. So it is enough to look up each band of a query, with so many
bits turned, among the same bands of all codes. Nothing within the distance is missed. With bands of about log2(n) bits
a bucket holds about one code, and the cost of a look-up hardly grows with n.
"""

from __future__ import annotations

import math
from collections import defaultdict
from itertools import combinations, pairwise

BITS = 64


class HammingIndex:
    """Codes to look up within `distance` bits; made for about `expected` of them."""

    def __init__(self, distance: int, expected: int) -> None:
        self.distance = distance
        bands = min(max(2, round(BITS / math.log2(max(4, expected)))), distance + 1)
        edges = [BITS * band // bands for band in range(bands + 1)]
        radius, rest = divmod(distance, bands)
        self._codes: list[int] = []
        self._bands: list[_Band] = []
        for band, (low, high) in enumerate(pairwise(edges)):
            turned = radius if band <= rest else radius - 1
            if turned >= 0:
                self._bands.append(_Band(low, high - low, turned))

    def __len__(self) -> int:
        return len(self._codes)

    def add(self, code: int) -> int:
        """Add a code; returns its number."""
        number = len(self._codes)
        self._codes.append(code)
        for band in self._bands:
            band.add(code, number)
        return number

    def near(self, code: int) -> list[tuple[int, int]]:
        """(distance, number) of every code within the distance, the nearest first."""
        candidates: set[int] = set()
        for band in self._bands:
            candidates.update(band.near(code))
        found = [((self._codes[number] ^ code).bit_count(), number) for number in candidates]
        return sorted(each for each in found if each[0] <= self.distance)


class _Band:
    """Some neighbouring bits of all codes."""

    def __init__(self, low: int, width: int, turned: int) -> None:
        self._low = low
        self._mask = (1 << width) - 1
        self._numbers: defaultdict[int, list[int]] = defaultdict(list)
        self._turns = [
            sum(1 << bit for bit in bits) for count in range(turned + 1) for bits in combinations(range(width), count)
        ]

    def add(self, code: int, number: int) -> None:
        self._numbers[code >> self._low & self._mask].append(number)

    def near(self, code: int) -> list[int]:
        """Numbers of the codes whose bits here differ in at most `turned` places."""
        mine = code >> self._low & self._mask
        numbers = self._numbers
        return [number for turn in self._turns if mine ^ turn in numbers for number in numbers[mine ^ turn]]
