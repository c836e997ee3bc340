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
from collections.abc import Iterable
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
        licences = licences_of(tree, path)
        captions: dict[str | int, list[str]] = {}
        for where, annotation in objects(tree, "annotations", path):
            captions.setdefault(need_id(annotation, "image_id", where), []).append(
                need(annotation, "caption", str, where)
            )
        for where, image in objects(tree, "images", path):
            number = need_id(image, "id", where)
            name = need(image, "file_name", str, where)
            texts = captions.pop(number, [])
            file = found.file(name, folder, f"{part}{year}/{name}")
            if file is not None:
                licence = licences.get(need_id(image, "license", where)) if "license" in image else None
                found.add(f"{part}{year}/{name}", file, texts, id=number, part=PARTS[part], licence=licence)
        for number in captions:
            found.skip(f"{part}{year} image {number}", "has captions, but the file does not list it among its images")


def licences_of(tree: dict[str, Any], path: Path) -> dict[str | int, str]:
    """The names of the licences that a COCO file lists, by their numbers there."""
    if not isinstance(tree.get("licenses"), list):
        return {}
    listed = objects(tree, "licenses", path)
    return {need_id(licence, "id", where): need(licence, "name", str, where) for where, licence in listed}


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
