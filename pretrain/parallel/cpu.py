"""Megatron-core 0.16 and DeepSpeed 0.19 without CUDA: the names they take for granted, in one place.

Each entry of `enable_cpu` stands for lines that name CUDA literally, or that ask for what a CPU machine lacks.
A process that trains on a GPU never calls it: the same code then runs unpatched.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import sys
import types
from typing import Any

import torch

CPU = torch.device("cpu")
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h


def enable_cpu() -> None:
    """Make both libraries run on CPU and gloo in this process, whatever the machine has. Again does nothing more."""
    # deepspeed/accelerator/real_accelerator.py guesses the accelerator at its first import; say it instead
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # tensor_parallel/random.py, parallel_state.py: `torch.cuda.current_device()` as the device of small tensors
    torch.cuda.current_device = lambda: CPU  # type: ignore[assignment, return-value]
    torch.cuda.synchronize = lambda device=None: None  # type: ignore[assignment]
    _random_state_on_cpu()
    _counters_on_cpu()
    _no_shared_memory_op()
    _keep_freed_memory()


def _keep_freed_memory() -> None:
    """Let glibc keep what a step frees for the next one, as torch's allocator does on a GPU.

    Activations of some MiB otherwise go back to the kernel and come again as fresh pages, to be zeroed at each step:
    7% of the CPU time of a quickstart step (`weft bench step`, AMD EPYC, 2 cores, 2026-11).
    """
    if not sys.platform.startswith("linux"):
        return
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):  # glibc; musl has no such dial
        library.mallopt(M_MMAP_THRESHOLD, 32 << 20)  # the largest that glibc takes
        library.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def _random_state_on_cpu() -> None:
    """tensor_parallel/random.py:90-150 reads and writes the CUDA generator; the CPU generator forks just the same."""
    import megatron.core.tensor_parallel.random as random

    random._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)
    torch.cuda.get_rng_state = lambda device="cuda": torch.get_rng_state()  # type: ignore[assignment]
    torch.cuda.manual_seed = lambda seed: torch.default_generator.manual_seed(int(seed))  # type: ignore[assignment, return-value]


def _counters_on_cpu() -> None:
    """pipeline_parallel/schedules.py:596, 983 and 2138 count tokens in a `torch.zeros([], device="cuda")`."""
    import megatron.core.pipeline_parallel.schedules as schedules

    class TorchOnCpu(types.ModuleType):
        def __getattr__(self, name: str) -> Any:
            return getattr(torch, name)

        @staticmethod
        def zeros(*size: Any, device: Any = None, **others: Any) -> torch.Tensor:
            return torch.zeros(*size, device=CPU, **others)

    schedules.torch = TorchOnCpu("torch")


def _no_shared_memory_op() -> None:
    """deepspeed/comm/torch.py:47 compiles a C++ all-reduce for CPU inference in every process that starts.

    Only `inference_all_reduce` uses it; training goes through gloo. Without it there is nothing to compile, no
    lock file to wait on, and no C++ compiler is needed.
    """
    # not `import deepspeed.comm.torch as ...`: the attribute of that name is torch itself
    deepspeed_torch = importlib.import_module("deepspeed.comm.torch")
    deepspeed_torch.build_shm_op = lambda: None  # type: ignore[attr-defined]
