"""The loader's benchmark, small: every way makes what was asked for, and ratios are those of the rates."""

import json
import tempfile
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from data_pipeline import bench
from data_pipeline.bench import bench_loader
from data_pipeline.decode import decode_image
from data_pipeline.transforms import ImageTransform


@pytest.mark.parametrize("workers", [0, 2])
def test_every_way_is_measured(workers: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(bench, "SAMPLES", 24)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    threads, children = torch.get_num_threads(), psutil.Process().children()
    result = bench_loader(images=13, width=97, height=61, size=24, batch=3, workers=workers, repeats=2, seed=4)
    assert result.samples == 24
    assert (result.images, result.batch, result.workers, result.seed) == (13, 3, workers, 4)
    assert 1000 < result.mean_bytes < 10_000
    tree = json.loads(json.dumps(result.as_dict()))
    for way in ("weft", "webdataset", "webdataset_fast_decoder", "decode_alone"):
        assert tree[way]["samples_per_cpu_second"] > 0
        assert tree[way]["samples_per_second"] > 0
        first = tree[way]["first_batch_seconds"]
        assert first is None if way == "decode_alone" else 0 < first < 24 / tree[way]["samples_per_second"] * 3
    rates = {way: tree[way]["samples_per_cpu_second"] for way in tree if isinstance(tree[way], dict)}
    assert tree["times_webdataset"] == pytest.approx(rates["weft"] / rates["webdataset"])
    assert tree["times_webdataset_fast_decoder"] == pytest.approx(rates["weft"] / rates["webdataset_fast_decoder"])
    assert tree["overhead"] == pytest.approx(rates["decode_alone"] / rates["weft"] - 1)
    assert torch.get_num_threads() == threads
    assert list(tmp_path.iterdir()) == []
    assert psutil.Process().children() == children


def test_a_way_that_falls_short_is_not_measured() -> None:
    with pytest.raises(RuntimeError, match="2 batches came instead of 3"):
        bench._measure(lambda: iter([0, 1]), steps=3, batch=1)


def test_images_are_likephotographs() -> None:
    samples = [bench.photograph(number, seed=0, width=512, height=384) for number in range(6)]
    sizes = [len(sample.fields["jpg"]) for sample in samples]
    assert 55_000 < np.mean(sizes) < 85_000
    assert len(set(sizes)) == 6
    image = decode_image(samples[0].fields["jpg"])
    assert image.shape == (384, 512, 3)
    assert 30 < image.std() < 70
    again = bench.photograph(0, seed=0, width=512, height=384)
    assert again.fields == samples[0].fields
    assert bench.photograph(0, seed=1, width=512, height=384).fields != again.fields


def test_the_ways_make_the_same_image() -> None:
    jpeg = bench.photograph(0, seed=0, width=160, height=120).fields["jpg"]
    ours = ImageTransform(48)(decode_image(jpeg), None)
    assert torch.equal(bench._fast(jpeg, 48).permute(2, 0, 1), ours)
    naive = bench._naive(jpeg, 48)
    assert naive.shape == (3, 48, 48)
    assert naive.dtype == torch.float32
    restored = (naive.permute(1, 2, 0).numpy() * bench.STD + bench.MEAN) * 255
    assert np.abs(restored - ours.permute(1, 2, 0).numpy()).mean() < 6  # bicubic is sharper than bilinear
    assert Image.fromarray(restored.clip(0, 255).astype(np.uint8)).size == (48, 48)


@pytest.mark.parametrize(
    "options", [{"images": 0}, {"batch": 0}, {"size": 0}, {"repeats": 0}, {"workers": -1}, {"images": 9, "batch": 5}]
)
def test_refuses_what_makes_no_sense(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="give"):
        bench_loader(**options)
