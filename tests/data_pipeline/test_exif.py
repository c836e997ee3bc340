"""JPEG orientation: what Pillow writes is read, and no header, however broken, is more than "upright"."""

import io
import struct

import numpy as np
import pytest
from PIL import Image

from data_pipeline.exif import APP1, ORIENTATION, SHORT, jpeg_orientation


def jpeg(orientation: int | None = None) -> bytes:
    exif = Image.Exif()
    exif[0x010F] = "a camera maker, so that the orientation is not the first entry"
    if orientation is not None:
        exif[ORIENTATION] = orientation
    file = io.BytesIO()
    Image.new("RGB", (9, 7), "red").save(file, "JPEG", exif=exif)
    return file.getvalue()


def tiff(orientation: int, endian: str, kind: int = SHORT, directory: int = 8) -> bytes:
    order = b"II" if endian == "<" else b"MM"
    header = order + struct.pack(endian + "HI", 42, directory)
    return header.ljust(directory, b"\0") + struct.pack(endian + "HHHIHH", 1, ORIENTATION, kind, 1, orientation, 0)


def jpeg_with(*segments: tuple[int, bytes], fill: bytes = b"") -> bytes:
    parts = [fill + b"\xff" + bytes([marker]) + struct.pack(">H", len(body) + 2) + body for marker, body in segments]
    return b"\xff\xd8" + b"".join(parts) + b"\xff\xda\0\2"


@pytest.mark.parametrize("orientation", range(1, 9))
def test_what_pillow_wrote(orientation: int) -> None:
    assert jpeg_orientation(jpeg(orientation)) == orientation


@pytest.mark.parametrize("endian", ["<", ">"])
@pytest.mark.parametrize("fill", [b"", b"\xff", b"\xff\xff\xff"])
def test_either_byte_order_after_other_segments(endian: str, fill: bytes) -> None:
    xmp = (APP1, b"http://ns.adobe.com/xap/1.0/\0<x/>")
    exif = (APP1, b"Exif\0\0" + tiff(6, endian, directory=23))
    assert jpeg_orientation(jpeg_with((0xE0, b"JFIF\0"), xmp, exif, fill=fill)) == 6


@pytest.mark.parametrize(
    "data",
    [
        jpeg(),
        jpeg(0),
        jpeg(9),
        b"",
        b"\xff\xd8",
        b"\xff\xd8\xff",
        b"\xff\xd8" + b"\xff" * 50,
        jpeg_with((APP1, b"Exif\0\0")),
        jpeg_with((APP1, b"Exif\0\0" + b"XX" + tiff(6, "<")[2:])),
        jpeg_with((APP1, b"Exif\0\0" + tiff(6, "<", kind=4))),
        jpeg_with((APP1, b"Exif\0\0" + tiff(6, "<")[:-6])),
        jpeg_with((APP1, b"Exif\0\0" + b"II*\0" + struct.pack("<I", 0xFFFFFFFF))),
        jpeg_with((0xDA, b""), (APP1, b"Exif\0\0" + tiff(6, "<"))),  # after the start of the pixels
    ],
)
def test_upright_where_nothing_can_be_read(data: bytes) -> None:
    assert jpeg_orientation(data) == 1


def test_no_damage_raises() -> None:
    whole = jpeg(6)
    generator = np.random.default_rng(3)
    for length in range(len(whole)):
        assert 1 <= jpeg_orientation(whole[:length]) <= 8
    for _ in range(500):
        data = bytearray(whole)
        for place in generator.integers(2, 120, size=3):
            data[place] = generator.integers(256)
        assert 1 <= jpeg_orientation(bytes(data)) <= 8
