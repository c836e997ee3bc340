"""What every way to make batches is measured by: one round of it, its CPU time, its memory, and the work it does."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import psutil
import torch
from PIL import Image

from data_pipeline.fork_server import server_pid

# CLIP's per-channel mean and standard deviation (Radford et al. 2021, github.com/openai/CLIP)
MEAN = np.array([0.48145466, 0.4578275, 0.40821073], dtype=np.float32)
STD = np.array([0.26862954, 0.26130258, 0.27577711], dtype=np.float32)

PREFETCH = 2  # batches a worker of torch's DataLoader is ahead; with fewer to go, the first workers may end


@dataclass(frozen=True)
class Speed:
    """One round, or the medians of several. Memory: resident, of the process and all below it, shared pages split."""

    samples_per_cpu_second: float  # CPU time of the process and its workers
    samples_per_second: float
    first_batch_seconds: float | None  # None for the bare loop, which makes no batches
    memory_after_tenth_bytes: int | None = None  # of the round; None where it was not looked at
    memory_at_end_bytes: int | None = None


def measure(
    batches: Callable[[], Iterable[Any]],
    steps: int,
    batch: int,
    workers: int,
    *,
    live: bool = False,
    weigh: bool = False,
    aside: Collection[int] = (),
) -> Speed:
    """Run one way from the start of its workers to their end.

    live: count processes that go on afterwards, too; weigh: look at memory, which takes a little time; aside: children
    that are not of this way. Raises RuntimeError when there are not `steps` batches.
    """
    started, before = time.perf_counter(), cpu_seconds(live)
    first = None
    counted = 0
    early = max(1, steps // 10)
    late = max(early, steps - PREFETCH * workers)
    memory: dict[int, int] = {}
    for made in batches():
        if first is None and made is not None:
            first = time.perf_counter() - started
        counted += 1
        if weigh and made is not None and counted in (early, late):
            memory[counted] = resident_bytes(aside)
    seconds, after = time.perf_counter() - started, cpu_seconds(live)
    cpu = sum(spent - before.get(process, 0.0) for process, spent in after.items())
    if counted != steps:
        raise RuntimeError(f"{counted} batches came instead of {steps}: what was measured is not what was asked for")
    return Speed(steps * batch / cpu, steps * batch / seconds, first, memory.get(early), memory.get(late))


def cpu_seconds(live: bool) -> dict[psutil.Process, float]:
    """CPU time of this process, of its children that have ended and of those that its fork server had (our workers).

    `live`: and of each below it that runs.

    What a grandchild spent that ended meanwhile may be lost (Ray's workers), which flatters who has such.
    """
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    found = {psutil.Process(): sum(usage.ru_utime + usage.ru_stime for usage in usages)}
    for process in below() if live else []:
        with suppress(psutil.NoSuchProcess):
            found[process] = sum(process.cpu_times()[:2])
    if server := server_pid():
        process = psutil.Process(server)
        found[process] = sum(process.cpu_times()[:4])  # its own, and of those it has waited for
    return found


def resident_bytes(aside: Collection[int]) -> int:
    """Resident memory of this process and all below it; a page that several hold counts once (Linux)."""
    found = 0
    for process in [psutil.Process(), *below(aside)]:
        try:
            memory = process.memory_full_info()
        except psutil.Error:
            continue  # gone meanwhile
        found += getattr(memory, "pss", memory.rss)
    return found


def below(aside: Collection[int] = ()) -> list[psutil.Process]:
    """The children of this process without those aside, their children, and so on."""
    found = [child for child in psutil.Process().children() if child.pid not in aside]
    for child in list(found):
        with suppress(psutil.NoSuchProcess):
            found += child.children(recursive=True)
    return found


def pil_pixels(image: Image.Image, size: int) -> torch.Tensor:
    """float32 [3, size, size]: short side to `size` by antialiased bicubic, centre square, normalised."""
    image = image.convert("RGB")
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    pixels_HWC = np.asarray(image.crop((left, top, left + size, top + size)), dtype=np.float32) / 255
    pixels_HWC = (pixels_HWC - MEAN) / STD
    return torch.from_numpy(pixels_HWC).permute(2, 0, 1).contiguous()
