"""What the importer tests share: small images and sounds, files in a source, and a whole data set read back."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import webdataset
from PIL import Image
from torch.nn.functional import normalize

from data_pipeline import BatchMaker, ImageTransform, Loader, Order, Sample, TextTransform, Tokenizer, open_dataset
from data_pipeline.check import check_dataset
from data_pipeline.sound import AudioTransform
from kernels import contrastive_loss

MakeImage = Callable[..., bytes]
MakeSound = Callable[..., bytes]


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


@pytest.fixture(scope="session")
def sound_bytes() -> MakeSound:
    """sound_bytes(seed, format) -> half a second of noise at 8 kHz, different for each seed."""

    def make(seed: int = 0, kind: str = "FLAC", seconds: float = 0.5) -> bytes:
        noise = np.random.default_rng(seed).integers(-9000, 9000, round(8000 * seconds), dtype=np.int16)
        file = io.BytesIO()
        soundfile.write(file, noise, 8000, format=kind)
        return file.getvalue()

    return make


@pytest.fixture
def put(tmp_path: Path) -> Callable[[str, object], Path]:
    """put("a/b.json", {...}) writes a file below SOURCE: bytes, a text, or a tree as JSON."""

    def write(name: str, data: object) -> Path:
        path = tmp_path / "source" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(data, bytes):
            path.write_bytes(data)
        else:
            path.write_text(data if isinstance(data, str) else json.dumps(data), encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="session")
def examine(read_all: Callable[[Path], list[Sample]]) -> Callable[..., dict[str, dict[str, Sample]]]:
    """examine(out) -> set -> id -> sample, after `check` has found nothing and plain webdataset has read the same.

    A model has trained on it for a step, too.

    `but`: what the reasons that `check` may give have in them.
    """

    def look(out: Path, but: tuple[str, ...] = ()) -> dict[str, dict[str, Sample]]:
        assert {path.name for path in out.iterdir()} <= {"train", "val", "test"}  # nothing hidden is left
        found = {}
        for folder in sorted(out.iterdir()):
            problems = check_dataset(folder, processes=0).problems
            assert [each for each in problems if not any(word in each.reason for word in but)] == []
            samples = read_all(folder)
            urls = [str(path) for path in sorted(folder.glob("*.tar"))]
            plain = list(webdataset.WebDataset(urls, shardshuffle=False))
            fields = [{name: data for name, data in each.items() if not name.startswith("__")} for each in plain]
            assert fields == [sample.fields for sample in samples]
            assert [each["__key__"] for each in plain] == [sample.key for sample in samples]
            for sample in samples:
                assert sample.captions()
                assert sample.fields["txt"].decode() == sample.captions()[0]
                assert set(sample.metadata()["provenance"]) == {"source", "licence", "id"}
            assert train_a_step(folder), f"nothing of {folder} was learned from"
            found[folder.name] = {str(sample.metadata()["provenance"]["id"]): sample for sample in samples}
            assert len(found[folder.name]) == len(samples)
        return found

    return look


def train_a_step(folder: Path) -> bool:
    """One step of a small contrastive model on pictures or sounds and their captions: whether it moved them."""
    dataset = open_dataset(folder)
    first = [dataset.read(number) for number in range(len(dataset))]
    tokenizer = Tokenizer.train([caption for sample in first for caption in sample.captions()], 300)
    has_image, has_sound = (any(getattr(each, f"{kind}_field") for each in first) for kind in ("image", "audio"))
    maker = BatchMaker(
        dataset,
        ImageTransform(16) if has_image else None,
        TextTransform(tokenizer, 12),
        0,
        training=True,
        audio=AudioTransform(frames=20, mels=16) if has_sound else None,
        optional=frozenset(name for name, there in (("image", has_image), ("audio", has_sound)) if there),
    )
    (batch,) = Loader(maker, Order(len(dataset), 0), global_batch=min(4, len(dataset)), stop_step=1)
    torch.manual_seed(0)
    seen = torch.cat([batch.image.flatten(1) / 255.0, batch.audio.flatten(1)], 1)
    tower, words = torch.nn.Linear(seen.shape[1], 8), torch.nn.EmbeddingBag(300, 8)
    optimizer = torch.optim.AdamW([*tower.parameters(), *words.parameters()], lr=1e-3)
    loss = contrastive_loss(normalize(tower(seen)), normalize(words(batch.text)), torch.tensor(10.0))
    loss = loss + (tower(seen) - words(batch.text)).square().mean()  # a single pair has no negatives to learn from
    loss.backward()
    before = tower.weight.detach().clone()
    optimizer.step()
    return bool(loss.isfinite()) and bool((tower.weight != before).any())
