"""What the importer tests share: a small image of any kind, and a whole data set read back."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipeline import Sample, open_dataset

MakeImage = Callable[..., bytes]


@pytest.fixture(scope="session")
def image_bytes() -> MakeImage:
    """image_bytes(seed, format) -> the bytes of a small noisy picture, different for each seed."""

    def make(seed: int = 0, kind: str = "PNG") -> bytes:
        pixels = np.random.default_rng(seed).integers(0, 256, (7, 11, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, kind)
        return file.getvalue()

    return make


@pytest.fixture(scope="session")
def read_all() -> Callable[[Path], list[Sample]]:
    """read_all(folder) -> its samples, in order."""

    def read(folder: Path) -> list[Sample]:
        dataset = open_dataset(folder)
        return [dataset.read(number) for number in range(len(dataset))]

    return read
