"""What the filter tests share: data sets of given samples, read back whole, and photographs in many versions."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipeline import Sample, open_dataset, write_shards

WriteSet = Callable[..., Path]
ReadAll = Callable[[Path], list[Sample]]


@pytest.fixture(scope="session")
def read_all() -> ReadAll:
    """read_all(folder) -> its samples, in order."""

    def read(folder: Path) -> list[Sample]:
        dataset = open_dataset(folder)
        return [dataset.read(number) for number in range(len(dataset))]

    return read


@pytest.fixture
def write_set(tmp_path: Path) -> WriteSet:
    """write_set("name", samples) -> the folder of a data set that holds them, in shards of four."""

    def write(name: str, samples: list[Sample], samples_per_shard: int = 4) -> Path:
        write_shards(
            len(samples), samples.__getitem__, tmp_path / name, samples_per_shard=samples_per_shard, processes=1
        )
        return tmp_path / name

    return write


@pytest.fixture(scope="session")
def captioned() -> Callable[..., Sample]:
    """captioned(key, "one", "two", more=...) -> a sample with these captions, as importers write it."""

    def make(key: str, *captions: str, **more: object) -> Sample:
        fields = {"json": json.dumps({"captions": list(captions), **more}, ensure_ascii=False).encode()}
        if captions:
            fields = {"txt": captions[0].encode(), **fields}
        return Sample(key, fields)

    return make


@pytest.fixture(scope="session")
def photograph() -> Image.Image:
    """A photograph of 512 x 600 pixels, of an admiral before a flag."""
    cbook = pytest.importorskip("matplotlib.cbook")
    with cbook.get_sample_data("grace_hopper.jpg") as file:
        return Image.open(file).convert("RGB")


@pytest.fixture(scope="session")
def encoded() -> Callable[..., bytes]:
    """encoded(image, "JPEG", quality=90) -> the bytes of a file."""

    def encode(image: Image.Image | np.ndarray, kind: str = "JPEG", **options: object) -> bytes:
        file = io.BytesIO()
        (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, kind, **options)
        return file.getvalue()

    return encode
