"""Baked data sets: resized once, never enlarged, everything else kept, what cannot be read told."""

import io
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tars import tar_of

from data_pipeline.bake import bake, baked_side
from data_pipeline.decode import decode_image, image_aspect
from data_pipeline.joined import Joined
from data_pipeline.reader import open_dataset
from data_pipeline.sample import Sample


def image_of(number: int, width: int, height: int, kind: str = "JPEG", mode: str = "RGB", **how: object) -> bytes:
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([x * 255 // width, y * 255 // height, np.full_like(x, number * 9 % 255), x * 255 // width], -1)
    image = Image.fromarray(pixels.astype(np.uint8), "RGBA").convert(mode)
    file = io.BytesIO()
    image.save(file, kind, **how)
    return file.getvalue()


TURNED = Image.Exif()
TURNED[0x0112] = 6
IMAGES = {
    "wide": ("jpg", image_of(0, 96, 64, quality=95)),
    "tall": ("jpg", image_of(1, 50, 90)),
    "turned": ("jpg", image_of(2, 90, 60, exif=TURNED)),
    "seen_through": ("png", image_of(3, 80, 80, "PNG", "RGBA")),
    "lossless": ("webp", image_of(4, 70, 50, "WEBP", "RGBA", lossless=True)),
    "equal": ("jpg", image_of(5, 48, 40)),
    "small": ("png", image_of(6, 30, 20, "PNG")),
    "narrow": ("jpg", image_of(7, 600, 12)),
}
SIDE = 40


@pytest.fixture
def source(tmp_path: Path) -> Path:
    members = []
    for key, (field, data) in IMAGES.items():
        members += [(f"{key}.{field}", data), (f"{key}.txt", key.encode())]
    members += [
        ("told.jpg", IMAGES["wide"][1]),
        ("told.json", json.dumps({"captions": ["a", "\u00e9"], "label": "x", "extra": [1, None]}).encode()),
        ("told.wav", b"RIFF, as it is"),
        ("cut.jpg", IMAGES["wide"][1][:-300]),
        ("cut.txt", b"cut"),
        ("odd.jpg", IMAGES["wide"][1]),
        ("odd.json", b"[1]"),
        ("words.txt", b"no image"),
    ]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "0.tar").write_bytes(tar_of(members))
    return tmp_path / "in"


def test_what_becomes_of_each(source: Path, tmp_path: Path) -> None:
    written = bake(source, tmp_path / "out", short_side=SIDE, quality=92, processes=1)
    assert [skip.source for skip in written.skipped] == ["cut", "odd"]
    dataset = open_dataset(tmp_path / "out")
    samples: dict[str, Sample] = {}
    for number, aspect in enumerate(dataset.aspects().tolist()):
        sample = dataset.read(number)
        samples[sample.key] = sample
        field = sample.image_field
        if field is None:
            assert np.isnan(aspect)
            continue
        assert aspect == pytest.approx(image_aspect(sample.fields[field]))
    assert list(samples) == [*IMAGES, "told", "words"]
    for key in ("equal", "small", "narrow"):  # nothing is enlarged, nor touched
        field, data = IMAGES[key]
        assert samples[key].fields == {field: data, "txt": key.encode()}
    for key in ("wide", "tall", "turned", "seen_through", "lossless"):
        field, data = IMAGES[key]
        before = decode_image(data)
        sample = samples[key]
        assert set(sample.fields) == {"jpg", "txt", "json"}
        image = decode_image(sample.fields["jpg"])
        assert min(image.shape[:2]) == SIDE
        assert image.shape[1] / image.shape[0] == pytest.approx(before.shape[1] / before.shape[0], rel=0.02)
        wanted = np.asarray(Image.fromarray(before).resize((image.shape[1], image.shape[0]), Image.Resampling.BOX))
        assert np.abs(image.astype(int) - wanted.astype(int)).mean() < 4
        assert sample.metadata() == {
            "baked": {
                "name": f"{key}.{field}",
                "width": before.shape[1],
                "height": before.shape[0],
                "short_side": SIDE,
                "quality": 92,
            }
        }
    told = samples["told"]
    assert told.captions() == ("a", "\u00e9")
    assert told.metadata()["extra"] == [1, None]
    assert told.fields["wav"] == b"RIFF, as it is"
    assert samples["words"].fields == {"txt": b"no image"}
    assert baked_side(dataset) == SIDE
    assert baked_side(Joined([dataset])) == SIDE  # by the samples
    assert baked_side(open_dataset(source)) is None

    smaller = bake(tmp_path / "out", tmp_path / "again", short_side=20, processes=1)
    assert smaller.skipped == ()
    again = open_dataset(tmp_path / "again").read(0)
    assert again.metadata()["baked"] == samples["wide"].metadata()["baked"] | {"short_side": 20, "quality": 90}


def test_the_same_bytes_by_any_number_of_processes_and_nothing_done_twice(source: Path, tmp_path: Path) -> None:
    written = [bake(source, tmp_path / f"out{n}", short_side=SIDE, samples_per_shard=3, processes=n) for n in (1, 2)]
    assert written[0].index == written[1].index
    assert written[0].skipped == written[1].skipped
    once_more = bake(source, tmp_path / "out1", short_side=SIDE, samples_per_shard=3)
    assert once_more.already
    assert once_more.skipped == written[0].skipped
    with pytest.raises(ValueError, match="out1 is there already"):
        bake(source, tmp_path / "out1", short_side=SIDE - 1)


BAKE = """
import os, signal, sys
from data_pipeline.bake import bake
def end(done, total):
    if done >= 6:
        os.kill(os.getpid(), signal.SIGKILL)
bake(sys.argv[1], sys.argv[2], short_side=40, samples_per_shard=3, processes=1, progress=end)
"""


def test_a_killed_one_is_gone_on_with(source: Path, tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", BAKE, str(source), str(tmp_path / "out")]
    assert subprocess.run(command, env=environment, check=False).returncode == -signal.SIGKILL
    (unfinished,) = tmp_path.glob(".out.*.unfinished")
    kept = {path.stat().st_ino for path in unfinished.glob("*.tar")}
    assert len(kept) == 2
    written = bake(source, tmp_path / "out", short_side=40, samples_per_shard=3, processes=1)
    assert kept <= {path.stat().st_ino for path in (tmp_path / "out").glob("*.tar")}
    whole = bake(source, tmp_path / "whole", short_side=40, samples_per_shard=3, processes=1)
    assert replace(written) == whole


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"short_side": 0}, "short side is 0: give 1 or more pixels"),
        ({"quality": 0}, "quality is 0: give 1 to 100"),
        ({"quality": 101}, "quality is 101: give 1 to 100"),
        ({"short_side": 80}, "resized to a short side of 80: the largest short side among 10 images is 80; give"),
    ],
)
def test_what_makes_no_sense_is_refused(source: Path, tmp_path: Path, options: dict[str, int], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        bake(source, tmp_path / "out", **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


def test_equal_keys_are_told_before_any_work_and_can_be_made_to_differ(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for shard in "ab":
        (tmp_path / "in" / f"{shard}.tar").write_bytes(tar_of({f"{n}.jpg": IMAGES["wide"][1] for n in range(2)}))
    told = r"2 keys of .* are there in several shards, such as '0' in a\.tar and b\.tar.* --shard-keys"
    with pytest.raises(ValueError, match=told):
        bake(tmp_path / "in", tmp_path / "out", short_side=SIDE, processes=1, progress=lambda *_: pytest.fail("worked"))
    bake(tmp_path / "in", tmp_path / "apart", short_side=SIDE, samples_per_shard=2, processes=1)
    for already in (False, True):
        written = bake(tmp_path / "in", tmp_path / "out", short_side=SIDE, shard_keys=True, processes=1)
        assert written.already is already
    dataset = open_dataset(tmp_path / "out")
    assert [dataset.key(number) for number in range(len(dataset))] == ["a/0", "a/1", "b/0", "b/1"]
    assert dataset.read(3).metadata()["baked"]["name"] == "1.jpg"
    (tmp_path / "in" / "a.tar").write_bytes(tar_of([("x.jpg", IMAGES["wide"][1]), ("y.txt", b"y"), ("x.txt", b"x")]))
    (tmp_path / "in" / "index.json").unlink()
    with pytest.raises(ValueError, match=r"1 key of .* is there twice, 'x' in a\.tar"):
        bake(tmp_path / "in", tmp_path / "no", short_side=SIDE, shard_keys=True, processes=1)
