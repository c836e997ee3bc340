"""Bytes to pixels: JPEG, PNG and WebP to uint8 [height, width, 3] RGB.

Design choices:
- The bytes say what they are; the field's name is not asked.
- Size comes from the header before a pixel is decoded, so a decompression bomb costs nothing.
- JPEG through libjpeg-turbo (`simplejpeg`), strictly: a file that ends early is an error, not a half-grey image.
- Transparent images lie on white. EXIF orientation is applied: the caption was written by someone who saw it upright.
- Whatever is wrong with the bytes is a DataError.
"""

from __future__ import annotations

import io
import math
import warnings

import numpy as np
import simplejpeg
from PIL import Image, ImageOps

from data_pipeline.errors import DataError
from data_pipeline.exif import ORIENTATION, jpeg_orientation

MAX_PIXELS = 64e6
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
    if data[:2] == b"\xff\xd8":
        return _decode_jpeg(data, max_pixels)
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return _decode_with_pillow(data, "PNG", max_pixels)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return _decode_with_pillow(data, "WEBP", max_pixels)
    raise DataError(f"not a JPEG, PNG or WebP image ({len(data)} bytes that start with {data[:8]!r})")


def image_aspect(data: bytes) -> float:
    """Width / height of an image, upright, by its header; nan when that cannot be read."""
    try:
        if data[:2] == b"\xff\xd8":
            height, width, *_ = simplejpeg.decode_jpeg_header(data)
            turned = jpeg_orientation(data) in ON_ITS_SIDE
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                image = Image.open(io.BytesIO(data), formats=["PNG", "WEBP"])
                width, height = image.size
                turned = image.getexif().get(ORIENTATION) in ON_ITS_SIDE
    except Exception:  # hostile bytes raise nearly anything in Pillow
        return math.nan
    return height / width if turned else width / height


def _decode_jpeg(data: bytes, max_pixels: float) -> np.ndarray:
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
        _refuse_bomb(width, height, max_pixels)
        if colorspace in ("CMYK", "YCCK"):  # print colours, which libjpeg-turbo does not turn into RGB
            return _decode_with_pillow(data, "JPEG", max_pixels)
        image = simplejpeg.decode_jpeg(data, colorspace="RGB")
    except DataError:
        raise
    except ValueError as error:
        raise DataError(f"damaged JPEG: {error}") from error
    orientation = jpeg_orientation(data)
    return np.ascontiguousarray(_UPRIGHT[orientation](image)) if orientation in _UPRIGHT else image


def _decode_with_pillow(data: bytes, kind: str, max_pixels: float) -> np.ndarray:
    try:
        with warnings.catch_warnings():
            # of odd EXIF, and of sizes, where our own limit speaks: a line per image that nobody can act on
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data), formats=[kind])
            _refuse_bomb(image.width, image.height, max_pixels)
            return np.array(_as_rgb(ImageOps.exif_transpose(image)))
    except DataError:
        raise
    except Image.DecompressionBombError as error:  # Pillow's own limit, which it checks before we see the size
        raise DataError(f"refused before decoding, as a decompression bomb would be: {error}") from error
    except Exception as error:  # hostile bytes raise nearly anything in Pillow: struct, zlib, Syntax, Index, ...
        raise DataError(f"damaged {kind}: {error}") from error


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):  # Pillow would clip 16 bits to 255 instead of scaling
        image = Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def _refuse_bomb(width: int, height: int, max_pixels: float) -> None:
    if width * height > max_pixels:
        raise DataError(
            f"an image of {width} x {height} pixels, over the limit of {max_pixels:.0f}: "
            "refused before decoding, as a decompression bomb would be"
        )
