"""Folders of images, as people have them."""

import json
import os
import unicodedata
import warnings

import pytest
from PIL import Image

from data_pipeline.errors import DataError
from data_pipeline.importers.folder import import_folder


@pytest.fixture
def put(tmp_path, image_bytes):
    """put("a/b.png", "caption") writes an image below SOURCE, and its .txt; returns the image's bytes."""
    seeds = iter(range(1000))

    def write(name, text=None, kind="PNG", data=None):
        path = tmp_path / "source" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        data = image_bytes(next(seeds), kind) if data is None else data
        path.write_bytes(data)
        if text is not None:
            path.with_suffix(".txt").write_bytes(text if isinstance(text, bytes) else text.encode())
        return data

    return write


@pytest.fixture
def run(tmp_path, read_all):
    """run() imports SOURCE without a test set and returns ({id: sample}, {source: reason})."""

    def import_it(**options):
        imported = import_folder(tmp_path / "source", tmp_path / "out", test_share=0, processes=0, **options)
        samples = {sample.metadata()["id"]: sample for sample in read_all(tmp_path / "out/train")}
        return samples, {skip.source: skip.reason for skip in imported.skipped}

    return import_it


def test_sidecars_of_every_kind_of_image(put, run):
    names = {"a.JPG": "JPEG", "deep/er/b.jpeg": "JPEG", "c.Png": "PNG", "d.webp": "WEBP"}
    stored = {
        name: put(name, f"caption of {name}\n\n  second \ncaption of {name}\n", kind) for name, kind in names.items()
    }
    samples, skipped = run()
    assert not skipped
    assert samples.keys() == names.keys()
    for name, sample in samples.items():
        assert sample.captions() == (f"caption of {name}", "second")
        assert sample.fields[sample.image_field] == stored[name]  # the very bytes
        assert sample.label() is None
    assert samples["a.JPG"].image_field == "jpg"


def test_class_folders(put, run):
    put("sea_lion/1.png")
    put("big-cats/snow_leopard/2.png")
    samples, skipped = run()
    assert not skipped
    assert samples["sea_lion/1.png"].captions()[0] == "a photo of a sea lion"
    assert len(samples["sea_lion/1.png"].captions()) > 1
    assert samples["sea_lion/1.png"].label() == "sea lion"
    assert samples["big-cats/snow_leopard/2.png"].label() == "big cats snow leopard"
    assert samples["sea_lion/1.png"].key == "sea_lion/1"


def test_where_some_have_a_caption_none_is_made_up(put, run):
    put("cat/1.png", "a tabby asleep")
    put("cat/2.png")
    put("dog/3.png")
    samples, skipped = run()
    assert {name: sample.captions() for name, sample in samples.items()} == {"cat/1.png": ("a tabby asleep",)}
    assert skipped.keys() == {"cat/2.png", "dog/3.png"}
    assert all("has no caption" in reason for reason in skipped.values())


def test_what_has_no_caption_or_no_pixels_is_skipped_with_a_reason(put, run, tmp_path):
    put("good.png", "\ufeffa good one\r\n")
    put("bare.png")
    put("empty_text.png", " \n\n")
    put("latin.png", "caf\xe9".encode("latin-1"))
    put("wide.png", "a dog".encode("utf-16-be"))
    put("cat/empty.png", "a", data=b"")
    put("cat/text.jpg", "b", data=b"this is no image at all")
    put("cat/short.png", "c", data=b"\x89PNG\r\n\x1a\n")
    (tmp_path / "source/cat/gone.png").symlink_to("nowhere.png")
    (tmp_path / "source/cat/self.png").symlink_to("self.png")
    os.mkfifo(tmp_path / "source/cat/pipe.png")  # to open it would wait for ever
    samples, skipped = run()
    assert samples.keys() == {"good.png"}
    assert samples["good.png"].captions() == ("a good one",)
    assert set(skipped) == {
        *("bare.png", "empty_text.png", "latin.png", "wide.png"),
        *(f"cat/{name}" for name in ("empty.png", "text.jpg", "short.png", "gone.png", "self.png", "pipe.png")),
    }
    assert "has no caption" in skipped["bare.png"]
    assert "no caption" in skipped["empty_text.png"]
    assert skipped["latin.png"] == "its .txt is not UTF-8"
    assert skipped["wide.png"].startswith("its .txt is not UTF-8 but UTF-16 or UTF-32, by the NUL or control")
    assert "empty" in skipped["cat/empty.png"]
    assert "not a JPEG" in skipped["cat/text.jpg"]


def test_hidden_things_and_other_files_are_left_alone(put, run):
    put("cat/1.png")
    put("cat/._1.png", data=b"what a Mac leaves behind")
    put(".thumbnails/1.png", "no")
    put("cat/notes.pdf", data=b"%PDF")
    put("cat/odd.png/inside.png")  # a folder with the name of an image
    samples, skipped = run()
    assert samples.keys() == {"cat/1.png", "cat/odd.png/inside.png"}
    assert not skipped


def test_links_are_followed_and_loops_end(put, run, tmp_path):
    put("cat/1.png")
    outside = tmp_path / "elsewhere"
    outside.mkdir()
    (outside / "2.png").write_bytes(put("cat/0.png"))
    (tmp_path / "source/dog").symlink_to(outside)
    (tmp_path / "source/a_link").symlink_to("cat")  # sorts before cat, and yet cat keeps its name
    (tmp_path / "source/cat/up").symlink_to("..")
    (outside / "round").symlink_to(outside)
    samples, skipped = run()
    assert samples.keys() == {"cat/0.png", "cat/1.png", "dog/2.png"}
    assert not skipped


def test_the_same_stem_twice_gives_two_samples(put, run):
    put("a.png", "shared")
    put("a.jpg", None, "JPEG")
    put("a.b.png", "dotted")
    put("a_b.png", "underlined")
    samples, _ = run()
    assert len({sample.key for sample in samples.values()}) == 4
    assert samples["a.jpg"].captions() == samples["a.png"].captions() == ("shared",)


def test_names_that_are_no_text_survive(put, run, tmp_path):
    put("dog/1.png")
    put("cat/1.png")
    os.rename(tmp_path / "source/cat/1.png", os.fsencode(tmp_path / "source/cat") + b"/\xff\n.png")
    samples, skipped = run()
    assert len(samples) == 2
    assert not skipped


def test_images_of_a_class_are_drawn_one_by_one_and_the_same_each_time(put, tmp_path, read_all):
    for label in range(3):
        for number in range(10):
            put(f"class_{label}/{number}.png")
    first = import_folder(tmp_path / "source", tmp_path / "out", test_share=0.2, processes=2)
    train, test = read_all(tmp_path / "out/train"), read_all(tmp_path / "out/test")
    assert (len(train), len(test)) == (24, 6)
    assert {sample.label() for sample in train} == {sample.label() for sample in test}
    again = import_folder(tmp_path / "source", tmp_path / "again", test_share=0.2, processes=0)
    assert again.test.index.fingerprint == first.test.index.fingerprint
    assert again.train.index.fingerprint == first.train.index.fingerprint
    other = import_folder(tmp_path / "source", tmp_path / "other", test_share=0.2, seed=1, processes=0)
    assert other.test.index.fingerprint != first.test.index.fingerprint


def test_a_folder_with_nothing_to_import_says_what_is_looked_for(put, tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    with pytest.raises(FileNotFoundError, match="no folder"):
        import_folder(source, out)
    source.mkdir()
    (source / "readme.txt").write_text("nothing here")
    with pytest.raises(FileNotFoundError, match=r"source.*\.webp.*class"):
        import_folder(source, out)
    (source / "readme.txt").unlink()
    put("bare.png")
    with pytest.raises(DataError, match=r"no image .* has a caption \(the first, bare\.png"):
        import_folder(source, out)
    assert not out.exists()


def test_an_import_is_not_repeated_over_itself(put, run, tmp_path):
    put("1.png", "one")
    run()
    with pytest.raises(ValueError, match="there already"):
        import_folder(tmp_path / "nowhere", tmp_path / "out")


# --- captions, in the forms that people keep them in

CAPTIONS = {f"{number}.png": f"a real caption {number}" for number in range(4)}
AS_JSONL = "\n".join(json.dumps({"file_name": name, "text": text}) for name, text in CAPTIONS.items())
AS_CSV = "file_name,caption\n" + "\n".join(f"{name},{text}" for name, text in CAPTIONS.items())
AS_TSV = AS_CSV.replace(",", "\t")
AS_LIST = json.dumps([{"image": name, "caption": text} for name, text in CAPTIONS.items()])
STEMS = {name.removesuffix(".png"): text for name, text in CAPTIONS.items()}


@pytest.fixture
def also(tmp_path):
    """also({"a/b.csv": "text"}) writes other files below SOURCE."""

    def write(files):
        for name, text in files.items():
            path = tmp_path / "source" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")

    return write


@pytest.mark.parametrize(
    ("folder", "files"),
    [
        ("train", {"train/metadata.jsonl": AS_JSONL}),
        ("", {"metadata.jsonl": AS_JSONL}),
        ("train", {"metadata.csv": AS_CSV.replace("\n", "\ntrain/")}),
        ("images", {"captions.csv": AS_CSV}),
        ("images", {"captions.tsv": AS_TSV}),
        ("images", {"captions.json": json.dumps(CAPTIONS)}),
        ("images", {"captions.json": json.dumps(STEMS)}),
        ("images", {"captions.json": json.dumps({name: [text] for name, text in CAPTIONS.items()})}),
        ("images", {"captions.json": json.dumps({name: {"caption": text} for name, text in STEMS.items()})}),
        ("images", {"captions.jsonl": AS_JSONL}),
        ("images", {"images/list.json": AS_LIST}),
        ("images", {"annotations/data.json": json.dumps({"data": json.loads(AS_LIST)})}),
        ("Images", {"captions.txt": AS_CSV}),  # Flickr8k
        ("images", {"captions.csv": AS_CSV.replace("\n", "\nimages\\")}),  # written on Windows
        ("a/b", {f"a/b/{name}.caption": text for name, text in STEMS.items()}),
        ("cat", {f"cat/{name}.json": json.dumps({"caption": text}) for name, text in STEMS.items()}),
        ("cat", {f"cat/{name}.json": json.dumps({"text": text, "id": 1}) for name, text in STEMS.items()}),
        ("images", {f"images/{name}.txt": text for name, text in CAPTIONS.items()}),  # 0.png.txt
        ("images", {f"captions/{name}.txt": text for name, text in STEMS.items()}),
        ("train/images", {f"train/captions/{name}.txt": text for name, text in STEMS.items()}),
        ("images/train", {f"captions/train/{name}.txt": text for name, text in STEMS.items()}),
        ("", {f"captions/{name}.txt": text for name, text in STEMS.items()}),
        ("images", {"metadata.jsonl": AS_JSONL, **{f"images/{name}.txt": text for name, text in STEMS.items()}}),
    ],
)
def test_captions_are_read_where_people_keep_them(put, run, also, folder, files):
    for name in CAPTIONS:
        put(f"{folder}/{name}".lstrip("/"))
    also(files)
    samples, skipped = run()
    assert {os.path.basename(name): sample.captions()[0] for name, sample in samples.items()} == CAPTIONS
    assert all(sample.label() is None for sample in samples.values())
    assert not skipped


MARKS = "\u2028\x85\v"


@pytest.mark.parametrize(
    "files",
    [
        {"a.txt": f"one{MARKS}line\r\ntwo\rthree"},
        {
            "captions.jsonl": "".join(
                json.dumps({"image": "a.png", "text": text}, ensure_ascii=False) + "\n"
                for text in (f"one{MARKS}line", "two", "three")
            )
        },
    ],
)
def test_a_line_separator_within_a_caption_ends_no_line(put, run, also, files):
    put("a.png")
    also(files)
    samples, skipped = run()
    assert samples["a.png"].captions() == (f"one{MARKS}line", "two", "three")
    assert not skipped


def test_a_bad_line_of_json_costs_itself_and_is_told(put, run, also):
    for number in range(3):
        put(f"{number}.png")
    rows = [json.dumps({"image": f"{number}.png", "text": f"caption {number}"}) for number in range(3)]
    also({"metadata.jsonl": "\n".join(["", rows[0], rows[1][:-1], '{"image": ' + "1" * 5000 + "}", "5", rows[2]])})
    samples, skipped = run()
    assert [sample.captions()[0] for sample in samples.values()] == ["caption 0", "caption 2"]
    assert skipped.pop("1.png") == "has no caption (others here have)"
    assert list(skipped) == [f"metadata.jsonl: line {number}" for number in (3, 4, 5)]
    assert "Expecting ',' delimiter at character" in skipped["metadata.jsonl: line 3"]
    assert "more digits than can be read" in skipped["metadata.jsonl: line 4"]


def test_a_quote_that_swallows_rows_of_names_without_extension_is_refused(put, run, also):
    cells = {1: '"never closed', 3: 'a pipe of 5"'}
    for number in range(5):
        put(f"{number}.png")
    also({"captions.tsv": "image\tcaption\n" + "".join(f"{n}\t{cells.get(n, f'text {n}')}\n" for n in range(5))})
    with pytest.raises(DataError, match=r"line 3: a quote that opens there closes in line 5, with rows between"):
        run()


@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC")])
def test_a_name_composed_otherwise_is_the_same_name(put, run, also, forms):
    image, text = (unicodedata.normalize(form, "caf\u00e9") for form in forms)
    put(f"images/{image}.png")
    put("images/b.png")
    also({f"images/{text}.txt": "coffee", "captions.csv": f"image,caption\n{text}.png,coffee\nb.png,tea"})
    samples, skipped = run()
    assert sorted(sample.captions()[0] for sample in samples.values()) == ["coffee", "tea"]
    assert not skipped


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"images/0.caption": "another"}, r"images/0\.caption.*0\.txt|0\.txt.*0\.caption"),
        ({"captions.csv": "image,caption\n0.png,another"}, r"0\.txt.*captions\.csv.*remove"),
        ({"captions.csv": "image,caption\n0.png,another\n", "images/0.txt": ""}, None),
        (
            {"captions.json": '{"0.png": "a", "0.png": "b"}', "images/0.txt": ""},
            r"captions\.json.*'0\.png' stands twice",
        ),
        ({"captions.csv": "image,caption,caption\n0.png,a,b\n"}, r"captions\.csv has 2 columns called 'caption'"),
        ({"captions.jsonl": "\n{"}, r"captions\.jsonl line 2 is not JSON"),
        ({"captions.json": "[" + "1" * 5000 + "]"}, r"captions\.json is not JSON.*more digits than can be read"),
    ],
)
def test_files_that_contradict_each_other_are_named(put, run, also, files, words):
    put("images/0.png", "a caption")
    also(files)
    if words is None:
        samples, _ = run()
        assert samples["images/0.png"].captions() == ("another",)
        return
    with pytest.raises(DataError, match=words):
        run()


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"metadata.csv": "file_name,label\n0.png,3"}, r"metadata\.csv.*'label'.*import table"),
        ({"captions.csv": "bild,caption\n0.png,3"}, r"captions\.csv.*'bild'.*import table"),
        ({"captions.json": '[{"image": "0.png", "legend": "x"}]'}, r"'legend'.*: call them 'image' and 'caption'"),
        ({"captions.csv": "image,caption\nelsewhere.png,3"}, r"captions\.csv: names no image"),
        ({"captions.csv": "image,caption\n0.png,x"}, r"'0\.png' may be cat/0\.png or dog/0\.png"),
        ({"captions.json": '{"images": [], "annotations": []}'}, "import coco"),
        ({"cat/0.txt": ""}, r"cat/0\.txt: its \.txt holds no caption"),
        ({"cat/0.txt": "0 0.5 0.5 0.25 0.25\n"}, "numbers"),
        ({"texts of mine/zero.txt": "a caption"}, r"texts of mine/zero\.txt: is a caption file without an image"),
        ({"cat/0.cap": "a cat"}, r"cat/0\.cap may hold captions.*give a \.txt"),
        ({"cat/0.png.text": "a cat"}, r"cat/0\.png\.text may hold captions"),
        ({"dog/0.tags": "dog, grass"}, r"dog/0\.tags may hold captions"),
        ({"captions.xlsx": "PK\3\4"}, r"captions\.xlsx may hold captions.*out of the folder"),
        ({"cat/captions.yaml": "a: b"}, r"captions\.yaml may hold captions"),
        ({"metadata.ods": "PK\3\4"}, r"metadata\.ods may hold captions"),
        ({"cat/0.cap": "一只红色的猫"}, r"cat/0\.cap may hold captions"),
    ],
)
def test_class_captions_are_not_made_up_beside_caption_files(put, run, also, files, words):
    put("cat/0.png")
    put("dog/0.png")
    also(files)
    with pytest.raises(DataError, match=words):
        run()


def test_files_about_a_class_set_do_not_stand_in_its_way(put, run, also):
    put("cat/0.png")
    put("dog/0.png")
    also({"README.txt": "Two classes.", "class_index.json": '{"0": ["n01", "cat"]}', "sizes.csv": "a,b\n1,2\n"})
    samples, skipped = run()
    assert {sample.label() for sample in samples.values()} == {"cat", "dog"}
    assert skipped.keys() == {"README.txt", "sizes.csv", "class_index.json"}


def test_what_lies_beside_images_of_a_class_and_is_no_text_is_told(put, run, also, tmp_path, read_all):
    for name in ("cat/0", "dog/0"):
        put(f"{name}.png")
        also({f"{name}.xml": "<box/>", f"{name}.npy": "\x93NUMPY\1\0", f"{name}.feat": "0.5 0.25 1 7 8\n"})
    also({"train.py": "print()", "cat/empty.cap": "", "notes.md": "Two classes.", "metadata.yaml": "name: two classes"})
    imported = import_folder(tmp_path / "source", tmp_path / "out", test_share=0, processes=0)
    assert {sample.label() for sample in read_all(tmp_path / "out/train")} == {"cat", "dog"}
    assert imported.notes[-1] == "what lies beside images as .feat, .npy, .xml is not read"


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("png.md5", "d41d8cd98f00b204e9800998ecf8427e  0.png"),
        ("log", "read the image in one second"),
        ("ini", "[view]\nzoom of the image=2"),
        ("pts", "version: 1\nn_points: 68\n{\n1 2\n}"),
        ("prj", 'PROJCS["WGS 84 / UTM zone 33N"]'),
        ("points", '[{"type": "Point"}]'),
        ("taken", "2026-01-05 12:30:01"),
        ("hash", "deadbeefdeadbeef"),
    ],
)
def test_what_lies_beside_images_of_a_class_and_is_no_prose_is_told(put, run, also, kind, text):
    for name in ("cat/0", "dog/0"):
        put(f"{name}.png")
        also({f"{name}.{kind}": text})
    samples, _ = run()
    assert {sample.label() for sample in samples.values()} == {"cat", "dog"}


def test_a_table_with_a_blank_behind_each_delimiter(put, run, also):
    put("0.png")
    put("1.png")
    also({"captions.csv": 'file_name, caption\n0.png, "a dog, running"\n1.png, plain\n'})
    samples, skipped = run()
    assert {name: sample.captions() for name, sample in samples.items()} == {
        "0.png": ("a dog, running",),
        "1.png": ("plain",),
    }
    assert not skipped


@pytest.mark.parametrize("name", ["train", "images", "img", "data", "val", "test", "Train 2017", "22x22", "2026-01-05"])
def test_one_class_or_a_name_that_says_nothing_makes_no_caption(put, run, name):
    put(f"{name}/0.png")
    with pytest.raises(DataError, match="has a caption"):
        run()
    put("cat/0.png")
    with pytest.raises(DataError, match="the only class folder is 'cat'"):
        run()
    put("dog/0.png")
    samples, skipped = run()
    assert samples.keys() == {"cat/0.png", "dog/0.png"}
    assert "no class" in skipped[f"{name}/0.png"]


@pytest.mark.parametrize("beside", ["test", "val", "validation"])
@pytest.mark.parametrize("classes", [True, False])
def test_train_beside_another_is_a_published_split(put, tmp_path, read_all, beside, classes):
    for part in ("train", beside):
        for number in range(4):
            label = ("cat/", "dog/")[number % 2] if classes else ""
            put(f"{part}/{label}{number}.png", None if classes else f"{part} {number}")
    put("cat/stray.png", None if classes else "stray")
    imported = import_folder(tmp_path / "source", tmp_path / "out", processes=0)
    sets = {path.name: read_all(path) for path in (tmp_path / "out").iterdir()}
    other = "test" if beside == "test" else "val"
    assert {name: len(samples) for name, samples in sets.items()} == {"train": 4, other: 4}
    assert all(sample.metadata()["id"].startswith(f"{beside}/") for sample in sets[other])
    assert {sample.label() for sample in sets[other]} == ({"cat", "dog"} if classes else {None})
    assert [skip.source for skip in imported.skipped] == ["cat/stray.png"]
    assert any("split of its own" in note for note in imported.notes)
    assert any("folder names (2 classes: cat, dog)" in note for note in imported.notes) == classes
    drawn = import_folder(tmp_path / "source", tmp_path / "drawn", test_share=0.5, processes=0)
    assert not drawn.skipped


def test_a_table_that_names_the_split_is_kept(put, tmp_path, also, read_all):
    for name in CAPTIONS:
        put(f"images/{name}")
    rows = [
        f"{name},{text},{part}"
        for (name, text), part in zip(CAPTIONS.items(), ("train", "train", "dev", "test"), strict=True)
    ]
    also({"captions.csv": "image,caption,split\n" + "\n".join(rows)})
    import_folder(tmp_path / "source", tmp_path / "out", processes=0)
    sets = {path.name: [sample.captions()[0] for sample in read_all(path)] for path in (tmp_path / "out").iterdir()}
    assert sets == {
        "train": ["a real caption 0", "a real caption 1"],
        "val": ["a real caption 2"],
        "test": ["a real caption 3"],
    }


def test_what_is_no_caption_is_told(put, run, also):
    bad = ["nan", "None", "['a', 'b']", "NULL", "n/a", "", "   ", "#N/A"]
    for number in range(len(bad) + 1):
        put(f"images/{number}.png")
    rows = [f'{number}.png,"{text}"' for number, text in enumerate([*bad, "a nan on a plate"])]
    also({"captions.csv": "image,caption\n" + "\n".join(rows)})
    samples, skipped = run()
    assert [sample.captions() for sample in samples.values()] == [("a nan on a plate",)]
    assert skipped.keys() == {f"images/{number}.png" for number in range(len(bad))}
    assert "'nan', which stands for none" in skipped["images/0.png"]
    assert "list written as text" in skipped["images/2.png"]


def test_images_of_other_kinds_and_captions_without_an_image_are_told(put, run, image_bytes):
    kinds = ["heic", "heif", "avif", "gif", "bmp", "tif", "tiff", "jp2", "jxl", "svg", "ico", "raw", "dng", "HEIC"]
    for number, kind in enumerate(kinds):
        put(f"{number}.{kind}", "a caption", data=b"not what we read")
    for number, kind in enumerate(["jfif", "jpe", "HEIC", "bmp"]):
        put(f"read{number}.{kind}", f"caption {kind}", data=image_bytes(number, "JPEG"))
    samples, skipped = run()
    assert [sample.image_field for sample in samples.values()] == ["jpg"] * 4
    assert skipped.keys() == {f"{number}.{kind}" for number, kind in enumerate(kinds)}
    assert "is a .heic file" in skipped["0.heic"]


def test_a_caption_file_without_an_image_is_told(put, run, also):
    put("a.png", "one")
    also(
        {"b.txt": "two", "c.caption": "three", "d/e.txt": "four", "captions.csv": "image,caption\na.png,one\nf.png,x\n"}
    )
    _, skipped = run()
    assert skipped.keys() == {"b.txt", "c.caption", "d/e.txt", "captions.csv: f.png"}


def test_what_pillow_warns_of_is_no_line_on_the_screen(put, run, recwarn, image_bytes, monkeypatch):
    real = Image.open

    def warn(*arguments, **options):
        warnings.warn("Image appears to be a malformed MPO file", UserWarning, stacklevel=2)
        return real(*arguments, **options)

    monkeypatch.setattr(Image, "open", warn)
    put("a.png", "a")
    assert len(run()[0]) == 1
    assert not recwarn.list
