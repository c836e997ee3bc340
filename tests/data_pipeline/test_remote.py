"""Shards at a URL: a real S3 server and a web server that misbehaves, killed and started again, on loopback."""

from __future__ import annotations

import os
import pickle
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from data_pipeline import remote
from data_pipeline.errors import DamagedSampleError, DataError
from data_pipeline.index import INDEX_FILE, table_path
from data_pipeline.reader import Dataset, open_dataset
from data_pipeline.remote import Cache
from data_pipeline.sample import Sample
from data_pipeline.shards import write_shards

pytest.importorskip("fsspec")

SAMPLES = 40
KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}


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


class WebServer:
    """Serves a folder with byte ranges and a listing; `spoil` may change an answer: (path, body) -> body or None."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.spoil: Callable[[str, bytes], bytes | None] = lambda path, body: body
        self.ranges = True
        self.asked: list[str] = []
        self.port = 0
        self.start()

    def start(self) -> None:
        web = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self.do_GET()

            def do_GET(self) -> None:
                path = self.path.strip("/")
                file = web.folder / path
                web.asked.append(f"{self.command} {path} {self.headers.get('Range', '')}")
                if not path:
                    listing = "".join(f'<a href="{each.name}">{each.name}</a>' for each in web.folder.iterdir())
                    return self.answer(200, listing.encode(), len(listing))
                if not file.is_file():
                    return self.answer(404, b"", 0)
                whole = file.read_bytes()
                asked = re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")) if web.ranges else None
                if asked is None:
                    return self.answer(200, whole, len(whole))
                first, last = int(asked[1]), min(int(asked[2] or len(whole) - 1), len(whole) - 1)
                if first >= len(whole):
                    return self.answer(416, b"", 0)
                body = whole[first : last + 1]
                return self.answer(206, body, len(body), f"bytes {first}-{last}/{len(whole)}")

            def answer(self, status: int, body: bytes, length: int, content_range: str = "") -> None:
                spoiled = web.spoil(self.path, body) if self.command == "GET" else body
                if spoiled is None:
                    return self.send_error(503)
                self.send_response(status)
                self.send_header("Content-Length", str(length))
                if web.ranges:
                    self.send_header("Accept-Ranges", "bytes")
                if content_range:
                    self.send_header("Content-Range", content_range)
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(spoiled)
                    if len(spoiled) < length:
                        self.close_connection = True

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


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


def test_a_server_without_ranges(web: WebServer, tmp_path: Path) -> None:
    web.ranges = False
    read_all(open_dataset(web.url, Cache(tmp_path)))


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


def test_a_kind_of_url_that_nobody_knows() -> None:
    with pytest.raises(ValueError, match="nonsense://x cannot be read: "):
        open_dataset("nonsense://x", Cache(Path("unused")))


# --- S3


class S3Server:
    """A moto server in a process of its own, with the folder's files in a bucket; it forgets them when it is killed."""

    def __init__(self, folder: Path, log: Path) -> None:
        self.folder, self.log = folder, log
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        import botocore.session

        client = botocore.session.get_session().create_client("s3", endpoint_url=self.url)
        ends = time.monotonic() + 60
        while True:
            try:
                client.create_bucket(Bucket="weft")
                break
            except Exception:
                assert time.monotonic() < ends
                time.sleep(0.2)
        for path in self.folder.iterdir():
            client.put_object(Bucket="weft", Key=f"sets/scenes/{path.name}", Body=path.read_bytes())

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


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


def test_s3_and_its_server_killed_on_the_way(s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "MISSING", 30.0)  # the server is back before its bucket is full again
    dataset = open_dataset("s3://weft/sets/scenes", Cache(tmp_path / "cache", 0))
    read: list[Sample] = []
    for number in range(SAMPLES):
        if number in (3, 10, 17, 25, 33):
            s3.kill()
            threading.Timer(1.0, s3.start).start()
        read.append(dataset.read(number))
    assert read == [make(number) for number in range(SAMPLES)]
    from data_pipeline.batch import BatchMaker
    from data_pipeline.loader import Loader  # forked workers make clients of their own
    from data_pipeline.order import Order

    loader = Loader(
        BatchMaker(dataset, None, None, 0, training=True), Order(SAMPLES, 0), global_batch=8, workers=2, stop_step=10
    )
    assert sorted(number for batch in loader for number in batch.sample.tolist()) == sorted(list(range(SAMPLES)) * 2)


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
