"""Random access: every sample as it went in, errors that name the shard, and few open files."""

import os
import pickle
import tracemalloc
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from tars import tar_of

from data_pipeline import files
from data_pipeline.block_order import BlockOrder
from data_pipeline.errors import DataError
from data_pipeline.index import Index, ShardEntry
from data_pipeline.mixture import Mixture, Phase
from data_pipeline.order import Order
from data_pipeline.reader import Dataset, open_dataset, read_order
from data_pipeline.sample import Sample
from data_pipeline.shards import write_shards

COUNT, PER_SHARD = 23, 3


def make(number: int) -> Sample:
    fields = {"txt": f"caption {number}".encode(), "bin": bytes([number]) * (number * 137 % 1500)}
    if number % 2:
        fields["json"] = b'{"label": "odd"}'
    return Sample(f"f{number % 2}/key-{number}", fields)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reader") / "set"
    write_shards(COUNT, make, folder, samples_per_shard=PER_SHARD, processes=1)
    return folder


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    copy = tmp_path / "set"
    copy.mkdir()
    for path in written.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    return copy


def test_every_sample_is_what_went_in(written: Path) -> None:
    dataset = open_dataset(written)
    assert len(dataset) == COUNT
    for number in [*range(COUNT), 22, 0, 11]:
        assert dataset.read(number) == make(number)
        assert dataset.key(number) == make(number).key


def test_locate(written: Path) -> None:
    dataset = open_dataset(str(written))
    assert [dataset.locate(number) for number in (0, 2, 3, 22)] == [(0, 0), (0, 2), (1, 0), (7, 1)]
    assert dataset.shard_file(5) == "shard-000001.tar"


@pytest.mark.parametrize("number", [-1, COUNT, 10**12])
def test_outside_is_an_index_error_that_says_what_there_is(written: Path, number: int) -> None:
    for ask in (Dataset.read, Dataset.key, Dataset.locate, Dataset.shard_file):
        with pytest.raises(IndexError, match=f"sample {number} of .*, which has samples 0 to 22"):
            ask(open_dataset(written), number)


def test_empty_shards_between_others(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(tar_of({"a.txt": b"1"}))
    (tmp_path / "b.tar").write_bytes(tar_of({"README": b"no sample"}))
    (tmp_path / "c.tar").write_bytes(tar_of({"c.txt": b"3", "d.txt": b""}))
    dataset = open_dataset(tmp_path)
    expected = {"a": b"1", "c": b"3", "d": b""}
    assert [dataset.read(i) for i in range(3)] == [Sample(key, {"txt": data}) for key, data in expected.items()]


def test_a_shard_truncated_after_it_was_opened_is_named(folder: Path) -> None:
    dataset = open_dataset(folder)
    path = folder / "shard-000002.tar"
    os.truncate(path, 1600)
    with pytest.raises(DataError, match=r"shard-000002\.tar is truncated: sample 'f0/key-8' should end at byte"):
        dataset.read(8)
    assert dataset.read(0) == make(0)


def test_a_shard_truncated_before_it_is_opened_is_named(folder: Path) -> None:
    os.truncate(folder / "shard-000002.tar", 1600)
    with pytest.raises(DataError, match=r"shard-000002\.tar has 1600 bytes, but \d+ in the index"):
        open_dataset(folder)


def test_a_shard_that_shrinks_while_it_is_open_is_an_error_and_no_crash(folder: Path) -> None:
    dataset = open_dataset(folder)
    assert dataset.read(6) == make(6)
    os.truncate(folder / "shard-000002.tar", 0)
    with pytest.raises(DataError, match=r"shard-000002\.tar is truncated"):
        dataset.read(6)


def test_a_shard_that_is_gone_is_named(folder: Path) -> None:
    dataset = open_dataset(folder)
    (folder / "shard-000001.tar").unlink()
    with pytest.raises(FileNotFoundError, match=r"shard-000001\.tar"):
        dataset.read(3)


def test_a_table_that_is_gone_is_named(folder: Path) -> None:
    dataset = open_dataset(folder)
    (folder / "shard-000001.tar.idx.npz").unlink()
    with pytest.raises(DataError, match=r"shard-000001\.tar\.idx\.npz is missing"):
        dataset.key(4)


def test_pickled_data_sets_read_on(written: Path) -> None:
    dataset = open_dataset(written)
    dataset.read(0)
    copy = pickle.loads(pickle.dumps(dataset))
    assert copy.fingerprint == dataset.fingerprint
    assert [copy.read(i) for i in range(COUNT)] == [make(i) for i in range(COUNT)]
    dataset.close()
    assert copy.read(0) == make(0)  # its files are its own


def test_other_processes_read_the_same(written: Path) -> None:
    dataset = open_dataset(written)
    dataset.read(0)
    with ProcessPoolExecutor(2) as pool:
        assert list(pool.map(dataset.read, range(COUNT))) == [make(i) for i in range(COUNT)]


def open_files() -> int:
    descriptors = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
    # the descriptor of the listing itself is closed by now
    return sum(os.readlink(path).endswith(".tar") for path in descriptors if os.path.lexists(path))


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts open files in /proc")
def test_more_shards_than_files_may_be_open(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MOST_OPEN", 3)
    dataset = open_dataset(written)
    before = open_files()
    for number in np.random.default_rng(0).integers(0, COUNT, 200).tolist():
        assert dataset.read(number) == make(number)
        assert open_files() - before <= 3
    dataset.close()
    assert open_files() == before
    assert dataset.read(5) == make(5)
    del dataset
    assert open_files() == before


def test_the_shard_read_longest_ago_is_closed_first(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MOST_OPEN", 2)
    dataset = open_dataset(written)
    for number in (0, 3, 0, 6):
        dataset.read(number)
    assert list(dataset.files._open) == ["shard-000000.tar", "shard-000002.tar"]


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no such folder"):
        open_dataset(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"there is no \.tar file"):
        open_dataset(tmp_path)


def test_read_order_tells_what_a_run_reads(written: Path) -> None:
    dataset, order = open_dataset(written), Order(COUNT, seed=4)
    rows = read_order(dataset, order, COUNT - 2, 5)
    assert [row["position"] for row in rows] == [21, 22, 23, 24, 25]
    assert [row["epoch"] for row in rows] == [0, 0, 1, 1, 1]
    assert [row["sample"] for row in rows] == order.sample_ids(np.arange(21, 26)).tolist()
    for row in rows:
        assert row["key"] == make(row["sample"]).key
        assert (row["shard"], row["offset"]) == (f"shard-{row['sample'] // 3:06}.tar", row["sample"] % 3)
    assert read_order(dataset, order, 3, 0) == []


def test_ten_thousand_shards_and_a_billion_samples_take_no_memory(tmp_path: Path) -> None:
    shards = (
        ShardEntry(f"s-{n:06d}.tar", 100_000, 10**10 + n, "sha256:" + "0" * 64, ("image",)) for n in range(10_000)
    )
    Index(tuple(shards)).save(tmp_path)
    dataset = Dataset(tmp_path, Index.load(tmp_path))
    assert len(dataset) == 10**9
    assert dataset.locate(123_456_789) == (1234, 56_789)
    positions = np.arange(5 * 10**8, 5 * 10**8 + 4096)
    sources = (Order(9 * 10**8, 0), Order(10**8, 1))
    for order in (Order(10**9, 0), BlockOrder(10**9, 0, 1000, 64), Mixture(sources, (Phase(0, (3, 1)),), 0)):
        tracemalloc.start()
        ids = order.sample_ids(positions)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 2e6, "memory is that of the batch, whatever the data set's size"
        assert len(set(ids.tolist())) == 4096
        assert all(dataset.locate(number)[1] == number % 100_000 for number in ids[:50].tolist())
