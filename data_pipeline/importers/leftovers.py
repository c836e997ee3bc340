"""What lies beside the images or sounds of a data set and does not become a sample: it is told, with the reason."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from data_pipeline.sample import Skipped

IMAGE_NAMES = ("jpg", "jpeg", "jpe", "jfif", "png", "webp")  # extensions of what is read
OTHER_IMAGES = (
    *("heic", "heif", "hif", "avif", "gif", "bmp", "dib", "tif", "tiff", "jp2", "j2k", "jpx", "jxl", "svg", "svgz"),
    *("ico", "icns", "psd", "tga", "exr", "hdr", "ppm", "pgm", "pbm", "pnm", "pcx", "eps", "apng", "jxr", "wdp"),
    *("raw", "dng", "cr2", "cr3", "nef", "arw", "orf", "rw2", "raf", "pef", "srw", "xcf"),
)
SOUND_NAMES = ("flac", "wav", "ogg", "mp3", "opus", "m4a", "aac", "wma", "aif", "aiff", "amr", "oga")
UNNAMED = "is not named in the annotations"


def extension_of(name: str) -> str:
    """The last extension of a file name, in lower case, without the dot."""
    return os.path.splitext(name)[1].lower().lstrip(".")


def looks_like_image(name: str) -> bool:
    """Whether a file name is that of an image of any kind."""
    return extension_of(name) in IMAGE_NAMES or extension_of(name) in OTHER_IMAGES


def is_readable_image(path: str | Path) -> bool:
    """Whether a file begins as a JPEG, PNG or WebP does, whatever it is called."""
    try:
        with open(path, "rb") as file:
            start = file.read(12)
    except OSError:
        return False
    return start[:3] == b"\xff\xd8\xff" or start[:8] == b"\x89PNG\r\n\x1a\n" or start[:4] + start[8:] == b"RIFFWEBP"


def unread_reason(name: str) -> str:
    """Why an image of a kind that is not read is left out."""
    return f"is a .{extension_of(name)} file: only JPEG, PNG and WebP are read, so convert it"


def unnamed(taken: Iterable[Path], root: Path, what: str = "image", reason: str = UNNAMED) -> list[Skipped]:
    """The images (or sounds) that lie beside those `taken` and are not among them, named relative to `root`."""
    beside: dict[str, set[str]] = {}
    for each in taken:
        folder, name = os.path.split(each)
        beside.setdefault(folder, set()).add(name)
    names = SOUND_NAMES if what == "sound" else (*IMAGE_NAMES, *OTHER_IMAGES)
    base = os.path.normpath(root.absolute())
    found = []
    for folder in sorted(beside):
        for name in sorted(set(os.listdir(folder)) - beside[folder]):
            path = os.path.join(folder, name)
            if not name.startswith(".") and extension_of(name) in names and not os.path.isdir(path):
                found.append(Skipped(Path(os.path.relpath(path, base)).as_posix(), reason))
    return found
