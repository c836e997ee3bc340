"""Numbers about a data set: exact where it is small, bounded where it is large, and not stopped by a bad sample."""

import io
import json
import os
import re
import threading
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from tars import picture, tar_of

from data_pipeline import reader
from data_pipeline.errors import DataError
from data_pipeline.remote import Cache
from data_pipeline.stats import dataset_stats, image_size, sound_seconds, spread_of
from data_pipeline.table import PLACES


def sound(frames: int) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, np.zeros(frames), 8000, format="WAV")
    return file.getvalue()


@pytest.fixture
def served(folder: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A web server of the folder; what is fetched is kept apart from that of the user."""
    pytest.importorskip("aiohttp")
    cache = Cache(tmp_path_factory.mktemp("cache"))
    monkeypatch.setattr(reader.open_dataset, "__defaults__", (cache,))
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Ranges, folder)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


class Ranges(BaseHTTPRequestHandler):
    """Serves the files of a folder by ranges of bytes, and lists them."""

    def __init__(self, folder: Path, *arguments: Any) -> None:
        self.folder = folder
        super().__init__(*arguments)

    def do_GET(self) -> None:
        path = self.folder / self.path.strip("/")
        if path.is_dir():
            return self.answer(200, "".join(f'<a href="{each.name}">' for each in path.iterdir()).encode(), "")
        if not path.is_file():
            return self.answer(404, b"", "")
        whole, asked = path.read_bytes(), re.match(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if not asked:
            return self.answer(200, whole, "")
        first, end = int(asked[1]), min(int(asked[2]) + 1, len(whole))
        if first >= len(whole):
            return self.answer(416, b"", "")
        return self.answer(206, whole[first:end], f"bytes {first}-{end - 1}/{len(whole)}")

    def do_HEAD(self) -> None:
        self.do_GET()

    def answer(self, status: int, body: bytes, content_range: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Accept-Ranges", "bytes")
        if content_range:
            self.send_header("Content-Range", content_range)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    first = {
        "a.png": picture(size=(13, 7)),
        "a.txt": b"one two  three",
        "a.json": json.dumps({"label": "cat"}).encode(),
        "b.jpg": picture(size=(13, 7), kind="JPEG"),
        "b.json": json.dumps({"captions": ["uno", "dos tres", "quatre"], "label": "dog"}).encode(),
        "c.webp": picture(size=(30, 50), kind="WEBP"),
        "c.json": json.dumps({"label": "cat"}).encode(),
    }
    second = {"d.wav": sound(4000), "d.txt": "日本".encode()}
    (tmp_path / "s0.tar").write_bytes(tar_of(first))
    (tmp_path / "s1.tar").write_bytes(tar_of(second))
    return tmp_path


def test_every_number_of_a_small_set(folder: Path) -> None:
    stats = dataset_stats(folder)
    assert (stats.samples, stats.shards, stats.opened, stats.unreadable) == (4, 2, 4, 0)
    assert stats.bytes == sum(path.stat().st_size for path in folder.glob("*.tar"))
    assert stats.modalities == {"audio": 1, "image": 3, "text": 2}
    assert stats.fields == {"json": 3, "txt": 2, "png": 1, "jpg": 1, "webp": 1, "wav": 1}
    assert (stats.shard_samples.smallest, stats.shard_samples.largest, stats.shard_samples.mean) == (1, 3, 2)
    assert (stats.captions_per_sample.smallest, stats.captions_per_sample.largest) == (0, 3)
    assert (stats.caption_characters.count, stats.caption_characters.smallest) == (5, 2)
    assert stats.caption_characters.largest == len("one two  three")
    assert (stats.caption_words.smallest, stats.caption_words.largest, stats.caption_words.mean) == (1, 3, 8 / 5)
    assert stats.image_sizes == {"13 x 7": 2, "30 x 50": 1}
    assert (stats.image_side.smallest, stats.image_side.largest) == (7, 30)
    assert (stats.sound_seconds.count, stats.sound_seconds.mean) == (1, 0.5)
    assert stats.labelled == 3
    assert stats.labels == {"cat": 2, "dog": 1}


def test_a_bounded_number_of_samples_is_opened_the_same_ones_each_time(tmp_path: Path) -> None:
    for shard in range(4):
        files = {f"k{shard}-{i}.txt": b"w" * (100 * shard + i + 1) for i in range(25)}
        (tmp_path / f"s{shard}.tar").write_bytes(tar_of(files))
    stats = dataset_stats(tmp_path, sample_limit=40)
    assert (stats.samples, stats.opened, stats.caption_characters.count) == (100, 40, 40)
    assert stats.caption_characters.smallest <= 25  # from the first shard to the last
    assert stats.caption_characters.largest > 300
    assert stats == dataset_stats(tmp_path, sample_limit=40)
    assert dataset_stats(tmp_path, sample_limit=1).opened == 1


def test_bad_samples_are_counted_and_the_rest_is_told(tmp_path: Path) -> None:
    files = {
        "a.png": b"no picture", "a.txt": b"one", "b.json": b"{", "b.png": picture(), "c.wav": b"no", "c.txt": b"\xff",
        "d.txt": b"four",
    }  # fmt: skip
    (tmp_path / "s.tar").write_bytes(tar_of(files))
    stats = dataset_stats(tmp_path)
    assert (stats.opened, stats.unreadable) == (4, 3)
    assert stats.image_sizes == {"13 x 7": 1}
    assert stats.caption_words.count == 2


def test_no_sample_is_opened_where_the_tables_tell(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = dataset_stats(folder)
    monkeypatch.setattr(reader.Dataset, "read", None)
    assert dataset_stats(folder) == whole
    assert dataset_stats(folder, sample_limit=2).opened == 2


def test_tables_tell_the_same_as_the_samples(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import data_pipeline.stats as module

    (folder / "s2.tar").write_bytes(tar_of({"e.png": b"no", "e.txt": b"\xff", "f.png": picture(), "f.txt": b"x y"}))
    for limit in (None, 3, 5):
        told = dataset_stats(folder, sample_limit=limit)
        monkeypatch.setattr(module, "_has_details", lambda dataset: False)
        opened = dataset_stats(folder, sample_limit=limit)
        monkeypatch.undo()
        assert (told.unreadable, told.fields, told.labels) == (opened.unreadable, opened.fields, opened.labels)
        assert told == opened


def test_tables_of_an_early_version_are_completed(folder: Path) -> None:
    whole = dataset_stats(folder)
    tree = json.loads((folder / "index.json").read_text())
    del tree["tables"], tree["fingerprint"]
    (folder / "index.json").write_text(json.dumps(tree))
    for path in folder.glob("*.npz"):
        with np.load(path) as arrays:
            early = {name: arrays[name] for name in (*PLACES, "aspect", "field_names", "checksum")}
        with path.open("wb") as file:
            np.savez(file, **early)
    assert dataset_stats(folder) == whole
    assert json.loads((folder / "index.json").read_text())["tables"] == 2


def test_what_is_not_read_is_said(folder: Path) -> None:
    (folder / "s1.tar.gz").write_bytes(b"x")
    (remark, *others) = dataset_stats(folder).remarks
    assert remark == "1 file or folder beside the tars is not read: s1.tar.gz (compressed)"
    assert others == ["1 sample without an image", "1 sample without a caption"]


def test_parquet_is_counted_as_it_lies(tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    for number, count in enumerate((3, 2)):
        images = [picture(row, (20 + number, 30)) for row in range(count)]
        table = pa.table({"image": images, "caption": ["one two"] * count, "label": ["cat"] * count})
        options = {"row_group_size": 2, "use_dictionary": False, "write_page_checksum": True}
        pq.write_table(table, tmp_path / f"{number}.parquet", **options)
    stats = dataset_stats(tmp_path)
    assert (stats.samples, stats.shards, stats.opened, stats.unreadable) == (5, 2, 5, 0)
    assert stats.bytes == sum(path.stat().st_size for path in tmp_path.iterdir())
    assert (stats.shard_samples.smallest, stats.shard_samples.largest) == (2, 3)
    assert stats.modalities == {"image": 5, "text": 5}
    assert stats.image_sizes == {"20 x 30": 3, "21 x 30": 2}
    assert stats.labels == {"cat": 5}
    assert dataset_stats(str(tmp_path), sample_limit=2).opened == 2
    column = pq.read_metadata(tmp_path / "0.parquet").row_group(0).column(0)
    data = bytearray((tmp_path / "0.parquet").read_bytes())
    data[column.data_page_offset + column.total_compressed_size - 200] ^= 1  # in its last picture
    (tmp_path / "0.parquet").write_bytes(data)
    assert (dataset_stats(tmp_path).opened, dataset_stats(tmp_path).unreadable) == (5, 2)


def test_shards_at_a_url_are_counted_as_those_in_a_folder(folder: Path, served: str) -> None:
    assert dataset_stats(served, sample_limit=3) == dataset_stats(folder, sample_limit=3)


def test_a_server_that_does_not_answer_is_not_waited_for_at_each_sample(
    folder: Path, served: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import data_pipeline.stats as module
    from data_pipeline import remote

    opened = module.open_dataset(served)
    for shard in folder.glob("*.tar"):
        shard.unlink()
    monkeypatch.setattr(remote, "MISSING", 0.2)
    monkeypatch.setattr(module, "MOST_FETCHED", 0)  # so that samples are opened
    monkeypatch.setattr(module, "open_dataset", lambda path: opened)  # it was there when it was opened
    with pytest.raises(DataError, match=r"s0\.tar: bytes 0 to \d+ could not be read for 0 s"):
        dataset_stats(served)


def test_a_stale_index_and_a_bad_limit_are_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="sample_limit is 0"):
        dataset_stats(folder, sample_limit=0)
    dataset_stats(folder)
    os.truncate(folder / "s1.tar", 600)
    with pytest.raises(DataError, match=r"s1\.tar has 600 bytes"):
        dataset_stats(folder)
    with pytest.raises(FileNotFoundError):
        dataset_stats(folder / "nowhere")


@pytest.mark.parametrize(
    "numbers",
    [[7], [7, 7, 7], [0, 9], [0, 10], [1, 2, 2, 3], range(1001), [0.5], [0.1, 0.2, 0.25], [-3, 4], [0, 10**9, 5]],
    ids=str,
)
def test_every_number_is_in_one_bin(numbers: list[float]) -> None:
    spread = spread_of(numbers)
    numbers = list(numbers)
    assert spread.count == sum(spread.counts) == len(numbers)
    assert (spread.smallest, spread.largest) == (min(numbers), max(numbers))
    assert spread.mean == pytest.approx(sum(numbers) / len(numbers))
    assert (spread.low[0], spread.high[-1]) == (spread.smallest, spread.largest)
    assert 1 <= len(spread.counts) <= 10
    if all(isinstance(number, int) for number in numbers):  # then bins do not overlap, and can be counted again
        bins = zip(spread.low, spread.high, strict=True)
        assert spread.counts == tuple(sum(low <= number <= high for number in numbers) for low, high in bins)


def test_the_spread_of_nothing() -> None:
    assert spread_of([]).count == 0
    assert spread_of([]).counts == ()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_image_size_reads_the_header_alone(kind: str) -> None:
    whole = picture(size=(301, 203), kind=kind)
    assert image_size(whole) == (301, 203)
    if kind != "WEBP":  # whose reader wants the file whole
        assert image_size(whole[:700]) == (301, 203)


@pytest.mark.parametrize("data", [b"", b"GIF89a\x01\0\x01\0\0\0\0;", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"])
def test_no_header_is_bad_data(data: bytes) -> None:
    with pytest.raises(DataError, match="no header of an image"):
        image_size(data)
    with pytest.raises(DataError, match="no header of a sound"):
        sound_seconds(data)
