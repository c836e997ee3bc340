"""Crop and resize against Pillow, and draws that depend on (seed, epoch, sample) and nothing else."""

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipeline.transforms import LOG_ASPECT, ImageTransform, TextTransform, _random_crop, sample_generator


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    """uint8 [height, width, 3] with detail at every scale."""
    generator = np.random.default_rng(seed)
    fine = generator.uniform(0, 255, size=(height, width, 3))
    coarse = np.kron(generator.uniform(0, 255, size=(height // 7 + 1, width // 7 + 1, 3)), np.ones((7, 7, 1)))
    return ((fine + coarse[:height, :width]) / 2).astype(np.uint8)


def by_pillow(image: np.ndarray, size: int) -> np.ndarray:
    """The centre square, antialiased bilinear in floats: float32 [3, size, size]."""
    height, width = image.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    channels = [Image.fromarray(image[top : top + side, left : left + side, c].astype(np.float32)) for c in range(3)]
    return np.stack([np.asarray(channel.resize((size, size), Image.Resampling.BILINEAR)) for channel in channels])


@pytest.mark.parametrize(
    ("height", "width", "size"),
    [(97, 131, 32), (131, 97, 31), (384, 512, 224), (40, 40, 40), (13, 17, 64), (300, 7, 5), (50, 50, 1), (1, 1, 3)],
)
def test_evaluation_is_the_antialiased_centre_square(height: int, width: int, size: int) -> None:
    image = noise(height, width)
    result = ImageTransform(size, crop_scale=(0.3, 1), flip=True)(image, None)  # neither counts without a generator
    assert result.shape == (3, size, size)
    assert result.dtype == torch.uint8
    assert np.abs(result.numpy() - by_pillow(image, size)).max() <= 1.01  # half a grey level a pass, two passes


def test_antialiasing_is_on() -> None:
    stripes = np.zeros((90, 90, 3), np.uint8)
    stripes[:, ::2] = 255  # without antialiasing this aliases to black and white
    result = ImageTransform(30)(stripes, None).float()
    assert (result - 127.5).abs().max() < 45
    assert abs(result.mean() - 127.5) < 3


def test_into_a_row_of_a_batch() -> None:
    image, transform = noise(97, 131), ImageTransform(24, crop_scale=(0.2, 0.9), flip=True)
    rows = [torch.zeros(4, 24, 24, 3, dtype=torch.uint8).permute(0, 3, 1, 2), torch.zeros(4, 3, 24, 24).byte()]
    for sample in range(8):  # mirrored and not
        expected = transform(image, sample_generator(0, 0, sample, "crop"))
        for batch in rows:
            batch.zero_()
            assert transform(image, sample_generator(0, 0, sample, "crop"), out=batch[2]) is not None
            assert torch.equal(batch[2], expected)
            assert batch[[0, 1, 3]].sum() == 0


def test_image_may_be_a_view() -> None:
    image = noise(60, 80)
    view = noise(60, 160)[:, ::2]
    view[:] = image
    assert torch.equal(ImageTransform(16)(view, None), ImageTransform(16)(image, None))


def test_whole_crop_scale_is_the_centre_square_in_training_too() -> None:
    image = noise(50, 80)
    transform = ImageTransform(20)
    assert not transform.draws
    assert torch.equal(transform(image, sample_generator(0, 0, 0, "crop")), transform(image, None))
    assert ImageTransform(20, flip=True).draws
    assert ImageTransform(20, crop_scale=(0.5, 1)).draws


def test_flip_mirrors_half_of_them() -> None:
    image = noise(30, 30)
    plain, transform = ImageTransform(30)(image, None), ImageTransform(30, flip=True)
    mirrored = 0
    for sample in range(400):
        result = transform(image, sample_generator(5, 0, sample, "crop"))
        is_mirrored = torch.equal(result, plain.flip(-1))
        assert is_mirrored or torch.equal(result, plain)
        mirrored += is_mirrored
    assert 150 < mirrored < 250  # five standard deviations


def test_crops_lie_in_the_image_and_have_the_area_and_aspect_asked_for() -> None:
    height, width, low, high = 301, 403, 0.3, 0.6  # no crop of these is cut by the border
    generator = np.random.default_rng(0)
    crops = np.array([_random_crop(height, width, (low, high), generator) for _ in range(4000)])
    top, left, rows, columns = crops.T
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + rows <= height).all()
    assert (left + columns <= width).all()
    area = rows * columns / (height * width)
    assert low - 0.01 < area.min() < low + 0.01
    assert high - 0.01 < area.max() < high + 0.01
    assert abs(area.mean() - (low + high) / 2) < 0.01
    log_aspect = np.log(columns / rows)
    assert np.abs(log_aspect).max() < LOG_ASPECT + 0.02
    assert abs(log_aspect.mean()) < 0.02
    assert log_aspect.std() == pytest.approx(LOG_ASPECT / 3**0.5, rel=0.05)  # uniform
    for place, room in ((top, height - rows), (left, width - columns)):
        assert (place == 0).any()  # the borders can be reached
        assert (place == room).any()
        assert abs((place / np.maximum(room, 1)).mean() - 0.5) < 0.03


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 500), (333, 2), (5, 3)])
def test_crops_of_odd_images(height: int, width: int) -> None:
    transform = ImageTransform(7, crop_scale=(0.01, 1.0))
    for sample in range(50):
        generator = sample_generator(0, 0, sample, "crop")
        top, left, rows, columns = _random_crop(height, width, (0.01, 1.0), generator)
        assert 1 <= rows <= height - top
        assert 1 <= columns <= width - left
        assert transform(noise(height, width), generator).shape == (3, 7, 7)


def test_draws_come_from_seed_epoch_sample_and_purpose() -> None:
    image, transform = noise(64, 64), ImageTransform(16, crop_scale=(0.2, 0.8), flip=True)
    paths = [
        (0, 0, 0),
        (1, 0, 0),
        (0, 1, 0),
        (0, 0, 1),
        (0, 10, 1),
        (0, 1, 1),
        (1, 1, 1),
        (-1, 0, 0),
        (2**63, 0, 2**61),
    ]
    results = [transform(image, sample_generator(*path, "crop")) for path in paths]
    for path, result in zip(paths, results, strict=True):
        assert torch.equal(transform(image, sample_generator(*path, "crop")), result)
    assert len({bytes(result.numpy()) for result in results}) == len(paths)
    first = {sample_generator(0, 1, 2, purpose).integers(2**63) for purpose in ("crop", "caption", "replacement 0")}
    assert len(first) == 3


def test_draws_stay_the_same_between_versions() -> None:
    """A resumed run must see the crops that it would have seen: these numbers may not change."""
    assert sample_generator(1, 2, 3, "crop").integers(10**6, size=4).tolist() == FIRST_DRAWS


FIRST_DRAWS = [111706, 754450, 750874, 257152]


@pytest.mark.parametrize("options", [{"size": 0}, {"size": -3}])
def test_refuses_a_size(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="image size is"):
        ImageTransform(**options)


@pytest.mark.parametrize("scale", [(0, 1), (0.5, 0.4), (0.5, 1.1), (-1, 1), (float("nan"), 1)])
def test_refuses_a_crop_scale(scale: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="crop_scale is"):
        ImageTransform(8, crop_scale=scale)


def test_text() -> None:
    class Letters:
        def encode(self, text: str, context: int) -> np.ndarray:
            return np.frombuffer(text.encode().ljust(context)[:context], np.uint8).astype(np.int32)

    assert TextTransform(Letters(), 4)("abcdefg").tolist() == [97, 98, 99, 100]
