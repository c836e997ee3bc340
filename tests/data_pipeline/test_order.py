"""The order: a permutation every epoch, a different one each time, computed at any place in constant memory."""

import tracemalloc

import numpy as np
import pytest

from data_pipeline.order import Order

SIZES = [1, 2, 3, 4, 5, 7, 16, 17, 97, 100, 101, 997, 1000, 1023, 1024, 1025, 65537]
PINNED = (
    [8, 9, 5, 0, 6, 4, 2, 1, 3, 7, 0, 9, 4, 5, 1, 7, 2, 6, 8, 3],
    [690, 178, 303, 269, 497, 342, 88, 295, 434, 953],
)


def epoch_of(order: Order, epoch: int) -> np.ndarray:
    return order.sample_ids(np.arange(epoch * order.samples, (epoch + 1) * order.samples))


@pytest.mark.parametrize("samples", SIZES)
def test_every_epoch_holds_every_sample_once(samples: int) -> None:
    for seed in (0, 1, 2**63 + 5, -3):
        for epoch in (0, 1, 12345):
            ids = epoch_of(Order(samples, seed), epoch)
            assert np.array_equal(np.sort(ids), np.arange(samples))


def test_epochs_and_seeds_differ() -> None:
    orders = [epoch_of(Order(1000, seed), epoch) for seed in (0, 1, 2, -1) for epoch in (0, 1, 2)]
    for number, one in enumerate(orders):
        for other in orders[number + 1 :]:
            assert np.count_nonzero(one == other) < 10  # one is expected by chance


def test_epoch_of_one_seed_is_not_an_epoch_of_the_next() -> None:
    assert not np.array_equal(epoch_of(Order(1000, 0), 1), epoch_of(Order(1000, 1), 0))


def test_any_stretch_is_the_same_as_in_one_piece() -> None:
    order = Order(101, 3)
    whole = order.sample_ids(np.arange(1000))
    assert whole.dtype == np.int64
    for start, end in [(0, 1), (100, 102), (50, 350), (999, 1000), (7, 7)]:
        assert np.array_equal(order.sample_ids(np.arange(start, end)), whole[start:end])
    scattered = np.array([[999, 0], [101, 100], [5, 5]])
    assert np.array_equal(order.sample_ids(scattered), whole[scattered])
    assert order.sample_ids(np.array(100)) == whole[100]


@pytest.mark.parametrize("samples", [*SIZES, 10**9 + 7, 2**61 + 3])
def test_one_position_alone_is_the_same_as_among_others(samples: int) -> None:
    for seed in (0, 2**63 + 5, -3):
        order = Order(samples, seed)
        positions = np.unique(np.random.default_rng(1).integers(0, min(5 * samples, 2**62), 200))
        alone = [order.sample_ids(positions[number : number + 1])[0] for number in range(len(positions))]
        assert np.array_equal(alone, order.sample_ids(np.append(positions, 0))[:-1])
    with pytest.raises(ValueError, match="positions count from 0, but -1"):
        Order(samples, 0).sample_ids(np.array([-1]))


def test_the_order_is_the_one_that_past_runs_have_read() -> None:
    """A change here changes the data order of every run that resumes: do not, or raise the version of checkpoints."""
    assert Order(10, 0).sample_ids(np.arange(20)).tolist() == PINNED[0]
    assert Order(1000, 7).sample_ids(np.arange(995, 1005)).tolist() == PINNED[1]


def test_unshuffled_order_counts() -> None:
    assert Order(3, 9, shuffle=False).sample_ids(np.arange(8)).tolist() == [0, 1, 2, 0, 1, 2, 0, 1]


def test_epoch() -> None:
    order = Order(7, 0)
    assert order.epochs(np.array([0, 6, 7, 13, 14])).tolist() == [0, 0, 1, 1, 2]


@pytest.mark.parametrize("samples", [10, 64, 100])
def test_samples_land_everywhere_equally_often(samples: int) -> None:
    """Chi-square over (place, sample) of many epochs: about (n - 1)^2 when uniform, with deviation sqrt(2) (n - 1)."""
    epochs = 2000
    ids = Order(samples, 11).sample_ids(np.arange(samples * epochs)).reshape(epochs, samples)
    counts = np.zeros((samples, samples))
    np.add.at(counts, (np.broadcast_to(np.arange(samples), ids.shape), ids), 1)
    expected = epochs / samples
    chi_square = ((counts - expected) ** 2 / expected).sum()
    freedom = (samples - 1) ** 2
    assert abs(chi_square - freedom) < 5 * np.sqrt(2 * freedom)


def test_neighbours_are_not_kept_together() -> None:
    ids = epoch_of(Order(10_000, 5), 0)
    assert abs(np.corrcoef(ids[:-1], ids[1:])[0, 1]) < 0.05
    assert abs(np.corrcoef(ids, np.arange(10_000))[0, 1]) < 0.05
    assert np.count_nonzero(np.abs(np.diff(ids)) == 1) < 15  # two are expected


def test_successive_epochs_are_independent() -> None:
    first, second = epoch_of(Order(10_000, 5), 0), epoch_of(Order(10_000, 5), 1)
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.05


def test_a_trillion_samples_take_no_memory() -> None:
    order = Order(2**40 + 7, 1)
    tracemalloc.start()
    positions = np.arange(5 * 2**40, 5 * 2**40 + 1000)
    ids = order.sample_ids(positions)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20
    assert len(set(ids.tolist())) == 1000
    assert 0 <= ids.min() <= ids.max() < order.samples
    assert ids.max() - ids.min() > order.samples // 2


def test_the_largest_order_still_permutes() -> None:
    order = Order(2**62 - 1, 0)
    ids = order.sample_ids(np.arange(1000))
    assert len(set(ids.tolist())) == 1000
    assert 0 <= ids.min() <= ids.max() < order.samples


@pytest.mark.parametrize("samples", [0, -1, 2**62])
def test_impossible_sizes_are_refused(samples: int) -> None:
    with pytest.raises(ValueError, match=f"not {samples}"):
        Order(samples, 0)


def test_negative_positions_are_refused() -> None:
    with pytest.raises(ValueError, match="positions count from 0, but -2 was asked for"):
        Order(5, 0).sample_ids(np.array([3, -2]))
