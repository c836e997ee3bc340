"""What img2dataset writes, as files and as Parquet."""

import json

import pytest

from data_pipeline.errors import DataError
from data_pipeline.importers.img2dataset import import_img2dataset

arrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

ROWS = 5
FAILURES = {3: ("failed_to_download", "HTTP Error 404: Not Found"), 4: ("failed_to_resize", "Image decoding error")}


def metadata(shard):
    """The rows of a shard's table, of which the last two were not downloaded."""
    rows = []
    for number in range(ROWS):
        status, error = FAILURES.get(number, ("success", None))
        rows.append({
            "url": f"https://example.org/{shard}/{number}.jpg",
            "caption": f"Picture {number} of {shard}",
            "key": f"{shard:05d}{number:04d}",
            "status": status,
            "error_message": error,
            "width": None if error else 11,
            "height": None if error else 7,
            "original_width": None if error else 110,
            "original_height": None if error else 70,
            "exif": None if error else "{}",
            "sha256": None if error else "0" * 64,
        })  # fmt: skip
    return rows


@pytest.fixture
def save(put):
    def write(name, rows, **options):
        path = put(name, b"")
        parquet.write_table(arrow.Table.from_pylist(rows), path, row_group_size=2, **options)

    return write


@pytest.fixture
def files(put, save, image_bytes, tmp_path):
    """Two shards in the layout of files."""
    for shard in range(2):
        for row in metadata(shard):
            if row["status"] == "success":
                stem = f"{shard:05d}/{row['key']}"
                put(f"{stem}.jpg", image_bytes(int(row["key"]), "JPEG"))
                put(f"{stem}.txt", row["caption"])
                put(f"{stem}.json", json.dumps(row, indent=4))
        save(f"{shard:05d}.parquet", metadata(shard))
        put(f"{shard:05d}_stats.json", {"count": ROWS, "successes": 3})
    return tmp_path / "source"


def test_files(files, put, tmp_path, examine, image_bytes):
    (files / "00001/000010001.jpg").unlink()
    put("00001/000010002.jpg", b"<html>")
    put("00002/000020000.jpg", image_bytes(1, "JPEG"))
    imported = import_img2dataset(files, tmp_path / "out", test_share=0.25, licence="unknown", processes=2)
    sets = examine(tmp_path / "out")
    assert (len(sets["train"]), len(sets["test"])) == (3, 1)
    samples = sets["train"] | sets["test"]
    assert set(samples) == {
        *(f"https://example.org/0/{number}.jpg" for number in range(3)),
        "https://example.org/1/0.jpg",
    }
    sample = samples["https://example.org/0/2.jpg"]
    assert sample.key == "00000/000000002"
    assert sample.captions() == ("Picture 2 of 0",)
    assert sample.fields["jpg"] == image_bytes(2, "JPEG")
    assert sample.metadata()["provenance"]["source"] == "source"
    assert sample.metadata()["provenance"]["licence"] == "unknown"
    assert imported.reasons() == {
        "failed_to_download: HTTP Error 404: Not Found": 2,
        "failed_to_resize: Image decoding error": 2,
        "the image file is missing": 1,
        "not a JPEG, PNG or WebP image, or damaged": 1,
        "has no .parquet beside it: its download was not finished": 1,
    }


def test_parquet(save, tmp_path, examine, image_bytes):
    rows = [
        {**row, "jpg": None if row["error_message"] else image_bytes(number, "JPEG"), "txt": row["caption"]}
        for number, row in enumerate(metadata(0))
    ]
    rows[1]["caption"] = None
    save("00000.parquet", rows)
    imported = import_img2dataset(tmp_path / "source", tmp_path / "out", test_share=0, processes=2)
    samples = examine(tmp_path / "out")["train"]
    assert set(samples) == {"https://example.org/0/0.jpg", "https://example.org/0/2.jpg"}
    assert samples["https://example.org/0/2.jpg"].fields["jpg"] == image_bytes(2, "JPEG")
    assert imported.reasons()["has no caption"] == 1
    assert len(imported.skipped) == 3


def test_damaged_row_groups_and_text_that_is_not_utf_8(save, tmp_path, examine, image_bytes):
    rows = [
        {**metadata(0)[0], "jpg": image_bytes(n, "JPEG"), "url": f"u{n}", "caption": f"Number {n}"} for n in range(8)
    ]
    plain = {"compression": "none", "use_dictionary": False, "write_statistics": False}  # each text stands there once
    save("00000.parquet", rows, write_page_checksum=True, **plain)
    path = tmp_path / "source/00000.parquet"
    whole = path.read_bytes()
    image = image_bytes(4, "JPEG")  # of row group 2
    assert whole.count(image) == 1
    path.write_bytes(whole.replace(image, image[:-1] + b"?"))
    imported = import_img2dataset(tmp_path / "source", tmp_path / "a", test_share=0, processes=0)
    assert set(examine(tmp_path / "a")["train"]) == {"u0", "u1", "u2", "u3", "u6", "u7"}
    ((reason, times),) = imported.reasons().items()
    assert reason.startswith("row group 2 of 00000.parquet is damaged: ")
    assert times == 2
    path.write_bytes(whole.replace(b"Number 3", b"Number ?"))
    with pytest.raises(DataError, match=r"^row group 1 of .*00000\.parquet is damaged: .*[^\n]\Z"):
        import_img2dataset(tmp_path / "source", tmp_path / "b")
    save("00000.parquet", rows, **plain)
    whole = path.read_bytes()
    assert whole.count(b"Number 3") == 1
    path.write_bytes(whole.replace(b"Number 3", b"Number \xff"))
    imported = import_img2dataset(tmp_path / "source", tmp_path / "c", test_share=0, processes=0)
    assert set(examine(tmp_path / "c")["train"]) == {f"u{n}" for n in range(8) if n != 3}
    assert [(skip.source, skip.reason) for skip in imported.skipped] == [
        ("00000/row group 1, row 1", "holds text that is not UTF-8")
    ]


def test_keys_reach_nothing_outside(save, put, tmp_path, image_bytes):
    put("../secret.jpg", image_bytes(9, "JPEG"))
    save("00000.parquet", [{**metadata(0)[0], "key": "../../secret"}])
    with pytest.raises(DataError, match="outside the data set's folder"):
        import_img2dataset(tmp_path / "source", tmp_path / "out")


def test_tars_need_no_import(put, save, tmp_path):
    save("00000.parquet", metadata(0))
    put("00000.tar", b"")
    with pytest.raises(ValueError, match="need no import, see `weft data check"):
        import_img2dataset(tmp_path / "source", tmp_path / "out")


def test_other_tables(put, save, tmp_path):
    put("x.txt", "")
    with pytest.raises(FileNotFoundError, match=r"no \*\.parquet in"):
        import_img2dataset(tmp_path / "source", tmp_path / "out")
    save("urls.parquet", [{"URL": "https://example.org", "TEXT": "x"}])
    with pytest.raises(DataError, match="lacks 'key', 'status', 'url'"):
        import_img2dataset(tmp_path / "source", tmp_path / "out")
    put("urls.parquet", b"PAR1 and no more PAR1")
    with pytest.raises(DataError, match=r"urls\.parquet is damaged"):
        import_img2dataset(tmp_path / "source", tmp_path / "out")
