"""The index: made from our shards and other people's, found out when it is stale, and never half written."""

import errno
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from tars import picture, tar_of

from data_pipeline.errors import DataError
from data_pipeline.index import (
    INDEX_FILE,
    Index,
    ShardEntry,
    build_index,
    checksum_of,
    disagreements,
    index_shard,
    load_index,
    load_table,
    read_table,
    table_path,
    written_whole,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two shards of three and two samples, not indexed."""
    folder = tmp_path / "set"
    folder.mkdir()
    one = {f"k{i}.{name}": f"{i}{name}".encode() * 99 for i in range(3) for name in ("png", "txt")}
    (folder / "a.tar").write_bytes(tar_of(one))
    (folder / "b.tar").write_bytes(tar_of({"x/y.flac": b"sound", "x/z.json": b"{}", "x/z.txt": b"words"}))
    return folder


def test_index_of_plain_tars(folder: Path) -> None:
    index = load_index(folder)
    assert [(s.file, s.samples, s.modalities) for s in index.shards] == [
        ("a.tar", 3, ("image", "text")),
        ("b.tar", 2, ("audio", "text")),
    ]
    assert index.samples == 5
    for shard in index.shards:
        assert shard.bytes == (folder / shard.file).stat().st_size
        assert shard.checksum == checksum_of(folder / shard.file)
    assert Index.load(folder) == index
    assert {path.name for path in folder.iterdir()} == {
        "a.tar", "b.tar", "a.tar.idx.npz", "b.tar.idx.npz", "index.json",
    }  # fmt: skip


def test_index_json_is_for_everyone(folder: Path) -> None:
    load_index(folder)
    tree = json.loads((folder / INDEX_FILE).read_text())
    assert (tree["format"], tree["version"], tree["samples"]) == ("weft-index", 1, 5)
    assert set(tree["shards"][0]) == {"file", "samples", "bytes", "checksum", "modalities"}


def test_shards_of_webdataset_itself(tmp_path: Path) -> None:
    """What `webdataset.ShardWriter` writes is indexed as it is, keys in folders and fields with dots included."""
    with webdataset.ShardWriter(str(tmp_path / "w-%03d.tar"), maxcount=3, verbose=0, encoder=True) as writer:
        for i in range(7):
            fields = {"png": picture(i), "left.png": picture(i + 50), "txt": f"caption {i}", "json": {"i": i}}
            writer.write({"__key__": f"part/{i:03}", **fields})
    index = load_index(tmp_path)
    assert [shard.samples for shard in index.shards] == [3, 3, 1]
    table = load_table(tmp_path / "w-000.tar", index.shards[0])
    assert [table.key(i) for i in range(3)] == ["part/000", "part/001", "part/002"]
    archive = (tmp_path / "w-000.tar").read_bytes()
    places = {name: archive[at : at + size] for name, at, size in table.places(1)}
    assert places["txt"] == b"caption 1"
    assert (places["png"], places["left.png"]) == (picture(1), picture(51))
    assert json.loads(places["json"]) == {"i": 1}


def test_tables_hold_every_place(folder: Path) -> None:
    entry = index_shard(folder / "a.tar")
    stored, fresh = load_table(folder / "a.tar", entry), read_table(folder / "a.tar")
    archive = (folder / "a.tar").read_bytes()
    for table in (stored, fresh):
        assert len(table) == 3
        for i in range(3):
            assert table.key(i) == f"k{i}"
            found = {name: archive[at : at + size] for name, at, size in table.places(i)}
            assert found == {name: f"{i}{name}".encode() * 99 for name in ("png", "txt")}


def test_tables_are_never_pickles(folder: Path) -> None:
    index_shard(folder / "a.tar")
    with np.load(table_path(folder / "a.tar"), allow_pickle=False) as arrays:
        assert all(arrays[name].dtype != object for name in arrays.files)


@pytest.mark.parametrize("tar_format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT], ids=["gnu", "pax"])
def test_keys_of_any_length_and_script(tmp_path: Path, tar_format: int) -> None:
    keys = ["d/" * 200 + "long", "čeština/日本語", "🦆", "a"]
    (tmp_path / "s.tar").write_bytes(tar_of({f"{key}.txt": key.encode() for key in keys}, tar_format))
    table = read_table(tmp_path / "s.tar")
    assert [table.key(i) for i in range(len(table))] == keys


def test_files_apart_are_samples_apart(tmp_path: Path) -> None:
    """Only neighbours make a sample, as in webdataset: the reader need not search the whole shard."""
    (tmp_path / "s.tar").write_bytes(tar_of({"a.txt": b"1", "b.txt": b"2", "a.png": b"3"}))
    table = read_table(tmp_path / "s.tar")
    assert [(table.key(i), [name for name, *_ in table.places(i)]) for i in range(3)] == [
        ("a", ["txt"]), ("b", ["txt"]), ("a", ["png"]),
    ]  # fmt: skip


def test_what_is_no_sample_is_left_out(tmp_path: Path) -> None:
    files = {"__meta__/x.txt": b"m", ".hidden.txt": b"h", "README": b"r", "a.txt": b"1"}
    (tmp_path / "s.tar").write_bytes(tar_of(files))
    table = read_table(tmp_path / "s.tar")
    assert (len(table), table.key(0)) == (1, "a")


def test_a_field_that_is_there_twice(tmp_path: Path) -> None:
    (tmp_path / "s.tar").write_bytes(tar_of([("a.txt", b"1"), ("a.TXT", b"2")]))
    with pytest.raises(DataError, match=r"s\.tar has the field 'txt' of sample 'a' twice, again at byte 1536"):
        build_index(tmp_path)


def test_fingerprints_are_of_the_data_and_its_order(folder: Path, tmp_path: Path) -> None:
    index = load_index(folder)
    assert build_index(folder).fingerprint == index.fingerprint
    assert Index(index.shards[::-1]).fingerprint != index.fingerprint
    archive = bytearray((folder / "a.tar").read_bytes())
    archive[600] ^= 1
    (folder / "a.tar").write_bytes(archive)
    assert build_index(folder).fingerprint != index.fingerprint


def test_more_processes_make_the_same_index(folder: Path) -> None:
    assert build_index(folder, processes=2) == build_index(folder, processes=1)
    (folder / "a.tar").write_bytes(b"no tar")
    with pytest.raises(DataError, match=r"a\.tar is truncated"):  # and a bad tar in a worker ends as in this process
        build_index(folder, processes=2)


def test_stale_when_a_shard_has_another_size(folder: Path) -> None:
    load_index(folder)
    (folder / "b.tar").write_bytes(tar_of({"x.txt": b"new" * 9999}))
    with pytest.raises(DataError, match=r"b\.tar has \d+ bytes, but \d+ in the index: see `weft data check"):
        load_index(folder)


def test_stale_when_a_shard_is_gone_or_new(folder: Path) -> None:
    load_index(folder)
    (folder / "b.tar").rename(folder / "c.tar")
    with pytest.raises(DataError, match=r"b\.tar is in the index, but there is no such file"):
        load_index(folder)
    assert [file for file, _ in disagreements(Index.load(folder), folder)] == ["b.tar", "c.tar"]
    (folder / INDEX_FILE).unlink()
    assert [shard.file for shard in load_index(folder).shards] == ["a.tar", "c.tar"]


def test_hidden_and_other_files_are_no_shards(folder: Path) -> None:
    (folder / ".unfinished.tar").write_bytes(b"x")
    (folder / "notes.txt").write_bytes(b"x")
    assert load_index(folder).samples == 5


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", "{}", "null", '{"format": "weft-index", "version": 2, "samples": 0, "shards": []}',
        '{"format": "other", "version": 1, "samples": 0, "shards": []}',
        '{"format": "weft-index", "version": 1, "samples": 1, "shards": []}',
        '{"format": "weft-index", "version": 1, "samples": 0, "shards": [{"file": "a.tar"}]}',
    ],
)  # fmt: skip
def test_another_index_json_is_bad_data(folder: Path, text: str) -> None:
    (folder / INDEX_FILE).write_text(text)
    with pytest.raises(DataError, match=r"index\.json is no index of ours"):
        load_index(folder)


@pytest.mark.parametrize("file", ["../a.tar", "/etc/a.tar", "sub/a.tar", "a.txt", ""])
def test_an_index_cannot_lead_out_of_its_folder(folder: Path, file: str) -> None:
    load_index(folder)
    tree = json.loads((folder / INDEX_FILE).read_text())
    tree["shards"][0]["file"] = file
    (folder / INDEX_FILE).write_text(json.dumps(tree))
    with pytest.raises(DataError, match="is not the name of a shard beside it"):
        load_index(folder)


def test_nothing_to_index(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no such folder"):
        load_index(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"there is no \.tar file in it"):
        load_index(tmp_path)
    (tmp_path / "s.tar").write_bytes(tar_of({"README": b"r"}))
    with pytest.raises(DataError, match=r"no sample in the 1 \.tar files"):
        load_index(tmp_path)
    assert not (tmp_path / INDEX_FILE).exists()


def test_bad_tables_are_bad_data(folder: Path) -> None:
    entry = load_index(folder).shards[0]
    path = folder / "a.tar"
    whole = table_path(path).read_bytes()
    for broken in (b"", b"PK", whole[:-30], whole[:200] + b"\0" * 40 + whole[240:]):
        table_path(path).write_bytes(broken)
        with pytest.raises(DataError, match=r"a\.tar\.idx\.npz is damaged.*index\.json to have it made anew"):
            load_table(path, entry)
    table_path(path).unlink()
    with pytest.raises(DataError, match=r"a\.tar\.idx\.npz is missing"):
        load_table(path, entry)


def test_a_table_of_another_tar_is_found(folder: Path) -> None:
    first, second = load_index(folder).shards
    table_path(folder / "b.tar").replace(table_path(folder / "a.tar"))
    with pytest.raises(DataError, match="describes another tar"):
        load_table(folder / "a.tar", first)
    changed = ShardEntry(second.file, second.samples, second.bytes, "sha256:0", second.modalities)
    index_shard(folder / "b.tar")
    with pytest.raises(DataError, match="describes another tar"):
        load_table(folder / "b.tar", changed)


def test_files_appear_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("before")

    def fill_the_disk() -> None:
        with written_whole(path) as unfinished:
            unfinished.write_text("half")
            raise OSError(errno.ENOSPC, "full")

    with pytest.raises(OSError, match="full"):
        fill_the_disk()
    assert path.read_text() == "before"
    with written_whole(path) as unfinished:
        unfinished.write_text("after")
    assert path.read_text() == "after"
    assert list(tmp_path.iterdir()) == [path]
