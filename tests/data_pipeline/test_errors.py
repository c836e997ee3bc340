"""What a library says of damaged bytes becomes part of one sentence: in one line, of plain text, and not too long."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from data_pipeline.errors import LONGEST_REASON, DataError, first_line
from data_pipeline.table import read_stored


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("no image", "no image"),
        ("no image\nTraceback: 40 lines", "no image"),
        ("\n  no image \n", "no image"),
        ("", "ValueError"),
        ("colour \x1b[31m\x00", r"colour \x1b[31m\x00"),
        ("x" * LONGEST_REASON, "x" * LONGEST_REASON),
        ("x" * 8000, "x" * (LONGEST_REASON - 4) + " ..."),
    ],
)
def test_the_first_line_of_an_error(said: str, told: str) -> None:
    assert first_line(ValueError(said)) == told


def test_a_table_whose_header_is_noise_is_damaged_in_a_sentence(tmp_path: Path) -> None:
    """As random bytes made it (fuzz, damage 41896): NumPy repeats the whole header that it cannot read."""
    header = b"{'descr': [" + b"('a', '<f4'), " * 500 + b"], 'fortran_order': False, \x1b[31m"
    array = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header
    with zipfile.ZipFile(tmp_path / "0.tar.idx.npz", "w") as archive:
        archive.writestr("offset.npy", array)
    with pytest.raises(DataError, match=r"0\.tar\.idx\.npz is damaged") as caught:
        read_stored(tmp_path / "0.tar.idx.npz", 1 << 20)
    assert len(str(caught.value)) < 2 * LONGEST_REASON + len(str(tmp_path))
    assert str(caught.value).isprintable()


def test_a_table_with_a_long_name_is_damaged_in_a_sentence(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "0.tar.idx.npz", "w") as archive:
        archive.writestr("n" * 30_000, b"")
    with pytest.raises(DataError, match="it holds 'nnn") as caught:
        read_stored(tmp_path / "0.tar.idx.npz", 1 << 20)
    assert len(str(caught.value)) < 2 * LONGEST_REASON + len(str(tmp_path))
