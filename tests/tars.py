"""Small tars and pictures for tests: `from tars import tar_of, picture`."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable, Mapping

import numpy as np
from PIL import Image

BLOCK = 512


def tar_of(
    files: Mapping[str, bytes] | Iterable[tuple[str, bytes] | tarfile.TarInfo], tar_format: int = tarfile.USTAR_FORMAT
) -> bytes:
    """A tar of (name, bytes) pairs or bare headers, written by Python's tarfile."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w", format=tar_format) as tar:
        for entry in files.items() if isinstance(files, Mapping) else files:
            if isinstance(entry, tarfile.TarInfo):
                tar.addfile(entry)
                continue
            name, data = entry
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return archive.getvalue()


def special(name: str, kind: bytes, linkname: str = "") -> tarfile.TarInfo:
    """The header of a link, device, folder or other special file."""
    info = tarfile.TarInfo(name)
    info.type = kind
    info.linkname = linkname
    return info


def with_checksum(header: bytes | bytearray) -> bytes:
    """A 512-byte tar header with its checksum made right."""
    header = bytearray(header)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def patched(archive: bytes, position: int, start: int, data: bytes) -> bytes:
    """The tar with `data` at byte `start` of the header at `position`, whose checksum is made right again."""
    header = bytearray(archive[position : position + BLOCK])
    header[start : start + len(data)] = data
    return archive[:position] + with_checksum(header) + archive[position + BLOCK :]


def picture(seed: int = 0, size: tuple[int, int] = (13, 7), kind: str = "PNG") -> bytes:
    """A small noisy picture, width x height, as the bytes of a file."""
    width, height = size
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()
