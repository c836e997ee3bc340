"""Flickr30K (Young et al. 2014, "From image descriptions to visual denotations"): photographs with five captions each.

Source, a folder with images (flickr30k-images/ or flickr30k_images/) and one of the three files that are about, the
first that is there; or that file itself:
  dataset_flickr30k.json    with the split of Karpathy and Fei-Fei 2015: train, val and test
  results_20130124.token    the original: "1000092795.jpg#0<TAB>Two young guys ..."
  results.csv               as Kaggle has it: "image_name| comment_number| comment"

Design choices:
- Only Karpathy's file has a split; with the others it is by caption.
- One row of Kaggle's file lacks its second separator. It is read all the same: a number stands between.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Unpack

from data_pipeline.importers.annotations import BadRowError, need, need_id, objects, read_json, read_lines
from data_pipeline.importers.gather import Gathered, Options, find_annotations, run_import
from data_pipeline.importers.image import read_image
from data_pipeline.importers.split import Imported

FILES = ("dataset_flickr30k.json", "results_20130124.token", "results.csv")
IMAGES = ("flickr30k-images", "flickr30k_images", "flickr30k_images/flickr30k_images", "images", "Images", ".")
PARTS = {"train": "train", "restval": "train", "val": "val", "test": "test"}
TOKEN_LINE = re.compile(r"(?P<image>.+)#(?P<number>\d+)\t(?P<caption>.*)")
CSV_LINE = re.compile(r"(?P<image>[^|]+?)\s*\|\s*(?P<number>\d+)(?:\s*\||\s)\s*(?P<caption>.*)")


def import_flickr30k(source: Path, out: Path, **options: Unpack[Options]) -> Imported:
    """Write the captioned images of `source` into out/train, out/test and, with Karpathy's split, out/val.

    `options` and errors: see `gather.Options` and `gather.run_import`.
    """
    return run_import("flickr30k", source, out, options, gather_flickr30k, read_image)


def gather_flickr30k(source: Path, found: Gathered) -> None:
    """Every image with captions."""
    found.source = "Flickr30K"
    files = find_annotations(source, FILES, [".", *IMAGES[:3], "annotations"], f"one of {', '.join(FILES)}")
    path = min(files, key=lambda file: FILES.index(file.name) if file.name in FILES else len(FILES))
    root = source.parent if source.is_file() else source
    folder = found.folder(*(root / name for name in IMAGES if any((root / name).glob("*.jpg"))), root)
    if path.suffix == ".json":
        _gather_karpathy(path, folder, found)
        return
    captions: dict[str, list[str]] = {}
    for image, caption in _captions(path, TOKEN_LINE if path.suffix == ".token" else CSV_LINE, found):
        captions.setdefault(image, []).append(caption)
    for image, texts in captions.items():
        file = found.file(image, folder)
        if file is not None:
            found.add(image, file, texts, id=image)


def _gather_karpathy(path: Path, folder: Path, found: Gathered) -> None:
    for where, image in objects(read_json(path), "images", path, found.skip):
        with found.skipping():
            name, split = need(image, "filename", str, where), need(image, "split", str, where)
            number = need_id(image, "imgid", where)
            if split not in PARTS:
                raise BadRowError(where, f"'split' is {split!r}, which is none of {', '.join(PARTS)}")
            captions = []
            for place, sentence in objects(image, "sentences", Path(where), found.skip):
                with found.skipping():
                    captions.append(need(sentence, "raw", str, place))
            file = found.file(name, folder)
            if file is not None:
                found.add(name, file, captions, id=number, part=PARTS[split])


def _captions(path: Path, pattern: re.Pattern[str], found: Gathered) -> Iterator[tuple[str, str]]:
    """(image, caption) of each line; a line of another form is left out, but for the header."""
    for number, line in enumerate(read_lines(path), start=1):
        match = pattern.fullmatch(line)
        if match:
            yield match["image"], match["caption"]
        elif line.strip() and not (number == 1 and line.startswith("image_name")):
            found.skip(f"{path.name} line {number}", "is not of the form image, number, caption")
