"""Name an image by its bytes, and refuse what a decoder would refuse, from the header alone.

Importers store the bytes as they are. A file that ends early still has its header; `weft data check` decodes it all.
"""

from __future__ import annotations

import io
import warnings
from pathlib import Path

from PIL import Image

from data_pipeline.decode import MAX_PIXELS
from data_pipeline.errors import DataError
from data_pipeline.importers.split import Candidate

FIELD_OF_FORMAT = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
TOO_LARGE = f"an image of more than {MAX_PIXELS:.0f} pixels"


def read_image(candidate: Candidate) -> dict[str, bytes]:
    """The bytes of the image file at `candidate.place`, named by what they are."""
    return image_field(Path(candidate.place).read_bytes())


def image_field(data: bytes) -> dict[str, bytes]:
    """{"jpg" | "png" | "webp": data}, whatever the file was called.

    Raises DataError when the header cannot be read, or promises more pixels than `decode_image` takes.
    """
    if not data:
        raise DataError("the image file is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # our own limit speaks below, and bytes are stored as they are
            image = Image.open(io.BytesIO(data), formats=["JPEG", "PNG", "WEBP"])
        width, height, kind = image.width, image.height, str(image.format)
    except Image.DecompressionBombError as error:  # twice Pillow's own limit
        raise DataError(TOO_LARGE) from error
    except Exception as error:  # hostile bytes raise nearly anything in Pillow: struct, zlib, Syntax, Index, ...
        raise DataError("not a JPEG, PNG or WebP image, or damaged") from error
    if width * height > MAX_PIXELS:
        raise DataError(TOO_LARGE)
    return {FIELD_OF_FORMAT[kind]: data}
