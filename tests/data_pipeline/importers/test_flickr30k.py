"""Flickr30K in its three published forms."""

import pytest

from data_pipeline.errors import DataError
from data_pipeline.importers.flickr30k import import_flickr30k

NAMES = [f"{1000092795 + number}.jpg" for number in range(6)]


def captions_of(number):
    return tuple(f"Guy {number} , seen | for the {place} th time ." for place in range(5))


@pytest.fixture
def images(put, image_bytes):
    """The images but one, and a broken one."""

    def write(folder):
        for number, name in enumerate(NAMES[:5]):
            put(f"{folder}/{name}", b"" if number == 4 else image_bytes(number, "JPEG"))

    return write


def reasons_of(imported):
    return {skip.source: skip.reason for skip in imported.skipped}


def test_the_token_file(put, images, tmp_path, examine):
    images("flickr30k-images")
    lines = [f"{name}#{place}\t{text}" for n, name in enumerate(NAMES) for place, text in enumerate(captions_of(n))]
    put("results_20130124.token", "\n".join([*lines, "nonsense", "../../x.jpg#0\tOutside ."]) + "\n")
    imported = import_flickr30k(tmp_path / "source", tmp_path / "out", test_share=0.25, licence="terms", processes=0)
    sets = examine(tmp_path / "out")
    assert (len(sets["train"]), len(sets["test"])) == (3, 1)
    samples = sets["train"] | sets["test"]
    for number, name in enumerate(NAMES[:4]):
        assert samples[name].captions() == captions_of(number)
        assert samples[name].metadata()["provenance"] == {"source": "Flickr30K", "licence": "terms", "id": name}
    reasons = reasons_of(imported)
    assert reasons[NAMES[5]] == "the image file is missing"
    assert reasons[NAMES[4]] == "the image file is empty"
    assert "not of the form" in reasons["results_20130124.token line 31"]
    assert "outside" in reasons["../../x.jpg"]
    assert len(imported.skipped) == 4


def test_the_table_of_kaggle_and_its_broken_row(put, images, tmp_path, examine):
    images("flickr30k_images/flickr30k_images")
    lines = ["image_name| comment_number| comment"]
    lines += [f"{name}| {place}| {text}" for n, name in enumerate(NAMES) for place, text in enumerate(captions_of(n))]
    lines[10] = f"{NAMES[1]}| 4   A dog runs across the grass ."  # as in the published file
    put("flickr30k_images/results.csv", "\n".join(lines))
    imported = import_flickr30k(tmp_path / "source", tmp_path / "out", test_share=0, processes=0)
    samples = examine(tmp_path / "out")["train"]
    assert set(samples) == set(NAMES[:4])
    assert samples[NAMES[0]].captions() == captions_of(0)
    assert samples[NAMES[1]].captions() == (*captions_of(1)[:4], "A dog runs across the grass .")
    assert set(reasons_of(imported)) == set(NAMES[4:])


def karpathy(splits):
    images = [
        {
            "sentids": [5 * number + place for place in range(5)],
            "imgid": number,
            "sentences": [
                {"tokens": text.split(), "raw": text, "imgid": number, "sentid": 5 * number + place}
                for place, text in enumerate(captions_of(number))
            ],
            "split": split,
            "filename": NAMES[number],
        }
        for number, split in enumerate(splits)
    ]
    return {"images": images, "dataset": "flickr30k"}


def test_the_split_of_karpathy(put, images, tmp_path, examine):
    images("flickr30k-images")
    put("results_20130124.token", "not even read")
    put("dataset_flickr30k.json", karpathy(["train", "val", "test", "train", "test", "val"]))
    imported = import_flickr30k(tmp_path / "source", tmp_path / "out", processes=0)
    sets = examine(tmp_path / "out")
    assert {name: set(samples) for name, samples in sets.items()} == {"train": {"0", "3"}, "val": {"1"}, "test": {"2"}}
    assert sets["val"]["1"].captions() == captions_of(1)
    assert set(reasons_of(imported)) == {NAMES[4], NAMES[5]}


def test_a_bad_row_costs_itself_and_is_told(put, images, tmp_path, examine):
    images("images")
    tree = karpathy(["train"] * 4 + ["nowhere"])
    tree["images"][0]["sentences"][1] = {"raw": None}
    tree["images"][1]["imgid"] = None
    tree["images"][2]["sentences"] = "none"
    put("dataset_flickr30k.json", tree)
    imported = import_flickr30k(tmp_path / "source", tmp_path / "out", processes=0)
    samples = examine(tmp_path / "out")["train"]
    assert {name: len(sample.captions()) for name, sample in samples.items()} == {"0": 4, "3": 5}
    reasons = {name.partition(", ")[2]: reason for name, reason in reasons_of(imported).items()}
    assert reasons["images[0], sentences[1]"].startswith("'raw' is null")
    assert reasons["images[1]"].startswith("'imgid' is null")
    assert reasons["images[2]"].startswith("'sentences' is a text")
    assert reasons["images[4]"].startswith("'split' is 'nowhere'")


@pytest.mark.parametrize("mark", ["\u2028", "\x85", "\v"])
def test_a_line_separator_within_a_caption_ends_no_line(put, images, tmp_path, examine, mark):
    images("flickr30k-images")
    put("results_20130124.token", "".join(f"{name}#0\tGuy {n}{mark}sits .\r\n" for n, name in enumerate(NAMES[:4])))
    imported = import_flickr30k(tmp_path / "source", tmp_path / "out", test_share=0, processes=0)
    samples = examine(tmp_path / "out")["train"]
    assert [samples[name].captions() for name in NAMES[:4]] == [(f"Guy {n}{mark}sits .",) for n in range(4)]
    assert list(reasons_of(imported)) == [f"flickr30k-images/{NAMES[4]}"]


def test_damaged_files_are_one_sentence(put, tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no"):
        import_flickr30k(tmp_path / "source", tmp_path / "out")
    file = put("dataset_flickr30k.json", karpathy(["nowhere"]))
    with pytest.raises(DataError, match=r"images\[0\]: 'split' is 'nowhere'"):
        import_flickr30k(tmp_path / "source", tmp_path / "out")
    file.write_text('{"images": [{"filename": "x", "split": "train", "imgid": 0}]}')
    with pytest.raises(DataError, match=r"images\[0\]: 'sentences' is not there"):
        import_flickr30k(tmp_path / "source", tmp_path / "out")
    file.unlink()
    put("results_20130124.token", b"x.jpg#0\t\xff")
    with pytest.raises(DataError, match=r"results_20130124\.token is not UTF-8"):
        import_flickr30k(tmp_path / "source", tmp_path / "out")
