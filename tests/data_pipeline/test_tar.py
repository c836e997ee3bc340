"""The tar reader: the same members as Python's tarfile, the byte of every defect, and no way to hang it."""

import io
import os
import pickle
import random
import re
import subprocess
import tarfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
from tars import BLOCK, patched, special, tar_of

from data_pipeline.errors import DataError
from data_pipeline.tar import (
    Member,
    TarError,
    Window,
    next_header,
    read_members,
    refusal_of_name,
    split_name,
    whole_members,
)

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
FILES = {
    "a.txt": b"",
    "folder/b.jpg": b"x" * 511,
    "folder/b.txt": b"y" * 512,
    "folder/sub/c.d.json": b"z" * 513,
    "no_dot": b"!",
    "d.bin": bytes(range(256)) * 41,
}


def members_of(archive: bytes) -> list[Member]:
    return list(read_members(archive, "some.tar"))


def open_members(path: Path) -> list[Member]:
    with Window(path) as buffer:
        return list(whole_members(buffer, str(path)))


def listed_by_tarfile(archive: bytes) -> list[Member]:
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        return [Member(info.name, info.offset_data, info.size) for info in tar if info.isreg()]


@pytest.mark.parametrize("tar_format", FORMATS.values(), ids=FORMATS)
def test_members_are_those_that_tarfile_lists(tar_format: int) -> None:
    archive = tar_of(FILES, tar_format)
    members = members_of(archive)
    assert members == listed_by_tarfile(archive)
    assert {m.name: archive[m.offset : m.offset + m.size] for m in members} == FILES


@pytest.mark.parametrize("length", [99, 100, 101, 155, 254, 255, 256, 257, 1000, 5000])
@pytest.mark.parametrize("tar_format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT], ids=["gnu", "pax"])
def test_long_names(tar_format: int, length: int) -> None:
    name = ("folder-17/" * 500)[: length - 5] + "x.txt"
    archive = tar_of({name: b"one", "short.txt": b"two"}, tar_format)
    assert [m.name for m in members_of(archive)] == [name, "short.txt"]
    assert members_of(archive) == listed_by_tarfile(archive)


@pytest.mark.parametrize("folders", ["", "d/", "d" * 98 + "/", "d" * 154 + "/", "d" * 155 + "/"])
@pytest.mark.parametrize("length", [5, 99, 100])
def test_ustar_splits_long_names_into_prefix_and_name(folders: str, length: int) -> None:
    name = folders + "n" * (length - 4) + ".txt"
    archive = tar_of({name: b"data"})
    assert members_of(archive) == listed_by_tarfile(archive) == [Member(name, BLOCK, 4)]


@pytest.mark.parametrize("tar_format", FORMATS.values(), ids=FORMATS)
def test_names_beyond_ascii(tar_format: int) -> None:
    archive = tar_of({"čeština/日本語-🦆.txt": b"1", "é.txt": b"2"}, tar_format)
    assert [m.name for m in members_of(archive)] == ["čeština/日本語-🦆.txt", "é.txt"]


def test_names_that_are_not_utf_8_stay_apart() -> None:
    archive = tar_of({"a0.txt": b"1", "a1.txt": b"2"})
    archive = patched(patched(archive, 0, 1, b"\xff"), 2 * BLOCK, 1, b"\xfe")
    names = [m.name for m in members_of(archive)]
    assert len(set(names)) == 2
    assert all(name.startswith("a") and name.endswith(".txt") for name in names)


@pytest.mark.parametrize("flavour", ["v7", "oldgnu", "gnu", "ustar", "posix"])
def test_archives_of_gnu_tar(tmp_path: Path, flavour: str) -> None:
    for name, data in FILES.items():
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(data)
    path = tmp_path / "made.tar"
    subprocess.run(["tar", "-cf", path, f"--format={flavour}", "-C", tmp_path / "in", "."], check=True)
    archive = path.read_bytes()
    found = {m.name.removeprefix("./"): archive[m.offset : m.offset + m.size] for m in open_members(path)}
    assert found == FILES


def test_pax_size_beats_the_size_in_the_header() -> None:
    archive = tar_of({"big.txt": b"d" * 700, "next.txt": b"e"}, tarfile.PAX_FORMAT)
    record = b"12 size=700\n"
    extended = tar_of({"pax": record})[: 2 * BLOCK]
    archive = patched(extended, 0, 156, b"x") + patched(archive, 0, 124, b"00000000000\0")
    assert [(m.name, m.size) for m in members_of(archive)] == [("big.txt", 700), ("next.txt", 1)]


def test_sizes_in_base_256_as_gnu_writes_them() -> None:
    archive = tar_of({"a.txt": b"d" * 600})
    archive = patched(archive, 0, 124, b"\x80" + (600).to_bytes(11, "big"))
    assert members_of(archive) == [Member("a.txt", BLOCK, 600)]


def test_signed_checksums_of_old_tars() -> None:
    archive = bytearray(tar_of({"aé.txt": b"1"}))
    signed = sum(archive[:148]) + sum(archive[156:BLOCK]) + 8 * 32 - 2 * 256  # é is two bytes over 127
    archive[148:156] = b"%06o\0 " % signed
    assert [m.name for m in members_of(bytes(archive))] == ["aé.txt"]


def test_folders_are_passed_over() -> None:
    archive = tar_of([special("folder", tarfile.DIRTYPE), ("folder/a.txt", b"1")])
    old = patched(tar_of({"old/": b"", "old/a.txt": b"1"}), 0, 156, b"\0")  # before POSIX a folder was a name with "/"
    assert [m.name for m in members_of(archive)] == ["folder/a.txt"]
    assert [m.name for m in members_of(old)] == ["old/a.txt"]


@pytest.mark.parametrize("tar_format", FORMATS.values(), ids=FORMATS)
def test_cut_anywhere_is_an_error_that_names_the_byte(tar_format: int) -> None:
    archive = tar_of({"one.txt": b"1" * 700, "t" * 90 + "/" + "w" * 90 + ".txt": b"2" * 10}, tar_format)
    ends = [m.offset + m.size for m in members_of(archive)]
    mark = (ends[-1] + BLOCK - 1) // BLOCK * BLOCK
    for cut in [*range(1, mark, 97), *ends, mark, mark - 1, mark + 1, mark + BLOCK - 1]:
        with pytest.raises(TarError, match=f"truncated.*byte {cut}") as caught:
            members_of(archive[:cut])
        assert caught.value.byte == cut
    assert len(members_of(archive[: mark + BLOCK])) == 2  # one block of zeros is an end mark


def test_cut_between_two_members_is_found() -> None:
    archive = tar_of({"one.txt": b"1", "two.txt": b"2"})
    with pytest.raises(TarError, match="without its end mark at byte 1024"):
        members_of(archive[: 2 * BLOCK])


def test_every_flipped_bit_of_a_header_is_found() -> None:
    archive = tar_of({"one.txt": b"1" * 20})
    for position in range(0, BLOCK, 3):
        if 148 <= position < 156:  # the checksum's own blanks may be read as the same number
            continue
        damaged = bytearray(archive)
        damaged[position] ^= 4
        with pytest.raises(TarError, match="header at byte 0") as caught:
            members_of(bytes(damaged))
        assert caught.value.byte == 0


def test_damage_in_the_second_header_names_its_byte() -> None:
    archive = bytearray(tar_of({"one.txt": b"1" * 600, "two.txt": b"2"}))
    archive[3 * BLOCK + 5] ^= 1
    with pytest.raises(TarError, match=r"some\.tar is damaged: the header at byte 1536 does not match its checksum"):
        members_of(bytes(archive))


@pytest.mark.parametrize("name", ["/etc/passwd.txt", "../up.txt", "a/../../up.txt", "..", "C:/a.txt", "a\\..\\b.txt"])
def test_names_outside_the_folder_are_refused(name: str) -> None:
    with pytest.raises(TarError, match="refused") as caught:
        members_of(tar_of({"good.txt": b"1", name: b"2", "after.txt": b"3"}))
    assert name in str(caught.value).replace("\\\\", "\\")
    assert caught.value.byte == 2 * BLOCK
    assert caught.value.resume_at == 4 * BLOCK


@pytest.mark.parametrize("name", ["..a.txt", "a..txt", "a/..b/c.txt", "...txt/x.txt"])
def test_dots_that_climb_nowhere_are_allowed(name: str) -> None:
    assert [m.name for m in members_of(tar_of({name: b"1"}))] == [name]


@pytest.mark.parametrize("tar_format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT], ids=["gnu", "pax"])
def test_long_names_outside_the_folder_are_refused(tar_format: int) -> None:
    with pytest.raises(TarError, match=r'climbs out of its folder with "\.\."'):
        members_of(tar_of({"d/" * 100 + "../" * 101 + "x.txt": b"1"}, tar_format))


@pytest.mark.parametrize(
    "name", ["a.pkl", "a.PICKLE", "a.pyd", "a.pth", "a.left.pt", "a.pkl.txt", "b/c.dill", "a.joblib"]
)
def test_pickles_are_refused(name: str) -> None:
    with pytest.raises(TarError, match="pickle"):
        members_of(tar_of({name: pickle.dumps([1])}))


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (tarfile.SYMTYPE, "a symbolic link"),
        (tarfile.LNKTYPE, "a hard link"),
        (tarfile.CHRTYPE, "a character device"),
        (tarfile.BLKTYPE, "a block device"),
        (tarfile.FIFOTYPE, "a named pipe"),
        (tarfile.GNUTYPE_SPARSE, "a sparse file"),
    ],
)
def test_special_files_are_refused_by_name_and_byte(kind: bytes, words: str) -> None:
    archive = tar_of([("good.txt", b"1"), special("evil.txt", kind, "good.txt")])
    with pytest.raises(TarError, match=re.escape(f"{words}, 'evil.txt' at byte 1024")):
        members_of(archive)


def test_unknown_types_are_refused() -> None:
    with pytest.raises(TarError, match="unknown type b'Q'"):
        members_of(patched(tar_of({"label.txt": b""}), 0, 156, b"Q"))


def test_sparse_files_in_pax_form_are_refused() -> None:
    info = tarfile.TarInfo("holes.txt")
    info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}
    with pytest.raises(TarError, match="a sparse file at byte 0"):
        members_of(tar_of([info], tarfile.PAX_FORMAT))


@pytest.mark.parametrize("mode", ["w:gz", "w:bz2", "w:xz"])
def test_compressed_tars_are_refused_with_the_fix(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "packed.tar"
    with tarfile.open(path, mode) as tar:
        tar.addfile(special("folder", tarfile.DIRTYPE))
    with pytest.raises(DataError, match=r"packed\.tar is compressed.*decompress it to plain \.tar"):
        open_members(path)


def test_what_is_no_tar_at_all(tmp_path: Path) -> None:
    path = tmp_path / "text.tar"
    path.write_bytes(b"<html>404 Not Found</html>" * 100)
    with pytest.raises(DataError, match=r"text\.tar is damaged or no tar at all: the header at byte 0"):
        open_members(path)
    path.write_bytes(b"")
    with pytest.raises(DataError, match=r"text\.tar is empty"):
        open_members(path)


@pytest.mark.parametrize("size", [b"-0000001000\0", b"-1\0", b"+7\0", b"0o7\0", b"1_0\0", b"\xff" * 12, b"9\0"])
def test_sizes_that_could_send_a_reader_in_circles(size: bytes) -> None:
    with pytest.raises(TarError, match="byte 1024"):
        members_of(patched(tar_of({"a.txt": b"1", "b.txt": b"2"}), 2 * BLOCK, 124, size))


@pytest.mark.timeout(20)  # the point of the test: records once took time with the square of their number
@pytest.mark.parametrize(
    ("body", "damaged"),
    [
        (b"9" * 6000 + b" size=1\n", True),
        (b"5 a=\n" * 200_000, False),
        (b"999 path=x\n", True),
        (b"0 a=b\n", True),
        (b"-9 a=b\n", True),
        (b"path=x\n", True),
        (b"\0" * 512, False),
    ],
    ids=["huge number", "many", "too long", "zero", "negative", "no length", "zeros"],
)
def test_hostile_pax_headers_end_soon_and_as_data_errors(body: bytes, damaged: bool) -> None:
    archive = patched(tar_of({"pax": body, "a.txt": b"1"}), 0, 156, b"x")
    try:
        names = [m.name for m in members_of(archive)]
    except TarError as error:
        names = [str(error.byte)]
    assert names == ["0" if damaged else "a.txt"]


def test_pax_size_must_be_a_number() -> None:
    for size in (b"-1", b"1e9", b"9" * 5000):
        record = b" size=" + size + b"\n"
        length = next(n for n in range(9999) if n == len(str(n)) + len(record))
        archive = patched(tar_of({"pax": b"%d%b" % (length, record), "a.txt": b"1"}), 0, 156, b"x")
        with pytest.raises(TarError, match="for a size"):
            members_of(archive)


def test_an_enormous_extended_header_is_refused_unread() -> None:
    archive = patched(tar_of({"pax": b"12 path=a.b\n"}), 0, 156, b"x")
    with pytest.raises(TarError, match="extended header of 8589934591 bytes at byte 0"):
        members_of(patched(archive, 0, 124, b"77777777777\0"))


@pytest.mark.timeout(60)
def test_random_bytes_never_raise_anything_but_data_errors() -> None:
    chance = random.Random(7)
    whole = tar_of({"one.txt": b"1" * 600, "p" * 120 + ".txt": b"2"}, tarfile.PAX_FORMAT)
    for _ in range(2000):
        position = chance.randrange(0, len(whole) - BLOCK, BLOCK)
        start = chance.randrange(0, 400)
        noise = chance.randbytes(chance.randrange(1, 30))
        try:
            members = members_of(
                patched(whole, position, start, noise)
            )  # the checksum is right: noise goes all the way
        except DataError:
            continue
        assert all(m.offset + m.size <= len(whole) for m in members)


def test_errors_cross_process_borders_whole() -> None:
    error = pickle.loads(pickle.dumps(TarError("sentence", 7, 512)))
    assert (str(error), error.byte, error.resume_at) == ("sentence", 7, 512)
    with ProcessPoolExecutor(1) as pool, pytest.raises(TarError, match="at byte 100"):
        pool.submit(members_of, tar_of(FILES)[:100]).result()


def some_files(count: int) -> bytes:
    """A tar of a few hundred kilobytes, padded as Python's tarfile does."""
    return tar_of({f"s{i:03}.{kind}": bytes([65 + i % 26]) * 900 for i in range(count) for kind in ("jpg", "txt")})


@pytest.mark.parametrize("kept", [1, 40, 57])
@pytest.mark.parametrize("more", [0, 100, 512, 4096])
def test_a_tail_of_zeros_is_no_padding(tmp_path: Path, kept: int, more: int) -> None:
    """An interrupted download into a file of the full size: zeros from anywhere on."""
    whole = some_files(80)
    start = kept * 2 * 3 * BLOCK
    (tmp_path / "s.tar").write_bytes(whole[:start] + bytes(len(whole) - start + more))
    with pytest.raises(TarError, match=f"ends in .* bytes of zeros from byte {start} on") as caught:
        open_members(tmp_path / "s.tar")
    assert caught.value.byte == start


@pytest.mark.parametrize("record", [BLOCK, 2 * BLOCK, 10240, 20480, 65536, 1 << 20])
@pytest.mark.parametrize("count", [1, 3, 80])
def test_padding_to_whole_records_is_taken(tmp_path: Path, record: int, count: int) -> None:
    files = some_files(count)[: count * 2 * 3 * BLOCK]
    for mark in (BLOCK, 2 * BLOCK):
        size = -(-(len(files) + mark) // record) * record
        (tmp_path / "s.tar").write_bytes(files + bytes(size - len(files)))
        assert len(open_members(tmp_path / "s.tar")) == 2 * count


@pytest.mark.parametrize("cut", [False, True], ids=["whole", "without its own end mark"])
def test_joined_tars_are_refused(tmp_path: Path, cut: bool) -> None:
    first, second = some_files(4), some_files(2)
    (tmp_path / "s.tar").write_bytes(first + (second[: 4 * 3 * BLOCK] if cut else second))
    with pytest.raises(TarError, match="more files after the end mark") as caught:
        open_members(tmp_path / "s.tar")
    assert caught.value.byte == len(first)


@pytest.mark.parametrize("hole", [(5, 6), (5, 40), (5, 41.5), (3, 479)])
def test_zeros_in_the_middle_are_no_end(tmp_path: Path, hole: tuple[float, float]) -> None:
    archive = bytearray(some_files(80))
    start, stop = (int(edge * 3 * BLOCK) for edge in hole)
    archive[start : min(stop, 158 * 3 * BLOCK)] = bytes(min(stop, 158 * 3 * BLOCK) - start)
    (tmp_path / "s.tar").write_bytes(archive)
    with pytest.raises(TarError, match="after the end mark"):
        open_members(tmp_path / "s.tar")


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        (b"V", "volume label"), (b"D", "listing of an incremental archive"), (b"Q", "entry of an unknown type"),
        (b"2", "symbolic link"), (b"6", "named pipe"),
    ],
)  # fmt: skip
def test_entries_that_are_no_files_are_left_out_and_counted(kind: bytes, what: str) -> None:
    archive = patched(tar_of({"backup of 1/2": b"x" * 700 * (kind in b"DQ"), "a.txt": b"1"}), 0, 156, kind)
    skipped: Counter[str] = Counter()
    assert [m.name for m in read_members(archive, "some.tar", skipped=skipped)] == ["a.txt"]
    assert skipped == {what: 1}


@pytest.mark.parametrize(
    "options",
    [
        ["-V", "a label"], ["-V", "x.jpg", "--format=gnu"], ["-V", "l", "--format=pax"], ["-G"],
        ["--listed-incremental=snapshot"], ["--format=pax", "--pax-option=globexthdr.name=g,comment=hello"],
    ],
)  # fmt: skip
def test_what_gnu_tar_adds_to_an_archive_is_left_out(tmp_path: Path, options: list[str]) -> None:
    folder = tmp_path / "files"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "a.txt").write_text("1")
    (folder / "sub" / "a.jpg").write_text("2")
    subprocess.run(["tar", "-c", "-f", tmp_path / "s.tar", *options, "-C", folder, "."], check=True, cwd=tmp_path)
    assert sorted(m.name for m in open_members(tmp_path / "s.tar")) == ["./sub/a.jpg", "./sub/a.txt"]


def test_a_member_may_be_named_as_a_compressed_file_begins() -> None:
    assert [m.name for m in members_of(tar_of({"BZh.txt": b"1"}))] == ["BZh.txt"]


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "s.tar"
    path.write_bytes(some_files(900))
    with Window(path) as buffer:
        members = whole_members(buffer, "s.tar")
        next(members)
        os.truncate(path, 2000)
        with pytest.raises(TarError, match="shrank while it was read"):
            list(members)


def test_next_header_finds_the_way_after_damage() -> None:
    archive = bytearray(tar_of({"one.txt": b"ustar" * 300, "two.txt": b"2", "three.txt": b"3"}))
    second = next_header(archive, BLOCK)
    assert second == BLOCK * 4
    assert next_header(archive, second) == second
    archive[second] ^= 1
    assert next_header(archive, BLOCK) == second + 2 * BLOCK
    assert next_header(archive, second + 3 * BLOCK) is None


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("a.jpg", ("a", "jpg")),
        ("a.b.JPG", ("a", "b.jpg")),
        ("x.y/a.Txt", ("x.y/a", "txt")),
        ("deep/er/a.txt", ("deep/er/a", "txt")),
        ("nodot", None),
        (".hidden", None),
        ("x/.hidden.txt", None),
        ("a.", None),
        ("__meta__/a.txt", None),
        ("__meta__.txt", ("__meta__", "txt")),
        ("__a.txt", ("__a", "txt")),
    ],
)
def test_split_name(name: str, split: tuple[str, str] | None) -> None:
    assert split_name(name) == split


def test_refusals_are_the_end_of_a_sentence() -> None:
    assert refusal_of_name("a/b.jpg") is None
    assert refusal_of_name("/a.jpg") == "is an absolute path"
