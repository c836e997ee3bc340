"""Shard numbers that are missing between others are told by check, and by the index that stats and training read."""

from __future__ import annotations

import bz2
import gzip
import lzma
from collections.abc import Callable
from pathlib import Path

import pytest
from tars import picture, tar_of

from data_pipeline.check import check_dataset
from data_pipeline.folder import GOES_ON, empty_remark, gap_in, ignored_in, ignored_names
from data_pipeline.index import build_index, load_index


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["shard-000000.tar", "shard-000002.tar"], "shard-000001.tar is not there"),
        (["8.tar", "9.tar", "11.tar"], "10.tar is not there"),
        (["00000.tar", "00001.tar", "00002.tar", "00005.tar"], "00003.tar, 00004.tar are not there"),
        ([f"a-{n:03}-of-020.tar" for n in range(20) if n % 3], ""),  # the last number is the same in all
        ([f"{n:02}.tar" for n in range(20) if n not in (3, 4, 5, 6, 7)], "03.tar, 04.tar, 05.tar and 2 more are"),
        (["0.tar", "1.tar", "2.tar"], ""),
        (["0.tar"], ""),
        (["0.tar", "10.tar", "20.tar"], ""),  # chosen
        (["a0.tar", "b2.tar"], ""),  # two series
        (["1.tar", "01.tar", "3.tar"], ""),
        (["train.tar", "0.tar", "2.tar"], ""),
        (["20260101T000000001.tar", "20260101T000000003.tar"], "20260101T000000002.tar is not there"),
        (["1234567890123.tar", "1234567890125.tar"], ""),
    ],
)
def test_a_gap_in_the_numbers_is_told(names: list[str], said: str) -> None:
    assert gap_in(names).startswith(said) if said else gap_in(names) == ""


def test_a_gap_is_a_warning_of_check_and_a_remark_of_the_index(tmp_path: Path) -> None:
    for number in (0, 2):
        files = {f"s{number}.png": picture(number), f"s{number}.txt": b"a caption"}
        (tmp_path / f"shard-{number:06}.tar").write_bytes(tar_of(files))
    told = "shard-000001.tar is not there, though shards before and after are"
    assert build_index(tmp_path, processes=0).remarks() == [told]
    assert load_index(tmp_path).remarks() == [told]
    report = check_dataset(tmp_path, processes=0)
    assert report.ok
    assert [(each.severity, each.reason) for each in report.problems] == [("warning", told)]


NOT_READ = {
    "compressed": ["1.tar.gz", "2.tgz", "3.tar.sz", "4.zip", "5.TAR.LZO"],
    "an unfinished download, by its name": ["1.tar.part", "2.tar.gz.partial", "3.tgz.crdownload", "4.tar_.gstmp"],
    "a part of a split tar, by its name": ["1.tar.aa", "2.tar.00", "3.tar.gz.001", "4.tar.part1"],
    GOES_ON: ["1.tar.1", "2.tar (1)", "3.tar.bak", "4.tar.gz.1", "5.tar~"],
    "hidden, as its name begins with a dot": [".1.tar", ".2.TAR"],
}
OF_NO_NOTE = [
    *("1.tar", "1.tar.idx.npz", ".1.tar.0123456789abcdef.tmp", ".1.tar.idx.npz.0123456789abcdef.tmp", "index.json"),
    *("._1.tar", ".DS_Store", ".1.zip", "1.tar.md5", "1.tar.gz.sha256sum", "1.tar.idx", "1.tar.json", "about.tar.txt"),
    *("1.target.bin", "tar", "README", "1.tar.etag", "2.tar.properties", "3.tar.csv.gz"),
]


@pytest.mark.parametrize(("why", "names"), NOT_READ.items(), ids=NOT_READ)
def test_what_may_be_a_shard_by_a_part_of_its_name_is_told(why: str, names: list[str]) -> None:
    assert ignored_names([*names, *OF_NO_NOTE]) == tuple((name, why) for name in sorted(names))


@pytest.mark.parametrize("pack", [bytes, gzip.compress, bz2.compress, lzma.compress])
def test_what_goes_on_behind_tar_is_told_where_it_is_an_archive(tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    """Names of tools' own (aws, rsync) cannot be listed; and many a tool writes a small file beside each tar."""
    data = pack(tar_of([("s.png", picture()), ("s.txt", b"a")]))
    names = ["1.tar.1", "2.tar.6eF4b2a1", ".3.tar.hT5xQz", "4.tar.metadata"]
    for name in names:
        (tmp_path / name).write_bytes(data)
    for name in ("1.tar.etag", "2.tar.2", "3.tar.stats", ".4.tar.swp"):
        (tmp_path / name).write_bytes(b"x" * 600)
    assert ignored_in(tmp_path) == tuple((name, GOES_ON) for name in sorted(names))


@pytest.mark.parametrize("size", [0, 2, 6])
def test_a_shard_of_nothing_but_zeros_is_named(tmp_path: Path, size: int) -> None:
    """The head of a tar is gone, and what is left is the padding at its end; or a tool wrote a shard of nothing."""
    (tmp_path / "a.tar").write_bytes(tar_of([("s.png", picture()), ("s.txt", b"a")]))
    (tmp_path / "x.tar").write_bytes(bytes(1024 + size))
    assert build_index(tmp_path).remarks() == ["x.tar holds no sample"]
    assert load_index(tmp_path).remarks() == ["x.tar holds no sample"]


def test_the_first_of_many_empty_shards_are_named() -> None:
    assert empty_remark([]) == ""
    assert empty_remark([f"{n}.tar" for n in range(5)]) == "5 shards hold no sample: 0.tar, 1.tar, 2.tar and 2 more"
