"""The lint: every defect planted is found, with its shard, byte and key, and sound data has none."""

import io
import json
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import soundfile
from tars import BLOCK, picture, special, tar_of

from data_pipeline.check import CheckReport, Problem, check_dataset
from data_pipeline.errors import DataError
from data_pipeline.index import INDEX_FILE, load_index, table_path
from data_pipeline.stats import dataset_stats


def wave_of_nans() -> bytes:
    file = io.BytesIO()
    soundfile.write(file, np.full(500, np.nan, np.float32), 8000, format="WAV", subtype="FLOAT")
    return file.getvalue()


def sound(frames: int = 500) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, np.sin(np.arange(frames) / 9), 8000, format="FLAC")
    return file.getvalue()


def good(number: int) -> dict[str, bytes]:
    """The files of one sound sample, its picture a JPEG or a PNG."""
    kind = ("JPEG", "PNG")[number % 2]
    return {
        f"good{number}.flac": sound(),
        f"good{number}.{kind.lower().replace('jpeg', 'jpg')}": picture(number, kind=kind),
        f"good{number}.txt": b"a caption",
    }


def dataset(folder: Path, *shards: dict[str, bytes] | list, indexed: bool = True) -> Path:
    for number, files in enumerate(shards):
        (folder / f"s{number}.tar").write_bytes(tar_of(files))
    if indexed:
        load_index(folder)
    return folder


def check(folder: Path, **options: bool) -> CheckReport:
    return check_dataset(folder, processes=1, **options)


def only_problem(folder: Path, **options: bool) -> Problem:
    (problem,) = check(folder, **options).problems
    return problem


def place_of(folder: Path, name: str, shard: str = "s0.tar") -> int:
    with tarfile.open(folder / shard) as tar:
        return tar.getmember(name).offset_data


def test_sound_data_has_no_problem(tmp_path: Path) -> None:
    report = check(dataset(tmp_path, good(0) | good(1), good(2)))
    assert report == CheckReport((), samples=3, shards=2)
    assert report.ok


def test_a_check_writes_nothing_and_needs_no_index(tmp_path: Path) -> None:
    dataset(tmp_path, good(0), indexed=False)
    report = check(tmp_path)
    assert report.ok
    assert [(p.severity, p.shard) for p in report.problems] == [("warning", INDEX_FILE)]
    assert [path.name for path in tmp_path.iterdir()] == ["s0.tar"]


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("bad.jpg", picture(1, (90, 90), "JPEG")[:900], "damaged JPEG"),
        ("bad.png", picture(1, (90, 90))[:900], "damaged PNG"),
        ("bad.png", b"<html>404</html>", "not a JPEG, PNG or WebP"),
        ("bad.jpg", b"", "not a JPEG, PNG or WebP image (0 bytes"),
        ("bad.left.webp", b"RIFF\0\0\0\0WEBPVP8 ", "the left.webp field: damaged WEBP"),
        ("bad.flac", sound(5000)[:300], "damaged FLAC"),
        ("bad.wav", b"RIFF", "not a FLAC, WAV or OGG sound"),
        ("bad.wav", wave_of_nans(), "values that are no sound"),
        ("bad.txt", b"caf\xe9", "not UTF-8"),
        ("bad.json", b"{", "not JSON"),
        ("bad.json", b"[]", "holds list, not an object"),
        ("bad.json", b'{"captions": [1]}', "captions that are not a list of texts"),
        ("bad.json", rb'{"captions": ["\ud800"]}', "not Unicode"),
        ("bad.json", rb'{"label": "\ud800"}', "not Unicode"),
        ("bad.json", b'{"label": 1, "label": 2}', "has the name 'label' twice, with different values"),
        *(
            ("bad.json", f'{{"qa": {qa}}}'.encode(), words)
            for qa, words in (
                ('"abc"', "no list of questions"),
                ('{"question": "x", "answer": "y"}', "no list of questions"),
                ('[{"q": "x"}]', "no list of questions"),
                ('[{"question": 1, "answer": "x"}]', "a question or an answer that is not text"),
                (r'[{"question": "x", "answer": "\ud800"}]', "not Unicode"),
            )
        ),
    ],
)
def test_bad_fields_are_errors_with_their_place(tmp_path: Path, name: str, data: bytes, words: str) -> None:
    files = {"bad.png": picture(), "bad.txt": b"words"} if not name.endswith(".txt") else {"bad.png": picture()}
    folder = dataset(tmp_path, good(0) | files | {name: data} | good(1))
    problem = next(p for p in check(folder).problems if p.severity == "error")
    assert len(check(folder).errors) == 1
    assert (problem.severity, problem.shard, problem.key) == ("error", "s0.tar", "bad")
    assert problem.byte == place_of(folder, name)
    assert words in problem.reason
    assert not check(folder).ok


def test_a_label_that_names_no_class_is_a_warning(tmp_path: Path) -> None:
    """Captions beside it are good: sets with several labels an image train and are scored by their captions."""
    text = b'{"captions": ["a cat and a dog"], "label": ["cat", "dog"]}'
    files = good(0) | {"odd.png": picture(), "odd.json": text, "more.png": picture(), "more.json": text}
    folder = dataset(tmp_path, files)
    found = check(folder)
    assert found.ok
    assert [(p.severity, p.key, p.reason) for p in found.problems] == [
        (
            "warning",
            "odd",
            "its label is neither text nor a whole number (list), and is read as none; so in 1 more of its samples",
        )
    ]
    assert dataset_stats(folder).unreadable == 0


def bomb(side: int) -> bytes:
    """A PNG of a few bytes that says it is this many pixels wide and high."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    pixels = zlib.compress(b"\0" * 99)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [9000, 100_000])
def test_decompression_bombs_are_refused(tmp_path: Path, side: int) -> None:
    problem = only_problem(dataset(tmp_path, {"boom.png": bomb(side), "boom.txt": b"boom"}))
    assert (problem.severity, problem.key, problem.byte) == ("error", "boom", BLOCK)
    assert "decompression bomb" in problem.reason


def test_without_decoding_only_the_text_is_read(tmp_path: Path) -> None:
    folder = dataset(tmp_path, {"a.jpg": b"no picture", "a.txt": b"\xff"})
    assert len(check(folder).errors) == 2
    assert "not UTF-8" in only_problem(folder, decode=False).reason


def test_an_odd_jpeg_that_is_whole_is_a_warning(tmp_path: Path) -> None:
    whole = picture(kind="JPEG")
    problem = only_problem(dataset(tmp_path, {"a.jpg": whole[:-2] + bytes([1]) * 90 + whole[-2:], "a.txt": b"words"}))
    assert problem.severity == "warning"
    assert "the jpg field is an odd JPEG, which Pillow reads whole (Corrupt JPEG data: " in problem.reason


def test_warnings_do_not_make_data_bad(tmp_path: Path) -> None:
    files = {"bare.png": picture(), "words.txt": b"only", "empty.png": picture(), "empty.txt": b" \n"}
    files |= {"blank.png": picture(), "blank.json": b'{"captions": ["one", ""]}'}
    report = check(dataset(tmp_path, good(0) | files))
    assert report.ok
    assert [(p.severity, p.key) for p in report.problems] == [
        ("warning", "bare"), ("warning", "words"), ("warning", "empty"), ("warning", "blank"),
    ]  # fmt: skip
    reasons = [p.reason for p in report.problems]
    assert reasons[0] == "no caption in its fields (png)"
    assert reasons[1] == "no image among its fields (txt)"
    assert "caption 1 in the txt field is empty" in reasons[2]
    assert "caption 2 in the json field is empty" in reasons[3]


def test_captions_may_be_in_the_json_field_alone(tmp_path: Path) -> None:
    files = {"a.json": json.dumps({"captions": ["x"]}).encode(), "a.png": picture(), "a.txt": b""}
    assert check(dataset(tmp_path, files)).problems == ()


def test_what_a_whole_shard_lacks_is_said_once(tmp_path: Path) -> None:
    folder = dataset(tmp_path, {f"t{i}.txt": b"words" for i in range(50)}, {f"u{i}.png": picture() for i in range(40)})
    report = check(folder)
    assert [(p.shard, p.key, p.reason) for p in report.problems if p.severity == "warning"] == [
        ("s0.tar", None, "none of its 50 samples has an image"),
        ("s1.tar", None, "none of its 40 samples has a caption"),
    ]
    (error,) = report.errors  # and so no run can learn from any
    assert error.reason.startswith("no sample has both an image and a caption: the fields are called txt, png")
    assert report.samples == 90


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        (("../up.txt", b"1"), "climbs out of its folder"),
        (("/etc/cron.d/evil.txt", b"1" * 600), "is an absolute path"),
        (("evil.pkl", b"1" * 600), "is a pickle"),
        (special("evil.txt", tarfile.SYMTYPE, "/etc/passwd"), "a symbolic link"),
        (special("evil.txt", tarfile.LNKTYPE, "good0.txt"), "a hard link"),
        (special("evil.txt", tarfile.GNUTYPE_SPARSE), "a sparse file"),
    ],
)
def test_refused_files_are_named_and_what_follows_is_read(tmp_path: Path, entry: object, words: str) -> None:
    first = list(good(0).items())
    bad = {"broken.jpg": b"x", "broken.txt": b"later"}
    dataset(tmp_path, [*first, entry, *bad.items(), *good(1).items()], indexed=False)
    report = check(tmp_path)
    assert report.samples == 3
    refused, broken = report.errors
    assert words in refused.reason
    assert refused.byte == end_of(first)
    assert (broken.key, broken.byte) == ("broken", place_of(tmp_path, "broken.jpg"))


def test_a_sparse_file_in_pax_form_is_no_sample_under_its_made_up_name(tmp_path: Path) -> None:
    sparse = tarfile.TarInfo("./GNUSparseFile.1/evil.jpg")
    sparse.pax_headers, sparse.size = {"GNU.sparse.major": "1", "GNU.sparse.name": "evil.jpg"}, 700
    with tarfile.open(tmp_path / "s0.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(sparse, io.BytesIO(bytes(700)))
        for name, data in good(0).items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    report = check(tmp_path)
    (error,) = report.errors
    assert (error.byte, "a sparse file" in error.reason, report.samples) == (0, True, 1)


def end_of(files: list[tuple[str, bytes]]) -> int:
    """The byte after the last of these files in a tar."""
    return sum(BLOCK + -(-len(data) // BLOCK) * BLOCK for _, data in files)


def test_a_damaged_header_is_one_error_and_reading_goes_on(tmp_path: Path) -> None:
    files = good(0) | good(1) | good(2) | good(3)
    dataset(tmp_path, files, indexed=False)
    header = place_of(tmp_path, "good1.png") - BLOCK
    archive = bytearray((tmp_path / "s0.tar").read_bytes())
    archive[header + 3] ^= 1
    (tmp_path / "s0.tar").write_bytes(archive)
    report = check(tmp_path)
    (error,) = report.errors
    assert (error.shard, error.byte) == ("s0.tar", header)
    assert "does not match its checksum" in error.reason
    assert report.samples == 4  # the sample that lost a file, too
    assert [p.key for p in report.problems if p.key] == []  # and no word about the picture that damage took


def test_two_damaged_headers_are_two_errors(tmp_path: Path) -> None:
    dataset(tmp_path, good(0) | good(1) | good(2), indexed=False)
    headers = [place_of(tmp_path, name) - BLOCK for name in ("good0.txt", "good2.flac")]
    archive = bytearray((tmp_path / "s0.tar").read_bytes())
    for header in headers:
        archive[header] ^= 1
    (tmp_path / "s0.tar").write_bytes(archive)
    assert [error.byte for error in check(tmp_path).errors] == headers


@pytest.mark.parametrize("cut", ["in a header", "in a picture", "between files", "before the end mark"])
def test_truncated_shards_name_the_byte_where_they_end(tmp_path: Path, cut: str) -> None:
    dataset(tmp_path, good(0) | good(1), good(2), indexed=False)
    picture_place = place_of(tmp_path, "good1.png")
    text_place = place_of(tmp_path, "good1.txt")
    end = {
        "in a header": picture_place - 100,
        "in a picture": picture_place + 50,
        "between files": picture_place - BLOCK,
        "before the end mark": text_place + BLOCK,
    }[cut]
    archive = (tmp_path / "s0.tar").read_bytes()
    (tmp_path / "s0.tar").write_bytes(archive[:end])
    report = check(tmp_path)
    (error,) = report.errors
    assert (error.shard, error.byte) == ("s0.tar", end)
    assert "truncated" in error.reason
    assert report.samples == 3  # and the other shard was read
    assert [p.shard for p in report.problems if p.severity == "warning"] == [INDEX_FILE]


def test_joined_tars_hide_samples(tmp_path: Path) -> None:
    first, second = tar_of(good(0)), tar_of(good(1))
    (tmp_path / "s0.tar").write_bytes(first + second)
    error = check(tmp_path).errors[0]
    assert error.byte == len(first)
    assert "more files after the end mark" in error.reason


def test_empty_and_foreign_files(tmp_path: Path) -> None:
    dataset(tmp_path, good(0), indexed=False)
    (tmp_path / "t.tar").write_bytes(b"")
    (tmp_path / "u.tar").write_bytes(b"<html>no such bucket</html>" * 99)
    (tmp_path / "v.tar").write_bytes(b"\x1f\x8b" + b"\0" * 2000)
    report = check(tmp_path)
    assert [(error.shard, error.byte) for error in report.errors] == [("t.tar", 0), ("u.tar", 0), ("v.tar", 0)]
    assert [
        part in error.reason
        for error, part in zip(report.errors, ("empty", "no tar at all", "compressed"), strict=True)
    ]
    assert report.samples == 1


def test_flipped_bytes_are_found_by_checksum(tmp_path: Path) -> None:
    folder = dataset(tmp_path, good(0), good(1))
    archive = bytearray((folder / "s1.tar").read_bytes())
    archive[place_of(folder, "good1.txt", "s1.tar")] ^= 1  # still text, still a tar
    (folder / "s1.tar").write_bytes(archive)
    problem = only_problem(folder)
    assert (problem.severity, problem.shard) == ("error", "s1.tar")
    assert "checksum" in problem.reason


def test_a_stale_index_is_named_shard_by_shard(tmp_path: Path) -> None:
    folder = dataset(tmp_path, good(0), good(1), good(2))
    (folder / "s0.tar").rename(folder / "s9.tar")
    (folder / "s2.tar").write_bytes(tar_of(good(2) | good(3) | {"good3.json": b'{"long": "' + b"x" * 20_000 + b'"}'}))
    errors = {error.shard: error.reason for error in check(folder).errors}
    assert set(errors) == {"s0.tar", "s2.tar", "s9.tar"}
    assert "there is no such file" in errors["s0.tar"]
    assert "bytes, but" in errors["s2.tar"]
    assert "is not in the index" in errors["s9.tar"]


def test_a_bad_index_does_not_end_the_check(tmp_path: Path) -> None:
    folder = dataset(tmp_path, good(0) | {"bad.jpg": b"x", "bad.txt": b"y"})
    (folder / INDEX_FILE).write_text("{")
    assert [error.shard for error in check(folder).errors] == [INDEX_FILE, "s0.tar"]


def test_shards_that_are_all_gone(tmp_path: Path) -> None:
    folder = dataset(tmp_path, good(0))
    (folder / "s0.tar").unlink()
    assert [error.shard for error in check(folder).errors] == ["s0.tar", INDEX_FILE]


def test_tables_are_held_against_the_tar(tmp_path: Path) -> None:
    folder = dataset(tmp_path, good(0), good(1))
    table_path(folder / "s0.tar").unlink()
    with np.load(table_path(folder / "s1.tar")) as stored:
        arrays = {name: stored[name].copy() for name in stored.files}
    del arrays["digest"]  # as whoever edits it by hand would
    arrays["crc"][1] += 1
    np.savez(table_path(folder / "s1.tar").open("wb"), **arrays)
    errors = {error.shard: error.reason for error in check(folder).errors}
    assert set(errors) == {"s0.tar", "s1.tar"}
    assert "is missing" in errors["s0.tar"]
    assert "has other places than the tar" in errors["s1.tar"]


def test_keys_in_several_shards_are_one_warning_a_shard(tmp_path: Path) -> None:
    folder = dataset(tmp_path, good(0) | good(1) | good(2), good(5), good(1) | good(2) | good(7), good(2))
    report = check(folder)
    assert report.ok
    assert [(p.severity, p.shard, p.key) for p in report.problems] == [
        ("warning", "s2.tar", "good1"), ("warning", "s3.tar", "good2"),
    ]  # fmt: skip
    assert "2 of its keys" in report.problems[0].reason
    assert "s0.tar" in report.problems[0].reason
    assert report.problems[0].byte == place_of(folder, "good1.flac", "s2.tar")


def test_a_torn_sample_is_an_error(tmp_path: Path) -> None:
    """Its picture and its caption are far apart: every reader sees two halves."""
    files = {"torn.png": picture(), **good(1), "torn.txt": b"words"}
    folder = dataset(tmp_path, files)
    report = check(folder)
    (error,) = report.errors
    assert (error.key, error.byte) == ("torn", place_of(folder, "torn.txt"))
    assert f"byte {place_of(folder, 'torn.png')} too: are its files torn apart?" in error.reason
    assert report.samples == 3  # as a run reads them


def test_a_sample_that_was_appended_anew_is_an_error(tmp_path: Path) -> None:
    """As `tar --append` of an updated sample leaves it: a run reads both, and so both are counted."""
    files = [*good(0).items(), *good(1).items(), *good(0).items()]
    report = check(dataset(tmp_path, files))
    (error,) = report.errors
    assert "too: a run reads both; unpacking the tar and packing it anew keeps the later one" in error.reason
    assert report.samples == 3


def test_a_field_that_is_there_twice_is_an_error(tmp_path: Path) -> None:
    dataset(tmp_path, [("a.png", picture()), ("a.txt", b"1"), ("a.TXT", b"2"), *good(1).items()], indexed=False)
    (error,) = check(tmp_path).errors
    assert error.key == "a"
    assert "'txt' is there twice" in error.reason


def test_processes_find_the_same(tmp_path: Path) -> None:
    bad = {"bad.jpg": b"x", "bad.txt": b"\xff"}
    folder = dataset(tmp_path, good(0) | bad, good(1), bad, indexed=False)
    (folder / "s1.tar").write_bytes((folder / "s1.tar").read_bytes()[:700])
    seen: list[tuple[int, int]] = []
    report = check_dataset(folder, processes=2, progress=lambda *now: seen.append(now))
    assert report == check(folder)
    assert len(report.errors) == 5
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_problems_are_sentences(tmp_path: Path) -> None:
    problem = only_problem(dataset(tmp_path, good(0) | {"bad.jpg": b"x", "bad.txt": b"y"}))
    assert str(problem).startswith(f"s0.tar, byte {problem.byte}, sample 'bad': the jpg field: not a JPEG")
    assert str(Problem("error", "a.tar", None, None, "why")) == "a.tar: why"


def test_nothing_to_check(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no such folder"):
        check(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"there is no \.tar file"):
        check(tmp_path)
    (tmp_path / "s.tar").write_bytes(tar_of({}))
    assert [p.reason for p in check(tmp_path).errors] == ["there is no sample in the whole data set"]


def merged(*names: str) -> dict[str, bytes]:
    return {name: picture(seed) if name.endswith("png") else b"words" for seed, name in enumerate(names)}


@pytest.mark.parametrize(
    "names",
    [
        ("cat.png", "cat.txt", "cat.2.png", "cat.2.txt", "cat.3.png", "cat.3.txt"),
        ("cat.png", "cat.txt", "cat.2.png"),
        ("img.v2.000.png", "img.v2.000.txt", "img.v2.001.png", "img.v2.001.txt"),
        ("cat.black.png", "cat.black.txt", "cat.white.png", "cat.white.txt"),
    ],
)
def test_samples_that_one_name_swallows_are_an_error(tmp_path: Path, names: tuple[str, ...]) -> None:
    dataset(tmp_path, good(0) | merged(*names))
    (error,) = check(tmp_path).errors
    assert f"{sum(name.endswith('png') for name in names)} images in one sample" in error.reason
    assert "a name ends at its first dot" in error.reason
    assert (error.key, error.byte) == (names[0].split(".")[0], place_of(tmp_path, names[0]))


def test_merged_samples_are_one_error_a_shard(tmp_path: Path) -> None:
    names = [f"cat{i}{more}.{kind}" for i in range(5) for more in ("", ".2") for kind in ("png", "txt")]
    dataset(tmp_path, merged(*names))
    assert only_problem(tmp_path).reason.endswith("a run reads png only; so in 4 more of its samples")


def test_a_caption_behind_a_dot_is_an_error(tmp_path: Path) -> None:
    names = [f"{i}.2.{kind}" for i in range(3) for kind in ("png", "txt")]
    (error,) = check(dataset(tmp_path, good(0) | merged(*names))).errors
    assert (error.key, error.byte) == ("0", place_of(tmp_path, "0.2.png"))
    assert "its caption is not read: the field is called 2.txt" in error.reason
    assert error.reason.endswith("; so in 2 more of its samples")


def test_other_text_beside_a_caption_or_a_label_is_no_error(tmp_path: Path) -> None:
    files = merged("a.png", "a.txt", "a.meta.json", "b.png", "b.meta.json") | {"b.json": b'{"label": "cat"}'}
    assert check(dataset(tmp_path, files)).ok


@pytest.mark.parametrize("other", ["left.png", "seg.png"])
def test_views_and_masks_beside_an_image_are_a_warning(tmp_path: Path, other: str) -> None:
    problem = only_problem(dataset(tmp_path, merged("a.png", "a.txt", f"a.{other}")))
    assert (problem.severity, problem.key) == ("warning", "a")
    assert "a run reads png only" in problem.reason


@pytest.mark.parametrize(
    ("names", "fields"),
    [
        ([f"{i}.{kind}" for i in range(3) for kind in ("input.png", "outputs.txt")], "input.png, outputs.txt"),
        ([f"{i}/{kind}" for i in range(3) for kind in ("image.png", "caption.txt")], "png, txt"),
        ([f"images/{i}.png" for i in range(3)] + [f"captions/{i}.txt" for i in range(3)], "png, txt"),
        ([f"{i}.{kind}" for i in range(3) for kind in ("png", "caption")], "png, caption"),
        ([f"{i}.png" for i in range(3)], "png"),
    ],
)
def test_a_set_of_which_no_sample_is_a_pair_is_not_good(tmp_path: Path, names: list[str], fields: str) -> None:
    (error,) = check(dataset(tmp_path, merged(*names))).errors
    assert error.shard == INDEX_FILE
    assert f"no sample has both an image and a caption: the fields are called {fields}" in error.reason
    assert ("first dot" in error.reason) == ("." in fields)


def test_captions_where_no_run_reads_them_are_named(tmp_path: Path) -> None:
    files = merged(*(f"{i}.png" for i in range(3))) | {
        f"{i}.json": b'{"caption": "a dog", "url": "x"}' for i in range(3)
    }
    report = check(dataset(tmp_path, dict(sorted(files.items()))))
    warning, error = sorted((problem.reason for problem in report.problems), key=len)
    told = "captions are read from txt and, as a list of texts, from 'captions' in json, and not from 'caption'"
    assert warning == f"none of its 3 samples has a caption: {told}"
    assert error == f"no sample has both an image and a caption: the fields are called json, png; {told}"


@pytest.mark.parametrize(
    "files",
    [
        {"a.png": picture(), "a.json": b'{"label": "cat"}'},
        {"a.png": picture(), "a.json": b'{"qa": [{"question": "q", "answer": "a"}]}'},
        {"a.png": picture(), "a.flac": sound()},
        {"a.txt": b"words", "a.flac": sound()},
    ],
    ids=["classes", "questions", "image and sound", "sound and caption"],
)
def test_pairs_of_other_kinds_are_good(tmp_path: Path, files: dict[str, bytes]) -> None:
    assert check(dataset(tmp_path, files)).ok


def test_what_lies_beside_the_tars_is_an_error(tmp_path: Path) -> None:
    dataset(tmp_path, good(0))
    (tmp_path / "t.TAR").write_bytes(tar_of(good(1)))
    for name in ("u.tar.gz", "v.tgz", "w.tar.zst", "x.tar.part", "y.zip", "z.tar.001", "z.tar.aa"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "y.tar").write_bytes(tar_of(good(2)))
    report = check(tmp_path)
    beside = {"more", "u.tar.gz", "v.tgz", "w.tar.zst", "x.tar.part", "y.zip", "z.tar.001", "z.tar.aa"}
    assert {error.shard for error in report.errors} == {"t.TAR", *beside}
    assert report.samples == 2  # the tar in upper case is read; it is not in the index yet
    (tmp_path / INDEX_FILE).unlink()
    assert {error.shard for error in check(tmp_path).errors} == beside


def test_parquet_of_a_tars_name_is_its_metadata(tmp_path: Path) -> None:
    """As img2dataset writes them: 00000.tar, 00000.parquet, 00000_stats.json."""
    dataset(tmp_path, good(0))
    for name in ("s0.parquet", "s0_stats.json", "other.parquet"):
        (tmp_path / name).write_bytes(b"x")
    assert [error.shard for error in check(tmp_path).errors] == ["other.parquet"]


@pytest.mark.parametrize("packed", [b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"BZh91AY", b"\xfd7zXZ\0", b"PK\3\4"])
def test_packed_files_that_are_called_tar(tmp_path: Path, packed: bytes) -> None:
    dataset(tmp_path, good(0))
    (tmp_path / INDEX_FILE).unlink()
    (tmp_path / "t.tar").write_bytes(packed + bytes(9000))
    (error,) = check(tmp_path).errors
    assert "is compressed" in error.reason
    with pytest.raises(DataError, match="is compressed"):
        load_index(tmp_path)


def test_a_tail_of_zeros_is_an_error(tmp_path: Path) -> None:
    dataset(tmp_path, {f"s{i}.{kind}": good(0)[f"good0.{kind}"] for i in range(40) for kind in ("jpg", "txt")})
    (tmp_path / INDEX_FILE).unlink()
    archive, end = (tmp_path / "s0.tar").read_bytes(), place_of(tmp_path, "s9.jpg") - BLOCK
    (tmp_path / "s0.tar").write_bytes(archive[:end] + bytes(len(archive) - end))
    (error,) = check(tmp_path).errors
    assert error.byte == end
    assert f"ends in {len(archive) - end} bytes of zeros" in error.reason


def test_a_caption_of_which_the_end_was_not_written(tmp_path: Path) -> None:
    (error,) = check(dataset(tmp_path, good(0) | {"a.png": picture(), "a.txt": b"a capt" + bytes(9)})).errors
    assert error.reason == "the txt field of sample 'a' ends in zero bytes: its end was never written?"


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-be"])
def test_a_caption_in_another_encoding_is_told_as_that_alone(tmp_path: Path, encoding: str) -> None:
    data = "\ufeffa capt".encode(encoding)
    (error,) = check(dataset(tmp_path, good(0) | {"a.png": picture(), "a.txt": data})).errors
    assert error.reason.endswith("is not UTF-8 but UTF-16 or UTF-32, by its first bytes: save it as UTF-8")


def test_images_that_their_names_hide_are_told(tmp_path: Path) -> None:
    hidden = {"__train__/a.png": picture(), "__train__/a.txt": b"x", ".b.PNG": picture(), "c/.flac": sound()}
    mute = {"._good0.jpg": b"mac", ".DS_Store": b"m", "__MACOSX/._good0.jpg": b"m", "__meta__/x.json": b"{}"}
    report = check(dataset(tmp_path, good(0) | hidden | mute))
    (told,) = report.problems
    assert (told.severity, told.byte) == ("warning", place_of(tmp_path, "__train__/a.png"))
    assert told.reason.startswith("3 files of images or sound are left out, as their names begin with a dot or with a")
    (remark,) = load_index(tmp_path).remarks()
    assert remark == "3 files of images or sound left out, as their names begin with a dot or with a folder __x__"


def test_a_link_to_nothing_and_files_in_no_sample(tmp_path: Path) -> None:
    dataset(tmp_path, [*good(0).items(), ("README", b"r"), special("tree", tarfile.SYMTYPE, "x")], indexed=False)
    (tmp_path / "t.tar").symlink_to(tmp_path / "nowhere")
    report = check(tmp_path)
    (error,) = report.errors
    assert (error.shard, error.reason) == ("t.tar", "a link to a file that is not there")
    reasons = " ".join(p.reason for p in report.problems)
    assert "1 files without an extension belong to no sample and are not read, as 'README'" in reasons
    assert "entries that are no files are left out: 1 x symbolic link" in reasons
