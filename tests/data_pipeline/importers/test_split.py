"""The split by caption, keys, and all-or-nothing writing that importers share."""

import os
import re
import shutil
import signal
import subprocess
import sys
import zlib
from collections import Counter
from dataclasses import replace

import pytest

from data_pipeline.errors import DataError
from data_pipeline.importers.folder import import_folder
from data_pipeline.importers.hold_out import choose_of_classes, choose_test, plain
from data_pipeline.importers.image import image_field
from data_pipeline.importers.split import (
    Candidate,
    Request,
    refuse_existing,
    unique_keys,
    write_split,
)
from data_pipeline.sample import Skipped
from data_pipeline.tar import refusal_of_name, split_name


def read_number(candidate):
    """Sample n holds n as a "wav"; negative numbers cannot be read."""
    if candidate.place < 0:
        raise DataError("a negative number")
    return {"wav": str(candidate.place).encode()}


def fail_in_training(candidate):
    """Reads any number but 13, at which the disk breaks in a way that is no skip."""
    if candidate.place == 13:
        raise RuntimeError("the roof fell in")
    return read_number(candidate)


def candidates_of(numbers, captions_of=lambda number: (f"the number {number}",)):
    return [Candidate(f"{number}.x", captions_of(number), number) for number in numbers]


def plains_of(samples):
    return {plain(caption) for sample in samples for caption in sample.captions()}


@pytest.mark.parametrize("seed", range(5))
def test_no_caption_is_on_both_sides_whatever_its_case_and_punctuation(seed):
    spellings = ("A red fox.", "a RED fox", "«A red   fox!»", "a red-fox")
    captions = [(spellings[number % 4],) for number in range(6)] + [(f"animal {number}",) for number in range(60)]
    held_out = choose_test(captions, 0.2, seed)
    assert len({number in held_out for number in range(6)}) == 1
    assert 9 <= len(held_out) <= 13  # the goal is 13, and a group of 6 may not fit


def test_captions_shared_through_a_third_sample_bind_too():
    chain = [("a", "b"), ("b", "c"), ("c", "d"), ("d",), ("x", "a")]
    others = [(f"other {number}",) for number in range(20)]
    for seed in range(10):
        held_out = choose_test(chain + others, 0.4, seed)
        assert len({number in held_out for number in range(5)}) == 1


def test_some_seeds_hold_out_the_group_and_some_do_not():
    captions = [("same",)] * 3 + [(f"other {number}",) for number in range(20)]
    assert {0 in choose_test(captions, 0.3, seed) for seed in range(30)} == {True, False}


def test_more_data_does_not_move_what_was_there():
    captions = [(f"caption {number}",) for number in range(100)]
    before, after = choose_test(captions, 0.2, 3), choose_test([*captions, ("one more",)], 0.2, 3)
    assert len(before) == 20
    assert len(before - after) <= 1
    assert choose_test(captions, 0.2, 3) == before
    assert choose_test(captions, 0.2, 4) != before


@pytest.mark.parametrize("share", [1e-9, 0.99])
def test_a_group_at_least_is_on_each_side(share):
    captions = [("a",)] * 5 + [("b",)] * 3
    held_out = choose_test(captions, share, 0)
    assert held_out in ({0, 1, 2, 3, 4}, {5, 6, 7})
    assert choose_test([("a",)] * 5, 0, 0) == set()


def test_the_smallest_group_is_held_out_when_none_fits():
    assert choose_test([("a",)] * 50 + [("b",)] * 30 + [("c",)] * 40, 0.1, 0) == set(range(50, 80))


@pytest.mark.parametrize(("samples", "held_out"), [(2, 1), (7, 1), (8, 2), (14, 2), (29, 3)])
def test_a_small_set_holds_out_the_two_that_an_evaluation_needs(samples, held_out):
    assert len(choose_test([(f"caption {number}",) for number in range(samples)], 0.1, 0)) == held_out
    assert len(choose_of_classes(["cat"] * samples, [str(number) for number in range(samples)], 0.1, 0)) == held_out


def test_one_caption_for_all_cannot_be_split():
    with pytest.raises(ValueError, match="test share of 0"):
        choose_test([("a cat",), ("A cat!",)], 0.1, 0)


@pytest.mark.parametrize("share", [-0.1, 1, 1.5, float("nan")])
def test_a_share_that_is_none_is_refused(tmp_path, share):
    with pytest.raises(ValueError, match="test share"):
        write_split(tmp_path / "out", candidates_of(range(4)), read_number, test_share=share, seed=0)
    assert not (tmp_path / "out").exists()


def test_plain_keeps_marks_and_tells_punctuation_apart():
    assert plain("कुत्ता") != plain("कुत्ते")  # they differ in a vowel sign alone
    assert plain("!") != plain("?")
    assert plain("Ｆｕｌｌ Straße") == plain("full strasse")


def test_keys_are_unique_and_storable():
    names = ["a.png", "a.jpg", "a-2.png", "x/a.b.png", "../up.png", "/abs/q.png", "__meta__/q.png", ".png", "é\n.png"]
    names += ["a b/c d.png", "\udcff.png", "x\\y.png", "...", "", "a.png"]
    keys = unique_keys(names)
    assert len(set(keys)) == len(names)
    assert keys[0] == "a"
    assert keys[3] == "x/a_b"
    for key in keys:
        assert split_name(f"{key}.png") == (key, "png")
        assert refusal_of_name(f"{key}.png") is None


def test_what_is_written_reads_back_in_the_order_of_the_source(tmp_path, read_all):
    candidates = candidates_of(range(50), lambda number: (f"number {number}", f"{number} again"))
    imported = write_split(tmp_path / "out", candidates, read_number, test_share=0.3, seed=1, processes=0)
    train, test = read_all(tmp_path / "out/train"), read_all(tmp_path / "out/test")
    assert (len(train), len(test)) == (35, 15) == (imported.train.index.samples, imported.test.index.samples)
    assert not plains_of(train) & plains_of(test)
    for part in (train, test):
        numbers = [int(sample.fields["wav"]) for sample in part]
        assert numbers == sorted(numbers)
        for number, sample in zip(numbers, part, strict=True):
            assert sample.key == str(number)
            assert sample.metadata()["id"] == f"{number}.x"
            assert sample.captions() == (f"number {number}", f"{number} again")
            assert sample.fields["txt"] == f"number {number}".encode()


def test_a_caption_in_both_sets_would_be_seen(tmp_path, read_all):
    """`plains_of` itself: the check above must be able to fail."""
    write_split(tmp_path / "out", candidates_of(range(4)), read_number, test_share=0, seed=0, processes=0)
    train = read_all(tmp_path / "out/train")
    assert plains_of(train) & plains_of(train[:1])


def test_many_processes_write_the_same_bytes(tmp_path):
    candidates = candidates_of(range(2500), lambda number: (f"number {number // 2}",))
    done = []
    first = write_split(
        tmp_path / "a", candidates, read_number, test_share=0.1, seed=7, processes=2, progress=lambda *p: done.append(p)
    )
    second = write_split(tmp_path / "b", candidates, read_number, test_share=0.1, seed=7, processes=0)
    assert first.train.index.fingerprint == second.train.index.fingerprint
    assert first.test.index.fingerprint == second.test.index.fingerprint
    assert len(first.train.index.shards) == 3
    assert done[-1] == (2500, 2500)
    assert done == sorted(done)


def test_no_share_is_no_test_set(tmp_path):
    imported = write_split(tmp_path / "out", candidates_of(range(4)), read_number, test_share=0, seed=0, processes=0)
    assert imported.test is None
    assert not (tmp_path / "out/test").exists()
    assert imported.train.index.samples == 4


def test_what_cannot_be_read_is_counted_with_its_reason(tmp_path):
    candidates = candidates_of([*range(20), -1, -2, -3])
    before = [Skipped("z", "no caption")]
    imported = write_split(
        tmp_path / "out", candidates, read_number, skipped=before, test_share=0.2, seed=0, processes=0
    )
    assert imported.train.index.samples + imported.test.index.samples == 20
    assert imported.reasons() == {"a negative number": 3, "no caption": 1}
    assert {skip.source for skip in imported.skipped} == {"-1.x", "-2.x", "-3.x", "z"}


def test_an_unreadable_test_set_is_drawn_again(tmp_path, read_all):
    """Whatever the seed draws first, one of three bad images among four may not be all of test."""
    for seed in range(6):
        out = tmp_path / str(seed)
        imported = write_split(out, candidates_of([1, 2, 3, -4]), read_number, test_share=0.1, seed=seed, processes=0)
        assert len(read_all(out / "test")) == 1
        assert len(read_all(out / "train")) == 2
        assert imported.reasons() == {"a negative number": 1}


def test_nothing_readable_is_an_error_that_says_why(tmp_path):
    for share in (0, 0.2):
        with pytest.raises(DataError, match="a negative number"):
            write_split(
                tmp_path / "out", candidates_of([-1, -2, -3]), read_number, test_share=share, seed=0, processes=0
            )
    assert os.listdir(tmp_path) == []


def test_a_failure_leaves_neither_set(tmp_path):
    candidates = candidates_of(range(40), lambda number: ("a",) if number == 13 else (f"b {number}",))
    seed = next(seed for seed in range(20) if 13 not in choose_test([c.captions for c in candidates], 0.3, seed))
    for processes in (0, 2):
        with pytest.raises(RuntimeError, match="the roof fell in"):
            write_split(tmp_path / "out", candidates, fail_in_training, test_share=0.3, seed=seed, processes=processes)
        assert os.listdir(tmp_path) == []


def test_what_is_there_is_not_touched(tmp_path):
    for part in ("train", "test"):
        out = tmp_path / part
        (out / part).mkdir(parents=True)
        (out / part / "mine").write_text("mine")
        with pytest.raises(ValueError, match=re.escape(str(out / part))):
            refuse_existing(out)
        with pytest.raises(ValueError, match="remove it"):
            write_split(out, candidates_of(range(4)), read_number, test_share=0.5, seed=0)
        assert os.listdir(out) == [part]
        assert (out / part / "mine").read_text() == "mine"
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file"):
        refuse_existing(tmp_path / "file")


def test_an_empty_folder_may_be_written_into(tmp_path):
    (tmp_path / "out/train").mkdir(parents=True)
    write_split(tmp_path / "out", candidates_of(range(4)), read_number, test_share=0.5, seed=0, processes=0)
    assert sorted(os.listdir(tmp_path / "out")) == ["test", "train"]


def test_an_image_is_named_by_its_bytes(image_bytes):
    for kind, name in (("PNG", "png"), ("JPEG", "jpg"), ("WEBP", "webp")):
        data = image_bytes(0, kind)
        assert image_field(data) == {name: data}
    for data in (b"", b"GIF89a", image_bytes()[:20], image_bytes(0, "JPEG")[:30], b"\x89PNG\r\n\x1a\n" + bytes(99)):
        with pytest.raises(DataError):
            image_field(data)


@pytest.mark.parametrize("side", [9_000, 60_000])  # over our limit, and over Pillow's too
def test_a_decompression_bomb_is_refused(image_bytes, side):
    data = bytearray(image_bytes())
    data[16:24] = side.to_bytes(4, "big") * 2  # width and height in the PNG header
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    with pytest.raises(DataError, match="more than"):
        image_field(bytes(data))


def published(numbers, parts=("train", "val", "test")):
    """Candidates of which the first is of train, the next of val, then test, and so on; some cannot be read."""
    candidates = candidates_of(numbers, lambda number: ("the same for all",))
    return [replace(candidate, part=parts[at % len(parts)]) for at, candidate in enumerate(candidates)]


def write_numbers(out, candidates, request=None, test_share=None, **options):
    return write_split(
        out, candidates, read_number, test_share=test_share, seed=0, request=request, processes=0, **options
    )


def test_a_published_split_is_kept(tmp_path, read_all):
    done = []
    imported = write_numbers(tmp_path / "out", published([*range(9), -1, -2]), progress=lambda *p: done.append(p))
    for first, part in enumerate(("train", "val", "test")):
        numbers = [int(sample.fields["wav"]) for sample in read_all(tmp_path / "out" / part)]
        assert numbers == list(range(first, 9, 3))
        assert imported.parts[part].index.samples == 3
    assert imported.reasons() == {"a negative number": 2}
    assert done[-1] == (11, 11)
    assert done == sorted(done)


def test_a_share_draws_another_split_than_the_published_one(tmp_path, read_all):
    candidates = [replace(candidate, part="val") for candidate in candidates_of(range(20))]
    imported = write_numbers(tmp_path / "out", candidates, test_share=0.2)
    assert {part: written.index.samples for part, written in imported.parts.items()} == {"train": 16, "test": 4}
    assert {len(written.index.shards) for written in imported.parts.values()} == {1}


def test_without_a_split_or_a_share_a_tenth_is_held_out(tmp_path):
    imported = write_numbers(tmp_path / "out", candidates_of(range(20)))
    assert {part: written.index.samples for part, written in imported.parts.items()} == {"train": 18, "test": 2}


@pytest.mark.parametrize("bad", ["train", "val", "test"])
def test_a_set_of_which_nothing_can_be_read_stops_all(tmp_path, bad):
    candidates = [replace(each, place=-1) if each.part == bad else each for each in published(range(6))]
    with pytest.raises(DataError, match=rf"nothing to write to .*{bad}.*a negative number"):
        write_numbers(tmp_path / "out", candidates)
    assert os.listdir(tmp_path) == []


def request_of(tmp_path, **options):
    return Request.of("numbers", tmp_path / "source", seed=0, media=tmp_path, **options)


def times_in(folder):
    return {path: path.stat().st_mtime_ns for path in sorted(folder.rglob("*"))}


def test_the_same_request_again_changes_nothing(tmp_path):
    request = request_of(tmp_path)
    candidates = published([*range(9), -1])
    skipped = [Skipped("z", "no caption")]
    first = write_numbers(tmp_path / "out", candidates, request, skipped=skipped)
    before = times_in(tmp_path)
    again = write_numbers(tmp_path / "out", candidates, request, skipped=skipped)
    assert again.already
    assert not first.already
    assert again.skipped == first.skipped
    assert [written.index for written in again.parts.values()] == [written.index for written in first.parts.values()]
    assert times_in(tmp_path) == before


def test_another_request_or_a_changed_source_is_refused(tmp_path):
    candidates = published(range(9))
    write_numbers(tmp_path / "out", candidates, request_of(tmp_path))
    before = times_in(tmp_path)
    refuse_existing(tmp_path / "out", request_of(tmp_path))
    for other in (None, request_of(tmp_path, licence="x"), request_of(tmp_path / "elsewhere")):
        with pytest.raises(ValueError, match="there already: give another"):
            refuse_existing(tmp_path / "out", other)
        with pytest.raises(ValueError, match="there already: give another"):
            write_numbers(tmp_path / "out", candidates, other)
    changed = replace(candidates[4], metadata={"more": 1})
    moved = replace(candidates[4], part="train")
    for others in (candidates[:-1], [*candidates[:4], changed, *candidates[5:]], [*candidates[:4], moved]):
        with pytest.raises(ValueError, match="its source has changed since"):
            write_numbers(tmp_path / "out", others, request_of(tmp_path))
    assert times_in(tmp_path) == before


def test_an_import_killed_between_its_sets_goes_on(tmp_path):
    """OUT/train comes last: without it, the others are there and not made again."""
    request, candidates = request_of(tmp_path), published(range(9))
    whole = write_numbers(tmp_path / "out", candidates, request)
    before = times_in(tmp_path / "out/test") | times_in(tmp_path / "out/val")
    shutil.rmtree(tmp_path / "out/train")
    resumed = write_numbers(tmp_path / "out", candidates, request)
    assert not resumed.already
    assert {part: written.index for part, written in resumed.parts.items()} == {
        part: written.index for part, written in whole.parts.items()
    }
    assert times_in(tmp_path / "out/test") | times_in(tmp_path / "out/val") == before


def test_what_an_interrupted_import_of_another_request_has_left_is_told(tmp_path):
    left = tmp_path / "out/.train.0123-1000.unfinished"
    left.mkdir(parents=True)
    imported = write_numbers(tmp_path / "out", published(range(9)), request_of(tmp_path))
    assert left.is_dir()
    (note,) = imported.notes
    assert note.endswith(f"or whose source has changed: remove {left.name}")


KILLED = """
import os, signal, sys
from pathlib import Path
from data_pipeline.importers.folder import import_folder

def die(done, total):
    if done > 1100:
        os.kill(os.getpid(), signal.SIGKILL)

import_folder(Path({source!r}), Path({out!r}), test_share=0.1, processes=0, progress=die)
"""


def test_a_killed_import_goes_on_where_it_was(tmp_path, image_bytes):
    """1,200 images are a test set of one shard and a training set of two; the kill comes after the first of those."""
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    (source / "0.png").write_bytes(image_bytes())
    (source / "0.txt").write_text("picture 0")
    for number in range(1, 1200):
        os.link(source / "0.png", source / f"{number}.png")
        (source / f"{number}.txt").write_text(f"picture {number}")
    code = KILLED.format(source=str(source), out=str(out))
    here = {**os.environ, "TMPDIR": str(tmp_path)}  # a killed process leaves its temporary files
    killed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=here)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    (unfinished,) = out.glob(".train.*.unfinished")
    assert not (out / "train").exists()
    before = times_in(out / "test")
    finished = (unfinished / "shard-000000.tar").stat().st_mtime_ns
    resumed = import_folder(source, out, test_share=0.1, processes=0)
    whole = import_folder(source, tmp_path / "whole", test_share=0.1, processes=0)
    assert {part: written.index for part, written in resumed.parts.items()} == {
        part: written.index for part, written in whole.parts.items()
    }
    assert times_in(out / "test") == before
    assert (out / "train/shard-000000.tar").stat().st_mtime_ns == finished
    assert sorted(os.listdir(out)) == ["test", "train"]
    assert import_folder(source, out, test_share=0.1, processes=0).already


def test_every_class_of_two_is_in_both_sets():
    classes = ["cat"] * 40 + ["dog"] * 3 + ["eel"] * 2 + ["one"]
    names = [f"{label}/{number}" for number, label in enumerate(classes)]
    held_out = choose_of_classes(classes, names, 0.1, 0)
    assert Counter(classes[number] for number in held_out) == {"cat": 4, "dog": 1, "eel": 1}
    assert held_out == choose_of_classes(classes, names, 0.1, 0) != choose_of_classes(classes, names, 0.1, 1)
    with pytest.raises(ValueError, match="each of the 2 classes has one sample"):
        choose_of_classes(["a", "b"], ["1", "2"], 0.1, 0)


def test_a_class_of_which_the_test_image_cannot_be_read_is_drawn_again(tmp_path, read_all):
    numbers = [(label, number) for label in ("cat", "dog") for number in range(6)]
    items = [Candidate(f"{label}/{n}", (label,), n if n else -1, {"label": label}, True) for label, n in numbers]
    for seed in range(6):
        imported = write_split(tmp_path / f"{seed}", items, read_number, test_share=0.2, seed=seed, processes=0)
        assert {sample.label() for sample in read_all(tmp_path / f"{seed}/test")} == {"cat", "dog"}
        assert len(imported.skipped) == 2


def test_what_is_in_no_published_set_is_told(tmp_path, read_all):
    items = [
        replace(each, part=part) for each, part in zip(candidates_of(range(3)), ("train", "test", None), strict=True)
    ]
    imported = write_split(tmp_path / "out", items, read_number, test_share=None, seed=0, processes=0)
    assert [skip.source for skip in imported.skipped] == ["2.x"]
