"""Decoding: the pixels that Pillow sees, upright and on white, or one DataError."""

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from data_pipeline.decode import decode_image
from data_pipeline.errors import DataError

WIDTH, HEIGHT = 61, 43


def picture(width: int = WIDTH, height: int = HEIGHT, seed: int = 0) -> np.ndarray:
    """Smooth colours, different in every corner: uint8 [height, width, 3]."""
    y, x = np.mgrid[:height, :width] / max(width, height)
    phases = np.random.default_rng(seed).uniform(0, 3, size=3)
    channels = [127.5 + 120 * np.sin(3 * x + 2 * y * (1 + n) + phase) for n, phase in enumerate(phases)]
    return np.stack(channels, axis=-1).astype(np.uint8)


def encoded(image: Image.Image | np.ndarray, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(file, kind, **options)
    return file.getvalue()


def by_pillow(data: bytes) -> np.ndarray:
    return np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))


def difference(one: np.ndarray, other: np.ndarray) -> int:
    assert one.shape == other.shape
    return int(np.abs(one.astype(int) - other.astype(int)).max())


@pytest.mark.parametrize(
    ("kind", "options", "tolerance"),
    [
        ("JPEG", {"quality": 90}, 2),
        ("JPEG", {"quality": 75, "subsampling": 0}, 2),
        ("JPEG", {"quality": 75, "subsampling": 1, "progressive": True}, 2),
        ("PNG", {}, 0),
        ("WEBP", {"lossless": True}, 0),
        ("WEBP", {"quality": 80}, 0),
    ],
)
def test_as_pillow_decodes(kind: str, options: dict[str, Any], tolerance: int) -> None:
    data = encoded(picture(), kind, **options)
    image = decode_image(data)
    assert image.shape == (HEIGHT, WIDTH, 3)
    assert image.dtype == np.uint8
    assert image.flags.c_contiguous
    assert difference(image, by_pillow(data)) <= tolerance


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_one_pixel(kind: str) -> None:
    data = encoded(np.full((1, 1, 3), 200, np.uint8), kind)
    assert difference(decode_image(data), np.full((1, 1, 3), 200)) <= 1


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_grey(kind: str) -> None:
    grey = picture()[..., 0]
    image = decode_image(encoded(grey, kind, **({"quality": 95} if kind == "JPEG" else {})))
    assert difference(image[..., 0], grey) <= 4
    assert (image[..., :1] == image).all()


def test_cmyk_jpeg() -> None:
    data = encoded(Image.fromarray(picture()).convert("CMYK"), "JPEG", quality=95)
    assert difference(decode_image(data), by_pillow(data)) == 0
    assert np.abs(decode_image(data).astype(int) - picture()).mean() < 4  # and not inverted


def test_16_bit_grey_is_scaled_and_not_clipped() -> None:
    grey = np.linspace(0, 65535, WIDTH * HEIGHT).reshape(HEIGHT, WIDTH).astype(np.uint16)
    image = decode_image(encoded(grey, "PNG"))
    assert difference(image, np.repeat((grey >> 8)[..., None], 3, axis=2)) == 0


def test_16_bit_colour() -> None:
    wide = picture().astype(np.uint16) * 257  # 0 .. 65535
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in wide)
    header = struct.pack(">IIBBBBB", WIDTH, HEIGHT, 16, 2, 0, 0, 0)
    assert difference(decode_image(png(header, zlib.compress(rows))), picture()) == 0


def png(header: bytes, pixels: bytes) -> bytes:
    chunks = ((b"IHDR", header), (b"IDAT", pixels), (b"IEND", b""))
    parts = (
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def test_one_bit() -> None:
    black_and_white = picture()[..., 0] > 127
    image = decode_image(encoded(Image.fromarray(black_and_white), "PNG"))
    assert (image == black_and_white[..., None] * np.uint8(255)).all()


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_transparency_lies_on_white(kind: str) -> None:
    opaque, half, clear = 255, 102, 0
    pixels = np.zeros((6, 9, 4), np.uint8)
    pixels[..., :3] = (200, 20, 60)
    pixels[:, :3, 3], pixels[:, 3:6, 3], pixels[:, 6:, 3] = opaque, half, clear
    image = decode_image(encoded(pixels, kind, **({"lossless": True, "exact": True} if kind == "WEBP" else {})))
    assert (image[:, :3] == (200, 20, 60)).all()
    assert difference(image[:, 3:6], np.broadcast_to([233, 161, 177], (6, 3, 3))) <= 1  # 0.4 of it, 0.6 of white
    assert (image[:, 6:] == 255).all()


def test_grey_with_transparency() -> None:
    pixels = np.array([[[40, 255], [40, 0]]], np.uint8)
    assert decode_image(encoded(Image.fromarray(pixels, "LA"), "PNG"))[0, :, 0].tolist() == [40, 255]


def test_palette_with_a_transparent_colour() -> None:
    image = Image.new("P", (3, 1))
    image.putpalette([0, 0, 0, 10, 200, 30, 0, 0, 250])
    image.putdata([0, 1, 2])
    assert decode_image(encoded(image, "PNG", transparency=1))[0].tolist() == [[0, 0, 0], [255] * 3, [0, 0, 250]]
    assert decode_image(encoded(image, "PNG"))[0].tolist() == [[0, 0, 0], [10, 200, 30], [0, 0, 250]]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(picture(), kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
    image = decode_image(data)
    assert image.shape[:2] == ((HEIGHT, WIDTH) if orientation < 5 else (WIDTH, HEIGHT))
    assert difference(image, by_pillow(data)) <= 2
    assert image.flags.c_contiguous


def test_first_frame_of_an_animation() -> None:
    frames = [Image.fromarray(picture(seed=seed)) for seed in range(3)]
    data = encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    assert difference(decode_image(data), picture(seed=0)) == 0


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("part", [0.02, 0.3, 0.7, 0.95])
def test_truncated(kind: str, part: float) -> None:
    data = encoded(picture(200, 150), kind)
    with pytest.raises(DataError):
        decode_image(data[: int(len(data) * part)])


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_damage_is_a_data_error_or_an_image(kind: str) -> None:
    whole = encoded(picture(), kind)
    generator = np.random.default_rng(1)
    for _ in range(200):
        data = bytearray(whole)
        for place in generator.integers(0, len(data), size=4):
            data[place] = generator.integers(256)
        try:
            image = decode_image(bytes(data))
        except DataError:
            continue
        assert image.dtype == np.uint8
        assert image.shape[2] == 3


@pytest.mark.parametrize("data", [b"", b"\xff", b"GIF89a" + bytes(50), b"<svg/>", b"RIFF\0\0\0\0WAVE", bytes(1000)])
def test_no_image(data: bytes) -> None:
    with pytest.raises(DataError, match="not a JPEG, PNG or WebP image"):
        decode_image(data)


@pytest.mark.parametrize("side", [12_000, 40_000, 2**31 - 1])
def test_png_bomb_is_refused_by_its_header(side: int) -> None:
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    with pytest.raises(DataError, match="refused before decoding"):
        decode_image(png(header, zlib.compress(bytes(100))))


def test_jpeg_bomb_is_refused_by_its_header() -> None:
    data = encoded(picture(), "JPEG")
    size, bomb = struct.pack(">HH", HEIGHT, WIDTH), struct.pack(">HH", 60_000, 60_000)
    assert data.count(size) == 1
    with pytest.raises(DataError, match="60000 x 60000 pixels"):
        decode_image(data.replace(size, bomb))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_the_limit_is_inclusive(kind: str) -> None:
    data = encoded(picture(), kind)
    assert decode_image(data, max_pixels=WIDTH * HEIGHT).shape == (HEIGHT, WIDTH, 3)
    with pytest.raises(DataError, match="over the limit"):
        decode_image(data, max_pixels=WIDTH * HEIGHT - 1)
