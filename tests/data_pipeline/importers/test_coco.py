"""COCO captions, on a small set in the published form."""

import json

import pytest

from data_pipeline import BatchMaker, ImageTransform, Loader, Order, TextTransform, Tokenizer, open_dataset
from data_pipeline.errors import DataError
from data_pipeline.importers.coco import import_coco

LICENCES = [
    {
        "url": "http://creativecommons.org/licenses/by-nc-sa/2.0/",
        "id": 1,
        "name": "Attribution-NonCommercial-ShareAlike",
    },
    {"url": "http://creativecommons.org/licenses/by/2.0/", "id": 4, "name": "Attribution License"},
]


def annotations(numbers, extra_images=(), extra_annotations=()):
    """A captions_*.json of images with these numbers, five captions each, whose order is not that of the images."""
    images = [
        {
            "license": 4 if number % 2 else 1,
            "file_name": f"{number:012d}.jpg",
            "coco_url": f"http://images.cocodataset.org/train2017/{number:012d}.jpg",
            "height": 7,
            "width": 11,
            "date_captured": "2013-11-14 17:02:52",
            "flickr_url": "http://farm7.staticflickr.com/6116/x.jpg",
            "id": number,
        }
        for number in numbers
    ]
    captions = [
        {"image_id": number, "id": 1000 * place + number, "caption": f"Caption {place} of {number}. \n"}
        for place in range(5)
        for number in reversed(numbers)
    ]
    info = {"description": "COCO 2017 Dataset", "version": "1.0", "year": 2017, "contributor": "COCO Consortium"}
    return {
        "info": info,
        "licenses": LICENCES,
        "images": [*images, *extra_images],
        "annotations": [*captions, *extra_annotations],
    }


@pytest.fixture
def coco(put, image_bytes, tmp_path):
    """A folder with three images of train and two of val."""
    put("annotations/captions_train2017.json", annotations([9, 25, 30]))
    put("annotations/captions_val2017.json", annotations([139, 285]))
    put("annotations/instances_val2017.json", {"not": "ours"})
    for number in (9, 25, 30):
        put(f"train2017/{number:012d}.jpg", image_bytes(number, "JPEG"))
    for number in (139, 285):
        put(f"val2017/{number:012d}.jpg", image_bytes(number, "JPEG"))
    return tmp_path / "source"


def test_five_captions_published_split_and_licences(coco, tmp_path, examine, image_bytes):
    imported = import_coco(coco, tmp_path / "out", processes=2)
    assert not imported.skipped
    sets = examine(tmp_path / "out")
    assert {name: set(samples) for name, samples in sets.items()} == {
        "train": {"9", "25", "30"},
        "test": {"139", "285"},
    }
    sample = sets["train"]["25"]
    assert sample.key == "train2017/000000000025"
    assert sample.captions() == tuple(f"Caption {place} of 25." for place in range(5))
    assert sample.fields["jpg"] == image_bytes(25, "JPEG")
    assert sample.metadata() == {
        "captions": list(sample.captions()),
        "id": "train2017/000000000025.jpg",
        "provenance": {"source": "COCO 2017 captions", "licence": "Attribution License", "id": 25},
    }
    assert sets["train"]["30"].metadata()["provenance"]["licence"] == "Attribution-NonCommercial-ShareAlike"


def test_all_five_captions_are_used_over_epochs(coco, tmp_path):
    import_coco(coco, tmp_path / "out", processes=0)
    dataset = open_dataset(tmp_path / "out" / "train")
    captions = [dataset.read(number).captions() for number in range(len(dataset))]
    tokenizer = Tokenizer.train(sum(captions, ()), 400)
    maker = BatchMaker(dataset, ImageTransform(8), TextTransform(tokenizer, 24), 0, training=True)
    seen = {number: set() for number in range(len(dataset))}
    for batch in Loader(maker, Order(len(dataset), 0), global_batch=len(dataset), stop_step=60):  # as many epochs
        for sample, tokens in zip(batch.sample.tolist(), batch.text.tolist(), strict=True):
            seen[sample].add(tuple(tokens))
    for number, written in enumerate(captions):
        assert seen[number] == {tuple(tokenizer.encode(caption, 24).tolist()) for caption in written}


def test_what_cannot_be_used_is_told(coco, put, tmp_path, examine, image_bytes):
    outside = {"license": 4, "file_name": "../../secret.jpg", "id": 1}
    absolute = {"license": 4, "file_name": str(tmp_path / "secret.jpg"), "id": 2}
    bare = {"license": 99, "file_name": "bare.jpg", "id": 3}
    half = {"file_name": "half.jpg", "id": 4}
    put("../secret.jpg", image_bytes(99, "JPEG"))
    put("train2017/bare.jpg", image_bytes(3, "JPEG"))
    put("train2017/half.jpg", image_bytes(4, "JPEG"))
    put("train2017/000000000025.jpg", b"no image")
    (coco / "train2017/000000000030.jpg").unlink()
    said = [{"image_id": number, "id": 70 + number, "caption": "X"} for number in (1, 2, 77)]
    said += [{"image_id": 3, "id": 80, "caption": " "}, {"image_id": 4, "id": 81, "caption": "half \ud83d a letter"}]
    tree = annotations([9, 25, 30], [outside, absolute, bare, half], said)
    put("annotations/captions_train2017.json", json.dumps(tree))
    imported = import_coco(coco, tmp_path / "out", licence="unknown to COCO", processes=0)
    samples = examine(tmp_path / "out")["train"]
    assert set(samples) == {"9", "4"}
    assert samples["4"].captions() == ("half ? a letter",)
    assert samples["4"].metadata()["provenance"]["licence"] == "unknown to COCO"
    reasons = {skip.source: skip.reason for skip in imported.skipped}
    assert len(reasons) == len(imported.skipped) == 6
    assert reasons["train2017/000000000030.jpg"] == "the image file is missing"
    assert "not a JPEG" in reasons["train2017/000000000025.jpg"]
    assert reasons["train2017/bare.jpg"] == "has no caption"
    for name in ("../../secret.jpg", tmp_path / "secret.jpg"):
        assert "outside the data set's folder" in reasons[f"train2017/{name}"]
    assert "does not list it" in reasons["train2017 image 77"]


def test_images_that_no_annotation_names_are_told(coco, put, tmp_path):
    for name in ("x.jpg", "y.heic", "notes.txt", "z.GIF"):
        put(f"train2017/{name}", b"?")
    imported = import_coco(coco, tmp_path / "out", processes=0)
    assert {skip.source for skip in imported.skipped} == {f"train2017/{name}" for name in ("x.jpg", "y.heic", "z.GIF")}
    assert imported.reasons() == {"is not named in the annotations": 3}


def test_only_val_was_downloaded(coco, tmp_path, examine):
    for path in (coco / "train2017").iterdir():
        path.unlink()
    imported = import_coco(coco, tmp_path / "out", processes=0)
    assert imported.train is None
    assert imported.reasons() == {"the image file is missing": 3}
    assert set(examine(tmp_path / "out")) == {"test"}


def test_another_split_and_other_folders(coco, tmp_path, examine):
    (tmp_path / "elsewhere").mkdir()
    for name in ("train2017", "val2017"):
        (coco / name).rename(tmp_path / "elsewhere" / name)
    with pytest.raises(DataError, match=r"of 5; the first, train2017/000000000009.jpg: the image file is missing"):
        import_coco(coco, tmp_path / "out")
    import_coco(coco, tmp_path / "out", media=tmp_path / "elsewhere", test_share=0.4, processes=0)
    sets = examine(tmp_path / "out")
    assert {name: len(samples) for name, samples in sets.items()} == {"train": 3, "test": 2}
    file, images = coco / "annotations/captions_val2017.json", tmp_path / "elsewhere/val2017"
    import_coco(file, tmp_path / "one", media=images, processes=0)
    assert set(examine(tmp_path / "one")["test"]) == {"139", "285"}


def test_of_two_years_the_one_with_images(coco, put, tmp_path, examine):
    tree = annotations([9, 25])
    for image in tree["images"]:
        image["file_name"] = f"COCO_train2014_{image['file_name']}"
    put("annotations/captions_train2014.json", tree)
    import_coco(coco, tmp_path / "new", processes=0)
    assert examine(tmp_path / "new")["train"]["9"].key == "train2017/000000000009"
    for path in (coco / "train2017").iterdir():
        path.rename(path.with_name(f"COCO_train2014_{path.name}"))
    (coco / "images").mkdir()
    (coco / "train2017").rename(coco / "images/train2014")
    for path in (coco / "val2017").iterdir():
        path.unlink()
    (coco / "val2017").rmdir()
    import_coco(coco, tmp_path / "old", processes=0)
    assert examine(tmp_path / "old")["train"]["9"].key == "train2014/COCO_train2014_000000000009"


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b'{"images": [', r"captions_train2017\.json is not JSON, damaged or cut short"),
        (b"[" * 100_000, "is not JSON, damaged"),
        (b'{"a": "\xff"}', "is not UTF-8"),
        (b"[]", "holds a list where an object should be"),
        (b"{}", "'annotations' is not there, where a list should be"),
    ],
)
def test_damaged_files_are_one_sentence(coco, put, tmp_path, data, words):
    put("annotations/captions_train2017.json", data)
    with pytest.raises(DataError, match=words) as caught:
        import_coco(coco, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_bad_row_costs_itself_and_is_told(coco, put, tmp_path, examine, image_bytes):
    images = [5, {"id": 1, "file_name": None}, {"id": True, "file_name": "x"}, {"id": 9.5, "file_name": "x"}]
    images += [{"id": 40, "file_name": "unlicensed.jpg", "license": None}, {"id": 41, "file_name": "x", "license": []}]
    said = ["x", {"image_id": 9}, {"image_id": [9], "caption": "x"}, {"image_id": 9, "caption": None}]
    said += [{"image_id": 25, "caption": ["a", "b"]}, {"image_id": 40, "caption": "unlicensed"}]
    tree = annotations([9, 25, 30], images, said)
    tree["licenses"] = [*LICENCES, {"id": 7, "name": None}, "x"]
    put("annotations/captions_train2017.json", tree)
    put("train2017/unlicensed.jpg", image_bytes(40, "JPEG"))
    imported = import_coco(coco, tmp_path / "out", licence="any", processes=0)
    samples = examine(tmp_path / "out")["train"]
    assert {name: len(sample.captions()) for name, sample in samples.items()} == {"9": 5, "25": 5, "30": 5, "40": 1}
    assert samples["40"].metadata()["provenance"]["licence"] == "any"
    reasons = {skip.source.partition(", ")[2]: skip.reason for skip in imported.skipped}
    assert len(reasons) == len(imported.skipped) == 12
    assert reasons["images[3]"] == "is a number where an object should be"
    assert reasons["images[4]"] == "'file_name' is null, where a text should be"
    assert reasons["images[5]"].startswith("'id' is true or false")
    assert reasons["images[8]"].startswith("'license' is a list")
    assert reasons["annotations[15]"].startswith("is a text")
    assert reasons["annotations[16]"].startswith("'caption' is not there")
    assert reasons["annotations[17]"].startswith("'image_id' is a list")
    assert reasons["annotations[18]"].startswith("'caption' is null")
    assert reasons["annotations[19]"].startswith("'caption' is a list")
    assert reasons["licenses[2]"].startswith("'name' is null")


def test_an_id_that_is_there_twice(coco, put, tmp_path, examine, image_bytes):
    put("train2017/other.jpg", image_bytes(5, "JPEG"))
    again = {"id": 9, "file_name": f"{9:012d}.jpg"}
    put("annotations/captions_train2017.json", annotations([9, 25], [again, {"id": 25, "file_name": "other.jpg"}]))
    (coco / f"train2017/{30:012d}.jpg").unlink()
    imported = import_coco(coco, tmp_path / "out", processes=0)
    assert set(examine(tmp_path / "out")["train"]) == {"9"}
    assert {skip.source.partition("/")[2]: skip.reason for skip in imported.skipped} == {
        f"{9:012d}.jpg": "is listed again, with the same id, 9",
        f"{25:012d}.jpg": "has the id of other.jpg, 25: it is not clear whose captions are meant",
        "other.jpg": f"has the id of {25:012d}.jpg, 25: it is not clear whose captions are meant",
    }


def test_what_stands_for_no_caption_is_none(coco, put, tmp_path, examine):
    tree = annotations([9, 25, 30])
    for annotation, text in zip(tree["annotations"], ["nan", "['a', 'b']", "None"], strict=False):
        annotation["caption"] = text  # the first captions of 30, 25 and 9
    for annotation in tree["annotations"][3:]:
        annotation["caption"] = " nan" if annotation["image_id"] == 30 else annotation["caption"]
    put("annotations/captions_train2017.json", tree)
    imported = import_coco(coco, tmp_path / "out", processes=0)
    samples = examine(tmp_path / "out")["train"]
    assert {name: sample.captions() for name, sample in samples.items()} == {
        name: tuple(f"Caption {place} of {name}." for place in range(1, 5)) for name in ("9", "25")
    }
    assert {skip.source.partition("/")[2]: skip.reason for skip in imported.skipped} == {
        f"{9:012d}.jpg": "its caption is 'None', which stands for none",
        f"{25:012d}.jpg": "its caption is a list written as text",
        f"{30:012d}.jpg": "its caption is 'nan', which stands for none",
    }
    assert [skip.source[:7] for skip in imported.skipped].count("one of ") == 2


def test_what_is_no_such_data_set(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no"):
        import_coco(tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no captions_\*\.json in .*empty"):
        import_coco(tmp_path / "empty", tmp_path / "out")
    with pytest.raises(FileNotFoundError, match=r"no folder .*images: give the one that holds the image files"):
        import_coco(tmp_path / "empty", tmp_path / "out", media=tmp_path / "images")
