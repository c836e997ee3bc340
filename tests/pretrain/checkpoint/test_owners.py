"""Every parameter is written by exactly one rank, and all have about as much to write."""

import pytest

from pretrain.checkpoint.owners import Entry, number_files, share_out

SHAPES = [(1000, 64), (64, 256), (256, 64), (64,), (64,), (256,), (64, 64), (64, 192), (1,), ()]
ENTRIES = [Entry(f"layer.{number}", shape, trained=number % 3 > 0) for number, shape in enumerate(SHAPES)]


@pytest.mark.parametrize("ranks", [1, 2, 3, 7, 16])
def test_each_is_owned_once_in_the_order_of_the_model(ranks: int) -> None:
    owned = share_out(ENTRIES, ranks)
    assert len(owned) == ranks
    assert sorted(each.name for entries in owned for each in entries) == sorted(each.name for each in ENTRIES)
    for entries in owned:
        assert entries == [each for each in ENTRIES if each in entries]
    assert share_out(ENTRIES, ranks) == owned


def test_the_load_is_even_and_counts_moments() -> None:
    entries = [Entry(f"trained.{number}", (100,), True) for number in range(8)]
    entries += [Entry(f"frozen.{number}", (100,), False) for number in range(24)]
    for owned in share_out(entries, 4):
        assert sum(each.numbers for each in owned) == 100 * (8 * 3 + 24) / 4


def test_files_are_numbered_over_those_who_own_any() -> None:
    stages = [[Entry("a", (4,), True)], [Entry("b", (4,), True), Entry("c", (2,), True)], []]
    files = number_files(stages, ranks=3)
    assert {key: (file.number, file.count) for key, file in files.items()} == {
        (0, 0): (0, 3),
        (1, 0): (1, 3),
        (1, 1): (2, 3),
    }
