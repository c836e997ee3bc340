"""The process groups of a layout, and the view of them that DeepSpeed wants.

Megatron-core makes and keeps the groups (`parallel_state`); `Ranks` is what the rest of weft asks, so nobody else
reads that module state. One more group, gloo even on GPUs, carries the few numbers that all ranks agree on each step.
"""

from __future__ import annotations

import logging
import os
import warnings
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from pretrain.errors import RequestError
from pretrain.parallel.cpu import enable_cpu
from pretrain.parallel.layout import Layout

TIMEOUT = timedelta(minutes=10)


@dataclass(frozen=True)
class Ranks:
    """Where this process stands in its groups."""

    rank: int
    world: int
    dp_rank: int
    dp_size: int
    tp_rank: int
    tp_size: int
    device: torch.device
    dp_group: dist.ProcessGroup
    tp_group: dist.ProcessGroup
    control_group: dist.ProcessGroup  # gloo, all ranks
    made_world: bool  # whether `stop_ranks` is to leave the default group too

    @property
    def is_first(self) -> bool:
        """Whether this rank speaks and writes for all."""
        return self.rank == 0

    def agree(self, numbers: torch.Tensor) -> torch.Tensor:
        """Sum int64 or float64 CPU numbers over all ranks."""
        if self.world > 1:
            dist.all_reduce(numbers, group=self.control_group)
        return numbers


def world_size() -> int:
    """How many ranks the launcher started (1 without one)."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def pick_device(asked: str) -> torch.device:
    """The device of this rank for run.device=auto, cpu or cuda: its own card, or the CPU.

    Raises RequestError for cuda where torch finds none.
    """
    cuda = torch.cuda.is_available()
    if asked == "cuda" and not cuda:
        raise RequestError("run.device is cuda, but torch finds no GPU here: use run.device=cpu or auto")
    if asked == "cpu" or not cuda:
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def start_ranks(layout: Layout, device: torch.device) -> Ranks:
    """Join the other ranks and make the groups of a layout. A single rank needs no launcher and opens no port."""
    from megatron.core import parallel_state

    on_cpu = device.type == "cpu"
    if on_cpu:
        enable_cpu()
    else:
        torch.cuda.set_device(device)
    # deepspeed/runtime/engine.py:1972 wants what a launcher sets; a single rank has none
    os.environ.setdefault("LOCAL_RANK", "0")
    made_world = not dist.is_initialized()
    if made_world:
        backend = "gloo" if on_cpu else "nccl"
        if layout.world == 1:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=TIMEOUT)
        else:
            dist.init_process_group(backend, timeout=TIMEOUT)
    logging.getLogger("megatron.core").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=layout.tp)
    return Ranks(
        rank=dist.get_rank(),
        world=dist.get_world_size(),
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp_size=parallel_state.get_tensor_model_parallel_world_size(),
        device=device,
        dp_group=parallel_state.get_data_parallel_group(),
        tp_group=parallel_state.get_tensor_model_parallel_group(),
        control_group=dist.new_group(backend="gloo", timeout=TIMEOUT),
        made_world=made_world,
    )


def start_alone(device: torch.device) -> Ranks:
    """The groups of a single process that only runs a model; Megatron-core's layers ask for them when they are built.

    Raises RuntimeError inside a job of several ranks.
    """
    from megatron.core import parallel_state

    if world_size() > 1:
        raise RuntimeError(f"a model by itself runs on one process, and this one is of {world_size()} ranks")
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    return start_ranks(Layout(world=1, dp=1, tp=1, zero=0, share=1, micro_batch=1), device)


def stop_ranks(ranks: Ranks) -> None:
    """Leave the groups of the layout, and the default group if `start_ranks` made it."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    dist.destroy_process_group(ranks.control_group)
    if ranks.made_world:
        dist.destroy_process_group()


class DeepSpeedGroups:
    """`mpu` of `deepspeed.initialize`: the same groups under the names that DeepSpeed calls.

    `megatron.core.parallel_state` itself lacks some of them (`get_model_parallel_world_size`).
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self._ranks.tp_group

    def get_model_parallel_rank(self) -> int:
        return self._ranks.tp_rank

    def get_model_parallel_world_size(self) -> int:
        return self._ranks.tp_size

    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self._ranks.dp_group

    def get_data_parallel_rank(self) -> int:
        return self._ranks.dp_rank

    def get_data_parallel_world_size(self) -> int:
        return self._ranks.dp_size
