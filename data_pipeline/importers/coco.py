"""COCO captions (Chen et al. 2015, "Microsoft COCO Captions"): photographs with five captions each.

Source, as cocodataset.org has it (2014 or 2017; of both, the newest whose images are there):
  annotations/captions_train2017.json, captions_val2017.json    {"images", "annotations", "licenses", "info"}
  train2017/, val2017/                                          the images, here or in images/
Format: https://cocodataset.org/#format-data, "Image Captioning".

Design choices:
- val becomes OUT/test: the captions of COCO's own test images are not published.
- All captions of an image are kept, in the order of their annotations; the first is the one to evaluate with.
- The licence of each image is the name that the file gives for it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Unpack

from data_pipeline.importers.annotations import need, need_id, objects, read_json
from data_pipeline.importers.gather import Gathered, Options, find_annotations, run_import
from data_pipeline.importers.image import read_image
from data_pipeline.importers.split import Imported

PARTS = {"train": "train", "val": "test"}
FILES = re.compile(r"captions_(train|val)(\d{4})\.json")


def import_coco(source: Path, out: Path, **options: Unpack[Options]) -> Imported:
    """Write the captioned images of `source` into out/train and out/test.

    `options` and errors: see `gather.Options` and `gather.run_import`.
    """
    return run_import("coco", source, out, options, gather_coco, read_image)


def gather_coco(source: Path, found: Gathered) -> None:
    """Every image with captions, of train and of val."""
    files = find_annotations(source, ["captions_*.json"], ["annotations", "."], "annotations/captions_train2017.json")
    root = source.parent.parent if source.is_file() else source
    for path, part, year in _newest(files, root, found):
        found.source = f"COCO {year} captions"
        folder = _images(root, part + year, found)
        tree = read_json(path)
        licences = _licences(tree, path, found)
        captions: dict[str | int, list[str]] = {}
        for where, annotation in objects(tree, "annotations", path, found.skip):
            with found.skipping():
                number, caption = need_id(annotation, "image_id", where), need(annotation, "caption", str, where)
                captions.setdefault(number, []).append(caption)
        images = list(_images_listed(tree, path, found))
        names: dict[str | int, dict[str, None]] = {}
        for number, name, _ in images:
            names.setdefault(number, {})[name] = None
        taken: set[str | int] = set()
        for number, name, licence in images:
            called = f"{part}{year}/{name}"
            file = found.file(name, folder, called)
            if file is None:
                continue
            if len(names[number]) > 1:
                others = ", ".join(other for other in names[number] if other != name)
                found.skip(called, f"has the id of {others}, {number}: it is not clear whose captions are meant")
            elif number in taken:
                found.skip(called, f"is listed again, with the same id, {number}")
            else:
                texts = captions.get(number, [])
                told = licences.get(licence) if licence is not None else None
                found.add(called, file, texts, id=number, part=PARTS[part], licence=told)
            taken.add(number)
        for number in (number for number in captions if number not in names):
            found.skip(f"{part}{year} image {number}", "has captions, but the file does not list it among its images")


def _images_listed(
    tree: dict[str, Any], path: Path, found: Gathered
) -> Iterator[tuple[str | int, str, str | int | None]]:
    """(id, file name, number of the licence or None) of each image that a COCO file lists."""
    for where, image in objects(tree, "images", path, found.skip):
        with found.skipping():
            number, name = need_id(image, "id", where), need(image, "file_name", str, where)
            licence = None if image.get("license") is None else need_id(image, "license", where)
            yield number, name, licence


def _licences(tree: dict[str, Any], path: Path, found: Gathered) -> dict[str | int, str]:
    """The names of the licences that a COCO file lists, by their numbers there."""
    licences: dict[str | int, str] = {}
    if isinstance(tree.get("licenses"), list):
        for where, licence in objects(tree, "licenses", path, found.skip):
            with found.skipping():
                licences[need_id(licence, "id", where)] = need(licence, "name", str, where)
    return licences


def _images(root: Path, name: str, found: Gathered) -> Path:
    return found.folder(root / name, root / "images" / name, root / "images")


def _newest(files: Iterable[Path], root: Path, found: Gathered) -> list[tuple[Path, str, str]]:
    """(file, "train" or "val", year) of one year: the newest with images, or else the newest."""
    known = [(path, match[1], match[2]) for path in files if (match := FILES.fullmatch(path.name))]
    if not known:
        raise FileNotFoundError(f"none of {', '.join(path.name for path in files)} is called captions_train2017.json")
    with_images = [
        year
        for _, part, year in known
        if (folder := _images(root, part + year, found)).name == part + year and folder.is_dir()
    ]
    year = max(with_images or [year for *_, year in known])
    return [each for each in known if each[2] == year]
