"""Mixtures: proportions, epochs and phases, all arithmetic on the position; and the batches that come of them."""

from __future__ import annotations

import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipeline.batch import BatchMaker
from data_pipeline.joined import Joined
from data_pipeline.loader import Loader
from data_pipeline.mixture import PERIOD, Mixture, Phase
from data_pipeline.order import Order
from data_pipeline.reader import open_dataset
from data_pipeline.sample import Sample
from data_pipeline.shards import write_shards
from data_pipeline.transforms import TextTransform


def mixture(*phases: Phase, sizes: tuple[int, ...] = (3000, 70), seed: int = 0) -> Mixture:
    return Mixture([Order(size, 10 + number) for number, size in enumerate(sizes)], phases, seed)


def test_each_source_has_its_share_exactly_and_its_own_epochs() -> None:
    mixed = mixture(Phase(0, (3, 1)))
    positions = np.arange(4 * PERIOD)
    sources, ids, epochs = mixed.sources(positions), mixed.sample_ids(positions), mixed.epochs(positions)
    assert np.bincount(sources).tolist() == [3 * PERIOD, PERIOD]
    for number, order in enumerate(mixed.orders):
        mine = sources == number
        count = np.arange(mine.sum())
        assert np.array_equal(ids[mine] - mixed.first_ids[number], order.sample_ids(count)), (
            "its own order, undisturbed"
        )
        assert np.array_equal(epochs[mine], count // order.samples)
    assert epochs[sources == 1].max() > 50 > epochs[sources == 0].max()
    # in a shuffled arrangement: stretches of a batch are near the share, and no period is like another
    for start in range(0, len(positions), 512):
        assert 0.6 < (sources[start : start + 512] == 0).mean() < 0.9
    assert not np.array_equal(sources[:PERIOD], sources[PERIOD : 2 * PERIOD])


def test_any_position_is_looked_up_by_itself() -> None:
    mixed = mixture(Phase(0, (2, 1, 1)), Phase(1001, (0, 1, 5)), Phase(9000, (1, 0, 0)), sizes=(50, 60, 70))
    positions = np.arange(20_000)
    whole = mixed.sample_ids(positions), mixed.epochs(positions), mixed.sources(positions)
    generator = np.random.default_rng(0)
    for _ in range(50):
        start, length = int(generator.integers(0, 19_000)), int(generator.integers(1, 999))
        part = positions[start : start + length]
        for all_of_them, function in zip(whole, (mixed.sample_ids, mixed.epochs, mixed.sources), strict=True):
            assert np.array_equal(function(part), all_of_them[part])
        assert mixed.counts(start) == np.bincount(whole[2][:start], minlength=3).tolist()
    again = pickle.loads(pickle.dumps(mixed))
    assert np.array_equal(again.sample_ids(positions), whole[0])
    far = 10**12 + np.arange(100)
    assert np.array_equal(mixed.sample_ids(far)[50:], mixed.sample_ids(far[50:]))


def test_weights_change_with_the_position_and_a_source_goes_on_where_it_was() -> None:
    mixed = mixture(Phase(0, (1, 1)), Phase(1000, (1, 0)), Phase(3000, (1, 3)))
    sources = mixed.sources(np.arange(3000 + PERIOD))
    assert set(sources[1000:3000]) == {0}
    assert np.bincount(sources[3000:]).tolist() == [PERIOD // 4, 3 * PERIOD // 4]
    second = np.flatnonzero(sources == 1)
    own = mixed.sample_ids(second) - 3000
    assert np.array_equal(own, mixed.orders[1].sample_ids(np.arange(len(second)))), "nothing skipped, nothing twice"


def test_the_seed_changes_the_arrangement_only() -> None:
    first, second = (mixture(Phase(0, (1, 1)), seed=seed).sources(np.arange(PERIOD)) for seed in (0, 1))
    assert not np.array_equal(first, second)
    assert Counter(first.tolist()) == Counter(second.tolist())


@pytest.mark.parametrize(
    ("phases", "reason"),
    [
        ([], "the first at 0"),
        ([Phase(5, (1, 1))], "the first at 0"),
        ([Phase(0, (1, 1)), Phase(0, (1, 2))], "each after the one before"),
        ([Phase(0, (1,))], "1 weights for 2 sources"),
        ([Phase(0, (0, 0))], "one of them above 0"),
        ([Phase(0, (1, -1))], "numbers of 0 or more"),
        ([Phase(0, (1, float("nan")))], "numbers of 0 or more"),
        ([Phase(0, (1, 1e-6))], "too small to be kept to"),
    ],
)
def test_what_makes_no_sense_is_refused(phases: list[Phase], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        mixture(*phases)
    with pytest.raises(ValueError, match="count from 0"):
        mixture(Phase(0, (1, 1))).sample_ids(np.array([3, -1]))


# --- through the loader


@pytest.fixture(scope="module")
def joined(tmp_path_factory: pytest.TempPathFactory) -> Joined:
    def write(name: str, count: int, unusable: tuple[int, ...] = ()) -> Path:
        def make(number: int) -> Sample:
            return Sample(f"{name}{number}", {"txt": b"\xff" if number in unusable else f"{name} {number}".encode()})

        folder = tmp_path_factory.mktemp("mixture") / name
        write_shards(count, make, folder, samples_per_shard=8, processes=0)
        return folder

    return Joined([open_dataset(write("cats", 40)), open_dataset(write("dogs", 9, unusable=(3,)))])


class Whole:
    def encode(self, text: str, context: int) -> np.ndarray:
        return np.frombuffer(text.encode().ljust(context)[:context], np.uint8).astype(np.int32)


def texts(batch: torch.Tensor) -> list[str]:
    return [bytes(row).decode().strip() for row in batch.to(torch.uint8).numpy()]


def test_any_ranks_and_workers_read_the_same(joined: Joined) -> None:
    maker = BatchMaker(joined, None, TextTransform(Whole(), 8), 0, training=True)
    mixed = Mixture([Order(40, 0), Order(9, 0)], [Phase(0, (1, 1)), Phase(48, (1, 0))], 0)

    def read(world: int, workers: int, start: int = 0) -> list[list[str]]:
        loaders = [
            Loader(
                maker, mixed, global_batch=12, rank=rank, world=world, workers=workers, start_step=start, stop_step=8
            )
            for rank in range(world)
        ]
        return [[text for batch in step for text in texts(batch.text)] for step in zip(*loaders, strict=True)]

    truth = read(1, 0)
    assert read(2, 2) == read(4, 0) == truth
    assert read(2, 1, start=5) == truth[5:]
    kinds = Counter(text.split()[0] for step in truth[:4] for text in step)
    assert kinds["cats"] + kinds["dogs"] == 48
    assert 12 < kinds["dogs"] < 36
    assert {text.split()[0] for step in truth[4:] for text in step} == {"cats"}
    (first,) = list(Loader(maker, mixed, global_batch=48, stop_step=1))
    assert {corrupt.key for corrupt in first.corrupt} == {"dogs3"}
    assert all(Path(corrupt.shard).name.startswith("shard-") for corrupt in first.corrupt)
    replaced = [texts(first.text)[row] for row in range(48) if mixed.sources(np.arange(48))[row] == 1]
    assert {text.split()[0] for text in replaced} == {"dogs"}, "what stands for a dog is a dog"


def test_joined_is_its_parts(joined: Joined) -> None:
    assert len(joined) == 49
    assert [joined.key(number) for number in (0, 39, 40, 48)] == ["cats0", "cats39", "dogs0", "dogs8"]
    assert joined.read(41).fields["txt"] == b"dogs 1"
    assert joined.alike(45) == range(40, 49)
    assert joined.fingerprint != Joined(joined.parts[::-1]).fingerprint
    with pytest.raises(IndexError, match="sample 49 of"):
        joined.read(49)
