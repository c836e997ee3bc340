"""What launchers ask: which GPU this is (its name in kernels.aot.TARGETS), the dtype of sums, how memory is aligned."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import triton
import triton.language as tl

ACCUMULATORS = {
    torch.bfloat16: tl.float32,
    torch.float16: tl.float32,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}  # kernels.precision.accumulator_of in Triton's words


@triton.jit
def _probe() -> None:
    pass


INTERPRETED = not isinstance(_probe, triton.JITFunction)  # TRITON_INTERPRET=1 was set when Triton was imported


def target_of(tensor: torch.Tensor) -> str:
    """The entry of TARGETS that is nearest to the tensor's GPU; "interpreter" where there is none.

    Consumer chips take the configurations of sm_80, whose shared memory is the smallest; a few of them are too large
    for it even so, and say so when they are launched.
    """
    if not tensor.is_cuda:
        return "interpreter"
    if torch.version.hip:
        return "gfx942"
    major, _ = torch.cuda.get_device_capability(tensor.device)
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_80")


def unit_of(*strides: int, of: Iterable[torch.Tensor | None] = ()) -> int:
    """8 if every stride is a multiple of it and every tensor `of` starts at a multiple of 16 bytes, else 1."""
    aligned = all(each is None or starts_at_16_bytes(each) for each in of)
    return 8 if aligned and all(stride % 8 == 0 for stride in strides) else 1


def dense(tensor: torch.Tensor) -> torch.Tensor:
    """Its elements side by side, from a multiple of 16 bytes on: for another start Triton compiles another kernel."""
    return tensor.contiguous() if starts_at_16_bytes(tensor) else tensor.clone(memory_format=torch.contiguous_format)


def starts_at_16_bytes(tensor: torch.Tensor) -> bool:
    return tensor.data_ptr() % 16 == 0
