"""The loader's benchmark, small: every way makes what was asked for, and ratios are those of the rates."""

import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from private_network import in_private_network

from data_pipeline.bench import loader as bench
from data_pipeline.bench import measure as bench_measure
from data_pipeline.bench import peers as bench_peers
from data_pipeline.bench.loader import bench_loader
from data_pipeline.bench.measure import Speed, measure
from data_pipeline.bench.peers import PEERS, Job, PeerProcess
from data_pipeline.decode import decode_image
from data_pipeline.fork_server import server_pid, start_server
from data_pipeline.shards import write_shards
from data_pipeline.transforms import ImageTransform


@pytest.mark.parametrize("workers", [0, 2])
def test_every_way_is_measured(workers: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(bench, "SAMPLES", 24)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    start_server()
    threads, children = torch.get_num_threads(), psutil.Process().children()
    result = bench_loader(
        images=13, width=97, height=61, size=24, batch=3, workers=workers, repeats=2, seed=4, peers=()
    )
    assert result.samples == 24
    assert (result.images, result.batch, result.workers, result.seed) == (13, 3, workers, 4)
    assert 1000 < result.mean_bytes < 10_000
    tree = json.loads(json.dumps(result.as_dict()))
    for way in ("weft", "webdataset", "webdataset_fast_decoder", "decode_alone"):
        assert tree[way]["samples_per_cpu_second"] > 0
        assert tree[way]["samples_per_second"] > 0
        first = tree[way]["first_batch_seconds"]
        assert first is None if way == "decode_alone" else 0 < first < 24 / tree[way]["samples_per_second"] * 3
        for looked in ("memory_after_tenth_bytes", "memory_at_end_bytes"):
            weighed = tree[way][looked]
            assert weighed is None if way == "decode_alone" else 50e6 < weighed < 20e9
    assert (tree.pop("peers"), tree.pop("times_peers"), tree["times_best_peer"]) == ({}, {}, None)
    rates = {way: tree[way]["samples_per_cpu_second"] for way in tree if isinstance(tree[way], dict)}
    assert tree["times_webdataset"] == pytest.approx(rates["weft"] / rates["webdataset"])
    assert tree["times_webdataset_fast_decoder"] == pytest.approx(rates["weft"] / rates["webdataset_fast_decoder"])
    assert tree["overhead"] == pytest.approx(rates["decode_alone"] / rates["weft"] - 1)
    assert tree["first_in_process_seconds"] > 0
    assert torch.get_num_threads() == threads
    assert list(tmp_path.iterdir()) == []
    assert psutil.Process().children() == children


def test_a_way_that_falls_short_is_not_measured() -> None:
    with pytest.raises(RuntimeError, match="2 batches came instead of 3"):
        measure(lambda: iter([0, 1]), steps=3, batch=1, workers=0)


def test_memory_that_a_round_gathers_shows() -> None:
    kept: list[np.ndarray] = []

    def batches() -> Iterator[int]:
        for number in range(20):
            kept.append(np.ones(10_000_000, dtype=np.uint8))
            yield number

    speed = measure(batches, steps=20, batch=1, workers=2, weigh=True)  # looked at after 2 and after 16
    assert speed.memory_after_tenth_bytes is not None
    assert speed.memory_at_end_bytes is not None
    assert 100e6 < speed.memory_at_end_bytes - speed.memory_after_tenth_bytes < 180e6
    assert measure(batches, steps=20, batch=1, workers=2).memory_at_end_bytes is None


def test_children_are_counted_unless_they_stand_aside() -> None:
    holds = "held = bytearray(b'1' * 200_000_000); print(flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", "sum(range(20_000_000)); " + holds], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        child.stdout.readline()  # it has worked, and holds its memory
        without = bench_measure.resident_bytes([child.pid])
        assert bench_measure.resident_bytes([]) > without + 150e6
        spent = sum(psutil.Process(child.pid).cpu_times()[:2])
        assert spent > 0
        assert bench_measure.cpu_seconds(live=True)[psutil.Process(child.pid)] >= spent
        server = {psutil.Process(pid) for pid in [server_pid()] if pid}
        assert set(bench_measure.cpu_seconds(live=False)) == {psutil.Process()} | server
        child.communicate(b"\n")


def test_why_a_peer_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    job = Job([], 0, str(tmp_path / "peer"), 24, 3, 8, 2)
    monkeypatch.setitem(PEERS, "ray_data", replace(PEERS["ray_data"], distribution="weft-has-no-such-peer"))
    absent = PeerProcess("ray_data", job)
    assert (absent.missing, absent.pid, absent.round()) == ("not installed", None, None)
    absent.close()

    monkeypatch.setitem(PEERS, "ray_data", replace(PEERS["ray_data"], distribution="numpy"))
    monkeypatch.setattr(bench_peers, "START", "raise ValueError('no luck')")
    broken = PeerProcess("ray_data", job)
    assert broken.missing == "failed with exit code 1: ValueError: no luck"
    broken.close()

    monkeypatch.setattr(bench_peers, "START", "print('{}', flush=True); input(); raise SystemExit('enough')")
    fails = PeerProcess("ray_data", job)
    assert fails.missing is None
    assert fails.round() is None
    assert fails.missing == "failed with exit code 1: enough"
    assert fails.round() is None
    fails.close()
    assert fails.pid is None


def test_why_a_peer_does_not_import() -> None:
    with pytest.raises(ModuleNotFoundError) as found:
        importlib.import_module("weft_has_no_such_module")
    assert bench_peers._why(found.value) == "needs weft_has_no_such_module"
    assert bench_peers._why(ModuleNotFoundError("No module named 'torchvision'")) == "needs torchvision"
    other_build = RuntimeError("operator torchvision::nms does not exist")
    assert bench_peers._why(other_build) == f"needs torchvision that loads ({other_build})"
    assert bench_peers._why(ImportError("tokenizers>=9 is required")) == "does not import (tokenizers>=9 is required)"


def test_a_table_with_and_without_a_peer() -> None:
    speed = Speed(100.0, 50.0, 0.5, 400_000_000, 401_000_000)
    peers: dict[str, Speed | str] = {"megatron_energon": replace(speed, samples_per_cpu_second=40.0)}
    peers |= {"ray_data": replace(speed, samples_per_cpu_second=20.0), "mosaicml_streaming": "needs torchvision"}
    bare = replace(speed, samples_per_cpu_second=110.0, first_batch_seconds=None, memory_at_end_bytes=None)
    result = bench.LoaderBench(512, 512, 384, 7e4, 224, 64, 2, 3, 0, 2048, 0.1, speed, speed, speed, bare, peers)
    tree = json.loads(json.dumps(result.as_dict()))
    assert tree["times_peers"] == {"megatron_energon": 2.5, "ray_data": 5.0}
    assert tree["times_best_peer"] == 2.5
    assert tree["peers"]["mosaicml_streaming"] == "needs torchvision"
    lines = {line[:28].strip(): line[28:].split() for line in str(result).splitlines()}
    assert lines["mosaicml-streaming + PIL"] == ["needs", "torchvision"]
    assert lines["megatron-energon + PIL"] == ["40", "50", "2.50", "1.00", "0.50", "s", "400", "401"]
    assert lines["decode and resize alone"] == ["110", "50", "0.91", "1.00", "-", "400", "-"]


def _one_peer(name: str, folder: str) -> dict[str, Any]:
    """A small benchmark with one peer, the images that it makes, and the processes that stay."""
    tempfile.tempdir = folder
    bench.SAMPLES = 24
    result = bench_loader(images=26, width=97, height=61, size=24, batch=3, workers=2, repeats=1, peers=(name,))
    deadline = time.monotonic() + 60
    while left := [each for each in psutil.Process().children(recursive=True) if each.pid != server_pid()]:
        if time.monotonic() > deadline:
            break
        time.sleep(0.1)
    found = {"peer": result.as_dict()["peers"][name], "left": [process.name() for process in left]}
    if isinstance(found["peer"], str):
        return found

    jpegs = [bench.photograph(number, 0, 97, 61).fields["jpg"] for number in range(26)]
    write_shards(
        26, partial(bench.photograph, seed=0, width=97, height=61), Path(folder, "shards"), samples_per_shard=13
    )
    own = Path(folder, "peer")
    own.mkdir()
    job = Job([str(path) for path in sorted(Path(folder, "shards").glob("*.tar"))], 26, str(own), 24, 3, 8, 2)
    peer = PEERS[name]
    peer.load()
    peer.prepare(job)
    with peer.running(job):
        made = [getattr(batch, "image", batch) for batch in peer.batches(job)]
        images = torch.cat([batch["image"] if isinstance(batch, dict) else batch for batch in made])
    folders = [str(path) for path in Path("/tmp").glob(f"weft-ray-*/session_*_{os.getpid()}")]
    right = [bench._naive(jpeg, 24) for jpeg in jpegs]
    sources = [next((number for number, image in enumerate(right) if torch.equal(image, row)), None) for row in images]
    return found | {"shape": tuple(images.shape), "sources": sources, "folders": folders}


@pytest.mark.slow
@pytest.mark.parametrize("name", list(PEERS))
def test_a_peer_makes_the_same_images(name: str, tmp_path: Path) -> None:
    try:
        metadata.version(PEERS[name].distribution)
    except metadata.PackageNotFoundError:
        pytest.skip(f"{PEERS[name].distribution} is not installed")
    found = in_private_network(_one_peer, name, str(tmp_path))
    assert found["left"] == []
    peer = found["peer"]
    if isinstance(peer, str) and not peer.startswith("failed"):
        pytest.skip(f"{name} {peer}")
    assert isinstance(peer, dict), peer
    assert peer["samples_per_cpu_second"] > 0
    assert peer["first_batch_seconds"] > 0
    assert 50e6 < peer["memory_after_tenth_bytes"] < 20e9
    assert found["folders"] == []
    assert found["shape"] == (24, 3, 24, 24)
    assert None not in found["sources"]
    assert len(set(found["sources"])) > 12


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
    restored = (naive.permute(1, 2, 0).numpy() * bench_measure.STD + bench_measure.MEAN) * 255
    assert np.abs(restored - ours.permute(1, 2, 0).numpy()).mean() < 6  # bicubic is sharper than bilinear
    assert Image.fromarray(restored.clip(0, 255).astype(np.uint8)).size == (48, 48)


@pytest.mark.parametrize(
    "options", [{"images": 0}, {"batch": 0}, {"size": 0}, {"repeats": 0}, {"workers": -1}, {"images": 9, "batch": 5}]
)
def test_refuses_what_makes_no_sense(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="give"):
        bench_loader(**options)
