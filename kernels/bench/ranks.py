"""InfoNCE over the embeddings of several GPUs, one process each, beside the gathered loss that is usual.

    rows(...) starts `python -m kernels.bench.ranks FOLDER RANK WORLD PAIRS SIZE DEVICE PARENT` once a rank.

A time is the longest of all ranks', forward and backward, collectives included; memory is the largest rank's.

Axes: n pairs of one rank, N pairs of all, D embedding size.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as differentiable
import torch.nn.functional as F

from kernels.bench.measure import BOTH, Clock, Run, peak_bytes, timing
from kernels.bench.process import die_with

Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
SECONDS = 50.0  # for all ranks together
REPETITIONS = 10
ON_GPUS, ON_CPU = ((65536, 512), (262144, 1024)), ((2048, 256),)


def gathered(x_nD: torch.Tensor, y_nD: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """All of both sides on every rank, with gradients; own rows against all (open_clip's local_loss, written anew)."""
    x_ND, y_ND = (torch.cat(differentiable.all_gather(each)) for each in (x_nD, y_nD))
    labels = torch.arange(len(x_nD), device=x_nD.device) + dist.get_rank() * len(x_nD)
    one_way = F.cross_entropy((scale.to(x_nD.dtype) * x_nD @ y_ND.T).float(), labels)
    return (one_way + F.cross_entropy((scale.to(y_nD.dtype) * y_nD @ x_ND.T).float(), labels)) / 2


def ours(x_nD: torch.Tensor, y_nD: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    from kernels.contrastive import contrastive_loss

    products = {"products": x_nD.dtype} if x_nD.dtype.itemsize == 2 else {}
    return contrastive_loss(x_nD, y_nD, scale, group=dist.group.WORLD, **products)


LOSSES: dict[str, Loss] = {"auto": ours, "gathered, local loss": gathered}


def rows(device: torch.device, quick: bool, world: int | None = None) -> list[dict[str, Any]]:
    """One row an implementation and size; `world`: as many ranks as there are GPUs, if None."""
    gpu = device.type == "cuda"
    world = world or torch.cuda.device_count()
    sizes = ON_GPUS[: 1 if quick else None] if gpu else ON_CPU
    return [row for pairs, size in sizes for row in _start(world, pairs, size, device.type)]


def _start(world: int, pairs: int, size: int, device: str) -> list[dict[str, Any]]:
    blank = {
        "operation": "contrastive_loss",
        "case": f"{world} ranks, N{pairs} D{size}",
        "shape": f"{world} x {pairs // world}, D{size} {'bf16' if device == 'cuda' else 'fp32'}",
        "pass": BOTH,
    }
    with tempfile.TemporaryDirectory(prefix="bench-ranks-") as folder:
        why = _run_ranks(folder, world, pairs, size, device)
        if why:
            return [{**blank, **_kind(name), "status": "error", "message": why} for name in LOSSES]
        results = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(world)]
    found = []
    for name in LOSSES:
        by_rank = [result[name] for result in results]
        failed = next((one["message"] for one in by_rank if "message" in one), "")
        if failed:
            found.append({**blank, **_kind(name), "status": "error", "message": failed})
            continue
        took = timing([max(times) for times in zip(*(one["seconds"] for one in by_rank), strict=True)])
        figures = {"seconds": took.seconds, "low": took.low, "high": took.high, "n": took.n}
        extra = max(one["extra_bytes"] for one in by_rank)
        found.append({**blank, **_kind(name), "status": "ok", **figures, "extra_bytes": extra, "target": 0.5})
    return found


def _run_ranks(folder: str, world: int, *sizes: int | str) -> str:
    """Start the ranks and wait for them; what went wrong, or an empty string."""
    processes = []
    for rank in range(world):
        command = [sys.executable, "-m", "kernels.bench.ranks", folder, *map(str, (rank, world, *sizes, os.getpid()))]
        with Path(folder, f"{rank}.log").open("w") as log:
            processes.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=log))
    limit = time.monotonic() + SECONDS
    try:
        codes = [each.wait(max(0.1, limit - time.monotonic())) for each in processes]
        return f"exit codes {codes}: {_last_line(folder, codes)}" if any(codes) else ""
    except subprocess.TimeoutExpired:
        return f"not done after {SECONDS:.0f} s"
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()


def _kind(name: str) -> dict[str, Any]:
    own = name == "auto"
    return {"implementation": name, "group": "kernels" if own else "peer", "own": own, "auto": own}


def _last_line(folder: str, codes: list[int]) -> str:
    rank = next(place for place, code in enumerate(codes) if code)
    return (Path(folder, f"{rank}.log").read_text().strip().splitlines() or [""])[-1][:200]


def measure_one_rank(rank: int, world: int, pairs: int, size: int, device: torch.device) -> dict[str, Any]:
    """What this rank took, by implementation."""
    clock = Clock(device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    generator = torch.Generator(device).manual_seed(rank)
    shape = (pairs // world, size)
    x, y = (F.normalize(torch.randn(shape, device=device, generator=generator), dim=1).to(dtype) for _ in range(2))
    leaves = [x.requires_grad_(), y.requires_grad_(), torch.tensor(14.3, device=device, requires_grad=True)]
    found: dict[str, Any] = {}
    for name, loss in LOSSES.items():
        run = Run(lambda loss=loss: loss(*leaves), leaves)  # type: ignore[misc]
        given = [torch.ones((), device=device)]
        try:  # it fails on all ranks alike, as by lack of memory, or the others wait until they are killed
            run.stage(BOTH, given)()
            extra = peak_bytes(run.stage(BOTH, given), device)
            seconds = []
            for _ in range(REPETITIONS):
                dist.barrier()
                seconds.append(clock.seconds(run.stage(BOTH, given)))
            found[name] = {"seconds": seconds, "extra_bytes": extra}
        except Exception as error:
            found[name] = {"message": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}
    return found


def main(folder: str, rank: int, world: int, pairs: int, size: int, device: str) -> None:
    store = dist.FileStore(str(Path(folder, "store")), world)
    own = torch.device(device, rank) if device == "cuda" else torch.device(device)
    if device == "cuda":
        torch.cuda.set_device(own)
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timedelta(seconds=SECONDS))
    found = measure_one_rank(rank, world, pairs, size, own)
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    die_with(int(sys.argv[7]))
    rank, world, pairs, size = map(int, sys.argv[2:6])
    main(sys.argv[1], rank, world, pairs, size, sys.argv[6])
