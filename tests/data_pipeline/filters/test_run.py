"""A run of filters: the right samples with their own bytes, counts that add up, the same at any number of processes."""

import json
import re
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from processes import workers_of
from tars import picture, tar_of

import data_pipeline.filters.look as look_module
from data_pipeline.check import check_dataset
from data_pipeline.errors import DataError
from data_pipeline.filters import (
    REPORT_FILE,
    Change,
    Drop,
    FilterReport,
    Removed,
    SampleStep,
    SetStep,
    Signatures,
    parse_steps,
    run_filters,
)
from data_pipeline.filters.look import UNREADABLE
from data_pipeline.folder import shard_files
from data_pipeline.index import load_index
from data_pipeline.sample import Sample

ReadAll = Callable[[Path], list[Sample]]
WriteSet = Callable[..., Path]


@dataclass(frozen=True)
class Multiples(SampleStep):
    """Drops the samples whose number divides by `of`."""

    name = "multiples"
    of: int

    def look(self, sample: Sample) -> Drop | None:
        number = int(sample.key)
        return Drop(f"divides by {self.of}", f"{number}") if number % self.of == 0 else None


@dataclass(frozen=True)
class Mark(SampleStep):
    """Appends a letter to the text of samples with an odd number."""

    name = "mark"
    letter: str

    def look(self, sample: Sample) -> Change | None:
        if int(sample.key) % 2 == 0:
            return None
        text = sample.fields["txt"] + self.letter.encode()
        return Change(Sample(sample.key, {**sample.fields, "txt": text}), (f"marked {self.letter}", "marked"))


@dataclass(frozen=True)
class Unmarked(SampleStep):
    """Keeps a sample whose text ends otherwise, and drops every third of the others."""

    name = "unmarked"
    mark: str

    def look(self, sample: Sample) -> Drop | None:
        ends = sample.fields["txt"].endswith(self.mark.encode())
        return Drop("marked") if ends and int(sample.key) % 3 == 0 else None


@dataclass(frozen=True)
class NeverAsked(SampleStep):
    """Fails the test that uses it when it is asked."""

    name = "never-asked"

    def look(self, sample: Sample) -> Drop | None:
        raise AssertionError(f"looked at {sample.key}")


@dataclass(frozen=True)
class FirstHalf(SetStep):
    """Keeps the first half of what is left, and writes down what it was shown."""

    name = "first-half"
    width = 2
    log: Path

    def signature(self, sample: Sample) -> bytes | None:
        return None if sample.key == "9" else f"{int(sample.key):02d}".encode()

    def decide(self, mine: Signatures, test: Signatures | None) -> list[Removed]:
        keys = [int(row.tobytes()) for row in mine.rows]
        self.log.write_text(json.dumps(keys))
        rows = np.arange(len(keys) // 2, len(keys))
        return [Removed("second half", rows, lambda row: f"{keys[row]} at {mine.place(row)}")]


def numbered(number: int) -> Sample:
    fields = {"png": picture(number), "txt": b"text of %d" % number, "json": b'{"provenance": {"id": %d}}' % number}
    return Sample(str(number), fields)


@pytest.fixture
def source(write_set: WriteSet) -> Path:
    return write_set("source", [numbered(number) for number in range(1, 22)])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.endswith(".npz")}


def adds_up(report: FilterReport) -> None:
    """Every sample is kept or was removed by one step, for one reason."""
    left = report.seen
    for step in report.steps:
        assert step.seen == left
        assert step.removed == sum(step.reasons.values())
        left -= step.removed
    assert left == report.kept


def test_kept_samples_keep_every_byte_and_the_report_says_where_the_others_went(
    source: Path, tmp_path: Path, read_all: ReadAll
) -> None:
    report = run_filters(source, tmp_path / "out", [Multiples(3), Multiples(2)], processes=1)
    kept = [number for number in range(1, 22) if number % 3 and number % 2]
    assert read_all(tmp_path / "out") == [numbered(number) for number in kept]
    adds_up(report)
    threes, twos = report.steps
    assert (threes.removed, threes.reasons) == (7, {"divides by 3": 7})
    assert (twos.seen, twos.removed) == (14, 7)
    assert [(each.key, each.shard, each.detail) for each in threes.examples] == [
        ("3", "shard-000000.tar", "3"), ("6", "shard-000001.tar", "6"), ("9", "shard-000002.tar", "9"),
    ]  # fmt: skip
    assert (report.seen, report.kept, report.changed) == (21, len(kept), 0)
    assert json.loads((tmp_path / "out" / REPORT_FILE).read_text()) == json.loads(json.dumps(report.as_tree()))
    assert check_dataset(tmp_path / "out", processes=1).problems == ()


def test_a_step_that_needs_all_samples_sees_what_the_steps_before_it_have_left(
    source: Path, tmp_path: Path, read_all: ReadAll
) -> None:
    steps = [Multiples(4), FirstHalf(tmp_path / "log"), Multiples(3)]
    report = run_filters(source, tmp_path / "out", steps, processes=1)
    shown = [number for number in range(1, 22) if number % 4 and number != 9]
    assert json.loads((tmp_path / "log").read_text()) == shown
    left = sorted([*shown[: len(shown) // 2], 9])  # 9 has nothing to compare, and stays
    assert [sample.key for sample in read_all(tmp_path / "out")] == [str(number) for number in left if number % 3]
    adds_up(report)
    first = shown[len(shown) // 2]
    assert report.steps[1].examples[0].detail == f"{first} at {first} in shard-{(first - 1) // 4:06d}.tar"
    assert report.steps[2].seen == len(left)


def test_changes_come_in_order_and_are_counted_by_kind(source: Path, tmp_path: Path, read_all: ReadAll) -> None:
    report = run_filters(source, tmp_path / "out", [Mark("a"), Multiples(3), Mark("b")], processes=1)
    samples = read_all(tmp_path / "out")
    assert {sample.key: sample.fields["txt"] for sample in samples if int(sample.key) < 6} == {
        "1": b"text of 1ab", "2": b"text of 2", "4": b"text of 4", "5": b"text of 5ab",
    }  # fmt: skip
    assert [list(sample.fields) for sample in samples] == [["json", "png", "txt"]] * len(samples)
    first, _, last = report.steps
    assert (first.changed, first.changes) == (11, {"marked": 11, "marked a": 11})
    assert last.changed == report.changed == 7  # odd ones that do not divide by 3
    adds_up(report)


def test_a_list_of_steps_is_one_step_after_the_other(source: Path, tmp_path: Path, read_all: ReadAll) -> None:
    """In the samples and in every count, however steps of both kinds follow each other."""
    half = FirstHalf(tmp_path / "log")
    steps = [Mark("a"), Multiples(8), half, Mark("b"), Unmarked("ab"), half, Mark("c"), Multiples(5)]
    at_once = run_filters(source, tmp_path / "at once", steps, processes=1)
    before = source
    for number, (step, of_list) in enumerate(zip(steps, at_once.steps, strict=True)):
        (alone,) = run_filters(before, tmp_path / str(number), [step], processes=1).steps
        before = tmp_path / str(number)
        assert (of_list.seen, of_list.removed, of_list.reasons) == (alone.seen, alone.removed, alone.reasons)
        assert (of_list.changed, of_list.changes) == (alone.changed, alone.changes)
        assert [each.key for each in of_list.examples] == [each.key for each in alone.examples]
    assert read_all(tmp_path / "at once") == read_all(before)
    assert all(step.removed or step.changed for step in at_once.steps)
    run_filters(source, tmp_path / "reversed", steps[::-1], processes=1)
    assert read_all(tmp_path / "reversed") != read_all(before)


def test_any_number_of_processes_comes_to_the_same_bytes(
    tmp_path: Path, write_set: WriteSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = Sample("22", {"png": b"\x89PNG\r\n\x1a\n, and no more"})
    source = write_set("source", [*map(numbered, range(1, 22)), bad])
    steps = parse_steps(["captions:patterns=of 7", "near-duplicates", "duplicates:of=captions", "personal-data"])
    steps += [Mark("a"), Multiples(5), FirstHalf(tmp_path / "log")]
    found = {}
    for processes in (1, 3):
        monkeypatch.setattr(look_module, "CHUNK", 100 if processes == 1 else 2)
        run_filters(source, tmp_path / str(processes), steps, samples_per_shard=3, processes=processes)
        found[processes] = contents(tmp_path / str(processes))
    assert found[1] == found[3]
    assert len(shard_files(tmp_path / "1")) == 3


def test_what_cannot_be_read_is_dropped_with_the_reason(write_set: WriteSet, tmp_path: Path, read_all: ReadAll) -> None:
    good, jpeg = picture(1, (64, 64), "JPEG"), picture(2, (64, 64), "JPEG")
    header = b"IHDR" + (60_000).to_bytes(4, "big") * 2 + b"\x08\x02\0\0\0"
    bomb = b"\x89PNG\r\n\x1a\n\0\0\0\r" + header + zlib.crc32(header).to_bytes(4, "big") + b"\0\0\0\0IDAT5\xaf\x06\x1e"
    samples = [
        Sample("good", {"jpg": good, "txt": b"a caption of words"}),
        Sample("cut", {"jpg": jpeg[: len(jpeg) // 2], "txt": b"a caption of words"}),
        Sample("bomb", {"png": bomb, "txt": b"a caption of words"}),
        Sample("empty", {"jpg": b"", "txt": b"a caption of words"}),
        Sample("bytes", {"jpg": picture(3), "txt": b"\xff\xfe caption"}),
        Sample("json", {"jpg": picture(4), "json": b'{"captions": ["ok", '}),
        Sample("deep", {"jpg": picture(5), "json": b"[" * 100_000}),
        Sample("half", {"jpg": picture(6), "json": rb'{"captions": ["half a \ud800 character"]}'}),
    ]
    folder = write_set("hostile", samples)
    report = run_filters(folder, tmp_path / "out", parse_steps(["near-duplicates", "captions"]), processes=1)
    assert [sample.key for sample in read_all(tmp_path / "out")] == ["good"]
    assert [step.reasons for step in report.steps] == [{"cannot be read": 3}, {"cannot be read": 4}]
    details = {example.key: example.detail for step in report.steps for example in step.examples}
    assert "damaged JPEG" in details["cut"]
    assert "decompression bomb" in details["bomb"]
    assert "UTF-8" in details["bytes"]
    adds_up(report)


def test_a_folder_that_holds_something_is_refused_and_left_alone(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("kept")
    with pytest.raises(ValueError, match="is there already"):
        run_filters(source, tmp_path / "out", [NeverAsked()], processes=1)
    with pytest.raises(ValueError, match="is there already"):
        run_filters(source, source, [NeverAsked()], processes=1)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


def test_nothing_left_is_an_error_that_says_which_step_took_it(source: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nothing would be left of the 21 .*: multiples removes 21 .* divides by 1"):
        run_filters(source, tmp_path / "out", [Multiples(1), NeverAsked()], processes=1)
    assert not (tmp_path / "out").exists()


def test_a_report_that_cannot_be_written_leaves_no_shards(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError("no room")

    monkeypatch.setattr(FilterReport, "save", full)
    with pytest.raises(OSError, match="no room"):
        run_filters(source, tmp_path / "out", [Multiples(2)], processes=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


@pytest.mark.parametrize("done", [4, 24])
@pytest.mark.parametrize("processes", [1, 2])
def test_an_interrupt_leaves_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, done: int, processes: int
) -> None:
    """While the samples are looked at, and while they are written."""

    def interrupt(now: int, _: int) -> None:
        if now >= done:
            raise KeyboardInterrupt

    monkeypatch.setattr(look_module, "CHUNK", 2)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    with pytest.raises(KeyboardInterrupt):
        run_filters(source, tmp_path / "out", [Mark("a")], samples_per_shard=3, processes=processes, progress=interrupt)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "temporary"]
    assert not list((tmp_path / "temporary").iterdir())
    assert not workers_of()


def test_a_damaged_shard_is_an_error_and_not_a_dropped_sample(source: Path, tmp_path: Path) -> None:
    shard = shard_files(source)[-1]
    shard.write_bytes(shard.read_bytes()[:-2048])
    with pytest.raises(DataError, match=shard.name):
        run_filters(source, tmp_path / "out", [Multiples(2)], processes=1)
    assert not (tmp_path / "out").exists()


def test_a_damaged_sample_is_dropped_by_the_first_step(source: Path, tmp_path: Path, read_all: ReadAll) -> None:
    load_index(source)
    shard = shard_files(source)[0]
    data = bytearray(shard.read_bytes())
    data[data.index(b"text of 3")] ^= 1
    shard.write_bytes(data)
    report = run_filters(source, tmp_path / "out", [Multiples(5), Mark("a")], processes=2)
    adds_up(report)
    assert report.steps[0].reasons == {"divides by 5": 4, UNREADABLE: 1}
    (example,) = (each for each in report.steps[0].examples if each.reason == UNREADABLE)
    assert example.key == "3"
    assert re.search(rf"{shard.name} is damaged: bytes \d+ to \d+, its 'txt'", example.detail)
    assert "3" not in {sample.key for sample in read_all(tmp_path / "out")}


def test_equal_keys_of_several_shards_are_told_before_they_would_come_into_one(
    tmp_path: Path, read_all: ReadAll
) -> None:
    (tmp_path / "in").mkdir()
    for shard in range(2):
        files = {f"{number}.txt": b"of shard %d" % shard for number in range(1, 4)}
        (tmp_path / "in" / f"s{shard}.tar").write_bytes(tar_of(files))
    with pytest.raises(ValueError, match=r"3 keys of .* shards, such as '1' in s0\.tar and s1\.tar.*--shard-keys"):
        run_filters(tmp_path / "in", tmp_path / "out", [Multiples(7)], processes=1)
    assert not (tmp_path / "out").exists()
    report = run_filters(tmp_path / "in", tmp_path / "out", [Multiples(7)], samples_per_shard=3, processes=1)
    assert report.kept == 6
    run_filters(tmp_path / "in", tmp_path / "named", [Multiples(7)], shard_keys=True, processes=1)
    assert [sample.key for sample in read_all(tmp_path / "named")] == ["s0/1", "s0/2", "s0/3", "s1/1", "s1/2", "s1/3"]


def test_equal_keys_are_no_matter_where_a_step_leaves_one_of_them(tmp_path: Path) -> None:
    image = {"a.png": picture(1)}
    (tmp_path / "in").mkdir()
    for shard in range(2):
        (tmp_path / "in" / f"s{shard}.tar").write_bytes(tar_of(image))
    assert run_filters(tmp_path / "in", tmp_path / "out", parse_steps(["duplicates"]), processes=1).kept == 1
    (tmp_path / "twice").mkdir()
    (tmp_path / "twice" / "s.tar").write_bytes(tar_of([("1.txt", b"a red car"), ("2.txt", b"a cat"), ("1.txt", b"x")]))
    assert (
        run_filters(tmp_path / "twice", tmp_path / "kept", parse_steps(["captions:min_words=2"]), processes=1).kept == 2
    )
    (tmp_path / "in" / "s1.tar").write_bytes(tar_of({"a.png": picture(2)}))
    (tmp_path / "in" / "index.json").unlink()
    with pytest.raises(ValueError, match=r"1 key of .* is there in several shards, 'a' in s0\.tar and s1\.tar"):
        run_filters(tmp_path / "in", tmp_path / "two", parse_steps(["duplicates"]), processes=1)


@pytest.mark.parametrize("shard_keys", [False, True])
def test_a_key_that_a_tar_has_twice_is_told_at_once(tmp_path: Path, shard_keys: bool) -> None:
    (tmp_path / "in").mkdir()
    files = [("1.txt", b"a"), ("2.txt", b"b"), ("1.txt", b"newer")]
    (tmp_path / "in" / "s.tar").write_bytes(tar_of(files))
    with pytest.raises(ValueError, match=r"1 key of .* is there twice, '1' in s\.tar.* unpacking s\.tar and packing"):
        run_filters(tmp_path / "in", tmp_path / "out", [Multiples(7)], shard_keys=shard_keys, processes=1)


def test_a_test_set_needs_a_step_that_compares_and_to_be_another_one(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="none of the steps compares"):
        run_filters(source, tmp_path / "out", [Multiples(2)], against=source, processes=1)
    with pytest.raises(ValueError, match="same data set"):
        run_filters(source, tmp_path / "out", parse_steps(["duplicates"]), against=source, processes=1)
    with pytest.raises(ValueError, match="give 1 to 63"):
        run_filters(source, tmp_path / "out", [], processes=1)


def test_progress_ends_at_its_total(
    source: Path, write_set: WriteSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(look_module, "CHUNK", 5)
    told: list[tuple[int, int]] = []
    run_filters(source, tmp_path / "out", [Multiples(2)], processes=1, progress=lambda *both: told.append(both))
    assert [done for done, _ in told] == [5, 10, 15, 20, 21, 32]
    assert told[-1] == (32, 32)
    test = write_set("test", [numbered(number) for number in (1, 2, 30)])
    told.clear()
    run_filters(
        source, tmp_path / "two", parse_steps(["duplicates"]), against=test, progress=lambda *both: told.append(both)
    )
    assert told[-1] == (21 + 3 + 19, 21 + 3 + 19)
    assert all(done <= total for done, total in told)
