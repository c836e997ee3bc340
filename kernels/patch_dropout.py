"""Patch dropout: an encoder sees a random subset of the patches of each sample.

    kept[b] = x[b, sorted(subset of round(keep * S) patches)]

Source: Li et al. 2023, "Scaling Language-Image Pre-training via Masking" (FLIP), section 3: half or three quarters of
the patches are removed, none is replaced by a mask token, and the rest keep their order and position embeddings (add
those before).

Design choices:
- No kernel of our own: one gather moves the kept rows, which is all the memory traffic there has to be, and its
  backward is the scatter. The choice of the subset reads no element of x.
- The subset is a function of seed, sample and patch, computed with integers (a hash by Chris Wellons, "lowbias32"), so
  it is the same on every device, in eager and compiled code, and when a step is replayed. No generator has a state
  that a checkpoint would have to keep.
- A seed in a tensor stays on its device: no synchronisation, and a CUDA graph that is replayed takes the new value.
  With one seed a sample, a sample loses the same patches in whatever batch it comes.

Axes: B batch, S tokens, D embedding size, P patches that may be dropped.
"""

from __future__ import annotations

import torch

_LOW_32 = 0xFFFFFFFF


def patch_dropout(
    x_BSD: torch.Tensor, keep: float, seed: int | torch.Tensor, *, first: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """(kept [B, S', D], indices int64 [B, S']): S' = first + max(1, round(keep * (S - first))) tokens of each sample.

    keep: the share of patches that stays, 0 < keep <= 1. first: tokens in front (a class token, registers) that always
    stay. seed: an int of 64 bits or an int64 tensor, scalar or one a sample [B]; every step, and every rank of a
    data-parallel group, needs another. The tokens keep their order; differentiable in x.
    Raises ValueError for a share or a count out of range, and a seed of another dtype or shape.
    """
    batch, tokens, size = _check(x_BSD, keep, seed, first)
    patches = tokens - first
    stay = max(1, round(keep * patches)) if patches else 0
    if not isinstance(seed, torch.Tensor):
        seed = torch.tensor(seed, dtype=torch.int64, device=x_BSD.device)
    chosen = _subset(seed.to(x_BSD.device), batch, patches, stay) + first
    always = torch.arange(first, device=x_BSD.device).expand(batch, first)
    indices = torch.cat([always, chosen], 1)
    return x_BSD.gather(1, indices[:, :, None].expand(-1, -1, size)), indices


def _check(x_BSD: torch.Tensor, keep: float, seed: int | torch.Tensor, first: int) -> tuple[int, int, int]:
    if x_BSD.ndim != 3:
        raise ValueError(f"patch_dropout: x is {list(x_BSD.shape)}: need [B, S, D]")
    batch, tokens, size = x_BSD.shape
    if not 0 < keep <= 1:
        raise ValueError(f"patch_dropout: keep is {keep}: it is the share that stays, above 0 and at most 1")
    if not 0 <= first <= tokens:
        raise ValueError(f"patch_dropout: first is {first}: need 0 to {tokens}, the number of tokens")
    if isinstance(seed, torch.Tensor) and (seed.dtype != torch.int64 or seed.shape not in ((), (batch,))):
        raise ValueError(f"patch_dropout: seed is {seed.dtype} {list(seed.shape)}: need int64 [] or [{batch}]")
    return batch, tokens, size


@torch.library.custom_op("weft::patch_subset", mutates_args=())
def _subset(seed: torch.Tensor, batch: int, patches: int, stay: int) -> torch.Tensor:
    """[B, stay]: patches in order. An operator so that Inductor does not unfold the hash, which takes it minutes."""
    order_BP = _keys(seed, batch, patches).argsort(1)
    return order_BP[:, :stay].sort(1).values


@_subset.register_fake
def _(seed: torch.Tensor, batch: int, patches: int, stay: int) -> torch.Tensor:
    return seed.new_empty((batch, stay))


def _keys(seed: torch.Tensor, batch: int, patches: int) -> torch.Tensor:
    """[B, P]: 32 random bits, all different within a sample; the smallest are kept."""
    device = seed.device
    sample_B = torch.arange(batch, device=device) if seed.ndim == 0 else torch.zeros_like(seed)
    state_B = _hash(_hash(_hash(seed & _LOW_32) ^ seed >> 32 & _LOW_32) ^ sample_B)
    # two numbers a sample that have nothing to do with each other: of hash(p ^ a) ^ hash(a), patch 0 would always be 0
    inner_B, outer_B = _hash(state_B ^ 0x9E3779B9), _hash(state_B ^ 0x85EBCA6B)
    patch_BP = torch.arange(patches, device=device).expand(batch, patches)
    return _hash(_hash(patch_BP ^ inner_B[:, None]) ^ outer_B[:, None])  # one to one in the patch: no ties


def _hash(bits: torch.Tensor) -> torch.Tensor:
    """Mix 32 bits, one to one; they are held in int64, whose products do not overflow as the factors are below 2^31."""
    bits = bits ^ bits >> 16
    bits = bits * 0x7FEB352D & _LOW_32
    bits = bits ^ bits >> 15
    bits = bits * (0x846CA68B - 2**32) & _LOW_32  # the same product modulo 2^32
    return bits ^ bits >> 16
