"""The index: made from our shards and other people's, found out when it is stale, and never half written."""

import errno
import hashlib
import io
import json
import os
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image
from tars import picture, special, tar_of

from data_pipeline.errors import DataError
from data_pipeline.index import (
    INDEX_FILE,
    Index,
    ShardEntry,
    build_index,
    checksum_of,
    complete_tables,
    disagreements,
    index_shard,
    load_index,
    load_table,
    table_path,
    written_whole,
)
from data_pipeline.reader import open_dataset
from data_pipeline.scan import LeftOut, read_table
from data_pipeline.table import PLACES


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


def stored_arrays(path: Path) -> dict[str, np.ndarray]:
    with np.load(table_path(path)) as arrays:
        return {name: arrays[name].copy() for name in arrays.files}


def store(path: Path, arrays: dict[str, np.ndarray], digest: bool = False) -> None:
    """Write a table as whoever tampers with it would, without its digest."""
    with table_path(path).open("wb") as file:
        np.savez(file, **{name: array for name, array in arrays.items() if digest or name != "digest"})


HUGE = 2**62
TAMPERED = {
    "count of fields": lambda a: a["first"].__setitem__(-1, 99),
    "negative count": lambda a: a["first"].__setitem__(1, -1),
    "empty sample": lambda a: a["first"].__setitem__(1, 0),
    "negative offset": lambda a: a["offset"].__setitem__(0, -512),
    "huge offset": lambda a: a["offset"].__setitem__(5, HUGE),
    "offset off its block": lambda a: a["offset"].__setitem__(0, 513),
    "negative size": lambda a: a["size"].__setitem__(0, -1),
    "huge size": lambda a: a["size"].__setitem__(5, 2**63 - 1),
    "overlap": lambda a: a["size"].__setitem__(0, 1024),
    "order": lambda a: a["offset"].__setitem__(slice(0, 2), a["offset"][1::-1].copy()),
    "field": lambda a: a["field"].__setitem__(0, 2),
    "negative field": lambda a: a["field"].__setitem__(0, -1),
    "field twice": lambda a: a["field"].__setitem__(0, a["field"][1]),
    "key end": lambda a: a["key_end"].__setitem__(0, 0),
    "key end back": lambda a: a["key_end"].__setitem__(1, 1),
    "key ends late": lambda a: a["key_end"].__setitem__(-1, HUGE),
    "keys": lambda a: a["keys"].__setitem__(0, 0xFF),
    "aspect": lambda a: a["aspect"].__setitem__(0, -1),
    "endless aspect": lambda a: a["aspect"].__setitem__(0, np.inf),
    "width": lambda a: a["width"].__setitem__(0, -4),
    "captions": lambda a: a["captions"].__setitem__(0, 2**31 - 1),
    "words": lambda a: a["caption_words"].__setitem__(0, -1),
    "label": lambda a: a["label"].__setitem__(0, 0),
    "seconds": lambda a: a["seconds"].__setitem__(0, -1),
    "unreadable": lambda a: a["unreadable"].__setitem__(0, 7),
    "type": lambda a: a.__setitem__("size", a["size"].astype(np.float64) * np.nan),
    "other type": lambda a: a.__setitem__("field", a["field"].astype(np.int16)),
    "shape": lambda a: a.__setitem__("offset", a["offset"].reshape(-1, 1)),
    "short": lambda a: a.__setitem__("crc", a["crc"][:-1]),
    "scalar": lambda a: a.__setitem__("first", a["first"][0]),
    "empty": lambda a: a.__setitem__("first", a["first"][:0]),
    "missing": lambda a: a.__delitem__("offset"),
    "unknown": lambda a: a.__setitem__("more", a["offset"]),
    "names": lambda a: a.__setitem__("field_names", np.frombuffer(b'{"png": 1}', np.uint8)),
    "nested names": lambda a: a.__setitem__("field_names", np.frombuffer(b"[" * 100_000, np.uint8)),
    "names twice": lambda a: a.__setitem__("field_names", np.frombuffer(b'["png", "png"]', np.uint8)),
    "checksum": lambda a: a.__setitem__("checksum", a["checksum"][::-1]),
    "not UTF-8": lambda a: a.__setitem__("checksum", np.frombuffer(b"\xff" * 71, np.uint8)),
    "no sample": lambda a: [a.__setitem__(name, array[:0]) for name, array in a.items()],
}  # fmt: skip


@pytest.mark.parametrize("change", TAMPERED.values(), ids=TAMPERED)
@pytest.mark.parametrize("digest", [False, True], ids=["by hand", "with its digest"])
def test_a_tampered_table_is_one_sentence(folder: Path, change: Callable, digest: bool) -> None:
    entry = load_index(folder).shards[0]
    arrays = stored_arrays(folder / "a.tar")
    change(arrays)
    store(folder / "a.tar", arrays, digest)
    with pytest.raises(DataError, match=r"a\.tar\.idx\.npz .*index\.json to have it made anew$"):
        load_table(folder / "a.tar", entry)


def test_a_table_that_was_edited_within_range_is_found_by_its_digest(folder: Path) -> None:
    entry = load_index(folder).shards[0]
    arrays = stored_arrays(folder / "a.tar")
    arrays["crc"][0] ^= 1
    store(folder / "a.tar", arrays, digest=True)
    with pytest.raises(DataError, match="its digest is that of another table"):
        load_table(folder / "a.tar", entry)


def test_a_table_that_unpacks_to_gigabytes_is_refused_unread(folder: Path) -> None:
    entry = load_index(folder).shards[0]
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("keys.npy", "w") as file:
        for _ in range(64):
            file.write(bytes(1 << 20))
    table_path(folder / "a.tar").write_bytes(bomb.getvalue())
    with pytest.raises(DataError, match="more than its tar"):
        load_table(folder / "a.tar", entry)
    small = bomb.getvalue().replace((64 << 20).to_bytes(4, "little"), (128).to_bytes(4, "little"))  # as it lies of it
    table_path(folder / "a.tar").write_bytes(small)
    with pytest.raises(DataError, match="is damaged"):
        load_table(folder / "a.tar", entry)


def test_a_compressed_npz_is_a_table_too(folder: Path) -> None:
    entry = load_index(folder).shards[0]
    arrays = stored_arrays(folder / "a.tar")
    with table_path(folder / "a.tar").open("wb") as file:
        np.savez_compressed(file, **arrays)
    assert load_table(folder / "a.tar", entry).same_places(read_table(folder / "a.tar"))


@pytest.mark.parametrize("seed", range(40))
def test_random_damage_to_a_table_is_found_or_harmless(folder: Path, seed: int) -> None:
    entry = load_index(folder).shards[0]
    fresh, chance = read_table(folder / "a.tar"), np.random.default_rng(seed)
    stored = bytearray(table_path(folder / "a.tar").read_bytes())
    for _ in range(chance.integers(1, 4)):
        stored[chance.integers(len(stored))] = chance.integers(256)
    table_path(folder / "a.tar").write_bytes(stored)
    try:
        table = load_table(folder / "a.tar", entry)
    except DataError:
        return
    assert table.same_places(fresh)


def change_shard(**changes: object) -> Callable[[dict], None]:
    return lambda tree: tree["shards"][0].update(changes)


EDITED = {
    "samples": change_shard(samples=4), "negative": change_shard(samples=-3), "float": change_shard(samples=3.0),
    "nan": change_shard(samples=float("nan")), "text": change_shard(samples="3"), "true": change_shard(samples=True),
    "huge": change_shard(samples=10**300), "more than fit": change_shard(samples=10**6),
    "list": change_shard(bytes=[1]),
    "endless": change_shard(bytes=float("inf")), "checksum": change_shard(checksum="sha256:" + "0" * 64),
    "no checksum": change_shard(checksum=None), "short checksum": change_shard(checksum="sha256:00"),
    "modality": change_shard(modalities=["image"]), "unknown modality": change_shard(modalities=["video"]),
    "nested": change_shard(modalities=[["image"]]), "null": change_shard(modalities=None), "file": change_shard(file=5),
    "NUL": change_shard(file="a\0.tar"), "left out": change_shard(left_out={"images": -1}),
    "left out of what": change_shard(left_out={"thumbs": 1}), "left": change_shard(left_out=[1]),
    "repeated": change_shard(repeated={"keys": -1, "first": "a"}), "which": change_shard(repeated={"keys": 1}),
    "moved samples": lambda tree: [shard.update(samples=n) for shard, n in zip(tree["shards"], (2, 3), strict=True)],
    "twice": lambda tree: tree["shards"].append(tree["shards"][0]),
    "total": lambda tree: tree.update(samples=6), "total null": lambda tree: tree.update(samples=None),
    "shards": lambda tree: tree.update(shards={}), "a shard": lambda tree: tree.update(shards=[5, 6]),
    "fingerprint": lambda tree: tree.update(fingerprint="0"), "version": lambda tree: tree.update(version=[1]),
    "tables": lambda tree: tree.update(tables=10**9), "reversed": lambda tree: tree["shards"].reverse(),
}  # fmt: skip


@pytest.mark.parametrize("change", EDITED.values(), ids=EDITED)
def test_an_edited_index_is_one_sentence(folder: Path, change: Callable) -> None:
    load_index(folder)
    tree = json.loads((folder / INDEX_FILE).read_text())
    change(tree)
    (folder / INDEX_FILE).write_text(json.dumps(tree))
    with pytest.raises(DataError, match=r"index\.json is no index of ours .*made anew$") as told:
        load_index(folder)
    assert "__init__" not in str(told.value)


@pytest.mark.parametrize(
    "change", [value for name, value in EDITED.items() if name in ("twice", "moved samples", "total", "huge")]
)
def test_an_edited_index_of_an_early_version_too(folder: Path, change: Callable) -> None:
    """They have no fingerprint in them; what does not show in the index shows when its tables are read."""
    load_index(folder)
    tree = json.loads((folder / INDEX_FILE).read_text())
    del tree["fingerprint"]
    change(tree)
    (folder / INDEX_FILE).write_text(json.dumps(tree))
    with pytest.raises(DataError, match="made anew"):
        [load_table(folder / shard.file, shard) for shard in load_index(folder).shards]


@pytest.mark.parametrize("text", ['{"shardlist": []}', '{"version": 2, "shards": [{"basename": "x"}]}', "[]", '"x"'])
def test_the_index_json_of_another_tool_is_not_ours_to_delete(folder: Path, text: str) -> None:
    (folder / INDEX_FILE).write_text(text)
    with pytest.raises(DataError, match="a file of another tool: move it elsewhere"):
        load_index(folder)


def test_fingerprints_are_those_of_earlier_versions() -> None:
    shards = (ShardEntry("a.tar", 2, 10240, "sha256:" + "ab" * 32, ("image", "text"), LeftOut(images=4)),)
    entries = (
        '[{"bytes": 10240, "checksum": "sha256:%s", "file": "a.tar", "modalities": ["image", "text"], "samples": 2}]'
    )
    assert Index(shards).fingerprint == hashlib.sha256((entries % ("ab" * 32)).encode()).hexdigest()


def test_tables_of_an_early_version_are_read_and_completed(folder: Path) -> None:
    """Version 1 had neither details nor a digest, and its index no fingerprint."""
    index = load_index(folder)
    for shard in index.shards:
        arrays = stored_arrays(folder / shard.file)
        store(folder / shard.file, {name: arrays[name] for name in (*PLACES, "aspect", "field_names", "checksum")})
    tree = json.loads((folder / INDEX_FILE).read_text())
    del tree["fingerprint"], tree["tables"]
    (folder / INDEX_FILE).write_text(json.dumps(tree))
    early = load_index(folder)
    assert (early.tables, early) == (1, index)
    assert all(load_table(folder / shard.file, shard).details is None for shard in early.shards)
    assert complete_tables(folder, early).tables == Index.load(folder).tables == 2
    details = load_table(folder / "b.tar", index.shards[1]).details
    assert details is not None
    assert details.captions.tolist() == [0, 1]


def test_what_no_run_reads_is_counted_and_told(tmp_path: Path) -> None:
    files = {
        "cat.jpg": b"1", "cat.txt": b"a", "cat.2.jpg": b"2", "cat.2.txt": b"b", "cat.3.jpg": b"3", "bare.jpg": b"4",
        "words.txt": b"c", "README": b"r", "sub/LICENSE": b"l", ".hidden": b"h", "__meta__/x.txt": b"m",
    }  # fmt: skip
    (tmp_path / "s.tar").write_bytes(tar_of([*files.items(), special("link", tarfile.SYMTYPE, "cat.jpg")]))
    left_out = load_index(tmp_path).left_out
    assert left_out == LeftOut(images=2, without_image=1, without_caption=1, files=2, entries=1)
    assert Index.load(tmp_path).left_out == left_out
    (line,) = open_dataset(tmp_path).remarks()
    for words in ("2 images not read", "1 sample without an image", "without a caption", "2 files", "1 tar entry"):
        assert words in line


def test_keys_that_a_tar_has_twice_are_told(tmp_path: Path) -> None:
    files = [(f"{number}.txt", b"%d" % number) for number in range(6)]
    (tmp_path / "a.tar").write_bytes(tar_of([*files, ("4.txt", b"new"), ("0.txt", b"new"), ("4.txt", b"newer")]))
    (tmp_path / "b.tar").write_bytes(tar_of(files))  # keys of another tar are no matter here
    told = "2 keys are there twice, such as '0' in a.tar: all samples of them are read"
    assert load_index(tmp_path).remarks() == [told]
    assert load_index(tmp_path).remarks() == [told]  # from its index, too
    assert Index.load(tmp_path).shards == build_index(tmp_path).shards
    (tmp_path / "a.tar").write_bytes(tar_of([*files, ("4.txt", b"new")]))
    assert build_index(tmp_path).remarks() == ["1 key is there twice, '4' in a.tar: all samples of it are read"]


def test_what_all_samples_lack_is_not_told_sample_by_sample(tmp_path: Path) -> None:
    (tmp_path / "s.tar").write_bytes(tar_of({"a.txt": b"1", "b.txt": b"2"}))
    assert open_dataset(tmp_path).remarks() == []


def test_files_beside_the_tars_are_told(folder: Path) -> None:
    (folder / "c.tar.gz").write_bytes(b"x")
    (folder / "d.TAR").write_bytes(tar_of({"d.txt": b"1"}))  # simply read
    for name in ("e.tgz", "f.tar.zst", "g.tar.part", "h.parquet", "notes.txt", "a.tar.sha256", ".i.tar"):
        (folder / name).write_bytes(b"x")
    (folder / "more" / "deep").mkdir(parents=True)
    (folder / "more" / "deep" / "j.tar").write_bytes(b"x")
    (folder / "logs").mkdir()
    (folder / "k.tar").mkdir()
    os.mkfifo(folder / "l.tar")
    index = load_index(folder)
    assert [shard.file for shard in index.shards] == ["a.tar", "b.tar", "d.TAR"]
    assert [name for name, _ in index.ignored] == [
        ".i.tar", "c.tar.gz", "e.tgz", "f.tar.zst", "g.tar.part", "h.parquet", "k.tar", "l.tar", "more",
    ]  # fmt: skip
    assert load_index(folder).ignored == index.ignored  # from its index, too
    (line,) = open_dataset(folder).remarks()
    assert "9 files or folders beside the tars are not read: .i.tar (hidden, as its name begins with a dot)" in line
    assert "c.tar.gz (compressed), e.tgz (compressed) and 6 more" in line


def test_a_link_to_a_shard_that_is_not_there(folder: Path) -> None:
    (folder / "c.tar").symlink_to(folder / "nowhere.tar")
    with pytest.raises(DataError, match=r"c\.tar is a link to a file that is not there"):
        build_index(folder)
    (folder / "c.tar").unlink()
    load_index(folder)
    (folder / "b.tar").unlink()
    (folder / "b.tar").symlink_to(folder / "nowhere.tar")
    with pytest.raises(DataError, match=r"b\.tar is a link to a file that is not there"):
        load_index(folder)


@pytest.mark.parametrize("kind", ["zeros", "joined", "hole"])
def test_a_tar_that_other_readers_read_in_part_is_refused(folder: Path, kind: str) -> None:
    whole = tar_of({f"k{i:03}.txt": b"w" * 600 for i in range(60)})
    archive = {
        "zeros": whole[: 15 * 3 * 512] + bytes(len(whole) - 15 * 3 * 512),
        "joined": whole + whole,
        "hole": whole[: 15 * 512] + bytes(1536) + whole[18 * 512 :],
    }[kind]
    (folder / "a.tar").write_bytes(archive)
    with pytest.raises(DataError, match=r"a\.tar (ends in \d+ bytes of zeros|has more files after the end mark)"):
        load_index(folder)
    assert not (folder / INDEX_FILE).exists()


def test_details_say_what_statistics_need(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    Image.new("RGB", (8, 4)).save(file, "JPEG", exif=exif)
    files = {
        "a.jpg": file.getvalue(), "a.json": b'{"captions": ["one two", "three"], "label": "cat"}',
        "b.png": picture(size=(5, 9)), "b.txt": b"four", "c.png": b"no", "c.json": b"{", "d.png": picture(),
        "d.json": b'{"label": "cat"}',
    }  # fmt: skip
    (tmp_path / "s.tar").write_bytes(tar_of(files))
    table = load_table(tmp_path / "s.tar", load_index(tmp_path).shards[0])
    details = table.details
    assert details is not None
    assert list(zip(details.width.tolist(), details.height.tolist(), strict=True)) == [(4, 8), (5, 9), (0, 0), (13, 7)]
    assert table.aspect is not None
    assert table.aspect[0] == 0.5
    assert details.captions.tolist() == [2, 1, -1, 0]
    assert details.caption_characters.tolist() == [7, 5, 4]
    assert details.caption_words.tolist() == [2, 1, 1]
    assert (details.label.tolist(), details.label_names) == ([0, -1, -1, 0], ("cat",))
    assert details.unreadable.tolist() == [0, 0, 1, 0]
