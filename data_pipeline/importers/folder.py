"""Images in a folder, nested as you like, with captions beside them, in a table, or in one folder a class.

Design choices:
- Captions are read in every form that people keep them in: see caption_files.py. Where some images have captions, one
  without is skipped, and told: a made-up caption among real ones would teach nonsense.
- Only where there are no caption files at all, and images lie in two or more folders with names of their own, captions
  are made from those names: `SOURCE/sea_lion/1.jpg` is "a photo of a sea lion", `SOURCE/big/cat/1.jpg` has the class
  "big cat". This is said. "images", "train", dates and sizes are no names of classes. Text files of other kinds that
  are called as images are, and a captions.xlsx, are refused there: they may hold the real captions.
- Folders train and test (or val) beside each other are a published split, and kept as such unless a share is given.
- Without one, test has no caption of train; of each class, some images are held out and the others trained on.
- An image is what its bytes are: a JPEG called .HEIC is read. Other kinds of images are told.
- Links are followed; every folder is read once, under its own name where it has one in SOURCE, so loops end.
- Hidden files and folders are left alone.
"""

from __future__ import annotations

import os
import re
from itertools import chain
from pathlib import Path

from data_pipeline.errors import DataError
from data_pipeline.importers.annotations import lines_of
from data_pipeline.importers.caption_files import TABLES, TEXTS, Captions, read_captions
from data_pipeline.importers.captions import NO_CAPTION, usable
from data_pipeline.importers.gather import part_named
from data_pipeline.importers.image import read_image
from data_pipeline.importers.leftovers import (
    IMAGE_NAMES,
    extension_of,
    is_readable_image,
    looks_like_image,
    unread_reason,
)
from data_pipeline.importers.split import Candidate, Imported, Provenance, Request, refuse_existing, write_split
from data_pipeline.sample import Skipped
from data_pipeline.shards import Progress

CLASS_CAPTIONS = ("a photo of a {}", "a picture of a {}", "an image of a {}")
LOOKED_FOR_CAPTIONS = (
    "a .txt, .caption or .json of the same name beside each, a table (metadata.jsonl, captions.csv, ...)"
)
LOOKED_FOR = f"images ({', '.join('.' + extension for extension in IMAGE_NAMES)}) with captions: "
LOOKED_FOR += f"{LOOKED_FOR_CAPTIONS}, or one folder a class"
CAPTION_TABLE = re.compile(  # "captions" says it whatever the file is; "metadata" is said of other things, too
    r"captions?\.\w+|(metadata|descriptions?)\.(xlsx?|xlsm|ods|numbers|arrow|feather|avro|orc)", re.IGNORECASE
)
NOTES = re.compile(r"md5|sha\d+|crc\w*|sum|log|ini|cfg|conf|toml|ya?ml|url|time|pp3|bak", re.IGNORECASE)  # extensions
WORD = re.compile(r"(?<!\w)[^\W\d_]+(?!\w)")
NO_PROSE = re.compile(r"[=<>{}\[\]\\|]|^\w+:")
TEXT_READ = 1024  # bytes of a file, to tell whether it holds text
NO_CLASS = re.compile(
    r"(train|val|test|eval|dev|valid|validation|training|testing|evaluation|images?|imgs?|pics?|pictures?|photos?|jpe?gs?|"
    r"jpegimages|pngs?|webp|data|datasets?|raw|files?|media|inputs?|outputs?|all|misc|export|downloads?|untitled|"
    r"new folder|samples?|dcim)[\s_-]*\d*|\d+\s*x\s*\d+|[\d\W_]{3,}",
    re.IGNORECASE,
)  # names of folders that say nothing about what is in an image
NOTES_CLASSES = 8  # at most so many are named in a note


def import_folder(
    source: Path,
    out: Path,
    *,
    licence: str | None = None,
    test_share: float | None = None,
    seed: int = 0,
    processes: int | None = None,
    on: str | None = None,
    progress: Progress | None = None,
) -> Imported:
    """Write the captioned images below the folder `source` into out/train and out/test, and out/val where it has one.

    `licence` is noted with each sample. `test_share`: None keeps the split that the folder has, or is 0.1.
    Raises FileNotFoundError when there is no such folder or no image in it, ValueError when `out` holds a data set or
    the captions cannot be split, DataError when no image has a caption or can be read, or it is not clear which.
    """
    request = Request.of("folder", source, licence=licence, test_share=test_share, seed=seed)
    refuse_existing(out, request)
    if not source.is_dir():
        raise FileNotFoundError(f"there is no folder {source}: give one with {LOOKED_FOR}")
    skipped: list[Skipped] = []
    images, files, others = _look(source, skipped)
    if not images and not skipped:
        raise FileNotFoundError(f"no image in {source}: looked there for {LOOKED_FOR}")
    captions = read_captions(
        source, [*images, *(skip.source for skip in skipped)], files
    )  # a .txt of a .heic is no orphan
    skipped += captions.left
    parts = _published(images) | captions.parts
    candidates, notes = _candidates(source, images, others, captions, parts, skipped, licence)
    if not candidates:
        raise _nothing(source, captions, skipped)
    if parts and test_share is None:
        sets = ", ".join(name for name in ("train", "val", "test") if name in parts.values())
        notes.append(f"{source} has a split of its own ({sets}), which is kept: --test-share draws another")
    return write_split(
        out,
        candidates,
        read_image,
        skipped=skipped,
        notes=notes,
        test_share=test_share,
        seed=seed,
        request=request,
        processes=processes,
        on=on,
        reads=[source],
        progress=progress,
    )


def _candidates(
    source: Path,
    images: list[str],
    others: list[str],
    captions: Captions,
    parts: dict[str, str],
    skipped: list[Skipped],
    licence: str | None,
) -> tuple[list[Candidate], list[str]]:
    """(the samples to be, what the user should know); images without a caption go to `skipped`."""
    classes: dict[str, str] = {}
    if not captions.of and not captions.refused:
        classes = {image: named for image in images if (named := _class_of(image))}
    beside = _beside(images, others) if classes else {}
    if classes:
        _refuse_other_captions(source, beside, others)
        _refuse_one_class(source, classes)
    candidates = []
    for image in images:
        label = classes.get(image)
        texts = captions.of.get(image) or tuple(caption.format(label) for caption in CLASS_CAPTIONS if label)
        if not texts:
            skipped.append(Skipped(image, captions.reasons.get(image, _no_caption(captions))))
            continue
        provenance = Provenance(source.absolute().name, licence, image)
        metadata = {"label": label} if label else {}
        place = str(source / image)
        candidates.append(Candidate(image, texts, place, metadata, bool(label), provenance, parts.get(image)))
    notes = []
    if classes:
        labels = sorted(set(classes.values()))
        named = ", ".join(labels[:NOTES_CLASSES]) + (", ..." if len(labels) > NOTES_CLASSES else "")
        notes.append(
            f"there are no caption files: captions are made from folder names ({len(labels)} classes: {named})"
        )
        if beside:
            notes.append(f"what lies beside images as .{', .'.join(sorted(beside))} is not read")
    return candidates, notes


def _no_caption(captions: Captions) -> str:
    if captions.of or captions.refused:
        return f"{NO_CAPTION} (others here have)" if captions.of else NO_CAPTION
    return f"{NO_CAPTION}, and its folder's name is no class"


def _beside(images: list[str], others: list[str]) -> dict[str, str]:
    """The kinds of files that are called as images are (K.cap or K.jpg.cap of K.jpg): extension -> the first of it."""
    names = {name for image in images for name in (image, os.path.splitext(image)[0])}
    found: dict[str, str] = {}
    for other in others:
        if os.path.splitext(other)[0] in names:
            found.setdefault(extension_of(other), other)
    return found


def _refuse_other_captions(source: Path, beside: dict[str, str], others: list[str]) -> None:
    """DataError when there may be captions in a file of a kind that is not read: made-up ones would stand for them."""
    tables = (other for other in others if CAPTION_TABLE.fullmatch(os.path.basename(other)))
    texts = (other for other in beside.values() if _may_be_captions(source / other))
    found = next(chain(tables, texts), None)
    if found is not None:
        raise DataError(
            f"{source / found} may hold captions, and files of its kind are not read: give {LOOKED_FOR_CAPTIONS}, or "
            "move what holds no captions out of the folder; then they are made from folder names"
        )


def _may_be_captions(path: Path) -> bool:
    """Whether a file begins with some words, and not with markup, settings, numbers or a checksum."""
    if NOTES.fullmatch(extension_of(path.name)):
        return False
    try:
        with path.open("rb") as file:
            start = file.read(TEXT_READ)
    except OSError:
        return False
    if any(byte < 32 and byte not in b"\t\n\v\f\r" for byte in start):
        return False
    texts, _ = usable(lines_of(start.decode("utf-8-sig", "replace")))
    words = WORD.findall(texts[0]) if texts else []
    # some scripts have no blanks between words
    spoken = len(words) > 1 or any(len(word) > 3 and not word.isascii() for word in words)
    return spoken and not NO_PROSE.search(texts[0])


def _refuse_one_class(source: Path, classes: dict[str, str]) -> None:
    labels = set(classes.values())
    if len(labels) == 1:
        raise DataError(
            f"no image in {source} has a caption, and the only class folder is {labels.pop()!r}: captions made from "
            f"one name would all be the same, so give {LOOKED_FOR}"
        )


def _nothing(source: Path, captions: Captions, skipped: list[Skipped]) -> DataError:
    """Why there is no sample: the caption files that could not be used, or the first image without a caption."""
    if captions.refused:
        first = captions.refused[0]
        return DataError(
            f"no image in {source} gets a caption from the caption files there ({first.source}: {first.reason}); "
            "captions are made from folder names only where there are no such files"
        )
    first = skipped[0]
    return DataError(f"no image in {source} has a caption (the first, {first.source}: {first.reason}): {LOOKED_FOR}")


# --- what is there


def _look(source: Path, skipped: list[Skipped]) -> tuple[list[str], list[str], list[str]]:
    """(images, caption files, other files) by their paths below `source`, in order.

    Images of kinds that are not read go to `skipped`.
    """
    images: list[str] = []
    files: list[str] = []
    others: list[str] = []
    for folder, below in _folders(source, skipped):
        for name in sorted(name for name in os.listdir(folder) if not name.startswith(".")):
            path, called = folder / name, _join(below, name)
            if os.path.isdir(path):
                continue
            if looks_like_image(name):
                reason = _unread(path)
                if reason:
                    skipped.append(Skipped(called, reason))
                else:
                    images.append(called)
            elif os.path.isfile(path):
                (files if extension_of(name) in (*TEXTS, *TABLES) else others).append(called)
    return images, files, others


def _unread(path: Path) -> str:
    """Why something with the name of an image is not read; "" when it is."""
    if not os.path.isfile(path):
        return "is no file, or a link to none"
    if extension_of(path.name) in IMAGE_NAMES or is_readable_image(path):
        return ""
    return unread_reason(path.name)


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


# --- what folders are called


def _published(images: list[str]) -> dict[str, str]:
    """The set of each image that lies in train, val or test, where train and another of them are beside each other."""
    beside: dict[str, set[str]] = {}  # folder -> sets that folders in it are called after
    for folder in {_parent(image) for image in images}:
        names = folder.split("/")
        for depth, name in enumerate(names):
            part = part_named(name)
            if part:
                beside.setdefault("/".join(names[:depth]), set()).add(part)
    splits = {folder for folder, parts in beside.items() if "train" in parts and len(parts) > 1}
    found = {}
    for image in images:
        names = _parent(image).split("/")
        for depth, name in enumerate(names):
            part = part_named(name)
            if part and "/".join(names[:depth]) in splits:
                found[image] = part
                break
    return found


def _class_of(image: str) -> str:
    """The path of an image's folder in words, without what says nothing ("images", "train"); "" when none is left."""
    names = [name for name in _parent(image).split("/") if name]
    words = [
        " ".join(name.replace("_", " ").replace("-", " ").split()) or name for name in names if not _says_nothing(name)
    ]
    return " ".join(words)


def _says_nothing(name: str) -> bool:
    return bool(NO_CLASS.fullmatch(name.strip()))


def _parent(image: str) -> str:
    return image.rpartition("/")[0]


def _join(below: str, name: str) -> str:
    return f"{below}/{name}" if below else name
