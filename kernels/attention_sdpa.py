"""Attention by way of torch's `scaled_dot_product_attention`: its own choice of kernel, or one of its kernels alone.

    sdpa        torch chooses; key lengths, and causal with Q other than S, as a mask, which cuDNN does not get
    cudnn       cuDNN's: bf16 and fp16, sm_80 and newer; refuses in deterministic mode
    flash       FlashAttention 2: bf16 and fp16, sm_80 and newer; ordered sums in deterministic mode
    efficient   the memory-efficient one, also fp32; ordered sums in deterministic mode

What a kernel takes differs between cards and versions of torch, so behind our own reasons stands torch's word
(`torch.backends.cuda.can_use_*_attention`), asked once for a card, dtype, size of a head and mask.

Axes: B batch, H heads, G heads of keys, Q queries, S keys, K size of a head.
"""

from __future__ import annotations

import contextlib
import functools
import warnings

import torch
import torch.nn.functional as F
from torch.backends.cuda import (
    SDPAParams,
    can_use_cudnn_attention,
    can_use_efficient_attention,
    can_use_flash_attention,
)
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels.attention_spec import Spec
from kernels.dispatch import constant_when_compiled

FUSED = {
    "cudnn": (SDPBackend.CUDNN_ATTENTION, can_use_cudnn_attention),
    "flash": (SDPBackend.FLASH_ATTENTION, can_use_flash_attention),
    "efficient": (SDPBackend.EFFICIENT_ATTENTION, can_use_efficient_attention),
}
HALF = (torch.bfloat16, torch.float16)
# cuDNN's backward gives nan with a mask where a log-sum-exp is below -88 (torch 2.11 on H100, pytorch #196678)
WITH_MASK = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def run(
    backend: str,
    q_BHQK: torch.Tensor,
    k_BGSK: torch.Tensor,
    v_BGSK: torch.Tensor,
    spec: Spec,
    key_lengths_B: torch.Tensor | None,
) -> torch.Tensor:
    """The output, where `refusal` had nothing against it."""
    shared = True if q_BHQK.shape[1] != k_BGSK.shape[1] else False  # noqa: SIM210 a bool, where shapes are symbols
    if backend in FUSED:
        with sdpa_kernel(FUSED[backend][0]):
            return F.scaled_dot_product_attention(
                q_BHQK, k_BGSK, v_BGSK, is_causal=spec.causal, scale=spec.scale, enable_gqa=shared
            )
    queries, keys = q_BHQK.shape[2], k_BGSK.shape[2]
    if key_lengths_B is not None:
        seen = (torch.arange(keys, device=k_BGSK.device) < key_lengths_B[:, None])[:, None, None]
    elif spec.causal and queries != keys:
        seen = torch.ones(queries, keys, dtype=torch.bool, device=q_BHQK.device).tril(keys - queries)
    else:
        return F.scaled_dot_product_attention(
            q_BHQK, k_BGSK, v_BGSK, is_causal=spec.causal, scale=spec.scale, enable_gqa=shared
        )
    sees_any = seen.any(-1, keepdim=True)
    with sdpa_kernel(WITH_MASK) if q_BHQK.is_cuda else contextlib.nullcontext():
        out = F.scaled_dot_product_attention(
            q_BHQK, k_BGSK, v_BGSK, attn_mask=seen | ~sees_any, scale=spec.scale, enable_gqa=shared
        )
    return torch.where(sees_any, out, 0)


def refusal(
    backend: str,
    q_BHQK: torch.Tensor,
    k_BGSK: torch.Tensor,
    v_BGSK: torch.Tensor,
    spec: Spec,
    *,
    lengths: bool,
    documents: bool,
    return_lse: bool,
) -> str:
    """Why torch's kernel cannot do this, or ""."""
    if return_lse:
        return "torch's function returns no log-sum-exp"
    if spec.window:
        return "torch's function takes no window"
    if spec.soft_cap:
        return "torch's function takes no soft cap"
    if documents:
        return "torch's function takes no packed documents"
    if spec.dropout:
        return "torch's dropout draws from the global generator, not from a seed"
    if q_BHQK.shape[2] == 0 or k_BGSK.shape[2] == 0:
        return "there are no queries or no keys"
    if backend == "sdpa":
        return "causal with key lengths would need a mask of B x Q x S" if lengths and spec.causal else ""
    return _fused_refusal(backend, q_BHQK, k_BGSK, v_BGSK, spec, lengths)


def _fused_refusal(
    backend: str, q_BHQK: torch.Tensor, k_BGSK: torch.Tensor, v_BGSK: torch.Tensor, spec: Spec, lengths: bool
) -> str:
    if not q_BHQK.is_cuda:
        return f"the tensors are on {q_BHQK.device.type}: it needs a GPU"
    if lengths:
        return "it takes no key lengths" if backend != "efficient" else "it takes key lengths as a mask: that is sdpa"
    if spec.causal and q_BHQK.shape[2] != k_BGSK.shape[2]:
        return f"causal with {q_BHQK.shape[2]} queries and {k_BGSK.shape[2]} keys: it would align them to the top left"
    if q_BHQK.dtype not in (dtypes := HALF if backend != "efficient" else (*HALF, torch.float32)):
        return f"q is {q_BHQK.dtype}: it takes {', '.join(map(str, dtypes))}"
    if q_BHQK.stride(3) != 1 or k_BGSK.stride(3) != 1 or v_BGSK.stride(3) != 1:
        return "the elements of a head must lie side by side"
    if backend == "cudnn" and q_BHQK.shape[2] == 1:
        return "one query: its backward gives nan where a log-sum-exp is far below 0 (cudnn-frontend #1072)"
    if backend == "cudnn" and torch.are_deterministic_algorithms_enabled():
        return "deterministic mode: its backward adds in no fixed order"
    shared = True if q_BHQK.shape[1] != k_BGSK.shape[1] else False  # noqa: SIM210 a bool, where shapes are symbols
    return torchs_word(backend, q_BHQK.device, q_BHQK.dtype, q_BHQK.shape[3], spec.causal, shared)


@constant_when_compiled
def torchs_word(backend: str, device: torch.device, dtype: torch.dtype, size: int, causal: bool, shared: bool) -> str:
    """Why torch would not run this kernel on such tensors, in its own words, or ""."""
    return _torchs_word(backend, device, dtype, size, causal, shared)


@functools.cache
def _torchs_word(backend: str, device: torch.device, dtype: torch.dtype, size: int, causal: bool, shared: bool) -> str:
    q, k, v = (
        torch.zeros(1, heads, 64, size, dtype=dtype, device=device, requires_grad=True)
        for heads in ((2, 1, 1) if shared else (2, 2, 2))
    )
    params = SDPAParams(q, k, v, None, 0.0, causal, shared)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        can = FUSED[backend][1](params, True)
    if can:
        return ""
    return f"torch: {said[0].message}" if said else f"torch refuses {dtype} with heads of {size} on {device}"
