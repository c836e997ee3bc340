"""Write a data set again with its images resized once, so that training decodes no more pixels than it needs.

    weft data bake IN OUT --short-side 256 --quality 90

Design choices:
- An image is made what training would see of it (upright, RGB, transparency on white), its short side resized to
  `short_side` by antialiased bicubic, and stored as JPEG. One that is no larger is kept, byte for byte: nothing is ever
  enlarged.
- What it was is written into the sample's json: {"baked": {"name", "width", "height", "short_side", "quality"}}. All
  other fields and keys of the sample are kept.
- A sample that cannot be decoded, or is empty, is skipped, and told with its reason.
- Who trains on the result must know how large it can be: `baked_side` reads that from the samples, wherever they are.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
from PIL import Image

from data_pipeline.damage import EMPTY
from data_pipeline.decode import decode_image
from data_pipeline.errors import DamagedSampleError, DataError
from data_pipeline.joined import Joined
from data_pipeline.keys import refuse_equal_keys, written_key
from data_pipeline.reader import Dataset, open_dataset
from data_pipeline.sample import Sample, Skipped
from data_pipeline.shards import SAMPLES_PER_SHARD, Origin, Progress, Written, read_origin, write_shards

KEY = "baked"  # in the json of a sample
VERSION = 1  # of the pixels that come of it
LOOKED_AT = 256  # images whose size is read before anything is written
PROBES = 16  # samples that are asked whether they were baked


def bake(
    source: str | Path,
    out: Path,
    *,
    short_side: int = 256,
    quality: int = 90,
    samples_per_shard: int = SAMPLES_PER_SHARD,
    shard_keys: bool = False,
    processes: int | None = None,
    progress: Progress | None = None,
) -> Written:
    """Write the samples of `source` into `out`, which must be new or empty, with images of at most this short side.

    Goes on where a killed process stopped, and leaves a folder as it is that holds the same already.
    `shard_keys`: write keys as <shard>/<key>, for shards that have equal ones.
    Raises ValueError for a short side or a quality that makes no sense, where no image is larger, and for two samples
    of one key that would come into one shard; otherwise as `open_dataset` and `write_shards` do.
    """
    if short_side < 1:
        raise ValueError(f"short side is {short_side}: give 1 or more pixels")
    if not 1 <= quality <= 100:
        raise ValueError(f"quality is {quality}: give 1 to 100")
    dataset = open_dataset(source)
    _refuse_small(dataset, short_side)
    refuse_equal_keys(dataset, np.arange(len(dataset)), samples_per_shard, shard_keys)
    request: dict[str, Any] = {"bake": VERSION, "short_side": short_side, "quality": quality}
    if shard_keys:
        request["shard_keys"] = True
    named = json.dumps({**request, "of": dataset.fingerprint}, sort_keys=True)
    origin = Origin({**request, "source": str(source)}, hashlib.sha256(named.encode()).hexdigest())
    make = Bake(dataset, short_side, quality, shard_keys)
    return write_shards(
        len(dataset),
        make,
        out,
        samples_per_shard=samples_per_shard,
        processes=processes,
        progress=progress,
        origin=origin,
    )


@dataclass(frozen=True)
class Bake:
    """Number of a sample -> that sample, its image resized."""

    dataset: Dataset
    short_side: int
    quality: int
    shard_keys: bool = False

    def __call__(self, number: int) -> Sample | Skipped:
        """The sample, or why it cannot be used."""
        try:
            sample = self._baked(self.dataset.read(number))
        except DamagedSampleError as error:
            return Skipped(error.key, str(error))
        if isinstance(sample, Skipped):
            return sample
        return Sample(written_key(self.dataset, number, sample.key, self.shard_keys), sample.fields)

    def _baked(self, sample: Sample) -> Sample | Skipped:
        if not sample.fields:
            return Skipped(sample.key, EMPTY)
        field = sample.image_field
        if field is None:
            return sample
        try:
            image = decode_image(sample.fields[field])
            height, width = image.shape[:2]
            if min(height, width) <= self.short_side:
                return sample
            metadata = sample.metadata()
        except DataError as error:
            return Skipped(sample.key, str(error))
        before = metadata.get(KEY)
        was = (
            before if isinstance(before, dict) else {"name": f"{sample.key}.{field}", "width": width, "height": height}
        )
        metadata[KEY] = {**was, "short_side": self.short_side, "quality": self.quality}
        stem, dot, _ = field.rpartition(".")
        new = f"{stem}{dot}jpg"
        jpeg = simplejpeg.encode_jpeg(_resized(image, self.short_side), self.quality, colorsubsampling="420")
        fields = {
            new if name == field else name: jpeg if name == field else data for name, data in sample.fields.items()
        }
        fields["json"] = json.dumps(metadata).encode()
        return Sample(sample.key, fields)


def baked_side(dataset: Dataset | Joined) -> int | None:
    """The short side that the images of a data set were baked to, by its folder or first samples; None: not baked."""
    origin = read_origin(dataset.source) if isinstance(dataset, Dataset) and isinstance(dataset.source, Path) else None
    if origin is not None and "bake" in origin.request:
        return int(origin.request["short_side"])
    for number in range(min(PROBES, len(dataset))):
        try:
            side = dataset.read(number).metadata()[KEY]["short_side"]
        except (DataError, OSError, KeyError, TypeError):  # damaged, or not baked; the loader speaks of the former
            continue
        if isinstance(side, int) and side > 0:
            return side
    return None


def _resized(image: np.ndarray, short_side: int) -> np.ndarray:
    """uint8 [height, width, 3] -> the same with this short side, which is smaller."""
    height, width = image.shape[:2]
    scale = short_side / min(height, width)
    size = max(short_side, round(width * scale)), max(short_side, round(height * scale))
    return np.ascontiguousarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))


def _refuse_small(dataset: Dataset, short_side: int) -> None:
    """ValueError when none of the images, of which some are looked at, is larger."""
    largest, seen = 0, 0
    for number in np.linspace(0, len(dataset) - 1, min(LOOKED_AT, len(dataset)), dtype=np.int64).tolist():
        try:
            sample = dataset.read(number)
        except DamagedSampleError:
            continue
        if sample.image_field is None:
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                size = _size_of(sample.fields[sample.image_field])
        except DataError:
            continue
        largest, seen = max(largest, min(size)), seen + 1
        if largest > short_side:
            return
    what = f"the largest short side among {seen} images is {largest}" if seen else "no image can be read"
    raise ValueError(
        f"nothing of {dataset.folder} would be resized to a short side of {short_side}: {what}; give a smaller "
        "--short-side, or train on it as it is"
    )


def _size_of(data: bytes) -> tuple[int, int]:
    return decode_image(data).shape[:2]
