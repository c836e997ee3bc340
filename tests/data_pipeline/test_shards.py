"""Writing shards: webdataset reads back every byte, any number of processes writes the same, all or nothing."""

import errno
import hashlib
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from tars import picture

import data_pipeline.shards as shards_module
from data_pipeline.errors import DataError
from data_pipeline.index import load_index
from data_pipeline.lock import held
from data_pipeline.reader import open_dataset
from data_pipeline.sample import Sample, Skipped
from data_pipeline.shards import Origin, write_shards


def make(number: int) -> Sample:
    """Odd on purpose: keys in folders and beyond ASCII, empty and block-sized fields, a dotted field."""
    fields = {"txt": f"caption {number}".encode(), "jpg": picture(number, kind="JPEG"), "left.png": b"p" * number * 100}
    if number % 3 == 0:
        fields["json"] = b""
    return Sample(f"part-{number // 4}/duck🦆{number}", fields)


def make_or_skip(number: int) -> Sample | Skipped:
    return Skipped(f"file-{number}", "too dark") if 3 <= number < 8 or number == 9 else make(number)


def fail_at(bad: int, number: int) -> Sample:
    if number == bad:
        raise DataError(f"sample {number} is bad")
    return make(number)


def stop_at(bad: int, number: int) -> Sample:
    if number == bad:
        raise KeyboardInterrupt
    return make(number)


def constant(key: str, field: str, number: int) -> Sample:
    return Sample(key, {field: b"x"})


def contents(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_plain_webdataset_reads_every_sample_and_field(tmp_path: Path) -> None:
    written = write_shards(11, make, tmp_path / "out", samples_per_shard=4, processes=1)
    urls = [str(tmp_path / "out" / shard.file) for shard in written.index.shards]
    found = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert [sample["__key__"] for sample in found] == [make(i).key for i in range(11)]
    for number, sample in enumerate(found):
        fields = {name: data for name, data in sample.items() if not name.startswith("__")}
        assert fields == make(number).fields


def test_what_is_written_is_what_is_read(tmp_path: Path) -> None:
    written = write_shards(11, make, tmp_path / "out", samples_per_shard=4, processes=1)
    assert [(shard.file, shard.samples) for shard in written.index.shards] == [
        ("shard-000000.tar", 4), ("shard-000001.tar", 4), ("shard-000002.tar", 3),
    ]  # fmt: skip
    assert written.index == load_index(tmp_path / "out")
    dataset = open_dataset(tmp_path / "out")
    assert [dataset.read(i) for i in range(11)] == [make(i) for i in range(11)]


@pytest.mark.parametrize("function", [make, make_or_skip])
def test_any_number_of_processes_writes_the_same_bytes(tmp_path: Path, function: Any) -> None:
    one = write_shards(11, function, tmp_path / "one", samples_per_shard=2, processes=1)
    two = write_shards(11, function, tmp_path / "two", samples_per_shard=2, processes=2)
    assert one == two
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


@pytest.mark.parametrize("inputs", [[5, 2, 9], np.array([5, 2, 9]), range(3, 8, 2)])
@pytest.mark.parametrize("processes", [1, 2])
def test_a_sample_is_made_of_each_input(tmp_path: Path, inputs: Any, processes: int) -> None:
    write_shards(inputs, make, tmp_path / "out", samples_per_shard=2, processes=processes)
    dataset = open_dataset(tmp_path / "out")
    assert [dataset.read(i) for i in range(3)] == [make(each) for each in inputs]


def test_skipped_samples_leave_no_gap(tmp_path: Path) -> None:
    """Samples 3 to 7 fill the second shard of four: it must vanish, and the third take its number."""
    written = write_shards(11, make_or_skip, tmp_path / "out", samples_per_shard=4, processes=1)
    assert [skip.source for skip in written.skipped] == [f"file-{i}" for i in (3, 4, 5, 6, 7, 9)]
    assert [(shard.file, shard.samples) for shard in written.index.shards] == [
        ("shard-000000.tar", 3), ("shard-000001.tar", 2),
    ]  # fmt: skip
    dataset = open_dataset(tmp_path / "out")
    assert [dataset.key(i) for i in range(5)] == [make(i).key for i in (0, 1, 2, 8, 10)]
    assert dataset.read(3) == make(8)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_bad_sample_leaves_nothing_behind(tmp_path: Path, processes: int) -> None:
    with pytest.raises(DataError, match="sample 7 is bad"):
        write_shards(11, partial(fail_at, 7), tmp_path / "out", samples_per_shard=2, processes=processes)
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        write_shards(11, partial(stop_at, 7), tmp_path / "out", samples_per_shard=2, processes=1)
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_with_workers_leaves_nothing_behind(tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shards(40, make, tmp_path / "out", samples_per_shard=2, processes=2, progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def make_until_full(number: int, sample: int) -> Sample:
    """`make`, on a disk that is full when it comes to the eighth."""
    if sample == 7:
        raise OSError(number, os.strerror(number))
    return make(sample)


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_says_so_and_leaves_nothing_behind(tmp_path: Path, processes: int, number: int) -> None:
    full = partial(make_until_full, number)
    with pytest.raises(OSError, match=r"the disk is full: .*out could not be written and nothing .* kept") as caught:
        write_shards(11, full, tmp_path / "out", samples_per_shard=2, processes=processes)
    assert caught.value.errno == number
    assert list(tmp_path.iterdir()) == []


def test_other_os_errors_stay_what_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Any, sample: dict[str, Any]) -> None:
        raise OSError(errno.EIO, "the disk is broken")

    monkeypatch.setattr(webdataset.TarWriter, "write", refuse)
    with pytest.raises(OSError, match="the disk is broken"):
        write_shards(3, make, tmp_path / "out", processes=1)


def test_an_empty_folder_is_taken_and_a_full_one_is_not(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    write_shards(2, make, tmp_path / "out", processes=1)
    before = contents(tmp_path / "out")
    with pytest.raises(ValueError, match="out is there already and not an empty folder"):
        write_shards(3, make, tmp_path / "out", processes=1)
    assert contents(tmp_path / "out") == before
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="file is there already"):
        write_shards(3, make, tmp_path / "file", processes=1)


def test_parents_are_made(tmp_path: Path) -> None:
    write_shards(1, make, tmp_path / "a" / "b" / "out", processes=1)
    assert len(open_dataset(tmp_path / "a" / "b" / "out")) == 1


def test_nothing_to_write_tells_why(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="none of 0 samples could be made"):
        write_shards(0, make, tmp_path / "out")
    with pytest.raises(DataError, match="none of 2 samples could be made; the first, file-3: too dark"):
        write_shards(2, partial(make_shifted, 3), tmp_path / "out", processes=1)
    assert list(tmp_path.iterdir()) == []


def make_shifted(by: int, number: int) -> Sample | Skipped:
    return make_or_skip(number + by)


@pytest.mark.parametrize(
    ("key", "field", "words"),
    [
        ("a.b", "txt", "would not read back as itself"),
        ("", "txt", "would not read back as itself"),
        ("folder/", "txt", "would not read back as itself"),
        ("__meta__/a", "txt", "would not read back as itself"),
        ("a", "", "would not read back as itself"),
        ("a", "TXT", "would not read back as itself"),
        ("a", "x/txt", "would not read back as itself"),
        ("a", "__txt", "two underscores are webdataset's own"),
        ("/a", "txt", "is an absolute path"),
        ("../a", "txt", "climbs out of its folder"),
        ("a", "pkl", "is a pickle"),
    ],
)
def test_what_would_not_read_back_is_refused(tmp_path: Path, key: str, field: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        write_shards(1, partial(constant, key, field), tmp_path / "out", processes=1)
    assert list(tmp_path.iterdir()) == []


def test_a_field_of_one_underscore_reads_back(tmp_path: Path) -> None:
    """As a tar with the file x._orig.jpg has it."""
    sample = Sample("x", {"_orig.jpg": b"image", "txt": b"words"})
    write_shards(1, lambda _: sample, tmp_path / "out", processes=1)
    assert open_dataset(tmp_path / "out").read(0) == sample
    (theirs,) = webdataset.WebDataset(str(tmp_path / "out" / "shard-000000.tar"), shardshuffle=False)
    assert (theirs["__key__"], theirs["_orig.jpg"], theirs["txt"]) == ("x", b"image", b"words")


def test_two_samples_of_one_key_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="two samples have the key 'same'"):
        write_shards(2, partial(constant, "same", "txt"), tmp_path / "out", processes=1)


def test_a_sample_without_a_field_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="sample 'k' has no field"):
        write_shards(1, lambda number: Sample("k", {}), tmp_path / "out", processes=1)


def test_samples_per_shard_must_be_positive(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="samples_per_shard is 0"):
        write_shards(1, make, tmp_path / "out", samples_per_shard=0)


@pytest.mark.parametrize("processes", [1, 2])
def test_progress_counts_samples_to_the_end(tmp_path: Path, processes: int) -> None:
    seen: list[tuple[int, int]] = []
    write_shards(
        5, make, tmp_path / "out", samples_per_shard=2, processes=processes, progress=lambda *now: seen.append(now)
    )
    assert [total for _, total in seen] == [5, 5, 5]
    assert sorted(done for done, _ in seen) == [done for done, _ in seen]
    assert seen[-1] == (5, 5)


ORIGIN = Origin({"importer": "ducks", "options": {"seed": 0}}, "f" * 64)
KILLED = """
import os, signal, sys
from pathlib import Path
sys.path += {paths!r}
from test_shards import ORIGIN, make
from data_pipeline.shards import write_shards

def die(done, total):
    if done >= {done}:
        os.kill(os.getpid(), signal.SIGKILL)

write_shards({count}, make, Path({out!r}), samples_per_shard=2, processes={processes}, progress=die, origin=ORIGIN)
"""


def make_logged(log: Path, number: int) -> Sample | Skipped:
    with log.open("a") as file:
        file.write(f"{number}\n")
    return make_or_skip(number)


def kill_after(out: Path, done: int, count: int, processes: int) -> None:
    """Write the same samples as `make` in a process that is killed after `done` of them."""
    here = Path(__file__).parent
    code = KILLED.format(paths=[str(here), str(here.parent)], done=done, count=count, out=str(out), processes=processes)
    killed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr


@pytest.mark.parametrize("processes", [0, 2])
def test_a_killed_writer_is_gone_on_with(tmp_path: Path, processes: int) -> None:
    whole = write_shards(40, make, tmp_path / "whole", samples_per_shard=2, processes=1, origin=ORIGIN)
    kill_after(tmp_path / "out", 12, 40, processes)
    (unfinished,) = tmp_path.glob(".out.*.unfinished")
    notes = {path.stem for path in unfinished.glob("*.done")}
    assert len(notes) >= 6
    before = {name: (unfinished / f"{name}.tar").stat().st_mtime_ns for name in notes}
    resumed = write_shards(40, make, tmp_path / "out", samples_per_shard=2, processes=2, origin=ORIGIN)
    assert resumed == whole
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert {name: (tmp_path / "out" / f"{name}.tar").stat().st_mtime_ns for name in notes} == before  # not made again
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def finished_shards(tmp_path: Path, count: int) -> Path:
    """An unfinished folder whose shards are all finished, as a kill just before the rename leaves it."""
    origin, hidden = ORIGIN, tmp_path / f".out.{ORIGIN.fingerprint[:16]}-4.unfinished"
    write_shards(count, make_or_skip, tmp_path / "out", samples_per_shard=4, processes=1, origin=origin)
    shutil.rmtree(tmp_path / "out")
    hidden.mkdir()
    shards_module._write_all(range(count), make_or_skip, hidden, 4, shards_module.Workers(1), None, True)
    return hidden


def test_only_what_is_whole_is_kept(tmp_path: Path) -> None:
    hidden = finished_shards(tmp_path, 20)
    data = bytearray((hidden / "shard-000000.tar").read_bytes())
    data[700] ^= 1
    (hidden / "shard-000000.tar").write_bytes(data)
    (hidden / "shard-000003.tar").unlink()
    (hidden / "shard-000004.done").write_text('{"entry"')
    (hidden / ".shard-000004.done.77.tmp").write_text("left by the killed process")
    (hidden / ".work-77").mkdir()
    (hidden / ".work-77" / "half.tar").write_text("left by a worker of it")
    log = tmp_path / "log"
    resumed = write_shards(
        20, partial(make_logged, log), tmp_path / "out", samples_per_shard=4, processes=1, origin=ORIGIN
    )
    assert sorted(map(int, log.read_text().split())) == [*range(4), *range(12, 20)]
    whole = write_shards(20, make_or_skip, tmp_path / "whole", samples_per_shard=4, processes=1, origin=ORIGIN)
    assert resumed == whole  # the shard of skipped samples, 4 to 7, was kept too, and its reasons with it
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert not hidden.exists()


def test_a_finished_folder_of_the_same_origin_is_left_as_it_is(tmp_path: Path) -> None:
    first = write_shards(11, make_or_skip, tmp_path / "out", samples_per_shard=4, processes=1, origin=ORIGIN)
    before = contents(tmp_path / "out")
    log = tmp_path / "log"
    again = write_shards(11, partial(make_logged, log), tmp_path / "out", samples_per_shard=4, origin=ORIGIN)
    assert again == replace(first, already=True)
    assert not log.exists()
    assert contents(tmp_path / "out") == before
    for other in (replace(ORIGIN, fingerprint="e" * 64), replace(ORIGIN, request={}), None):
        with pytest.raises(ValueError, match="out is there already"):
            write_shards(11, make, tmp_path / "out", samples_per_shard=4, origin=other)


def test_two_writers_of_one_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards_module, "LOCK_SECONDS", 0.0)
    refused = []

    def write_too(done: int, total: int) -> None:
        with pytest.raises(ValueError, match=r"another process is writing .*out at this moment"):
            write_shards(4, make, tmp_path / "out", samples_per_shard=2, processes=1, origin=ORIGIN)
        refused.append(done)

    write_shards(4, make, tmp_path / "out", samples_per_shard=2, processes=1, origin=ORIGIN, progress=write_too)
    assert refused == [2, 4]
    assert len(open_dataset(tmp_path / "out")) == 4


def test_without_an_origin_nothing_is_taken_over(tmp_path: Path) -> None:
    """A process in another container may have our number, and write to its own unfinished folder."""
    other = tmp_path / f".out.{os.getpid()}.unfinished"
    other.mkdir()
    (other / "shard-000009.tar").write_bytes(b"at work")
    write_shards(2, make, tmp_path / "out", processes=1)
    assert len(open_dataset(tmp_path / "out")) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == [other.name, "out"]
    assert (other / "shard-000009.tar").read_bytes() == b"at work"


def test_a_failure_leaves_nothing_to_go_on_with(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="sample 7 is bad"):
        write_shards(11, partial(fail_at, 7), tmp_path / "out", samples_per_shard=2, processes=1, origin=ORIGIN)
    assert list(tmp_path.iterdir()) == []


def test_workers_end_with_a_killed_parent(tmp_path: Path) -> None:
    """Their lock is let go, which is what the next writer waits for."""
    kill_after(tmp_path / "out", 2, 40, 2)
    (unfinished,) = tmp_path.glob(".out.*.unfinished")
    with held(unfinished.with_suffix(".lock"), shards_module.LOCK_SECONDS, "it"):
        pass
