"""The lint of Parquet: what is damaged is named by file, row group and row, and the rest is read."""

from pathlib import Path

import pytest
from tars import picture

from data_pipeline.check import check_dataset

pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")


def write(path: Path, images: list[bytes | None], captions: list[str | None]) -> None:
    path.parent.mkdir(exist_ok=True)
    table = pa.table({"image": pa.array(images, pa.binary()), "caption": pa.array(captions, pa.string())})
    options = {"row_group_size": 4, "use_dictionary": False, "compression": "none", "write_page_checksum": True}
    pq.write_table(table, path, **options)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "set" / "a.parquet", [picture(i) for i in range(10)], [f"caption {i}" for i in range(10)])
    write(tmp_path / "set" / "b.parquet", [picture(i) for i in range(3)], ["x", "y", "z"])
    return tmp_path / "set"


def test_sound_parquet_is_good(folder: Path) -> None:
    seen: list[tuple[int, int]] = []
    report = check_dataset(folder, processes=1, progress=lambda *now: seen.append(now))
    assert (report.ok, report.problems, report.samples, report.shards) == (True, (), 13, 2)
    assert seen == [(1, 2), (2, 2)]
    assert check_dataset(folder / "b.parquet", processes=1).samples == 3


def test_rows_are_named(folder: Path) -> None:
    images = [picture(), b"no image", picture(1), None]
    write(folder / "b.parquet", images, ["x", "y", None, "z"])
    problems = check_dataset(folder, processes=1).problems
    assert [(p.severity, p.shard, p.key) for p in problems] == [
        ("error", "b.parquet", "b/1"), ("warning", "b.parquet", "b/3"), ("warning", "b.parquet", "b/2"),
    ]  # fmt: skip
    assert "not a JPEG, PNG or WebP" in problems[0].reason
    assert [p.key for p in check_dataset(folder, decode=False, processes=1).problems] == ["b/3", "b/2"]


def test_a_row_group_that_cannot_be_read_is_one_error(folder: Path) -> None:
    data = bytearray((folder / "a.parquet").read_bytes())
    data[data.index(picture(5)) + 60] ^= 1
    (folder / "a.parquet").write_bytes(data)
    report = check_dataset(folder, processes=1)
    (error,) = report.errors
    assert error.reason.startswith("row group 1, rows 4 to 7, cannot be read: ")
    assert report.samples == 9


@pytest.mark.parametrize("end", [0, 3, 100, -1])
def test_a_file_that_is_cut_is_one_error(folder: Path, end: int) -> None:
    (folder / "a.parquet").write_bytes((folder / "a.parquet").read_bytes()[:end])
    report = check_dataset(folder, processes=1)
    assert [error.shard for error in report.errors] == ["a.parquet"]
    assert report.samples == 3


def test_files_of_other_columns_do_not_go_together(folder: Path) -> None:
    pq.write_table(pa.table({"jpg": [picture()], "text": ["x"]}), folder / "c.parquet")
    (error,) = check_dataset(folder, processes=1).errors
    assert "c.parquet has no column 'image'" in error.reason


def test_a_file_of_no_row_is_a_warning_and_hides_nothing(folder: Path) -> None:
    """As Spark writes it; what a run refuses is told beside it, of each file."""
    write(folder / "c.parquet", [], [])
    report = check_dataset(folder, processes=1)
    assert (report.ok, [str(problem) for problem in report.problems]) == (True, ["c.parquet: it holds no row"])
    (folder / "d.parquet").write_bytes(b"cut")
    for name in ("e", "f"):
        pq.write_table(pa.table({"image": [picture()], "text": ["x"]}), folder / f"{name}.parquet")
    errors = check_dataset(folder, processes=1).errors
    assert [error.shard for error in errors] == ["d.parquet", "e.parquet", "f.parquet"]
    assert "f.parquet has no column 'caption', which a.parquet beside it has, only 'text'" in errors[2].reason
    for name in ("test", "train"):
        write(folder / f"{name}.parquet", [], [])
    with pytest.raises(ValueError, match="holds files of several splits"):
        check_dataset(folder, processes=1)


def test_files_of_no_row_alone_are_no_data(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", [], [])
    (error,) = check_dataset(tmp_path, processes=1).errors
    assert "no sample in the whole data set" in error.reason


def test_parquet_without_words_is_not_good(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", [picture()] * 3, [None] * 3)
    (error,) = check_dataset(tmp_path, processes=1).errors
    assert error.reason.endswith("the fields are called png; captions are read from the column 'caption'")
    columns = {"image": [picture()] * 3, "caption": pa.nulls(3, pa.string()), "text": ["x", "y", "z"]}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    (error,) = check_dataset(tmp_path, processes=1).errors
    assert error.reason.endswith("captions are read from the column 'caption', and not from 'text'")
