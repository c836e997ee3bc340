"""JPEG orientation: what Pillow writes is read, and no header, however broken, is more than "upright"."""

import io
import struct

import numpy as np
import pytest
from PIL import Image, ImageOps

from data_pipeline.decode import decode_image
from data_pipeline.exif import APP1, EXIF, ORIENTATION, XMP, jpeg_orientation

SHORT = 3


def jpeg(orientation: int | None = None) -> bytes:
    exif = Image.Exif()
    exif[0x010F] = "a camera maker, so that the orientation is not the first entry"
    if orientation is not None:
        exif[ORIENTATION] = orientation
    file = io.BytesIO()
    Image.new("RGB", (9, 7), "red").save(file, "JPEG", exif=exif)
    return file.getvalue()


def tiff(orientation: int, endian: str, kind: int = SHORT, directory: int = 8, count: int = 1) -> bytes:
    order = b"II" if endian == "<" else b"MM"
    header = order + struct.pack(endian + "HI", 42, directory)
    return (
        header.ljust(directory, b"\0")
        + struct.pack(endian + "HHHI", 1, ORIENTATION, kind, count)
        + struct.pack(
            endian + ("I" if kind in (4, 9) else "HH"), *((orientation,) if kind in (4, 9) else (orientation, 0))
        )
    )


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


def by_pillow(data: bytes) -> np.ndarray:
    return np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))


WRITTEN = {
    "long": EXIF + tiff(6, "<", kind=4),
    "long, big end first": EXIF + tiff(8, ">", kind=4),
    "signed": EXIF + tiff(5, ">", kind=8),
    "signed long": EXIF + tiff(7, "<", kind=9),
    "byte": EXIF + tiff(6, "<", kind=1),
    "two": EXIF + tiff(6, "<", count=2),
    "xmp": XMP + b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>',
    "xmp element": XMP + b"<tiff:Orientation>3</tiff:Orientation>",
    "xmp out of range": XMP + b'tiff:Orientation="9"',
}


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("where", WRITTEN)
@pytest.mark.parametrize("exif", [None, 1, 4])
def test_other_spellings_as_pillow_takes_them(where: str, exif: int | None) -> None:
    """Alone, and after an EXIF segment with an orientation of its own."""
    first = jpeg(exif) if exif else jpeg()
    if exif is None:  # no EXIF segment at all
        file = io.BytesIO()
        Image.effect_mandelbrot((9, 7), (-2, -1, 1, 1), 20).convert("RGB").save(file, "JPEG")
        first = file.getvalue()
    start = first.index(b"\xff\xdb")
    body = WRITTEN[where]
    data = first[:start] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + first[start:]
    assert decode_image(data).shape == by_pillow(data).shape
    assert (decode_image(data) == by_pillow(data)).all()


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
        jpeg_with((APP1, b"Exif\0\0" + tiff(6, "<", kind=1))),  # a byte, which Pillow takes for no number
        jpeg_with((APP1, b"Exif\0\0" + tiff(6, "<", count=0))),
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
