"""The trial that our own attention kernels pass on a card before "auto" trusts them: values and gradients against fp64.

Once for each backend, dtype, size of a head and set of options, because each of these is another kernel. The relative
error allowed is several times the rounding of the dtype (of TF32 for fp32) and far below that of a wrong mask.
"""

from __future__ import annotations

import functools

import torch

from kernels import reference
from kernels.attention_operator import attend
from kernels.dispatch import constant_when_compiled, must_agree, trial

LIMITS = {torch.bfloat16: 2e-2, torch.float16: 5e-3, torch.float32: 5e-3, torch.float64: 1e-5}
LENGTH = 200  # a few tiles, and a part of one
WINDOW, SOFT_CAP, DROPOUT = 70, 5.0, 0.25
LENGTHS, STARTS = (200, 77), (0, 3, 130, 200)


@constant_when_compiled
def trust(backend: str, device: torch.device, dtype: torch.dtype, size: int, traits: tuple[str, ...]) -> str:
    """Why "auto" does not trust this kernel, or "". The first call runs it; torch.compile takes the result as it is."""
    name = f"attention by {backend} ({', '.join((str(dtype), f'heads of {size}', *traits))})"
    return trial(name, device, functools.partial(compare, backend, device, dtype, size, traits))


def compare(backend: str, device: torch.device, dtype: torch.dtype, size: int, traits: tuple[str, ...]) -> None:
    """Raises ArithmeticError where the output or a gradient is off."""
    generator = torch.Generator().manual_seed(0)
    batch = 1 if "documents" in traits else 2
    heads, shared = 2, 1
    drawn = [torch.randn(batch, each, LENGTH, size, generator=generator) for each in (heads, shared, shared)]
    lengths = torch.tensor(LENGTHS, device=device) if "key lengths" in traits else None
    starts = torch.tensor(STARTS, dtype=torch.int32, device=device) if "documents" in traits else None
    causal, window = "causal" in traits, WINDOW if "window" in traits else 0
    soft_cap, dropout = SOFT_CAP if "soft cap" in traits else 0.0, DROPOUT if "dropout" in traits else 0.0
    seed = torch.zeros((), dtype=torch.int64, device=device) if dropout else None
    scale = size**-0.5

    def mine(*qkv: torch.Tensor) -> list[torch.Tensor]:
        return [attend(*qkv, lengths, starts, starts, seed, scale, causal, window, soft_cap, dropout, backend)[0]]

    seen = reference.attention_mask(
        LENGTH, LENGTH, causal=causal, window=window or None, key_lengths_B=lengths, query_starts=starts
    ).to(device)
    keep = None
    if seed is not None:
        from kernels.gpu.attention import dropout_keep

        keep = dropout_keep((batch, heads, LENGTH, LENGTH), dropout, seed)

    def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> list[torch.Tensor]:
        out, _ = reference.attention_with_options(
            q, k, v, seen, scale=scale, soft_cap=soft_cap or None, keep=keep, dropout=dropout
        )
        return [out.float()]

    must_agree(mine, plain, [each.to(device, dtype) for each in drawn], LIMITS[dtype])
