"""Shards in a folder that cannot be written to."""

import errno
import os
import pickle
import subprocess
import sys

import pytest

from data_pipeline import read_only, reader, shards
from data_pipeline.errors import DataError
from data_pipeline.index import INDEX_FILE, load_index, written_whole
from data_pipeline.reader import open_dataset
from data_pipeline.remote import Cache
from data_pipeline.sample import Sample
from data_pipeline.shards import write_shards


def make(number):
    return Sample(f"s{number}", {"txt": b"caption %d" % number, "jpg": bytes([number]) * 900})


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Shards without an index, in a folder that says it cannot be written to."""
    folder = tmp_path / "shards"
    write_shards(20, make, folder, samples_per_shard=10, processes=0)
    for path in (*folder.glob("*.npz"), folder / INDEX_FILE):
        path.unlink()
    monkeypatch.setattr(reader, "may_write", lambda path: path != folder)
    return folder


def test_its_index_is_kept_in_the_cache(folder, tmp_path):
    there = sorted(path.name for path in folder.iterdir())
    cache = Cache(tmp_path / "cache")
    for _ in range(2):
        dataset = pickle.loads(pickle.dumps(open_dataset(folder, cache)))
        assert [dataset.read(number) for number in range(20)] == [make(number) for number in range(20)]
        assert dataset.folder == folder
    assert sorted(path.name for path in folder.iterdir()) == there
    assert dataset.fingerprint == load_index(folder).fingerprint


def test_what_changes_there_is_indexed_anew(folder, tmp_path):
    cache = Cache(tmp_path / "cache")
    first = open_dataset(folder, cache).fingerprint
    shard = min(folder.glob("*.tar"))
    data = shard.read_bytes().replace(b"caption 3", b"CAPTION 3")
    shard.write_bytes(data)
    os.utime(shard, (1, 1))
    dataset = open_dataset(folder, cache)
    assert dataset.fingerprint != first
    assert dataset.read(3).fields["txt"] == b"CAPTION 3"
    max(folder.glob("*.tar")).unlink()
    assert len(open_dataset(folder, cache)) == 10


def test_messages_name_the_folder_itself(folder, tmp_path):
    shard = min(folder.glob("*.tar"))
    shard.write_bytes(shard.read_bytes()[:5000])
    with pytest.raises(DataError) as failure:
        open_dataset(folder, Cache(tmp_path / "cache"))
    assert str(shard) in str(failure.value)
    assert "cache" not in str(failure.value)


def test_a_cache_that_cannot_be_written_either_is_one_sentence(folder, tmp_path, monkeypatch):
    def refuse(real, mirror):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(mirror / ".0.tar.tmp"))

    monkeypatch.setattr(read_only, "_link", refuse)
    with pytest.raises(OSError, match=r"is read-only, and the cache .* `weft data stats`") as failure:
        open_dataset(folder, Cache(tmp_path / "cache"))
    assert ".tmp" not in str(failure.value)


def test_a_folder_mounted_read_only(folder, tmp_path):
    """As the kernel has it, for root too, where a mount may be made."""
    if subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("no mount can be made here")
    weft = os.path.join(os.path.dirname(sys.executable), "weft")
    script = f"mount --bind {folder} {folder} && mount -o remount,ro,bind {folder} && {weft} data stats {folder}"
    environment = {**os.environ, "HOME": str(tmp_path)}
    ran = subprocess.run(["unshare", "-m", "sh", "-c", script], capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stderr
    assert "20" in ran.stdout


def test_no_message_names_a_temporary_file(tmp_path):
    with pytest.raises(FileNotFoundError) as failure, written_whole(tmp_path / "nowhere/out.json") as unfinished:
        unfinished.write_text("x")
    assert failure.value.filename == str(tmp_path / "nowhere/out.json")
    names = set()
    for _ in range(2):  # of two processes with one number
        with written_whole(tmp_path / "out") as unfinished:
            unfinished.write_text("x")
            names.add(unfinished.name)
    assert len(names) == 2


def test_a_data_set_that_cannot_be_written_is_told_by_its_own_name(tmp_path, monkeypatch):
    def refuse(path, *_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(shards, "held", refuse)
    with pytest.raises(PermissionError) as failure:
        write_shards(2, make, tmp_path / "out", processes=0)
    assert failure.value.filename == str(tmp_path / "out")
