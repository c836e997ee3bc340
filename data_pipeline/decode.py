"""Bytes to pixels: JPEG, PNG and WebP to uint8 [height, width, 3] RGB.

Design choices:
- The bytes say what they are; the field's name is not asked.
- Size comes from the header before a pixel is decoded, so a decompression bomb costs nothing.
- JPEG through libjpeg-turbo (`simplejpeg`), strictly: a file that ends early is an error, not a half-grey image. What
  it refuses though no pixel is lost (stray bytes, an odd sampling, a bad profile, no end mark) is decoded by Pillow
  instead, once it is certain that none is (jpeg_loss.py). So are print colours, of which Pillow makes RGB.
- PNG and WebP through Pillow. PNGs with too few rows or without their palette are errors there, not black.
- Transparent images lie on white. The orientation in EXIF or XMP is applied: the caption was written by someone who
  saw the image upright.
- Whatever is wrong with the bytes is a DataError, whatever a library raises for it.
"""

from __future__ import annotations

import io
import math
import struct
import warnings
import zlib
from collections.abc import Iterator

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from data_pipeline.errors import DataError, first_bytes, first_line
from data_pipeline.exif import ORIENTATION, UPRIGHT, jpeg_orientation
from data_pipeline.jpeg_loss import LOST, lost_pixels

MAX_PIXELS = 64e6
PNG_PASSES = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
ON_ITS_SIDE = (5, 6, 7, 8)  # EXIF orientations in which width and height are to be exchanged

# EXIF orientation -> the image upright (Exif 2.32, tag 0x0112, "Orientation")
_UPRIGHT = {
    2: lambda image: image[:, ::-1],
    3: lambda image: image[::-1, ::-1],
    4: lambda image: image[::-1],
    5: lambda image: image.swapaxes(0, 1),
    6: lambda image: image.swapaxes(0, 1)[:, ::-1],
    7: lambda image: image[::-1, ::-1].swapaxes(0, 1),
    8: lambda image: image.swapaxes(0, 1)[::-1],
}


def decode_image(data: bytes, *, max_pixels: float = MAX_PIXELS) -> np.ndarray:
    """JPEG, PNG or WebP bytes -> contiguous uint8 [height, width, 3] RGB, upright.

    Raises DataError when the bytes are no such image, damaged, or of more than `max_pixels` pixels.
    """
    return decode_and_remark(data, max_pixels=max_pixels)[0]


def decode_and_remark(data: bytes, *, max_pixels: float = MAX_PIXELS) -> tuple[np.ndarray, str]:
    """As decode_image; also what is odd about a JPEG that only Pillow reads, "" when nothing is."""
    if data[:2] == b"\xff\xd8":
        return _decode_jpeg(data, max_pixels)
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return _decode_with_pillow(data, "PNG", max_pixels), ""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return _decode_with_pillow(data, "WEBP", max_pixels), ""
    raise DataError(f"not a JPEG, PNG or WebP image ({len(data)} bytes that start with {first_bytes(data)})")


def image_size(data: bytes) -> tuple[int, int] | None:
    """(width, height) of an image, upright, by its header; None when that cannot be read."""
    try:
        width, height, turned = _jpeg_shape(data) or _pillow_shape(data)
    except Exception:  # hostile bytes raise nearly anything in Pillow
        return None
    if width < 1 or height < 1:
        return None
    return (height, width) if turned else (width, height)


def image_aspect(data: bytes) -> float:
    """Width / height of an image, upright, by its header; nan when that cannot be read."""
    size = image_size(data)
    return math.nan if size is None else size[0] / size[1]


def _jpeg_shape(data: bytes) -> tuple[int, int, bool] | None:
    """(width, height, whether they are exchanged when upright); None when the strict decoder cannot tell."""
    if data[:2] != b"\xff\xd8":
        return None
    try:
        height, width, *_ = simplejpeg.decode_jpeg_header(data)
    except Exception:  # a KeyError for a sampling that it does not know
        return None
    return width, height, jpeg_orientation(data) in ON_ITS_SIDE


def _pillow_shape(data: bytes) -> tuple[int, int, bool]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = Image.open(io.BytesIO(data), formats=["JPEG", "PNG", "WEBP"])
        return image.width, image.height, _orientation(image) in ON_ITS_SIDE


def _decode_jpeg(data: bytes, max_pixels: float) -> tuple[np.ndarray, str]:
    printed = False
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
        _refuse_bomb(width, height, max_pixels)
        printed = colorspace in ("CMYK", "YCCK")
        image = simplejpeg.decode_jpeg(data, colorspace="CMYK" if printed else "RGB")
    except DataError:
        raise
    except Exception as error:  # a ValueError of libjpeg-turbo, or a KeyError for a sampling that it does not know
        told = str(error)
        if isinstance(error, ValueError) and LOST.search(told):
            raise DataError(f"damaged JPEG: {told}") from error
        try:
            image = _decode_with_pillow(data, "JPEG", max_pixels)
        except DataError:
            if "premature end" in told.lower():  # of which Pillow says how many bytes it has not used
                raise DataError(f"damaged JPEG: {told}") from error
            raise
        lost = lost_pixels(data)
        if lost:
            raise DataError(f"damaged JPEG: {lost}") from error
        if not isinstance(error, ValueError) or "subsampling" in told:
            return image, "an unusual chroma subsampling"
        return image, "it has no end mark" if told == "Premature end of JPEG file" else told
    if printed:
        return _decode_with_pillow(data, "JPEG", max_pixels), ""
    return _upright(image, jpeg_orientation(data)), ""


def _decode_with_pillow(data: bytes, kind: str, max_pixels: float) -> np.ndarray:
    try:
        with warnings.catch_warnings():
            # of odd EXIF, and of sizes, where our own limit speaks: a line per image that nobody can act on
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data), formats=[kind])
            _refuse_bomb(image.width, image.height, max_pixels)
            if kind == "PNG":
                _refuse_incomplete_png(data, image)
            return _upright(np.array(_as_rgb(image, data)), _orientation(image))
    except DataError:
        raise
    except UnidentifiedImageError as error:  # whose own text names an object in memory
        raise DataError(f"damaged {kind}: its header cannot be read") from error
    except Image.DecompressionBombError as error:  # Pillow's own limit, which it checks before we see the size
        raise DataError(f"refused before decoding, as a decompression bomb would be: {first_line(error)}") from error
    except Exception as error:  # hostile bytes raise nearly anything in Pillow: struct, zlib, Syntax, Index, ...
        raise DataError(f"damaged {kind}: {first_line(error)}") from error


def _upright(image: np.ndarray, orientation: int) -> np.ndarray:
    return np.ascontiguousarray(_UPRIGHT[orientation](image)) if orientation in _UPRIGHT else image


def _orientation(image: Image.Image) -> int:
    """Orientation in the EXIF or XMP of an image that is loaded; 1 where that is damaged: the pixels may be fine."""
    try:
        orientation = image.getexif().get(ORIENTATION, UPRIGHT)
        return orientation if orientation in _UPRIGHT else UPRIGHT
    except Exception:  # as above
        return UPRIGHT


def _as_rgb(image: Image.Image, data: bytes) -> Image.Image:
    """The image in RGB, on white where it is transparent. `data`: the file, whose header says what Pillow does not."""
    image.load()
    clear = image.info.get("transparency")
    if image.mode.startswith("I;16"):  # Pillow would clip 16 bits to 255 instead of scaling
        wide = np.asarray(image).astype(np.uint16)
        grey = (wide >> 8).astype(np.uint8)
        return Image.fromarray(grey if clear is None else np.where(wide == clear, np.uint8(255), grey)).convert("RGB")
    if image.format == "PNG" and clear is not None:
        depth = data[24]
        if image.mode == "L" and depth < 8:  # Pillow scales the pixels, but not the transparent one
            image.info["transparency"] = clear * 255 // ((1 << depth) - 1)
        elif image.mode == "RGB" and depth == 16:  # of which Pillow keeps the upper half
            image.info["transparency"] = tuple(channel >> 8 for channel in clear)
    if image.mode in ("RGBA", "LA", "PA") or clear is not None:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def _refuse_incomplete_png(data: bytes, image: Image.Image) -> None:
    """DataError for a PNG that Pillow would give black pixels where there are none: too few rows, or no palette."""
    if image.mode == "P" and not (image.palette and image.palette.palette):
        raise DataError("damaged PNG: its pixels are numbers of a palette, and there is none")
    image.load()
    last = np.asarray(image)[-2:]
    if last.any(axis=tuple(range(1, last.ndim))).all():
        return  # rows that are missing are zero, the last ones first: of an interlaced image the last but one, too
    width, height, depth, colour, _, _, interlaced = struct.unpack_from(">IIBBBBB", data, 16)
    bits = depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    wanted = 0
    for left, top, across, down in PNG_PASSES if interlaced else ((0, 0, 1, 1),):
        columns, rows = -(-(width - left) // across), -(-(height - top) // down)
        wanted += rows * (1 + (columns * bits + 7) // 8) if columns > 0 and rows > 0 else 0
    unpacking, found = zlib.decompressobj(), 0
    for part in _png_pixels(data):
        while part and found < wanted:
            found += len(unpacking.decompress(part, 1 << 20))
            part = unpacking.unconsumed_tail
    found += len(unpacking.flush()) if found < wanted else 0
    if found < wanted:
        raise DataError(f"damaged PNG: its rows end early, after {found} of {wanted} bytes")


def _png_pixels(data: bytes) -> Iterator[bytes]:
    """The bodies of the IDAT chunks of a PNG."""
    position = 8
    while position + 8 <= len(data):
        length, name = struct.unpack_from(">I4s", data, position)
        if name == b"IDAT":
            yield data[position + 8 : position + 8 + length]
        position += length + 12


def _refuse_bomb(width: int, height: int, max_pixels: float) -> None:
    if width * height > max_pixels:
        raise DataError(
            f"an image of {width} x {height} pixels, over the limit of {max_pixels:.0f}: "
            "refused before decoding, as a decompression bomb would be"
        )
