"""Near-duplicates: copies of a real photograph are found, other pictures are not."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageEnhance, ImageOps

from data_pipeline.filters import Signatures, parse_steps, run_filters
from data_pipeline.filters.near_duplicates import NearDuplicates
from data_pipeline.sample import Sample
from data_pipeline.scenes.synth import synthesise

Encode = Callable[..., bytes]
WriteSet = Callable[..., Path]
ReadAll = Callable[[Path], list[Sample]]


def without_edge(image: Image.Image, share: float) -> Image.Image:
    width, height = image.size
    edges = (round(width * share), round(height * share))
    return image.crop((*edges, width - edges[0], height - edges[1]))


@pytest.fixture(scope="module")
def copies(photograph: Image.Image, encoded: Encode) -> dict[str, bytes]:
    half = photograph.resize((256, 300), Image.Resampling.BICUBIC)
    return {
        "quality 20": encoded(photograph, quality=20),
        "half": encoded(half, quality=85),
        "stretched": encoded(photograph.resize((300, 300)), quality=85),
        "thumbnail": encoded(photograph.resize((85, 100)), quality=60),
        "png": encoded(half, "PNG"),
        "webp": encoded(half, "WEBP", quality=50),
        "cropped": encoded(without_edge(photograph, 0.02), quality=85),
        "brighter": encoded(ImageEnhance.Brightness(photograph).enhance(1.05), quality=85),
    }


@pytest.fixture(scope="module")
def others(photograph: Image.Image, encoded: Encode) -> dict[str, bytes]:
    """Pictures that have much in common with the photograph, and are not it."""
    width, height = photograph.size
    pixels = np.asarray(photograph)
    return {
        "mirrored": encoded(ImageOps.mirror(photograph)),
        "upside down": encoded(photograph.rotate(180)),
        "left half": encoded(photograph.crop((0, 0, width // 2, height))),
        "top half": encoded(photograph.crop((0, 0, width, height // 2))),
        "red for blue": encoded(np.ascontiguousarray(pixels[:, :, ::-1])),
        "negative": encoded(255 - pixels),
        "red light": encoded(with_light(photograph, (255, 0, 0))),
        "green light": encoded(with_light(photograph, (0, 130, 0))),
        "grey": encoded(np.full_like(pixels, 127)),
        "white": encoded(np.full_like(pixels, 255)),
    }


def with_light(image: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    """The picture with a small disc on it: colours that are equally bright have equal hashes."""
    lit = image.copy()
    ImageDraw.Draw(lit).ellipse((380, 40, 460, 130), fill=colour)
    return lit


def field(data: bytes) -> str:
    return {b"\xff\xd8": "jpg", b"\x89P": "png", b"RI": "webp"}[data[:2]]


def test_copies_go_and_other_pictures_stay(
    photograph: Image.Image,
    encoded: Encode,
    copies: dict[str, bytes],
    others: dict[str, bytes],
    write_set: WriteSet,
    read_all: ReadAll,
    tmp_path: Path,
) -> None:
    pictures = {"original": encoded(photograph, quality=92)} | copies | others
    folder = write_set("in", [Sample(key, {field(data): data}) for key, data in pictures.items()])
    report = run_filters(folder, tmp_path / "out", parse_steps(["near-duplicates"]), processes=1)
    assert [sample.key for sample in read_all(tmp_path / "out")] == ["original", *others]
    assert report.steps[0].reasons == {"looks the same as an earlier sample": len(copies)}
    assert report.steps[0].examples[0].detail == "as original in shard-000000.tar"


def test_a_copy_of_a_test_picture_leaves_the_training_set(
    photograph: Image.Image,
    encoded: Encode,
    copies: dict[str, bytes],
    others: dict[str, bytes],
    write_set: WriteSet,
    read_all: ReadAll,
    tmp_path: Path,
) -> None:
    test = write_set("test", [Sample("original", {"jpg": encoded(photograph)}), Sample("text", {"txt": b"no picture"})])
    train = write_set("train", [Sample(key, {field(data): data}) for key, data in (others | copies).items()])
    report = run_filters(train, tmp_path / "out", parse_steps(["near-duplicates"]), against=test, processes=1)
    assert [sample.key for sample in read_all(tmp_path / "out")] == list(others)
    assert report.steps[0].reasons == {"looks the same as a sample of the test set": len(copies)}


def test_the_distance_is_the_users(
    photograph: Image.Image, encoded: Encode, copies: dict[str, bytes], write_set: WriteSet, tmp_path: Path
) -> None:
    pictures = {"original": encoded(photograph)} | copies
    folder = write_set("in", [Sample(key, {field(data): data}) for key, data in pictures.items()])
    kept = [
        run_filters(folder, tmp_path / str(distance), parse_steps([f"near-duplicates:distance={distance}"])).kept
        for distance in (0, 8)
    ]
    assert kept[0] > kept[1] == 1


def test_drawn_scenes_of_few_shapes_are_told_apart(tmp_path: Path) -> None:
    synthesise(tmp_path / "scenes", train=150, test=10, seed=1, size=64, sound=False, processes=1)
    report = run_filters(
        tmp_path / "scenes" / "train",
        tmp_path / "out",
        parse_steps(["near-duplicates:distance=4"]),
        against=tmp_path / "scenes" / "test",
        processes=1,
    )
    assert report.kept == 150


def test_small_differences_do_not_join_into_a_chain() -> None:
    """Neighbours in the row differ in 6 bits, the first and the third in 12: only every second one goes."""
    codes = [sum(1 << bit for bit in range(6 * number)) for number in range(5)]
    rows = np.zeros((5, NearDuplicates.width), np.uint8)
    rows[:, :8] = np.array(codes, "<u8")[:, None].view(np.uint8)
    (removed,) = NearDuplicates(distance=8).decide(Signatures(rows, str), None)
    assert removed.rows.tolist() == [1, 3]
    assert [removed.detail(row) for row in (1, 3)] == ["as 0", "as 2"]


def test_settings_that_make_no_sense_are_refused() -> None:
    for words in ("distance=17", "distance=-1", "colour=300", "distance=2.5"):
        with pytest.raises(ValueError, match=r"near-duplicates:(distance|colour) is"):
            parse_steps([f"near-duplicates:{words}"])
