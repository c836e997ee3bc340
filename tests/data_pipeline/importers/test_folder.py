"""Folders of images, as people have them."""

import os

import pytest

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


def test_a_sidecar_goes_before_the_class(put, run):
    put("cat/1.png", "a tabby asleep")
    put("cat/2.png")
    samples, _ = run()
    assert samples["cat/1.png"].captions() == ("a tabby asleep",)
    assert samples["cat/2.png"].captions()[0] == "a photo of a cat"


def test_what_has_no_caption_or_no_pixels_is_skipped_with_a_reason(put, run, tmp_path):
    put("good.png", "\ufeffa good one\r\n")
    put("bare.png")
    put("empty_text.png", " \n\n")
    put("latin.png", "caf\xe9".encode("latin-1"))
    put("cat/empty.png", data=b"")
    put("cat/text.jpg", data=b"this is no image at all")
    put("cat/short.png", data=b"\x89PNG\r\n\x1a\n")
    (tmp_path / "source/cat/gone.png").symlink_to("nowhere.png")
    (tmp_path / "source/cat/self.png").symlink_to("self.png")
    os.mkfifo(tmp_path / "source/cat/pipe.png")  # to open it would wait for ever
    samples, skipped = run()
    assert samples.keys() == {"good.png"}
    assert samples["good.png"].captions() == ("a good one",)
    assert set(skipped) == {
        *("bare.png", "empty_text.png", "latin.png"),
        *(f"cat/{name}" for name in ("empty.png", "text.jpg", "short.png", "gone.png", "self.png", "pipe.png")),
    }
    assert "no .txt" in skipped["bare.png"]
    assert "no caption" in skipped["empty_text.png"]
    assert "UTF-8" in skipped["latin.png"]
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
    put("cat/1.png")
    os.rename(tmp_path / "source/cat/1.png", os.fsencode(tmp_path / "source/cat") + b"/\xff\n.png")
    samples, skipped = run()
    assert len(samples) == 1
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
    put("bare.png")
    with pytest.raises(DataError, match=r"bare\.png.*no \.txt"):
        import_folder(source, out)
    assert not out.exists()


def test_an_import_is_not_repeated_over_itself(put, run, tmp_path):
    put("cat/1.png")
    run()
    with pytest.raises(ValueError, match="there already"):
        import_folder(tmp_path / "nowhere", tmp_path / "out")
