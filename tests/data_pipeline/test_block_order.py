"""Block order: a permutation each epoch, local within windows, and its quality as measured."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from data_pipeline.block_order import BlockOrder, quality, quality_of
from data_pipeline.order import Order
from data_pipeline.reader import open_dataset
from data_pipeline.sample import Sample
from data_pipeline.shards import write_shards


@pytest.mark.parametrize(
    ("samples", "block", "window"),
    [(1, 1, 1), (7, 3, 2), (100, 10, 4), (1000, 7, 3), (1000, 64, 1000), (1009, 64, 4), (50, 100, 2), (4096, 64, 8)],
)
def test_every_epoch_is_a_permutation_and_no_two_are_alike(samples: int, block: int, window: int) -> None:
    order = BlockOrder(samples, 3, block, window)
    ids = order.sample_ids(np.arange(4 * samples)).reshape(4, samples)
    for row in ids:
        assert sorted(row.tolist()) == list(range(samples))
    if samples > 7:
        assert len({tuple(row.tolist()) for row in ids}) == 4
        assert not np.array_equal(ids[0], BlockOrder(samples, 4, block, window).sample_ids(np.arange(samples)))
    assert np.array_equal(order.epochs(np.arange(4 * samples)), np.repeat(np.arange(4), samples))


def test_any_position_is_looked_up_by_itself() -> None:
    order = BlockOrder(1009, 0, 16, 4)
    whole = order.sample_ids(np.arange(3000))
    for position in np.random.default_rng(0).integers(0, 3000, 100):
        assert order.sample_ids(np.array([position]))[0] == whole[position]
    with pytest.raises(ValueError, match="count from 0"):
        order.sample_ids(np.array([-1]))


def test_a_window_reads_few_blocks_and_mixes_them() -> None:
    order = BlockOrder(6400, 1, 64, 5)
    windows = order.sample_ids(np.arange(6400)).reshape(20, 320)
    for window in windows:
        assert len(np.unique(window // 64)) == 5
        assert (np.diff(window) == 1).mean() < 0.05, "neighbours do not follow each other"
    neighbours = [set((window // 64).tolist()) for window in windows]
    assert any(max(blocks) - min(blocks) > 50 for blocks in neighbours), "blocks come from everywhere"


def test_quality_tells_what_is_won_and_what_is_lost() -> None:
    samples, per_shard, size = 100_000, 1000, 60_000
    shard = np.arange(samples) // per_shard
    piece = np.arange(samples) * size // (1 << 20)
    sizes = np.full(samples, size)
    found = [
        quality(order, shard, piece, sizes, batch=256, batches=20, cache_pieces=200)
        for order in (BlockOrder(samples, 0, 64, 4), BlockOrder(samples, 0, 64, 32), Order(samples, 0))
    ]
    assert [each.shards_a_batch < 100 for each in found] == [True, True, True]
    assert found[0].shards_a_batch < found[1].shards_a_batch < found[2].shards_a_batch
    assert found[2].shards_a_batch == pytest.approx(found[2].shards_a_batch_shuffled, rel=0.05)
    assert found[0].neighbours > found[1].neighbours > found[2].neighbours
    assert found[0].fetched < 2 < 10 < found[2].fetched, "a full shuffle fetches a piece a sample"
    assert found[1].fetched < 3


def test_refused() -> None:
    for block, window in ((0, 1), (1, 0)):
        with pytest.raises(ValueError, match="give 1 or more of each"):
            BlockOrder(10, 0, block, window)


def test_a_billion_samples_in_constant_memory() -> None:
    order = BlockOrder(10**9, 5, 128, 64)
    ids = order.sample_ids(10**9 - 5000 + np.arange(10_000))
    assert ids.min() >= 0
    assert ids.max() < 10**9
    assert len(np.unique(ids[:5000])) == len(np.unique(ids[5000:])) == 5000


def test_the_quality_of_a_data_set_as_it_lies(tmp_path: Path) -> None:
    def make(number: int) -> Sample:
        return Sample(f"s{number}", {"txt": b"x" * 20_000})

    write_shards(600, make, tmp_path / "a", samples_per_shard=60, processes=0)
    dataset = open_dataset(tmp_path / "a")
    full = quality_of(Order(600, 0), dataset, batch=50, cache_pieces=6)
    blocks = quality_of(BlockOrder(600, 0, 60, 2), dataset, batch=50, cache_pieces=6)
    assert full.shards_a_batch > 9 > 4 > blocks.shards_a_batch
    assert blocks.fetched < 3 < full.fetched
    assert "a full shuffle" in str(blocks)
    with pytest.raises(ValueError, match="a batch of 601 does not fit"):
        quality_of(Order(600, 0), dataset, batch=601)


def test_blocks_beyond_the_data_set_are_cut_to_it() -> None:
    """As many as there are samples is a full shuffle, however much more is asked for."""
    order = BlockOrder(97, 3, 5 * 10**12, 10**12)
    assert (order.block, order.window) == (97, 1)
    assert sorted(order.sample_ids(np.arange(97)).tolist()) == [*range(97)]
    assert BlockOrder(97, 3, 8, 10**12) == BlockOrder(97, 3, 8, 13)
