"""Time, peak memory and the ceilings of the machine.

Design choices:
- Time on a GPU is between two CUDA events. Before them come a read of more than the L2 cache holds, so that inputs
  are read from memory (a write would leave lines that are written back within the time of the operation), and a kernel
  that only waits, so that the host has queued the whole operation when the first event passes: what a host that is
  slower than 1 ms costs an operation is in its time, less is not.
- What is measured of one case takes turns, repetition by repetition, so that clocks and neighbours fall on all alike.
- A backward pass is measured by itself after a forward pass that is not timed, so its graph is fresh each time.
- Peak memory is what the operation, forward and backward together where there is a backward, allocates beyond its
  inputs at its highest: on a GPU by torch's caching allocator, on CPU by the profiler's record of torch's allocations
  (scratch space that a matrix library takes for itself is not in it).
- Floating point operations are counted as the definition needs them (kernels/bench/README.md has the convention), so
  the fraction of a ceiling falls when an implementation computes something twice.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

FORWARD, BACKWARD, BOTH = "forward", "backward", "both"
WAIT_CYCLES = 2_000_000  # about 1 ms
COLD_BYTES = {"cuda": 256 << 20, "cpu": 64 << 20}  # at least; larger than the last cache that we know of
SLOW = 5.0  # seconds; what takes longer is measured once
REPETITIONS = ((0.02, 30), (0.1, 15), (0.5, 8), (SLOW, 3))  # by the seconds that one takes
QUICK_REPETITIONS = ((0.1, 5), (SLOW, 3))

Action = Callable[[], Any]


@dataclass(frozen=True)
class Run:
    """An implementation with its tensors: `forward()` gives a tensor or several; `leaves` are what has a gradient."""

    forward: Callable[[], torch.Tensor | Sequence[torch.Tensor]]
    leaves: Sequence[torch.Tensor]

    def gradients(self, outputs: torch.Tensor | Sequence[torch.Tensor], given: Sequence[torch.Tensor]) -> Any:
        """Gradients of the leaves; `given` are those of the outputs."""
        return torch.autograd.grad(as_list(outputs), list(self.leaves), list(given), allow_unused=True)

    def stage(self, which: str, given: Sequence[torch.Tensor]) -> Action:
        """Do what comes before this pass, and return the pass."""
        if which == FORWARD:
            return self.forward
        if which == BOTH:
            return lambda: self.gradients(self.forward(), given)
        outputs = self.forward()
        return lambda: self.gradients(outputs, given)


@dataclass(frozen=True)
class Timing:
    """Seconds: the median of n repetitions, the quartiles around it, and the shortest."""

    seconds: float
    low: float
    high: float
    best: float
    n: int


def as_list(outputs: torch.Tensor | Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)


class Clock:
    """Times one action at a time on a device, with cold caches."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        size = COLD_BYTES[device.type]
        if device.type == "cuda":
            size = max(size, 4 * getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0))
        self._cold = torch.zeros(size // 4, device=device)
        self._sum = torch.zeros((), device=device)

    def seconds(self, action: Action) -> float:
        """How long an action takes."""
        torch.sum(self._cold, dim=0, out=self._sum)
        if self.device.type != "cuda":
            began = time.perf_counter()
            action()
            return time.perf_counter() - began
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(WAIT_CYCLES)
        start.record()
        action()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


def take_turns(
    clock: Clock,
    stages: Mapping[str, Callable[[], Action]],
    quick: bool,
    deadline: float,
    begins: Callable[[str], None] = lambda name: None,
    failed_with: Callable[[Exception], None] = lambda error: None,
) -> dict[str, Timing | Exception]:
    """Time what each stage returns, in turns; all are warm. `deadline` (time.monotonic) ends it after 3 rounds or more.

    How often one is repeated depends on the seconds it took the first time. One that raises is out from there on, and
    its exception stands in place of its time. begins(name): before each repetition, so that a death is blamed on the
    right one. failed_with(error): at once; it may raise, which ends all.
    """
    seconds: dict[str, list[float]] = {name: [] for name in stages}
    failed: dict[str, Exception] = {}
    wanted: dict[str, int] = dict.fromkeys(stages, 1)
    turn = 0
    while alive := [name for name in stages if name not in failed and turn < wanted[name]]:
        if turn > 3 and time.monotonic() > deadline:
            break
        for name in alive:
            begins(name)
            try:
                seconds[name].append(clock.seconds(stages[name]()))
            except Exception as error:
                failed_with(error)
                failed[name] = error.with_traceback(None)  # which would keep its tensors alive
                continue
            if turn == 0:  # this one sets the number, and counts only where it is the only one
                rules = QUICK_REPETITIONS if quick else REPETITIONS
                wanted[name] = 1 + next((n for limit, n in rules if seconds[name][0] < limit), 0)
        turn += 1
    return {name: failed[name] if name in failed else timing(seconds[name][1:] or seconds[name]) for name in stages}


def timing(seconds: Sequence[float]) -> Timing:
    """Sum up the repetitions."""
    if len(seconds) == 1:
        return Timing(seconds[0], seconds[0], seconds[0], seconds[0], 1)
    low, middle, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return Timing(middle, low, high, min(seconds), len(seconds))


def peak_bytes(action: Action, device: torch.device) -> int:
    """The most memory that torch holds during an action beyond what it held before."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        action()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        action()
    recorded = profile.profiler.kineto_results.events()  # type: ignore[union-attr]  # the profiler has run
    changes = sorted((each.start_ns(), each.nbytes()) for each in recorded if each.name() == "[memory]")
    held = most = 0
    for _, change in changes:
        held += change
        most = max(most, held)
    return most


def ceilings(clock: Clock, quick: bool) -> dict[str, Any]:
    """What this machine can do at most: bytes a second of a copy (read and written), operations a second of a product.

    At most: of the fastest repetition.
    On a GPU 2 GiB and 8192^3 in bf16; on CPU smaller, in fp32.
    """
    gpu = clock.device.type == "cuda"
    size, dtype = (8192, torch.bfloat16) if gpu else (1024 if quick else 2048, torch.float32)
    copied = (1 << 31) if gpu else (64 << 20 if quick else 256 << 20)
    source = torch.ones(copied, dtype=torch.int8, device=clock.device)
    target = torch.empty_like(source)
    a, b = (torch.randn(size, size, device=clock.device, dtype=dtype) for _ in range(2))
    product = torch.empty_like(a)
    stages: dict[str, Callable[[], Action]] = {
        "copy": lambda: lambda: target.copy_(source),
        "product": lambda: lambda: torch.mm(a, b, out=product),
    }
    times = {}
    for name, took in take_turns(clock, stages, quick, deadline=time.monotonic() + 10).items():
        if isinstance(took, Exception):
            raise took
        times[name] = took
    return {
        "bytes_per_second": 2 * copied / times["copy"].best,
        "flops_per_second": 2 * size**3 / times["product"].best,
        "copied_bytes": copied,
        "product": f"{size}^3 {str(dtype).removeprefix('torch.')}",
        "n": times["product"].n,
    }
