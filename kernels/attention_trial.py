"""The trial that a kernel of attention passes on a card before "auto" trusts it: values and gradients against fp64.

Once for each backend, dtype, size of a head and set of options, because each of these is another kernel. The relative
error allowed is several times the rounding of the dtype (of TF32 for fp32) and far below that of a wrong mask.

Ours are tried, and torch's own, which differ between its versions. cuDNN's have given nan where a log-sum-exp is far
below 0 (pytorch #196678, cudnn-frontend #1072), which those of random scores never are: SHIFT is added to theirs.
"""

from __future__ import annotations

import functools

import torch

from kernels import attention_sdpa, reference
from kernels.attention_operator import attend
from kernels.attention_spec import Spec
from kernels.dispatch import constant_when_compiled, must_agree, trial

LIMITS = {torch.bfloat16: 9e-3, torch.float16: 5e-3, torch.float32: 8e-3, torch.float64: 1e-5}
LENGTH = 200  # a few tiles, and a part of one
LENGTHS_OF_TORCHS = (64, 192, 200, 257)  # also where the last tile is half full, or has one row
SHIFT = -120.0  # exp of its opposite is no number in fp32
WINDOW, SOFT_CAP, DROPOUT = 70, 5.0, 0.25
LENGTHS, STARTS = (200, 77), (0, 3, 130, 200)


@constant_when_compiled
def trust(backend: str, device: torch.device, dtype: torch.dtype, size: int, traits: tuple[str, ...]) -> str:
    """Why "auto" does not trust this kernel, or "". The first call runs it; torch.compile takes the result as it is."""
    name = f"attention by {backend} ({', '.join((str(dtype), f'heads of {size}', *traits))})"
    return trial(name, device, functools.partial(compare, backend, device, dtype, size, traits))


def compare(backend: str, device: torch.device, dtype: torch.dtype, size: int, traits: tuple[str, ...]) -> None:
    """Raises ArithmeticError where the output or a gradient is off."""
    for length in LENGTHS_OF_TORCHS if backend in attention_sdpa.FUSED else (LENGTH,):
        _compare(backend, device, dtype, size, traits, length)


def _compare(
    backend: str, device: torch.device, dtype: torch.dtype, size: int, traits: tuple[str, ...], length: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    batch = 1 if "documents" in traits else 2
    torchs = backend in attention_sdpa.FUSED
    heads, shared = 2, 2 if torchs and "shared keys" not in traits else 1
    drawn = [torch.randn(batch, each, length, size, generator=generator) for each in (heads, shared, shared)]
    if torchs:
        drawn[0][..., 0], drawn[1][..., 0] = 4 * SHIFT, size**0.5 / 4
    lengths = torch.tensor(LENGTHS, device=device) if "key lengths" in traits else None
    starts = torch.tensor(STARTS, dtype=torch.int32, device=device) if "documents" in traits else None
    causal, window = "causal" in traits, WINDOW if "window" in traits else 0
    soft_cap, dropout = SOFT_CAP if "soft cap" in traits else 0.0, DROPOUT if "dropout" in traits else 0.0
    seed = torch.zeros((), dtype=torch.int64, device=device) if dropout else None
    scale = size**-0.5

    def mine(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> list[torch.Tensor]:
        if torchs:
            return [attention_sdpa.run(backend, q, k, v, Spec(scale, causal), None)]
        return [attend(q, k, v, lengths, starts, starts, seed, scale, causal, window, soft_cap, dropout, backend)[0]]

    seen = reference.attention_mask(
        length, length, causal=causal, window=window or None, key_lengths_B=lengths, query_starts=starts
    ).to(device)
    keep = None
    if seed is not None:
        from kernels.gpu.attention import dropout_keep

        keep = dropout_keep((batch, heads, length, length), dropout, seed)

    def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> list[torch.Tensor]:
        out, _ = reference.attention_with_options(
            q, k, v, seen, scale=scale, soft_cap=soft_cap or None, keep=keep, dropout=dropout
        )
        return [out.float()]

    must_agree(mine, plain, [each.to(device, dtype) for each in drawn], LIMITS[dtype])
