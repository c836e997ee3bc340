"""Decoding: the pixels that Pillow sees, upright and on white, or one DataError."""

import base64
import io
import struct
import zlib
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from data_pipeline.decode import PNG_PASSES, decode_and_remark, decode_image, image_aspect
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


# --- what the strict decoder refuses and Pillow reads whole

SAMPLINGS = ["1x4", "2x2,2x1", "3x1", "4x2", "1x1,2x2,1x1", "1x3", "3x2,1x1,1x2"]


def sampled(factors: str) -> bytes:
    """A JPEG whose header claims these sampling factors, its pixels being those of 4:4:4 read in another order."""
    data = bytearray(encoded(picture(64, 64), "JPEG", subsampling=0))
    start = data.index(b"\xff\xc0")
    parts = [tuple(map(int, part.split("x"))) for part in factors.split(",")]
    for number in range(3):
        across, down = parts[number] if number < len(parts) else (1, 1)
        data[start + 11 + 3 * number] = across << 4 | down
    return bytes(data)


@pytest.mark.parametrize("factors", SAMPLINGS)
def test_a_header_of_unusual_sampling_is_no_error_of_another_kind(factors: str) -> None:
    assert image_aspect(sampled(factors)) == 1.0
    with suppress(DataError):  # too few pixels, for some
        assert difference(decode_image(sampled(factors)), by_pillow(sampled(factors))) == 0


# cjpeg -sample 1x4, 2x2,2x1 and 1x1,2x2,1x1 of an 8 x 8 ramp of colours, quality 30
BY_CJPEG = {
    "1x4": (
        "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDABsSFBcUERsXFhceHBsgKEIrKCUlKFE6PTBCYFVlZF9VXVtqeJmBanGQc1tdhbWGkJ6j"
        "q62rZ4C8ybqmx5moq6T/2wBDARweHigjKE4rK06kbl1upKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSk"
        "pKSkpKSkpKT/wAARCAAIAAgDARQAAhEBAxEB/8QAFQABAQAAAAAAAAAAAAAAAAAAAAP/xAAXEAEAAwAAAAAAAAAAAAAAAAAAAwRh"
        "/8QAFQEBAQAAAAAAAAAAAAAAAAAAAAP/xAAXEQEAAwAAAAAAAAAAAAAAAAACAARR/9oADAMBAAIRAxEAPwCUFDACy1sjVS2f/9k="
    ),
    "2x2,2x1": (
        "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDABsSFBcUERsXFhceHBsgKEIrKCUlKFE6PTBCYFVlZF9VXVtqeJmBanGQc1tdhbWGkJ6j"
        "q62rZ4C8ybqmx5moq6T/2wBDARweHigjKE4rK06kbl1upKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSk"
        "pKSkpKSkpKT/wAARCAAIAAgDASIAAiEBAxEB/8QAFQABAQAAAAAAAAAAAAAAAAAAAAP/xAAXEAEAAwAAAAAAAAAAAAAAAAAAAwRh"
        "/8QAFQEBAQAAAAAAAAAAAAAAAAAAAAL/xAAaEQACAgMAAAAAAAAAAAAAAAAAAgMEARNR/9oADAMBAAIRAxEAPwCUFDACzO/QVWmf"
        "Xg//2Q=="
    ),
    "1x1,2x2,1x1": (
        "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDABsSFBcUERsXFhceHBsgKEIrKCUlKFE6PTBCYFVlZF9VXVtqeJmBanGQc1tdhbWGkJ6j"
        "q62rZ4C8ybqmx5moq6T/2wBDARweHigjKE4rK06kbl1upKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSk"
        "pKSkpKSkpKT/wAARCAAIAAgDAREAAiIBAxEB/8QAFAABAAAAAAAAAAAAAAAAAAAAA//EABkQAAEFAAAAAAAAAAAAAAAAAAMAAQQT"
        "Iv/EABYBAQEBAAAAAAAAAAAAAAAAAAACA//EABkRAQACAwAAAAAAAAAAAAAAAAABBAIDE//aAAwDAQACEQMRAD8AUMMNbZW1myAq"
        "tuz5w//Z"
    ),
}


@pytest.mark.parametrize("factors", BY_CJPEG)
def test_whole_files_of_unusual_sampling(factors: str) -> None:
    data = base64.b64decode(BY_CJPEG[factors])
    image, remark = decode_and_remark(data)
    assert difference(image, by_pillow(data)) == 0
    assert remark == "an unusual chroma subsampling"


def with_segment(marker: int, body: bytes) -> bytes:
    data = encoded(picture(), "JPEG")
    start = data.index(b"\xff\xdb")
    return data[:start] + bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body + data[start:]


def without_jfif(data: bytes) -> bytes:
    """Without the header that says more of the colours than Adobe's segment."""
    (length,) = struct.unpack_from(">H", data, 4)
    assert data[2:4] == b"\xff\xe0"
    return data[:2] + data[4 + length :]


def with_stray(bytes_before: bytes, marker: bytes) -> bytes:
    data = encoded(picture(), "JPEG")
    start = data.rindex(marker)
    return data[:start] + bytes_before + data[start:]


WHOLE = {
    "2 before the end": with_stray(bytes(2), b"\xff\xd9"),
    "8 before the end": with_stray(bytes(8), b"\xff\xd9"),
    "100 before the end": with_stray(bytes([1]) * 100, b"\xff\xd9"),
    "between segments": with_stray(b"\0\1\2", b"\xff\xdb"),
    "before the frame": with_stray(b"\7", b"\xff\xc0"),
    "a bad ICC segment": with_segment(0xE2, b"ICC_PROFILE\0\5\3xxxxx"),
    "an unknown Adobe transform": with_segment(0xEE, b"Adobe\0d\0\0\0\0\7"),
    "the same, and no JFIF header": without_jfif(with_segment(0xEE, b"Adobe\0d\0\0\0\0\7")),
}


def test_every_value_of_a_sampling_factor() -> None:
    data = encoded(picture(16, 16), "JPEG", subsampling=0, quality=20)
    frame = data.index(b"\xff\xc0")
    for place in (frame + 11, frame + 14, frame + 17):
        for value in range(256):
            with suppress(DataError):
                decode_image(data[:place] + bytes([value]) + data[place + 1 :])


@pytest.mark.parametrize("defect", WHOLE)
def test_small_defects_without_a_lost_pixel_go_by_pillow(defect: str) -> None:
    image, _ = decode_and_remark(WHOLE[defect])
    assert difference(image, by_pillow(WHOLE[defect])) == 0


def test_it_says_what_is_odd_about_such_a_file() -> None:
    assert "extraneous bytes" in decode_and_remark(WHOLE["between segments"])[1]
    assert decode_and_remark(encoded(picture(), "JPEG"))[1] == ""


@pytest.mark.parametrize("data", [b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF\0\0\0\0WEBP", b"\xff\xd8" + bytes(99)])
def test_a_reason_names_no_place_in_memory(data: bytes) -> None:
    """It would be another one each time, where reasons are counted and compared."""
    with pytest.raises(DataError, match=r"^damaged (JPEG|PNG|WEBP): [^<]*$"):
        decode_image(data)


def test_lost_pixels_stay_an_error() -> None:
    whole = encoded(picture(200, 150), "JPEG")
    for data in (whole[:-2], whole[:-30], whole[: len(whole) // 2], whole[:700] + bytes(300) + whole[1000:]):
        with pytest.raises(DataError):
            decode_image(data)


def cut(data: bytes, part: float = 1 / 3) -> bytes:
    """The first part of a JPEG, with an end mark."""
    return data[: int(len(data) * part)] + b"\xff\xd9"


def stray_before(marker: bytes, data: bytes) -> bytes:
    start = data.index(marker)
    return data[:start] + bytes(range(1, 13)) + data[start:]


def without_restart(number: int, data: bytes) -> bytes:
    """A JPEG without the data before its restart marker of that number (1 to 7), and without the marker."""
    first, last = (data.index(bytes([0xFF, 0xD0 + each])) for each in (number - 1, number))
    return data[:first] + data[last:]


def jpeg(mode: str = "RGB", **options: Any) -> bytes:
    return encoded(Image.fromarray(picture(200, 150)).convert(mode), "JPEG", **options)


TABLE, FRAME, FIRST_RESTART = b"\xff\xdb", b"\xff\xc0", b"\xff\xd0"
TALLER = jpeg().replace(struct.pack(">HH", 150, 200), struct.pack(">HH", 166, 200))
RESTARTED = jpeg(restart_marker_blocks=9)
LOST = {
    "stray bytes and a cut": stray_before(TABLE, cut(jpeg())),
    "the same, in its last bytes": stray_before(TABLE, cut(jpeg(), 0.98)),
    "stray bytes and a cut of many scans": stray_before(TABLE, cut(jpeg(progressive=True))),
    "stray bytes within the scans and a cut": stray_before(b"\xff\xc4", cut(jpeg(progressive=True), 0.6)),
    "stray bytes before a later scan": cut(stray_before(b"\xff\xda", jpeg(progressive=True)), 0.6),
    "stray bytes and rows that are not there": stray_before(TABLE, TALLER),
    "stray bytes and a restart that is not there": stray_before(TABLE, without_restart(4, RESTARTED)),
    "stray bytes in the data and a restart later": stray_before(FIRST_RESTART, without_restart(4, RESTARTED)),
    "stray bytes in the data and no last restart": stray_before(FIRST_RESTART, cut(RESTARTED, 0.9)),
    "print colours": cut(jpeg("CMYK")),
    "print colours and rows that are not there": stray_before(TABLE, cut(jpeg("CMYK"))),
    "print colours of many scans": cut(jpeg("CMYK", progressive=True)),
    "a bad profile and a cut": cut(with_segment(0xE2, b"ICC_PROFILE\0\5\3xxxxx"), 0.9),
    "no end mark and a cut": jpeg()[:1500] + bytes(5000),
    "no end mark, a cut and print colours": jpeg("CMYK")[:3000] + bytes(9000),
    **{f"a sampling of {factors}": cut(base64.b64decode(data), 0.985) for factors, data in BY_CJPEG.items()},
}


@pytest.mark.parametrize("defect", LOST)
def test_a_harmless_defect_hides_no_lost_pixels(defect: str) -> None:
    with suppress(OSError):
        assert by_pillow(LOST[defect]).any(), "Pillow reads it, half grey"
    with pytest.raises(DataError, match="damaged JPEG: "):
        decode_image(LOST[defect])


ODD = {
    "no end mark, and zeros": (jpeg(), jpeg()[:-2] + bytes(16)),
    "stray bytes before a restart": (RESTARTED, stray_before(FIRST_RESTART, RESTARTED)),
    "stray bytes before a later scan": (
        jpeg(progressive=True),
        stray_before(b"\xff\xda\0\x08", jpeg(progressive=True)),
    ),
    "stray bytes in print colours": (jpeg("CMYK"), stray_before(TABLE, jpeg("CMYK"))),
}


@pytest.mark.parametrize("defect", ODD)
def test_an_odd_file_with_all_its_pixels_is_read(defect: str) -> None:
    whole, odd = ODD[defect]
    assert difference(decode_image(odd), by_pillow(whole)) <= 2  # where the strict decoder reads it


HEADERS = {
    "JPEG": encoded(picture(16, 16), "JPEG", subsampling=0, quality=20),
    "progressive JPEG": encoded(picture(9, 9), "JPEG", progressive=True, subsampling=2, quality=20),
    "PNG": encoded(picture(7, 5), "PNG"),
    "palette PNG": encoded(Image.fromarray(picture(7, 5)).quantize(8), "PNG", transparency=3),
    "grey PNG": png(struct.pack(">IIBBBBB", 4, 3, 2, 0, 0, 0, 0), zlib.compress(bytes([0, 27] * 3))),
    "WEBP": encoded(picture(7, 5), "WEBP", quality=20),
    "lossless WEBP": encoded(picture(7, 5), "WEBP", lossless=True),
}


@pytest.mark.parametrize("kind", HEADERS)
def test_no_value_of_any_byte_raises_anything_but_a_data_error(kind: str) -> None:
    """In CI: every byte of the header with some 6 of the values, each value at some byte."""
    whole = HEADERS[kind]
    with_values = ((place, value) for place in range(2, min(len(whole), 700)) for value in range(place % 41, 256, 41))
    for place, value in with_values:
        data = bytearray(whole)
        data[place] = value
        with suppress(DataError):
            decode_image(bytes(data), max_pixels=1e5)
        assert not image_aspect(bytes(data)) <= 0


# --- PNG: transparency of grey, rows and palettes that are missing


def chunked(header: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    whole = png(header, b"")
    head, tail = whole[:33], whole[-12:]
    between = (
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )
    return head + b"".join(between) + tail


@pytest.mark.parametrize(
    ("depth", "row", "clear", "seen"),
    [
        (1, [0b01000000], 1, [0, 255]),
        (1, [0b01000000], 0, [255, 255]),
        (2, [0b01100000], 1, [255, 170]),
        (2, [0b01100000], 2, [85, 255]),
        (4, [0x3A], 3, [255, 170]),
        (4, [0x3A], 10, [51, 255]),
        (8, [7, 9], 9, [7, 255]),
        (16, [0x12, 0x34, 0x12, 0x35], 0x1234, [255, 0x12]),
        (16, [0x12, 0x34, 0x12, 0x35], 0x1236, [0x12, 0x12]),
    ],
)
def test_grey_with_a_transparent_colour_of_any_depth(depth: int, row: list[int], clear: int, seen: list[int]) -> None:
    header = struct.pack(">IIBBBBB", 2, 1, depth, 0, 0, 0, 0)
    data = chunked(header, (b"tRNS", struct.pack(">H", clear)), (b"IDAT", zlib.compress(bytes([0, *row]))))
    assert decode_image(data)[0, :, 0].tolist() == seen


@pytest.mark.parametrize("depth", [8, 16])
def test_colour_with_a_transparent_colour(depth: int) -> None:
    pixels = np.array([[10, 20, 30], [40, 50, 60]]) * (257 if depth == 16 else 1)
    header = struct.pack(">IIBBBBB", 2, 1, depth, 2, 0, 0, 0)
    body = b"\0" + pixels.astype(">u2" if depth == 16 else "u1").tobytes()
    clear = struct.pack(">HHH", *pixels[1].tolist())
    data = chunked(header, (b"tRNS", clear), (b"IDAT", zlib.compress(body)))
    assert decode_image(data)[0].tolist() == [[10, 20, 30], [255] * 3]


@pytest.mark.parametrize("interlaced", [0, 1])
@pytest.mark.parametrize("size", [(5, 8), (8, 7), (1, 9)])
def test_rows_that_are_missing_are_an_error(interlaced: int, size: tuple[int, int]) -> None:
    width, height = size
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, interlaced)
    passes = PNG_PASSES if interlaced else ((0, 0, 1, 1),)
    lines = [
        b"\0" + bytes(value % 256 for value in range(1, 1 + -(-(width - left) // across)))
        for left, top, across, down in passes
        if width > left
        for _ in range(top, height, down)
    ]
    assert decode_image(png(header, zlib.compress(b"".join(lines)))).shape == (height, width, 3)
    for kept in range(len(lines)):
        with pytest.raises(DataError, match="damaged PNG"):
            decode_image(png(header, zlib.compress(b"".join(lines[:kept]))))


def test_black_rows_that_are_there_are_none_missing() -> None:
    assert (decode_image(encoded(np.zeros((9, 5, 3), np.uint8), "PNG")) == 0).all()
    assert (decode_image(encoded(np.zeros((9, 5, 4), np.uint8), "PNG")) == 255).all()


@pytest.mark.parametrize("palette", [(), ((b"PLTE", b""),)])
def test_no_palette_is_an_error(palette: tuple[tuple[bytes, bytes], ...]) -> None:
    header = struct.pack(">IIBBBBB", 2, 1, 8, 3, 0, 0, 0)
    with pytest.raises(DataError, match="damaged PNG"):
        decode_image(chunked(header, *palette, (b"IDAT", zlib.compress(b"\0\1\1"))))
