"""`weft bench data --ray`: the Ray loader beside the one in process, same data, as many decoders as workers.

Both make the same batches of the images of loader.py. The clock runs from the first batch to the last, so that neither
the start of workers nor of Ray counts; the ways take turns, and medians over the rounds are given. What Ray's own
processes take of the machine is in the wall time, which on a machine with as many decoders as cores is the point.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from data_pipeline.batch import Batch, BatchMaker
from data_pipeline.bench.loader import photograph
from data_pipeline.loader import Loader
from data_pipeline.order import Order
from data_pipeline.ray_token import guard_own_ray
from data_pipeline.reader import open_dataset
from data_pipeline.shards import write_shards
from data_pipeline.transforms import ImageTransform


@dataclass(frozen=True)
class RayBench:
    """Samples a wall second by number of workers or decoders; ratio = Ray over in process at the same number."""

    batch: int
    samples: int
    in_process: dict[int, float]
    ray: dict[int, float]

    @property
    def ratio(self) -> dict[int, float]:
        """Ray's rate over that of the loader in process."""
        return {number: self.ray[number] / self.in_process[number] for number in self.ray}

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        return {**asdict(self), "ratio": self.ratio}

    def __str__(self) -> str:
        lines = ["| workers / decoders | in process, samples/s | on Ray | ratio |", "|---|---|---|---|"]
        for number, rate in self.ray.items():
            lines.append(f"| {number} | {self.in_process[number]:.0f} | {rate:.0f} | {self.ratio[number]:.2f} |")
        return "\n".join(lines)


def bench_ray(
    workers: tuple[int, ...] = (1, 2),
    images: int = 512,
    batch: int = 64,
    steps: int = 40,
    size: int = 224,
    rounds: int = 3,
) -> RayBench:
    """Measure on this machine, with a Ray of its own. Raises DataError when there can be none."""
    guard_own_ray()
    from data_pipeline.ray_cluster import connect, disconnect
    from data_pipeline.ray_loader import RayLoader

    with tempfile.TemporaryDirectory(prefix="weft-bench-") as name:
        folder = Path(name) / "shards"
        write_shards(images, partial(photograph, seed=0, width=512, height=384), folder, samples_per_shard=256)
        maker, order = BatchMaker(open_dataset(folder), ImageTransform(size), None, 0, training=True), Order(images, 0)
        connect("local", processors=max(workers))
        in_process: dict[int, float] = {}
        on_ray: dict[int, float] = {}
        try:
            for number in workers:
                rates: tuple[list[float], list[float]] = ([], [])
                for turn in range(rounds):
                    common: dict[str, Any] = {"global_batch": batch, "stop_step": steps}
                    rates[0].append(_rate(Loader(maker, order, workers=number, **common), batch))
                    pool = f"bench-{number}-{turn}"
                    rates[1].append(_rate(RayLoader(maker, order, pool=pool, decoders=number, **common), batch))
                in_process[number], on_ray[number] = median(rates[0]), median(rates[1])
        finally:
            disconnect()
    return RayBench(batch, steps * batch, in_process, on_ray)


def _rate(batches: Iterable[Batch], batch: int) -> float:
    """Samples a second, after the first tenth: by then every worker has started."""
    arrived = []
    for _ in batches:
        arrived.append(time.perf_counter())
    first = len(arrived) // 10
    return (len(arrived) - 1 - first) * batch / (arrived[-1] - arrived[first])
