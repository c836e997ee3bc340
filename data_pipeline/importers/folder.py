"""Images in a folder, nested as you like, with a .txt beside each or in one folder a class.

Design choices:
- Per image: the .txt of the same name (one caption a line, blank lines aside) decides. Where there is none, the path of
  its folder below SOURCE is the class: `SOURCE/sea_lion/1.jpg` is "a photo of a sea lion", `SOURCE/big/cat/1.jpg` has
  the class "big cat". An image in SOURCE itself without a .txt is skipped, and so is one whose .txt is empty: somebody
  meant to say something.
- Test has no caption of train, but for class folders: of a class, some images are held out and the others trained on.
- Links are followed; every folder is read once, under its own name where it has one in SOURCE, so loops end.
- Hidden files and folders are left alone.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from data_pipeline.errors import DataError
from data_pipeline.importers.image import read_image
from data_pipeline.importers.split import (
    TEST_SHARE,
    Candidate,
    Imported,
    Provenance,
    Request,
    refuse_existing,
    write_split,
)
from data_pipeline.sample import IMAGE_EXTENSIONS, Skipped
from data_pipeline.shards import Progress

CLASS_CAPTIONS = ("a photo of a {}", "a picture of a {}", "an image of a {}")
LOOKED_FOR = f"images ({', '.join('.' + extension for extension in IMAGE_EXTENSIONS)}) with a .txt of the same name "
LOOKED_FOR += "beside each, or in one folder a class"


def import_folder(
    source: Path,
    out: Path,
    *,
    licence: str | None = None,
    test_share: float = TEST_SHARE,
    seed: int = 0,
    processes: int | None = None,
    on: str | None = None,
    progress: Progress | None = None,
) -> Imported:
    """Write the captioned images below the folder `source` into out/train and out/test.

    `licence` is noted with each sample.
    Raises FileNotFoundError when there is no such folder or no image in it, ValueError when `out` holds a data set or
    the captions cannot be split, DataError when no image has a caption or can be read.
    """
    request = Request.of("folder", source, licence=licence, test_share=test_share, seed=seed)
    refuse_existing(out, request)
    if not source.is_dir():
        raise FileNotFoundError(f"there is no folder {source}: give one with {LOOKED_FOR}")
    candidates: list[Candidate] = []
    skipped: list[Skipped] = []
    for folder, below in _folders(source, skipped):
        _take_folder(folder, below, candidates, skipped)
    origin = source.absolute().name
    candidates = [replace(each, provenance=Provenance(origin, licence, each.name)) for each in candidates]
    if not candidates and not skipped:
        raise FileNotFoundError(f"no image in {source}: looked there for {LOOKED_FOR}")
    if not candidates:
        first = skipped[0]
        raise DataError(f"no image in {source} has a caption (the first, {first.source}: {first.reason}): {LOOKED_FOR}")
    return write_split(
        out,
        candidates,
        read_image,
        skipped=skipped,
        test_share=test_share,
        seed=seed,
        request=request,
        processes=processes,
        on=on,
        reads=[source],
        progress=progress,
    )


def _folders(source: Path, skipped: list[Skipped]) -> list[tuple[Path, str]]:
    """(folder, its path below `source`) of every folder once, in order of path; real ones before links to them."""
    found: list[tuple[Path, str]] = []
    seen: set[tuple[int, int]] = set()
    real = [(source, "")]
    links: list[tuple[Path, str]] = []
    while real or links:
        folder, below = real.pop() if real else links.pop(0)
        status = folder.stat()
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        try:
            inside = sorted(name for name in os.listdir(folder) if not name.startswith("."))
        except OSError as error:
            skipped.append(Skipped(below, f"a folder that cannot be read: {error.strerror}"))
            continue
        found.append((folder, below))
        for name in inside:
            if os.path.isdir(folder / name):
                (links if os.path.islink(folder / name) else real).append((folder / name, _join(below, name)))
    return sorted(found, key=lambda folder: folder[1])


def _take_folder(folder: Path, below: str, candidates: list[Candidate], skipped: list[Skipped]) -> None:
    """Add the images directly in `folder` to the candidates, or to what is skipped."""
    names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    texts = {Path(name).stem: name for name in names if name.lower().endswith(".txt")}
    for name in names:
        path = folder / name
        if path.suffix.lower().lstrip(".") not in IMAGE_EXTENSIONS or os.path.isdir(path):
            continue
        captions: tuple[str, ...] = ()
        reason, metadata = "", {}
        if not os.path.isfile(path):
            reason = "is no file, or a link to none"
        elif path.stem in texts:
            captions, reason = _read_captions(folder / texts[path.stem])
        elif below:
            label = _class_name(below)
            captions, metadata = tuple(caption.format(label) for caption in CLASS_CAPTIONS), {"label": label}
        else:
            reason = "has no .txt beside it and is in no class folder"
        if captions:
            by_class = "label" in metadata
            candidates.append(Candidate(_join(below, name), captions, str(path), metadata, by_class))
        else:
            skipped.append(Skipped(_join(below, name), reason))


def _read_captions(path: Path) -> tuple[tuple[str, ...], str]:
    """(captions, "") of a .txt, or ((), why there are none)."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        return (), "its .txt is not UTF-8"
    except OSError as error:
        return (), f"its .txt cannot be read: {error.strerror}"
    captions = tuple(dict.fromkeys(line.strip() for line in lines if line.strip()))
    return captions, "" if captions else "its .txt holds no caption"


def _class_name(below: str) -> str:
    """A folder's path below the source, in words; as it is when it has none ("_")."""
    return " ".join(below.replace("_", " ").replace("-", " ").replace("/", " ").split()) or below


def _join(below: str, name: str) -> str:
    return f"{below}/{name}" if below else name
