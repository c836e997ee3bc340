"""Tables of images and captions: CSV and TSV as people write them, Parquet as Hugging Face does."""

import sys

import pytest

from data_pipeline.errors import DataError
from data_pipeline.importers.table import find_column, import_table, locate


@pytest.fixture
def folder(tmp_path, image_bytes):
    """A folder with images/0.png .. images/4.png, and a picture above it that no table may reach."""
    images = tmp_path / "set/images"
    images.mkdir(parents=True)
    for number in range(5):
        (images / f"{number}.png").write_bytes(image_bytes(number))
    (tmp_path / "secret.png").write_bytes(image_bytes(99))
    (tmp_path / "set-of-another").mkdir()
    (tmp_path / "set-of-another/0.png").write_bytes(image_bytes(98))
    return tmp_path / "set"


@pytest.fixture
def run(tmp_path, read_all):
    """run(table) imports it without a test set and returns ({id: sample}, {source: reason})."""

    def import_it(table, **options):
        imported = import_table(table, tmp_path / "out", test_share=0, processes=0, **options)
        samples = {sample.metadata()["id"]: sample for sample in read_all(tmp_path / "out/train")}
        return samples, {skip.source: skip.reason for skip in imported.skipped}

    return import_it


def write(folder, text, name="table.csv", encoding="utf-8"):
    (folder / name).write_bytes(text.encode(encoding))
    return folder / name


@pytest.mark.parametrize("delimiter", [",", "\t", ";", "|"])
def test_any_delimiter_quotes_and_marks(folder, run, image_bytes, delimiter):
    lines = [
        ("id", "Image", "Caption"),
        ("1", "images/0.png", '"one, two; three|four\tfive"'),
        ("2", "./images/../images/1.png", '"two\nlines ""quoted"""'),
        ("3", "images/2.png", "größe"),
    ]
    table = write(folder, "\ufeff" + "\r\n".join(delimiter.join(line) for line in lines) + "\r\n")
    samples, skipped = run(table)
    assert not skipped
    assert samples["images/0.png"].captions() == ("one, two; three|four\tfive",)
    assert samples["images/1.png"].captions() == ('two\nlines "quoted"',)
    assert samples["images/2.png"].captions() == ("größe",)
    assert [samples[f"images/{number}.png"].fields["png"] for number in range(3)] == [image_bytes(n) for n in range(3)]
    assert samples["images/0.png"].key == "images/0"


def test_rows_of_one_image_are_one_sample(folder, run):
    table = write(folder, "filepath,title\nimages/0.png,a\nimages/1.png,b\n./images/0.png,c\nimages/0.png,a\n")
    samples, skipped = run(table)
    assert not skipped
    assert samples["images/0.png"].captions() == ("a", "c")
    assert samples["images/1.png"].captions() == ("b",)


def test_rows_that_cannot_be_used_are_counted(folder, run):
    rows = ["images/0.png,fine", "images/9.png,gone", "images,a folder", ",no image", "images/1.png,", "images/2.png"]
    rows += ["images/3.png,  ", "https://example.org/a.png,a url", f"{'x' * 5000}.png,a long name"]
    (folder / "images/4.png").write_bytes(b"no image")
    rows.append("images/4.png,broken")
    samples, skipped = run(write(folder, "path,caption\n" + "\n".join(rows)))
    assert samples.keys() == {"images/0.png"}
    assert len(skipped) == 9
    assert "missing" in skipped["images/9.png"]
    assert "missing" in skipped["images"]
    assert "no image" in skipped["row 4"]
    assert skipped["images/1.png"] == skipped["images/2.png"] == skipped["images/3.png"] == "has no caption"
    assert "URL" in skipped["https://example.org/a.png"]
    assert "not a JPEG" in skipped["images/4.png"]


def test_a_row_with_too_many_cells_is_skipped(folder, run):
    rows = ["images/0.png,a cat", "", "images/1.png,a cat, asleep, on a mat", 'images/2.png,"a dog, awake", ,']
    samples, skipped = run(write(folder, "image,caption\n" + "\n".join(rows)))
    assert {name: sample.captions() for name, sample in samples.items()} == {
        "images/0.png": ("a cat",),
        "images/2.png": ("a dog, awake",),
    }
    assert skipped == {"row 2": "has 4 cells, where the table has 2 columns: quote its texts"}


def test_a_table_reaches_nothing_outside_its_folder(folder, run, tmp_path):
    outside = ["../secret.png", "images/../../secret.png", str(tmp_path / "secret.png"), "../set-of-another/0.png"]
    inside = [str(folder / "images/1.png"), "../set/images/2.png"]
    samples, skipped = run(write(folder, "image,text\n" + "\n".join(f"{path},x" for path in outside + inside)))
    assert samples.keys() == {"images/1.png", "images/2.png"}  # and no path of this machine among the names
    assert set(skipped) == set(outside)
    assert all("outside the table's folder" in reason for reason in skipped.values())


def test_a_relative_table_and_one_at_the_root(folder, run, monkeypatch):
    monkeypatch.chdir(folder / "images")
    samples, _ = run(write(folder / "images", "file,text\n0.png,x\n").relative_to(folder / "images"))
    assert samples.keys() == {"0.png"}
    assert locate("etc/x.png", folder.__class__("/"))[0] == folder.__class__("/etc/x.png")


def test_columns_are_found_by_usual_names_or_given(folder, run, tmp_path):
    assert find_column(["id", "File_Name", "URL"], None, ("url", "file_name"), "image", tmp_path) == "URL"
    table = write(folder, "bild,text,wort\nimages/0.png,no,yes\n")
    with pytest.raises(ValueError, match=r"'bild', 'text', 'wort'.*image"):
        run(table)
    with pytest.raises(ValueError, match="'Bild'"):
        run(table, image_column="Bild", caption_column="wort")
    samples, _ = run(table, image_column="bild", caption_column="wort")
    assert samples["images/0.png"].captions() == ("yes",)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", r"table\.csv is empty"),
        (b"\n\n", r"table\.csv is empty, or its first line is"),
        (b"image,caption\n", "no row"),
        (b"image,caption\nimages/7.png,x\n", "images/7.png: the image file is missing"),
        (b"image,caption\nimages/0.png,caf\xe9\n", "UTF-8"),
        (b"image,caption\n" + b'images/0.png,"' + b"x" * (1 << 24) + b'x"\n', "line 2: field larger"),
        (
            b'image,caption\n\nimages/0.png,"two\nlines"\n\nimages/1.png,"x\nimages/2.png,y\n',
            "line 6: a quote .* never",
        ),
        (b'image,caption\nimages/0.png,"a "small" cat"\n', "line 2: a value goes on after its closing quote"),
        (b'"image,caption\nimages/0.png,x\n', "line 1: a quote that opens there is never closed"),
        (b"image,caption\nimages/0.png,a,b\n", "the first, row 1: has 3 cells, where the table has 2 columns"),
    ],
)
def test_bad_tables_are_one_sentence(folder, tmp_path, data, words):
    (folder / "table.csv").write_bytes(data)
    with pytest.raises(DataError, match=words):
        import_table(folder / "table.csv", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["table.tsv", "table.csv"])
@pytest.mark.parametrize("cells", [{1: '"never closed', 3: 'a pipe of 5"'}, {0: '"open', 1: 'closed"'}])
def test_a_quote_that_swallows_rows_is_refused_and_can_be_a_letter(folder, run, tmp_path, name, cells):
    divider = "," if name.endswith("csv") else "\t"
    rows = [("image", "caption"), *((f"images/{n}.png", cells.get(n, f"caption {n}")) for n in range(5))]
    table = write(folder, "\n".join(map(divider.join, rows)), name)
    first, last = min(cells) + 2, max(cells) + 2
    with pytest.raises(DataError, match=rf"line {first}: a quote .* closes in line {last}, with rows .*--no-quotes"):
        import_table(table, tmp_path / "out")
    samples, skipped = run(table, quotes=False)
    assert not skipped
    assert [samples[f"images/{n}.png"].captions()[0] for n in range(5)] == [
        cells.get(n, f"caption {n}") for n in range(5)
    ]


@pytest.mark.parametrize(
    ("names", "header", "cells"),
    [
        ("0.png 1.png 2.jpeg 3.jpeg 4.jpeg", "image\tcaption", {1: '"never closed', 4: 'a pipe of 5"'}),
        ("0 1 2 3 4", "image\tcaption", {1: '"never closed', 4: 'a pipe of 5"'}),
        ("0.png 1.png 2.png 3.png 4.png", "caption\timage", {1: '"never closed', 4: 'a pipe of 5"'}),
    ],
)
def test_a_quote_that_swallows_rows_of_other_names_is_refused(tmp_path, image_bytes, names, header, cells):
    lines = [header]
    for number, name in enumerate(names.split()):
        (tmp_path / name).write_bytes(image_bytes(number))
        row = (name, cells.get(number, f"caption {number}"))
        lines.append("\t".join(row if header.startswith("image") else row[::-1]))
    table = write(tmp_path, "\n".join(lines), "t.tsv")
    with pytest.raises(DataError, match=r"line 3: a quote .* closes in line 6, with rows between"):
        import_table(table, tmp_path / "out")


def test_blanks_before_quotes_are_no_text_where_the_header_has_them(folder, run):
    text = 'image, caption\nimages/0.png, "a dog, brown"\nimages/1.png, a cat\n'
    samples, skipped = run(write(folder, text))
    assert {name: sample.captions() for name, sample in samples.items()} == {
        "images/0.png": ("a dog, brown",),
        "images/1.png": ("a cat",),
    }
    assert not skipped


def test_a_blank_before_a_quote_is_told(folder, run):
    _, skipped = run(write(folder, 'image,caption\nimages/0.png, "a dog, brown"\nimages/1.png,a cat\n'))
    assert skipped == {"row 1": "has 3 cells, where the table has 2 columns: take the blanks before its quotes away"}


def test_of_two_columns_that_differ_in_case_the_usual_name_is_taken(folder, run):
    samples, _ = run(write(folder, "IMAGE,Caption,image,caption\nx,no,images/0.png,yes\n"))
    assert samples["images/0.png"].captions() == ("yes",)


def test_a_caption_of_several_lines_is_no_row(folder, run):
    text = "a cat, asleep\nand a dog, awake\n1. two, 2. three\nlike that in a.jpg, or b"
    samples, skipped = run(write(folder, f'image,caption\nimages/0.png,"{text}"\n'))
    assert samples["images/0.png"].captions() == (text,)
    assert not skipped


def test_two_columns_of_one_name_are_refused(folder, run):
    with pytest.raises(DataError, match="2 columns called 'caption'"):
        run(write(folder, "image,caption,caption\nimages/0.png,a,b\n"))


def test_what_stands_for_no_caption_is_told(folder, run):
    bad = ["nan", "None", "NULL", "n/a", "\"['a', 'b']\""]
    rows = [f"images/{n % 4}.png,{text}" for n, text in enumerate(bad)]
    samples, skipped = run(write(folder, "image,caption\n" + "\n".join([*rows, "images/4.png,a none of nans"])))
    assert samples["images/4.png"].captions() == ("a none of nans",)
    assert len(samples) == 1
    assert "stands for none" in skipped["images/1.png"]
    assert "list written as text" in skipped["images/0.png"]


def test_images_that_the_table_does_not_name_are_noted(folder, tmp_path):
    (folder / "images/x.heic").touch()
    table = write(folder, "image,caption\nimages/0.png,a\n")
    imported = import_table(table, tmp_path / "out", test_share=0, processes=0)
    assert imported.notes == ("table.csv does not name 5 of the images beside those it names, such as images/1.png",)


def test_a_caption_longer_than_the_csv_module_likes(folder, run):
    samples, _ = run(write(folder, f"image,caption\nimages/0.png,{'long ' * 40_000}\n"))
    assert len(samples["images/0.png"].captions()[0]) == 199_999


def test_requests_that_cannot_be(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="no table"):
        import_table(folder / "none.csv", tmp_path / "out")
    (folder / "table.xlsx").write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"\.parquet"):
        import_table(folder / "table.xlsx", tmp_path / "out")
    (tmp_path / "out/train").mkdir(parents=True)
    (tmp_path / "out/train/x").touch()
    with pytest.raises(ValueError, match="there already"):
        import_table(folder / "none.csv", tmp_path / "out")


def test_test_holds_no_caption_of_train(folder, tmp_path, read_all):
    rows = [f"images/{number}.png,{'A cat' if number % 2 else 'a CAT!'}" for number in range(4)]
    table = write(folder, "image,caption\n" + "\n".join([*rows, "images/4.png,a dog"]))
    import_table(table, tmp_path / "out", test_share=0.2, processes=0)
    assert {s.captions()[0] for s in read_all(tmp_path / "out/test")} == {"a dog"}
    assert len(read_all(tmp_path / "out/train")) == 4


class TestParquet:
    """The same with embedded images; these need the extra "parquet"."""

    @pytest.fixture
    def save(self, folder):
        arrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        def write_table(columns, name="table.parquet", row_group_size=2, **options):
            parquet.write_table(arrow.table(columns), folder / name, row_group_size=row_group_size, **options)
            return folder / name

        return write_table

    def test_bytes(self, save, run, image_bytes):
        images = [image_bytes(number, "JPEG") for number in range(7)]
        images[3] = None
        images[4] = b"broken"
        table = save({"jpg": images, "txt": [f"caption {n}" for n in range(5)] + [None, "caption 6"]})
        samples, skipped = run(table)
        assert samples.keys() == {"row 1", "row 2", "row 3", "row 7"}
        assert [samples[f"row {n}"].fields["jpg"] for n in (1, 2, 3, 7)] == [images[n] for n in (0, 1, 2, 6)]
        assert [samples[f"row {n}"].captions() for n in (1, 7)] == [("caption 0",), ("caption 6",)]
        assert skipped["row 4"] == "has no image"
        assert "not a JPEG" in skipped["row 5"]
        assert skipped["row 6"] == "has no caption"

    def test_bytes_and_path_as_hugging_face_writes_them(self, save, run, image_bytes):
        images = [
            {"bytes": image_bytes(7, "WEBP"), "path": "whatever/7.webp"},
            {"bytes": None, "path": "images/1.png"},
            {"bytes": None, "path": "../secret.png"},
            {"bytes": None, "path": None},
            None,
        ]
        table = save({"image": images, "captions": [["one", "two"], ["three"], ["x"], ["x"], ["x"]]})
        samples, skipped = run(table)
        assert samples["row 1"].fields["webp"] == image_bytes(7, "WEBP")
        assert samples["row 1"].captions() == ("one", "two")
        assert samples["row 2"].fields["png"] == image_bytes(1)
        assert len(samples) == 2
        assert "outside" in skipped["row 3"]
        assert skipped["row 4"] == skipped["row 5"] == "has no image"

    @pytest.mark.parametrize("kind", ["binary", "large_binary", "binary_view"])
    def test_every_type_of_bytes(self, save, run, image_bytes, kind):
        arrow = pytest.importorskip("pyarrow")
        if not hasattr(arrow, kind):
            pytest.skip(f"this pyarrow has no {kind}")
        images = arrow.array([image_bytes(number) for number in range(3)], getattr(arrow, kind)())
        samples, skipped = run(save({"image": images, "text": list("abc")}))
        assert not skipped
        assert [samples[f"row {n + 1}"].fields["png"] for n in range(3)] == [image_bytes(n) for n in range(3)]

    def test_a_damaged_row_group(self, save, tmp_path, run, image_bytes):
        images, texts = [image_bytes(number) for number in range(6)], [f"caption {n}" for n in range(6)]
        table = save(
            {"image": images, "text": texts},
            compression="none",
            use_dictionary=False,
            write_statistics=False,
            write_page_checksum=True,
        )
        whole = table.read_bytes()
        assert whole.count(images[3]) == 1
        table.write_bytes(whole.replace(images[3], images[3][:-1] + b"?"))
        samples, skipped = run(table)
        assert samples.keys() == {"row 1", "row 2", "row 5", "row 6"}
        assert skipped.keys() == {"row 3", "row 4"}
        assert all(reason.startswith("row group 1 of table.parquet is damaged: ") for reason in skipped.values())
        table.write_bytes(whole.replace(b"caption 4", b"caption ?"))
        with pytest.raises(DataError, match=r"^row group 2 of .*table\.parquet is damaged: .*[^\n]\Z"):
            import_table(table, tmp_path / "other")

    def test_text_that_is_not_utf_8(self, save, run, image_bytes):
        images = [{"bytes": None, "path": f"images/{number}.png"} for number in range(5)]
        texts = [["one", "two"], ["caption 1"], ["caption 2"], ["four"], ["five"]]
        columns = {"image": images, "text": texts}
        table = save(columns, compression="none", use_dictionary=False, write_statistics=False)
        damaged = table.read_bytes().replace(b"caption 1", b"caption \xff").replace(b"images/3.png", b"images/\xff.png")
        table.write_bytes(damaged)
        samples, skipped = run(table)
        assert samples.keys() == {"row 1", "row 3", "row 5"}
        assert skipped == dict.fromkeys(("row 2", "row 4"), "holds text that is not UTF-8")

    def test_paths(self, save, run):
        table = save({"path": ["images/0.png", "images/1.png", "gone.png", None], "text": list("abcd")})
        samples, skipped = run(table)
        assert samples.keys() == {"images/0.png", "images/1.png"}
        assert skipped == {"gone.png": "the image file is missing", "row 4": "has no image"}

    def test_many_processes_write_the_same_bytes(self, save, tmp_path, image_bytes):
        images = [image_bytes(number % 50) for number in range(1500)]
        table = save({"image": images, "text": [f"caption {n}" for n in range(1500)]}, row_group_size=100)
        first = import_table(table, tmp_path / "a", processes=2)
        second = import_table(table, tmp_path / "b", processes=0)
        assert (first.train.index.samples, first.test.index.samples) == (1350, 150)
        assert first.train.index.fingerprint == second.train.index.fingerprint
        assert first.test.index.fingerprint == second.test.index.fingerprint

    def test_bad_files_and_columns(self, save, folder, tmp_path):
        (folder / "bad.parquet").write_bytes(b"PAR1 and then nothing of the kind PAR1")
        with pytest.raises(DataError, match=r"bad\.parquet is damaged"):
            import_table(folder / "bad.parquet", tmp_path / "out")
        with pytest.raises(ValueError, match="holds int64"):
            import_table(save({"image": [1, 2], "text": ["a", "b"]}), tmp_path / "out")
        with pytest.raises(ValueError, match=r"'a'.*caption"):
            import_table(save({"a": ["x"]}), tmp_path / "out", image_column="a")

    def test_without_pyarrow_it_says_how_to_get_it(self, folder, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "pyarrow", None)  # makes the import fail, as where it is not installed
        (folder / "table.parquet").write_bytes(b"PAR1")
        with pytest.raises(ValueError, match=r"pip install 'weft\[parquet\]'"):
            import_table(folder / "table.parquet", tmp_path / "out")
