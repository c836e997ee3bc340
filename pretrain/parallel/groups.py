"""The process groups of a layout, and the view of them that DeepSpeed wants.

Megatron-core makes and keeps the groups (`parallel_state`); `Ranks` is what the rest of weft asks, so nobody else
reads that module state. One more group, gloo even on GPUs, carries the few numbers that all ranks agree on each step.
"""

from __future__ import annotations

import logging
import math
import os
import sys
import warnings
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from pretrain.errors import RequestError
from pretrain.job import this_job
from pretrain.parallel.cpu import enable_cpu
from pretrain.parallel.layout import Layout
from pretrain.parallel.meeting import meet

TIMEOUT = timedelta(minutes=10)
ALLOCATOR_SETTINGS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # torch's variables


@dataclass(frozen=True)
class Ranks:
    """Where this process stands in its groups."""

    rank: int
    world: int
    dp_rank: int  # which share of the global batch
    dp_size: int
    zero_rank: int  # among the ranks with the same parameters: data and context parallel ones
    zero_size: int
    tp_rank: int
    tp_size: int
    pp_rank: int  # which stage
    pp_size: int
    device: torch.device
    dp_group: dist.ProcessGroup
    zero_group: dist.ProcessGroup
    tp_group: dist.ProcessGroup
    pp_group: dist.ProcessGroup
    model_group: dist.ProcessGroup  # all pieces and stages of one copy of the model
    same_rows_group: dist.ProcessGroup  # of one stage: tensor and context parallel, with the same embeddings
    all_rows_group: dist.ProcessGroup  # of one stage: those of all data parallel ranks
    end_stages_group: dist.ProcessGroup | None  # first and last stage, on a rank of either; None without stages
    copy_group: dist.ProcessGroup | None  # all that train on the same share; None where that is one rank
    control_group: dist.ProcessGroup  # gloo, all ranks
    made_groups: tuple[dist.ProcessGroup, ...]  # what `stop_ranks` is to leave, the default group if it was made here

    @property
    def is_first(self) -> bool:
        """Whether this rank speaks and writes for all."""
        return self.rank == 0

    @property
    def is_reader(self) -> bool:
        """Whether this rank reads the batches of its share, for all that train on it."""
        return self.copy_group is None or dist.get_rank(self.copy_group) == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether embeddings and losses are found here."""
        return self.pp_rank == self.pp_size - 1

    def from_last_stage(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of the last stage on all stages; elsewhere `tensor` says shape and dtype."""
        if self.pp_size > 1:
            last = dist.get_global_rank(self.pp_group, self.pp_size - 1)
            dist.broadcast(tensor, last, group=self.pp_group)
        return tensor

    def agree(self, numbers: torch.Tensor) -> torch.Tensor:
        """Sum int64 or float64 CPU numbers over all ranks."""
        if self.world > 1:
            dist.all_reduce(numbers, group=self.control_group)
        return numbers

    def wait_for_all(self) -> None:
        """Return when every rank is here. The `barrier` of torch would begin with a tensor on the card."""
        self.agree(torch.zeros(1, dtype=torch.int64))

    def of_all(self, mine: Any) -> list[Any]:
        """What each rank gives, rank 0 first, on every rank; it must pickle."""
        everyone = [mine] * self.world
        if self.world > 1:
            dist.all_gather_object(everyone, mine, group=self.control_group)
        return everyone

    def of_first(self, mine: Any) -> Any:
        """What rank 0 gives, on every rank; it must pickle."""
        told = [mine]
        if self.world > 1:
            dist.broadcast_object_list(told, src=0, group=self.control_group)
        return told[0]


def world_size() -> int:
    """How many ranks the launcher started (1 without one)."""
    return this_job().world


def pick_device(asked: str) -> torch.device:
    """The device of this rank for run.device=auto, cpu or cuda: its own card, or the CPU.

    Raises RequestError for cuda where torch finds no GPU, or none for this rank.
    """
    cuda = torch.cuda.is_available()
    if asked == "cuda" and not cuda:
        raise RequestError("run.device is cuda, but torch finds no GPU here: use run.device=cpu or auto")
    if asked == "cpu" or not cuda:
        return torch.device("cpu")
    job, cards = this_job(), torch.cuda.device_count()
    if job.local_rank is None and job.is_one_of_several:
        raise RequestError("LOCAL_RANK is not set, so this rank does not know its GPU: use --nproc, torchrun or srun")
    # srun --gpus-per-task shows each task its own card, as the only one
    card = 0 if job.by == "srun" and cards == 1 else job.local_rank or 0
    if card >= cards:
        raise RequestError(f"LOCAL_RANK is {card}, but torch finds {cards} GPU(s): start at most {cards} ranks here")
    return torch.device("cuda", card)


def start_ranks(
    layout: Layout, device: torch.device, timeout: timedelta = TIMEOUT, patience: float = TIMEOUT.total_seconds()
) -> Ranks:
    """Join the other ranks and make the groups of a layout. A single rank needs no launcher and opens no port.

    `timeout`: how long a collective waits for a rank that does not come; `patience`: for how many seconds ranks wait
    for each other at the start. Raises WeftError that names a rank which failed before, did not come, or has another
    layout.
    """
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    if device.type == "cpu":
        enable_cpu()
    else:
        _prepare_card(device)
    # deepspeed/runtime/engine.py:1972 wants what a launcher sets; a single rank has none
    os.environ.setdefault("LOCAL_RANK", "0")
    if parallel_state.model_parallel_is_initialized():  # of a model that was loaded before (`start_alone`)
        parallel_state.destroy_model_parallel()
    before = _groups()
    if not dist.is_initialized():
        _join_all(layout, device, timeout, patience)
    logging.getLogger("megatron.core").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=layout.tp,
            pipeline_model_parallel_size=layout.pp,
            virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
            context_parallel_size=layout.cp,
            create_gloo_process_groups=False,  # second groups for its own checkpoints, which nothing here uses
            distributed_timeout_minutes=math.ceil(timeout.total_seconds() / 60),
        )
    # with tensor parallel ranks Megatron-core's layers fork random streams of its own tracker
    model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    in_end_stages = parallel_state.is_rank_in_embedding_group(ignore_virtual=True) and layout.pp > 1
    return Ranks(
        rank=dist.get_rank(),
        world=dist.get_world_size(),
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
        zero_rank=parallel_state.get_data_parallel_rank(with_context_parallel=True),
        zero_size=parallel_state.get_data_parallel_world_size(with_context_parallel=True),
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp_size=parallel_state.get_tensor_model_parallel_world_size(),
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pp_size=parallel_state.get_pipeline_model_parallel_world_size(),
        device=device,
        dp_group=parallel_state.get_data_parallel_group(),
        zero_group=parallel_state.get_data_parallel_group(with_context_parallel=True),
        tp_group=parallel_state.get_tensor_model_parallel_group(),
        pp_group=parallel_state.get_pipeline_model_parallel_group(),
        model_group=parallel_state.get_model_parallel_group(),
        same_rows_group=parallel_state.get_tensor_and_context_parallel_group(),
        all_rows_group=parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True),
        end_stages_group=parallel_state.get_embedding_group() if in_end_stages else None,
        copy_group=_copy_group(layout, timeout),
        control_group=dist.new_group(backend="gloo", timeout=timeout),
        made_groups=tuple(group for group in _groups() if group not in before),
    )


def _prepare_card(device: torch.device) -> None:
    """Make it this process's current one, before anything is allocated."""
    if not any(map(os.environ.get, ALLOCATOR_SETTINGS)):
        # packed captions have another length at each step, for which blocks of fixed segments would soon not fit
        torch._C._accelerator_setAllocatorSettings("expandable_segments:True")
    torch.cuda.set_device(device)


def _join_all(layout: Layout, device: torch.device, timeout: timedelta, patience: float) -> None:
    """Make the default group: gloo on CPU, NCCL on cards."""
    backend = "gloo" if device.type == "cpu" else "nccl"
    if layout.world == 1:
        # not bound to its card: torch would split each further group from this one, and NCCL has refused that to a
        # single rank (CUDA error 600, DeepSpeed issue 8248)
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        return
    job = this_job()
    store = meet(job, patience, {"the kind of device": device.type, "the layout": layout.sizes})
    dist.init_process_group(
        backend,
        store=store,
        rank=job.rank,
        world_size=job.world,
        timeout=timeout,
        # NCCL connects at once, and no barrier guesses a card
        device_id=None if device.type == "cpu" else device,
    )


def _copy_group(layout: Layout, timeout: timedelta) -> dist.ProcessGroup | None:
    """This rank's group of tp * cp * pp ranks; every rank makes those of all shares, as torch wants it."""
    if layout.world == layout.dp:
        return None
    # what ranks say to each other goes beside the cards, batches between them
    backend = "gloo" if dist.get_backend() == "gloo" else "cpu:gloo,cuda:nccl"
    inner = layout.tp * layout.cp  # ranks count through tp, cp, dp, pp
    mine = None
    for share in range(layout.dp):
        members = [place + inner * (share + layout.dp * stage) for stage in range(layout.pp) for place in range(inner)]
        group = dist.new_group(members, backend=backend, timeout=timeout)
        if dist.get_rank() in members:
            mine = group
    return mine


def start_alone(device: torch.device) -> Ranks:
    """The groups of a single process that only runs a model; Megatron-core's layers ask for them when they are built.

    Raises RequestError inside a job of several ranks.
    """
    if (job := this_job()).is_one_of_several:
        raise RequestError(
            f"this command runs in one process, but {job.by} has started this one as rank {job.rank} of {job.world}: "
            "start it once, without a launcher"
        )
    if device.type == "cuda" and device.index is None:  # which `set_device` does not take
        device = torch.device("cuda", torch.cuda.current_device())
    return start_ranks(Layout(world=1, dp=1, tp=1, zero=0, share=1, micro_batch=1), device)


def stop_ranks(ranks: Ranks) -> None:
    """Leave the groups of the layout: Megatron-core only forgets them, and each would keep its threads and sockets."""
    from megatron.core import parallel_state

    if sys.exception() is None:  # else the others may never come
        ranks.wait_for_all()  # nobody closes a socket that another still reads from
    parallel_state.destroy_model_parallel()
    default = dist.group.WORLD
    for group in ranks.made_groups:
        if group is not default and group in _groups():  # Megatron-core leaves some itself
            dist.destroy_process_group(group)
    if default in ranks.made_groups:
        dist.destroy_process_group()


def _groups() -> list[dist.ProcessGroup]:
    """All process groups that this process is a member of."""
    return list(dist.distributed_c10d._world.pg_map)


class DeepSpeedGroups:
    """`mpu` of `deepspeed.initialize`: the same groups under the names that DeepSpeed calls.

    `megatron.core.parallel_state` itself lacks some of them (`get_model_parallel_world_size`).
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self._ranks.model_group

    def get_model_parallel_rank(self) -> int:
        return dist.get_rank(self._ranks.model_group)

    def get_model_parallel_world_size(self) -> int:
        return dist.get_world_size(self._ranks.model_group)

    def get_tensor_model_parallel_group(self) -> dist.ProcessGroup:
        return self._ranks.tp_group

    def get_tensor_model_parallel_rank(self) -> int:
        return self._ranks.tp_rank

    def get_tensor_model_parallel_world_size(self) -> int:
        return self._ranks.tp_size

    def get_pipeline_model_parallel_group(self) -> dist.ProcessGroup:
        return self._ranks.pp_group

    def get_pipeline_model_parallel_rank(self) -> int:
        return self._ranks.pp_rank

    def get_pipeline_model_parallel_world_size(self) -> int:
        return self._ranks.pp_size

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self._ranks.zero_group

    def get_data_parallel_rank(self) -> int:
        return self._ranks.zero_rank

    def get_data_parallel_world_size(self) -> int:
        return self._ranks.zero_size
