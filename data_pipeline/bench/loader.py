"""How fast the loader is, against its peers and against the decoding that nobody can leave out.

Ways to make the same batches of size x size RGB images from the same temporary shards:

    weft                       our Loader: uint8 out
    weft_baked                 our Loader on what `weft data bake` made of them: the short side 8/7 of `size`
    webdataset                 webdataset + PIL + float arithmetic in the workers, the pipeline most people write
    webdataset_fast_decoder    webdataset with our decoder and resize, uint8 out: what is left is the loader itself
    the loaders of others      mosaicml-streaming, megatron-energon, Ray Data, where they are installed: peers.py
    decode_alone               decode and resize in a bare loop over bytes in memory: the floor

Design choices:
- The number to trust is samples per CPU-second, a way's process and all its workers, from their start to their end: it
  stands (nearly) still when somebody else is on the machine, which samples per wall second do not.
- Every way runs `workers` processes at once, the bare loop too: two busy threads of one core are slower than one.
- The ways take turns, round after round, the first round being warm-up, so that a change of the machine meets all.
- Memory is looked at in the warm-up round, as looking takes time: after its first tenth, and near its end, while every
  worker is still there. A round is an epoch, or as many as make SAMPLES.
- The consumer drops each batch. A real one copies it to a device, and uint8 is a quarter of float there too, so this
  flatters the float pipelines.
- The images are noise with the 1/f^a amplitude spectrum of photographs, a = 1.2 to 1.6 (Field 1987, "Relations between
  the statistics of natural images"), as JPEG of quality 90 with half-resolution colour: about 70 kB at 512 x 384.
"""

from __future__ import annotations

import io
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import simplejpeg
import torch
import webdataset
from PIL import Image
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader

from data_pipeline.bake import bake
from data_pipeline.batch import BatchMaker
from data_pipeline.bench.measure import Speed, measure, pil_pixels
from data_pipeline.bench.peers import PEERS, Job, PeerProcess
from data_pipeline.loader import Loader
from data_pipeline.order import Order
from data_pipeline.parallel import run_jobs
from data_pipeline.reader import open_dataset
from data_pipeline.sample import Sample
from data_pipeline.shards import write_shards
from data_pipeline.transforms import ImageTransform

SAMPLES = 4096  # at least this many a measurement, so that starting workers does not weigh
QUALITY = 90
CONTRAST, COLOUR = 50.0, 0.25  # standard deviation of the brightness, in grey levels, and of a colour difference to it


@dataclass(frozen=True)
class LoaderBench:
    """What was measured, and on what."""

    images: int
    width: int
    height: int
    mean_bytes: float  # of a JPEG
    size: int
    batch: int
    workers: int
    repeats: int
    seed: int
    samples: int  # a measurement
    first_in_process_seconds: float  # from opening the data set to its first batch, without workers
    weft: Speed
    webdataset: Speed
    webdataset_fast_decoder: Speed
    decode_alone: Speed
    peers: dict[str, Speed | str]  # by the names of peers.PEERS; a str says why there is no speed
    weft_baked: Speed | str = "not measured"  # our Loader on the same images baked to `baked_side`
    baked_side: int = 0

    @property
    def times_webdataset(self) -> float:
        """Our samples per CPU-second over those of webdataset with PIL."""
        return self._times(self.webdataset)

    @property
    def times_webdataset_fast_decoder(self) -> float:
        """Our samples per CPU-second over those of webdataset with our decoder."""
        return self._times(self.webdataset_fast_decoder)

    @property
    def times_peers(self) -> dict[str, float]:
        """Our samples per CPU-second over those of each peer that was measured."""
        return {name: self._times(speed) for name, speed in self.peers.items() if isinstance(speed, Speed)}

    @property
    def times_best_peer(self) -> float | None:
        """The smallest of `times_peers`; None when no peer was measured."""
        return min(self.times_peers.values(), default=None)

    @property
    def times_baked(self) -> float | None:
        """Samples per CPU-second of baked images over those of the same as they were; None when not measured."""
        return None if isinstance(self.weft_baked, str) else 1 / self._times(self.weft_baked)

    @property
    def overhead(self) -> float:
        """CPU time a sample beyond decoding and resizing, as a part of those: 0.1 is 10% more."""
        return self.decode_alone.samples_per_cpu_second / self.weft.samples_per_cpu_second - 1

    def _times(self, other: Speed) -> float:
        return self.weft.samples_per_cpu_second / other.samples_per_cpu_second

    def as_dict(self) -> dict[str, Any]:
        """Everything, ratios included, in JSON's types."""
        return {
            **asdict(self),
            "times_webdataset": self.times_webdataset,
            "times_webdataset_fast_decoder": self.times_webdataset_fast_decoder,
            "times_peers": self.times_peers,
            "times_best_peer": self.times_best_peer,
            "overhead": self.overhead,
            "times_baked": self.times_baked,
        }

    def __str__(self) -> str:
        rows: dict[str, Speed | str] = {
            "weft": self.weft,
            f"weft, baked to {self.baked_side}": self.weft_baked,
            "webdataset + PIL": self.webdataset,
            "webdataset + our decoder": self.webdataset_fast_decoder,
            **{PEERS[name].label + " + PIL": speed for name, speed in self.peers.items()},
            "decode and resize alone": self.decode_alone,
        }
        lines = [
            f"{self.images} JPEGs of {self.width} x {self.height}, {self.mean_bytes / 1000:.1f} kB each, "
            f"to {self.size}; {self.workers} worker(s), batch {self.batch}; median of {self.repeats}",
            f"  {'':<26}{'samples a':>10}{'':>8}{'weft is times':>15}{'':>5}  {'first':<9}memory, MB, after",
            f"  {'':<26}{'CPU-second':>10}{'second':>8}{'CPU-second':>12}{'second':>8}  {'batch':<9}{'1/10':<9}the end",
        ]
        for name, speed in rows.items():
            if isinstance(speed, str):
                lines.append(f"  {name:<26}{speed}")
                continue
            first = "-" if speed.first_batch_seconds is None else f"{speed.first_batch_seconds:.2f} s"
            wall = self.weft.samples_per_second / speed.samples_per_second
            lines.append(
                f"  {name:<26}{speed.samples_per_cpu_second:>10.0f}{speed.samples_per_second:>8.0f}"
                f"{self._times(speed):>12.2f}{wall:>8.2f}  {first:<9}"
                f"{_megabytes(speed.memory_after_tenth_bytes):<9}{_megabytes(speed.memory_at_end_bytes)}"
            )
        best = self.times_best_peer
        lines.append(
            f"  weft = {self.times_webdataset:.2f} x webdataset + PIL, "
            f"{self.times_webdataset_fast_decoder:.2f} x webdataset + our decoder, "
            + (f"{best:.2f} x the best of the other peers, " if best is not None else "")
            + f"{self.overhead:+.1%} CPU time over decode and resize alone"
        )
        if self.times_baked is not None:
            lines.append(f"  weft on images baked to a short side of {self.baked_side} = {self.times_baked:.2f} x weft")
        lines.append(
            f"  without workers, from opening the data set to the first batch: {self.first_in_process_seconds:.2f} s"
        )
        return "\n".join(lines)


def _megabytes(count: int | None) -> str:
    return "-" if count is None else f"{count / 1e6:.0f}"


def bench_loader(
    *,
    images: int = 512,
    width: int = 512,
    height: int = 384,
    size: int = 224,
    batch: int = 64,
    workers: int = 2,
    repeats: int = 3,
    seed: int = 0,
    peers: Sequence[str] = tuple(PEERS),
) -> LoaderBench:
    """Make `images` JPEGs of width x height in a temporary folder and measure every way on them, and these peers.

    Raises ValueError when a number makes no sense; the data set must hold a batch for every worker.
    """
    smallest = {"images": images, "width": width, "height": height, "size": size, "batch": batch, "repeats": repeats}
    for name, value in smallest.items():
        if value < 1:
            raise ValueError(f"{name} is {value}: give 1 or more")
    processes = max(1, workers)
    if workers < 0 or images < processes * batch:
        raise ValueError(
            f"{images} images are no batch of {batch} for each of {workers} workers: "
            f"give {processes * batch} or more, and 0 or more workers"
        )
    steps = max(1, round(SAMPLES / (batch * processes))) * processes  # each worker makes as many batches
    with tempfile.TemporaryDirectory(prefix="weft-bench-") as name, ExitStack() as running:
        folder = Path(name) / "shards"
        make = partial(photograph, seed=seed, width=width, height=height)
        write_shards(images, make, folder, samples_per_shard=images // processes)
        dataset = open_dataset(folder)
        jpegs = [dataset.read(number).fields["jpg"] for number in range(images)]
        urls = [str(folder / shard.file) for shard in dataset.index.shards[:processes]]
        held = sum(shard.samples for shard in dataset.index.shards[:processes])
        maker = BatchMaker(dataset, ImageTransform(size), None, seed=seed, training=True)
        order = Order(images, seed)
        side, baked_batches = round(size * 8 / 7), None
        if side < min(width, height):
            bake(folder, Path(name) / "baked", short_side=side, samples_per_shard=images // processes)
            baked = BatchMaker(open_dataset(Path(name) / "baked"), ImageTransform(size), None, seed, training=True)
            baked_batches = Loader(baked, order, global_batch=batch, workers=workers, stop_step=steps)
        ways: dict[str, Callable[[], Iterable[Any]]] = {
            "weft": lambda: Loader(maker, order, global_batch=batch, workers=workers, stop_step=steps),
            **({"weft_baked": lambda: baked_batches} if baked_batches is not None else {}),
            "webdataset": lambda: _webdataset(urls, partial(_naive, size=size), batch, steps, workers),
            "webdataset_fast_decoder": lambda: _webdataset(urls, partial(_fast, size=size), batch, steps, workers),
            "decode_alone": lambda: _decode_alone(jpegs, size, batch, steps, workers),
        }
        others: dict[str, PeerProcess] = {}
        for peer in peers:
            own = Path(name) / peer
            own.mkdir()
            others[peer] = PeerProcess(peer, Job(urls, held, str(own), size, batch, steps, workers))
            running.callback(others[peer].close)
        aside = [process.pid for process in others.values() if process.pid is not None]
        rounds: dict[str, list[Speed]] = {way: [] for way in (*ways, *peers)}
        firsts: list[float] = []
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # as in a worker, where this process does the work itself
        try:
            for number in range(repeats + 1):
                firsts.append(_first_in_process(folder, size, batch, seed))
                for way, batches in ways.items():
                    speed = measure(batches, steps, batch, workers, weigh=not number, aside=aside)
                    rounds[way].append(speed)
                for peer, process in others.items():
                    found = process.round(weigh=not number)
                    if found is not None:
                        rounds[peer].append(found)
        finally:
            torch.set_num_threads(threads)
        missing = {peer: process.missing for peer, process in others.items() if process.missing is not None}
    speeds = {way: _median(found) for way, found in rounds.items() if way not in missing}
    return LoaderBench(
        images=images,
        width=width,
        height=height,
        mean_bytes=sum(map(len, jpegs)) / images,
        size=size,
        batch=batch,
        workers=workers,
        repeats=repeats,
        seed=seed,
        samples=steps * batch,
        first_in_process_seconds=median(firsts[1:]),
        weft_baked=speeds.pop("weft_baked", "images are no larger"),
        **{way: speeds[way] for way in ways if way in speeds},
        baked_side=side,
        peers={peer: missing[peer] if peer in missing else speeds[peer] for peer in peers},
    )


def _first_in_process(folder: Path, size: int, batch: int, seed: int) -> float:
    """Seconds from opening the data set to the first batch, without workers."""
    started = time.perf_counter()
    maker = BatchMaker(open_dataset(folder), ImageTransform(size), None, seed=seed, training=True)
    for _ in Loader(maker, Order(len(maker.dataset), seed), global_batch=batch, stop_step=1):
        pass
    return time.perf_counter() - started


def _median(rounds: list[Speed]) -> Speed:
    """Of the rounds after the first, which is warm-up and gives the memory."""
    warm = rounds[1:]
    firsts = [speed.first_batch_seconds for speed in warm if speed.first_batch_seconds is not None]
    return Speed(
        median(speed.samples_per_cpu_second for speed in warm),
        median(speed.samples_per_second for speed in warm),
        median(firsts) if firsts else None,
        rounds[0].memory_after_tenth_bytes,
        rounds[0].memory_at_end_bytes,
    )


def _webdataset(
    urls: list[str], make: Callable[[bytes], torch.Tensor], batch: int, steps: int, workers: int
) -> DataLoader:
    """`steps` batches of webdataset's own loading, in its order: shards split over the workers, samples in a row."""
    pipeline = webdataset.DataPipeline(
        webdataset.SimpleShardList(urls),
        webdataset.split_by_worker,
        webdataset.tarfile_to_samples(),
        webdataset.to_tuple("jpg"),
        webdataset.map_tuple(make),
        webdataset.batched(batch, partial=False, collation_fn=_stack),
    )
    pipeline = pipeline.repeat().with_epoch(steps // max(1, workers))
    return DataLoader(pipeline, batch_size=None, num_workers=workers, prefetch_factor=2 if workers else None)


def _stack(samples: list[tuple[torch.Tensor]]) -> torch.Tensor:
    return torch.stack([image for (image,) in samples])


def _naive(jpeg: bytes, size: int) -> torch.Tensor:
    """float32 [3, size, size]: what most pipelines make of an image."""
    return pil_pixels(Image.open(io.BytesIO(jpeg)), size)


def _fast(jpeg: bytes, size: int) -> torch.Tensor:
    """uint8 [size, size, 3]: what our decoder and transform come down to, without their checks."""
    image_1HWC = torch.from_numpy(simplejpeg.decode_jpeg(jpeg, colorspace="RGB"))[None]
    height, width = image_1HWC.shape[1:3]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    crop_1CHW = image_1HWC[:, top : top + side, left : left + side].permute(0, 3, 1, 2)
    return interpolate(crop_1CHW, (size, size), mode="bilinear", antialias=True)[0].permute(1, 2, 0)


def _decode_alone(jpegs: list[bytes], size: int, batch: int, steps: int, workers: int) -> Iterator[None]:
    """The floor, in `workers` processes at once; yields None for every batch's worth when all is done."""
    share = steps // max(1, workers) * batch
    shares = [(range(worker * share, (worker + 1) * share),) for worker in range(max(1, workers))]
    with run_jobs(partial(_decode, jpegs, size), shares, processes=workers) as done:
        for _ in done:
            pass
    yield from [None] * steps


def _decode(jpegs: list[bytes], size: int, numbers: range) -> None:
    for number in numbers:
        _fast(jpegs[number % len(jpegs)], size)


def photograph(number: int, seed: int, width: int, height: int) -> Sample:
    """A JPEG with the spectrum of a photograph, as a sample."""
    generator = np.random.default_rng([seed, number])
    frequencies = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequencies[0, 0] = 1 / max(width, height)
    amplitude = (frequencies ** -generator.uniform(1.2, 1.6)).astype(np.float32)
    parts = generator.standard_normal((2, 3, *amplitude.shape), dtype=np.float32)
    planes = np.fft.irfft2((parts[0] + 1j * parts[1]) * amplitude, s=(height, width))
    planes *= CONTRAST / np.maximum(planes.std(axis=(1, 2), keepdims=True), 1e-6)
    brightness, blue, red = planes[0], planes[1] * COLOUR, planes[2] * COLOUR
    # YCbCr to RGB: ITU-T T.871 section 7
    image_HWC = np.stack(
        [brightness + 1.402 * red, brightness - 0.344136 * blue - 0.714136 * red, brightness + 1.772 * blue], axis=-1
    )
    pixels = np.clip(np.rint(image_HWC + 128), 0, 255).astype(np.uint8)
    jpeg = simplejpeg.encode_jpeg(pixels, QUALITY, colorspace="RGB", colorsubsampling="420")
    return Sample(f"{number:06d}", {"jpg": jpeg, "txt": b"noise like a photograph"})
