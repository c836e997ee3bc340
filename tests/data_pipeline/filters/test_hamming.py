"""Multi-index hashing finds exactly what comparing with every code finds."""

import random

import pytest

from data_pipeline.filters.hamming import HammingIndex


@pytest.mark.parametrize("distance", [0, 1, 3, 7, 8, 11])
@pytest.mark.parametrize("expected", [1, 400, 10**6])
def test_nothing_within_the_distance_is_missed_and_nothing_beyond_it_found(distance: int, expected: int) -> None:
    draw = random.Random(distance)
    codes = [draw.getrandbits(64) for _ in range(60)]
    for code in codes[:40]:  # neighbours on both sides of the border, and far ones
        for turned in (0, 1, distance, distance + 1, distance + 2):
            for bit in draw.sample(range(64), turned):
                code ^= 1 << bit
            codes.append(code)
    codes += [0, 2**64 - 1, 2 ** (distance + 1) - 1]
    index = HammingIndex(distance, expected)
    assert [index.add(code) for code in codes] == list(range(len(codes)))
    for query in codes:
        by_comparing = sorted(((query ^ code).bit_count(), number) for number, code in enumerate(codes))
        assert index.near(query) == [each for each in by_comparing if each[0] <= distance]


def test_a_query_looks_at_few_of_many_codes() -> None:
    draw = random.Random(0)
    index = HammingIndex(8, 4000)
    codes = [draw.getrandbits(64) for _ in range(4000)]
    for code in codes:
        index.add(code)
    looked_at = sum(len(set().union(*(band.near(code) for band in index._bands))) for code in codes[:200])
    assert looked_at / 200 < 4000 / 20
