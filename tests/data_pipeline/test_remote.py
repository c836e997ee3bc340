"""Shards at a URL: a real S3 server and a web server that misbehaves, killed and started again, on loopback."""

from __future__ import annotations

import hashlib
import os
import pickle
import re
import shutil
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from servers import KEYS, S3Server, WebServer

from data_pipeline import remote
from data_pipeline.batch import Batch, BatchMaker
from data_pipeline.errors import DamagedSampleError, DataError
from data_pipeline.index import INDEX_FILE, load_index, load_table, table_path
from data_pipeline.loader import Loader
from data_pipeline.order import Order
from data_pipeline.reader import Dataset, open_dataset
from data_pipeline.remote import Cache
from data_pipeline.sample import Sample
from data_pipeline.shards import write_shards

pytest.importorskip("fsspec")

SAMPLES = 40


def make(number: int) -> Sample:
    """About 9 kB, no two alike."""
    return Sample(f"s{number:03d}", {"txt": b"caption %d" % number, "jpg": bytes([number]) * (9000 + number)})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "shards"
    write_shards(SAMPLES, make, folder, samples_per_shard=10, processes=0)
    return folder


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "PIECE", 16 << 10)  # a shard is six of them
    monkeypatch.setattr(remote, "STREAM", 30 << 10)


def read_all(dataset: Dataset) -> None:
    assert [dataset.read(number) for number in range(len(dataset))] == [make(number) for number in range(SAMPLES)]


# --- a web server


@pytest.fixture
def web(folder: Path) -> Iterator[WebServer]:
    server = WebServer(folder)
    yield server
    server.stop()


def test_it_is_the_data_set_that_lies_there(web: WebServer, folder: Path, tmp_path: Path) -> None:
    dataset = open_dataset(web.url, Cache(tmp_path))
    local = open_dataset(folder)
    assert dataset.fingerprint == local.fingerprint
    read_all(dataset)
    read_all(pickle.loads(pickle.dumps(dataset)))
    requests = len([each for each in web.asked if "GET" in each and ".tar bytes" in each])
    pieces = sum(-(-shard.bytes // remote.PIECE) for shard in local.index.shards)
    ends = len(local.index.shards)  # what lies behind the last byte is asked for too
    assert requests <= pieces + ends, "every piece was fetched once, though all was read twice"
    assert dataset.folder == web.url


def test_without_a_cache_exactly_what_is_read_is_fetched(web: WebServer, tmp_path: Path) -> None:
    read_all(open_dataset(web.url, Cache(tmp_path, 0)))
    assert len([each for each in web.asked if ".tar bytes" in each]) == SAMPLES
    assert not list(tmp_path.glob("*/pieces/*"))


def test_a_folder_of_plain_tars_is_indexed_once(folder: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.mkdir()
    for path in folder.glob("*.tar"):
        shutil.copy(path, plain)
    server = WebServer(plain)
    try:
        for _ in range(2):
            dataset = open_dataset(server.url, Cache(tmp_path / "cache"))
            read_all(dataset)
            assert dataset.fingerprint == open_dataset(folder).fingerprint
        assert sorted(path.name for path in plain.iterdir()) == sorted(path.name for path in folder.glob("*.tar"))
        before = len([each for each in server.asked if ".tar bytes" in each])
        open_dataset(server.url, Cache(tmp_path / "cache"))
        assert len([each for each in server.asked if ".tar bytes" in each]) == before, "no shard is read again"
        shutil.copy(min(folder.glob("*.tar")), plain / "extra.tar")
        assert len(open_dataset(server.url, Cache(tmp_path / "cache"))) == SAMPLES + 10, "a new tar is seen"
    finally:
        server.stop()


def test_answers_that_fail_or_come_short_cost_no_sample(web: WebServer, tmp_path: Path) -> None:
    count = 0

    def spoil(path: str, body: bytes) -> bytes | None:
        nonlocal count
        count += 1
        if count % 3 == 0:
            return None
        return body[: len(body) // 2] if count % 3 == 1 else body

    dataset = open_dataset(web.url, Cache(tmp_path))
    web.spoil = spoil
    read_all(dataset)
    assert count > 30


def test_bytes_damaged_on_their_way_are_fetched_again(web: WebServer, tmp_path: Path) -> None:
    spoiled: list[str] = []

    def spoil(path: str, body: bytes) -> bytes:
        if path.endswith(".tar") and not spoiled:
            spoiled.append(path)
            return body[:9000] + bytes([body[9000] ^ 1]) + body[9001:]
        return body

    dataset = open_dataset(web.url, Cache(tmp_path))
    web.spoil = spoil
    read_all(dataset)
    assert spoiled


def test_bytes_damaged_where_they_lie_are_named(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    shard = sorted(copy.glob("*.tar"))[2]
    data = bytearray(shard.read_bytes())
    data[14000] ^= 4
    shard.write_bytes(data)
    server = WebServer(copy)
    try:
        for dataset in (open_dataset(server.url, Cache(tmp_path / "cache")), open_dataset(copy)):
            with pytest.raises(DamagedSampleError, match=rf"{shard.name} is damaged: bytes \d+ to \d+, its 'jpg'"):
                read_all(dataset)
            assert [dataset.read(number).key for number in (20, 22)] == ["s020", "s022"]
    finally:
        server.stop()


@pytest.mark.parametrize("stream", [30 << 10, 1 << 20])  # a shard is read in parts, or asked for beyond its end
def test_a_server_without_ranges(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stream: int) -> None:
    monkeypatch.setattr(remote, "STREAM", stream)
    plain = tmp_path / "plain"
    plain.mkdir()
    for path in folder.glob("*.tar"):
        shutil.copy(path, plain)
    for served in (folder, plain):
        web = WebServer(served)
        web.ranges = False
        try:
            dataset = open_dataset(web.url, Cache(tmp_path / f"cache of {served.name}"))
            assert dataset.fingerprint == open_dataset(folder).fingerprint
            read_all(dataset)
        finally:
            web.stop()


@pytest.mark.parametrize("indexed", [True, False])
@pytest.mark.parametrize("ranges", [True, False])
def test_a_server_that_tells_no_size(folder: Path, served: WebServer, copy: Path, ranges: bool, indexed: bool) -> None:
    served.ranges, served.sizes = ranges, False
    cache = Cache(copy.parent / "cache")
    if indexed:
        load_index(copy)
    if not (indexed or ranges):
        with pytest.raises(DataError, match=r"\.tar cannot be read by ranges: its server does not tell its size;"):
            open_dataset(served.url, cache)
        assert not list(cache.folder.rglob("*.tar"))
        return
    dataset = open_dataset(served.url, cache)
    assert [dataset.read(number) for number in range(20)] == [make(number) for number in range(20)]


def test_a_page_instead_of_the_index_is_named_by_its_url(served: WebServer, copy: Path) -> None:
    (copy / INDEX_FILE).write_text("<html>please log in</html>")
    with pytest.raises(DataError, match=r"^http://[^ ]*/index\.json is no index of ours .*: have it made by"):
        open_dataset(served.url, Cache(copy.parent / "cache"))


def test_a_server_that_stays_away_is_one_sentence(
    web: WebServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "PATIENCE", 1.0)
    dataset = open_dataset(web.url, Cache(tmp_path))
    dataset.read(31)  # the table of its shard is here
    web.stop()
    with pytest.raises(DataError, match=r"/.*\.tar: bytes \d+ to \d+ could not be read for 1 s: "):
        dataset.read(35)
    web.start()
    read_all(dataset)


def test_a_shard_that_is_gone_is_one_sentence(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "MISSING", 0.5)
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    gone = sorted(copy.glob("*.tar"))[1]
    server = WebServer(copy)
    try:
        dataset = open_dataset(server.url, Cache(tmp_path / "cache"))
        gone.unlink()
        with pytest.raises(DataError, match=rf"{gone.name}: bytes \d+ to \d+ could not be read for 0 s: "):
            read_all(dataset)
        with pytest.raises(DataError, match=rf"{gone.name} is in the index, but there is no such file"):
            open_dataset(server.url, Cache(tmp_path / "cache"))
        (copy / INDEX_FILE).unlink()
        for path in copy.glob("*.tar"):
            path.unlink()
        with pytest.raises(FileNotFoundError, match=r"no data set at http.*: there is no index.json and no \.tar"):
            open_dataset(server.url, Cache(tmp_path / "other"))
    finally:
        server.stop()


def test_the_cache_keeps_its_bound(web: WebServer, tmp_path: Path) -> None:
    bound = 10 * remote.PIECE
    dataset = open_dataset(web.url, Cache(tmp_path, bound))
    for _ in range(2):
        read_all(dataset)
        kept = sum(path.stat().st_size for path in tmp_path.glob("*/pieces/*"))
        assert 0 < kept <= bound + bound // 16 + remote.PIECE


def test_a_kind_of_url_that_nobody_knows(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nonsense://x cannot be read: "):
        open_dataset("nonsense://x", Cache(tmp_path))


# --- what changes at the URL


def tag(data: bytes) -> dict[str, str]:
    return {"ETag": f'"{hashlib.sha256(data).hexdigest()[:16]}"'}


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """Two shards and no index, to be changed and served."""
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in sorted(folder.glob("*.tar"))[:2]:
        shutil.copy(path, copy)
    return copy


@pytest.fixture
def served(copy: Path) -> Iterator[WebServer]:
    server = WebServer(copy)
    yield server
    server.stop()


def other(number: int) -> Sample:
    """As large as `make`'s, and another."""
    sample = make(number)
    return Sample(sample.key, {"txt": b"CAPTION %d" % number, "jpg": sample.fields["jpg"]})


def write_shard(path: Path, make_sample: Callable[[int], Sample], samples: int) -> None:
    write_shards(samples, make_sample, path.parent.parent / "new", processes=0)
    shutil.move(path.parent.parent / "new/shard-000000.tar", path)
    shutil.rmtree(path.parent.parent / "new")


@pytest.mark.parametrize("scheme", ["http", "file"])
def test_a_shard_beside_the_index_is_refused_as_in_a_folder(served: WebServer, copy: Path, scheme: str) -> None:
    url = served.url if scheme == "http" else f"file://{copy}"
    load_index(copy)
    assert len(open_dataset(url, Cache(copy.parent / "cache"))) == 20
    shutil.copy(min(copy.glob("*.tar")), copy / "extra.tar")
    for path in (copy, url):
        with pytest.raises(DataError, match=r"extra\.tar is not in the index"):
            open_dataset(path, Cache(copy.parent / "cache"))


@pytest.mark.parametrize("samples", [9, 10, 11])  # shorter, as long, longer
@pytest.mark.parametrize("scheme", ["http", "http by time", "file"])
def test_a_shard_that_was_replaced_is_read_anew(served: WebServer, copy: Path, scheme: str, samples: int) -> None:
    url = f"file://{copy}" if scheme == "file" else served.url
    served.mark = tag if scheme == "http" else lambda data: {"Last-Modified": f"at {zlib.crc32(data)}"}
    cache = Cache(copy.parent / "cache")
    before = open_dataset(url, cache)
    assert before.read(3) == make(3)
    shard = min(copy.glob("*.tar"))
    size = shard.stat().st_size
    write_shard(shard, other, samples)
    assert (shard.stat().st_size == size) == (samples == 10)
    os.utime(shard, (1, 1))
    after = open_dataset(url, cache)
    assert after.read(3) == other(3), "neither the index nor the pieces are those of before"
    assert len(after) == 10 + samples
    assert (
        after.fingerprint == open_dataset(url, Cache(copy.parent / "another node's")).fingerprint != before.fingerprint
    )


def test_without_marks_a_change_of_size_is_seen(served: WebServer, copy: Path) -> None:
    cache = Cache(copy.parent / "cache")
    assert len(open_dataset(served.url, cache)) == 20
    write_shard(min(copy.glob("*.tar")), other, 9)
    dataset = open_dataset(served.url, cache)
    assert len(dataset) == 19
    assert dataset.read(3) == other(3)


def test_pieces_of_a_shard_replaced_together_with_its_index_are_fetched_again(served: WebServer, copy: Path) -> None:
    served.mark = tag
    load_index(copy)
    cache = Cache(copy.parent / "cache")
    assert open_dataset(served.url, cache).read(3) == make(3)
    write_shard(min(copy.glob("*.tar")), other, 10)
    for path in (*copy.glob("*.npz"), copy / INDEX_FILE):
        path.unlink()
    load_index(copy)
    dataset = pickle.loads(pickle.dumps(open_dataset(served.url, cache)))
    assert dataset.read(3) == other(3)


NAMES = [
    *("a b", "100%", "a%20b", "a#b", "a?b=c", "a+b", "a&b", "a;b", "a'b", 'a"b', "a<b>", "[a]{b}", "a@b:c"),
    "\u00e4\u65e5\U0001f600",
]


@pytest.mark.parametrize("indexed", [True, False])
def test_names_of_any_letters(served: WebServer, copy: Path, indexed: bool) -> None:
    for name in NAMES:
        shutil.copy(min(copy.glob("*.tar")), copy / f"{name}.tar")
    cache = Cache(copy.parent / "cache")
    local = load_index(copy)
    if not indexed:
        for path in (*copy.glob("*.npz"), copy / INDEX_FILE):
            path.unlink()
    dataset = open_dataset(served.url, cache)
    assert dataset.fingerprint == local.fingerprint
    assert len({dataset.read(number).key for number in range(len(dataset))}) == 20


@pytest.mark.parametrize("status", [401, 403, 404, 405, 501])
def test_a_folder_that_may_not_be_listed_is_read_by_its_index(served: WebServer, copy: Path, status: int) -> None:
    served.listing = status
    cache = Cache(copy.parent / "cache")
    with pytest.raises((DataError, FileNotFoundError), match=r"there is no index\.json"):
        open_dataset(served.url, cache)
    load_index(copy)
    assert open_dataset(served.url, cache).read(3) == make(3)
    max(copy.glob("*.tar")).unlink()
    with pytest.raises(DataError, match="is in the index, but there is no such file"):
        open_dataset(served.url, cache)


# --- S3


@pytest.fixture
def s3(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    pytest.importorskip("s3fs")
    pytest.importorskip("moto.server")
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    server = S3Server(folder, tmp_path / "log")
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    yield server
    server.kill()


@pytest.mark.slow
def test_s3_and_its_server_killed_on_the_way(s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "MISSING", 30.0)  # the server is back before its bucket is full again
    dataset = open_dataset("s3://weft/sets/scenes", Cache(tmp_path / "cache", 0))
    read: list[Sample] = []
    back = threading.Timer(0.0, lambda: None)
    back.start()
    for number in range(SAMPLES):
        if number in (3, 10, 17, 25, 33):
            back.join()  # a server that is killed while it starts is another case
            s3.kill()
            back = threading.Timer(1.0, s3.start)
            back.start()
        read.append(dataset.read(number))
    assert read == [make(number) for number in range(SAMPLES)]
    loader = batches_of(dataset, workers=2, stop_step=10)  # forked workers make clients of their own
    assert sorted(number for batch in loader for number in batch.sample.tolist()) == sorted(list(range(SAMPLES)) * 2)


def batches_of(dataset: Dataset, workers: int, stop_step: int) -> Loader:
    return Loader(
        BatchMaker(dataset, None, None, 0, training=True),
        Order(SAMPLES, 0),
        global_batch=8,
        workers=workers,
        stop_step=stop_step,
    )


@pytest.mark.slow
def test_a_byte_changed_at_a_random_moment(s3: S3Server, folder: Path, tmp_path: Path) -> None:
    """All rows are those that should be there, but the changed sample's from then on: it is named with its bytes."""
    draws, order, index = np.random.default_rng(0), Order(SAMPLES, 0), load_index(folder)
    for _ in range(5):
        strike, shard, offset = int(draws.integers(1, 10)), index.shards[draws.integers(4)], int(draws.integers(10))
        sample = 10 * index.shards.index(shard) + offset
        name, first, size = load_table(folder / shard.file, shard).places(offset)[draws.integers(2)]
        place, whole = first + int(draws.integers(size)), (folder / shard.file).read_bytes()
        changed = whole[:place] + bytes([whole[place] ^ 1 << int(draws.integers(8))]) + whole[place + 1 :]

        named = 0
        dataset = open_dataset("s3://weft/sets/scenes", Cache(tmp_path / "cache", 0))
        for step, batch in enumerate(batches_of(dataset, workers=0, stop_step=20)):
            expected = order.sample_ids(batch.position.numpy())
            hit = expected == sample if step >= strike else np.zeros(8, bool)
            assert np.array_equal(batch.sample.numpy() != expected, hit)
            assert len(batch.corrupt) >= hit.sum(), "it may be drawn to replace itself"
            assert hit.any() or not batch.corrupt
            for corrupt in batch.corrupt:
                damage = rf"/{shard.file} is damaged: bytes (\d+) to (\d+), its '{name}', changed"
                found = re.search(damage, corrupt.reason)
                assert found, corrupt.reason
                assert int(found[1]) <= place <= int(found[2])
                named += 1
            if step + 1 == strike:
                s3.put(shard.file, changed)
        assert named >= 2, "it is read in every epoch"
        s3.put(shard.file, whole)


def all_right(batches: Iterable[Batch]) -> None:
    for batch in batches:
        assert np.array_equal(batch.sample, Order(SAMPLES, 0).sample_ids(batch.position.numpy()))


@pytest.mark.slow
def test_a_shard_removed_at_a_random_moment(
    s3: S3Server, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every batch until then is right; then one sentence with the shard and the bytes, and no epoch that ends early."""
    monkeypatch.setattr(remote, "MISSING", 0.5)
    draws, index = np.random.default_rng(0), load_index(folder)
    for workers in (0, 1, 2, 1, 0):
        strike, shard = int(draws.integers(1, 10)), index.shards[draws.integers(4)]
        dataset = open_dataset("s3://weft/sets/scenes", Cache(tmp_path / "cache", 0))
        batches = iter(batches_of(dataset, workers=workers, stop_step=1000))

        all_right(islice(batches, strike))
        s3.remove(shard.file)
        patience = 5 if workers else 0  # what is set here does not reach a worker
        told = rf"/{shard.file}: bytes \d+ to \d+ could not be read for {patience} s: "
        with pytest.raises(DataError, match=told):
            all_right(islice(batches, 30))  # those made in advance, and some without that shard
        s3.put(shard.file, (folder / shard.file).read_bytes())


@pytest.mark.parametrize("moment", range(5))
def test_answers_cut_short_at_random(web: WebServer, tmp_path: Path, moment: int) -> None:
    draws = np.random.default_rng(moment)
    cut = 0

    def spoil(path: str, body: bytes) -> bytes | None:
        nonlocal cut
        if draws.random() < 0.4 and body:
            cut += 1
            return body[: int(draws.integers(len(body)))]
        return body

    web.spoil = spoil
    read_all(open_dataset(web.url, Cache(tmp_path, 0)))
    assert cut >= 5


def test_tables_are_made_where_they_are_missing(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    for path in copy.glob("*.tar"):
        os.unlink(table_path(path))
    server = WebServer(copy)
    try:
        read_all(open_dataset(server.url, Cache(tmp_path / "cache")))
    finally:
        server.stop()
