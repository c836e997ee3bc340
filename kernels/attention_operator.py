"""weft::attention and weft::attention_backward: our own attention kernels as operators of torch.

One pair serves the backends that are not torch's function: "blocked" (plain torch), "triton", and "gluon", whose
backward is Triton's. To autograd and torch.compile they are opaque: no graph break, and no look inside. The
log-sum-exp carries no gradient, and the backward has none of its own.

Axes: B batch, H heads, G heads of keys, Q queries, S keys, K size of a head.
"""

from __future__ import annotations

from typing import Any

import torch

from kernels import attention_blocked
from kernels.attention_spec import Spec, laid_out_as
from kernels.precision import accumulator_of


@torch.library.custom_op("weft::attention", mutates_args=())
def attend(
    q_BHQK: torch.Tensor,
    k_BGSK: torch.Tensor,
    v_BGSK: torch.Tensor,
    key_lengths_B: torch.Tensor | None,
    query_starts: torch.Tensor | None,
    key_starts: torch.Tensor | None,
    seed: torch.Tensor | None,
    scale: float,
    causal: bool,
    window: int,
    soft_cap: float,
    dropout: float,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(output like q, log-sum-exp [B, H, Q] in fp32, or fp64 for fp64)."""
    spec = Spec(scale, causal, window, soft_cap, dropout)
    if backend == "gluon":
        from kernels.gpu import attention_gluon

        return attention_gluon.forward(q_BHQK, k_BGSK, v_BGSK, spec)
    with torch.autocast(q_BHQK.device.type, enabled=False):  # which would round the products of plain torch
        return _module(backend).forward(
            q_BHQK, k_BGSK, v_BGSK, spec,
            key_lengths_B=key_lengths_B, query_starts=query_starts, key_starts=key_starts, seed=seed,
        )  # fmt: skip


@torch.library.custom_op("weft::attention_backward", mutates_args=())
def attend_backward(
    grad_BHQK: torch.Tensor,
    q_BHQK: torch.Tensor,
    k_BGSK: torch.Tensor,
    v_BGSK: torch.Tensor,
    out_BHQK: torch.Tensor,
    lse_BHQ: torch.Tensor,
    key_lengths_B: torch.Tensor | None,
    query_starts: torch.Tensor | None,
    key_starts: torch.Tensor | None,
    seed: torch.Tensor | None,
    scale: float,
    causal: bool,
    window: int,
    soft_cap: float,
    dropout: float,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v."""
    spec = Spec(scale, causal, window, soft_cap, dropout)
    with torch.autocast(q_BHQK.device.type, enabled=False):
        return _module("triton" if backend == "gluon" else backend).backward(
            grad_BHQK, q_BHQK, k_BGSK, v_BGSK, out_BHQK, lse_BHQ, spec,
            key_lengths_B=key_lengths_B, query_starts=query_starts, key_starts=key_starts, seed=seed,
        )  # fmt: skip


def _module(backend: str) -> Any:
    if backend == "blocked":
        return attention_blocked
    from kernels.gpu import attention as attention_triton

    return attention_triton


@attend.register_fake
def _(q_BHQK: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return laid_out_as(q_BHQK), q_BHQK.new_empty(q_BHQK.shape[:3], dtype=accumulator_of(q_BHQK.dtype))


@attend_backward.register_fake
def _(
    grad_BHQK: torch.Tensor, q_BHQK: torch.Tensor, k_BGSK: torch.Tensor, v_BGSK: torch.Tensor, *_: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return laid_out_as(q_BHQK), laid_out_as(k_BGSK), laid_out_as(v_BGSK)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    q, k, v, *others = inputs
    tensors, ctx.settings = others[:4], others[4:]
    ctx.save_for_backward(q, k, v, *output, *tensors)
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx: Any, grad_BHQK: torch.Tensor, _: Any) -> tuple[torch.Tensor | None, ...]:
    return *attend_backward(grad_BHQK, *ctx.saved_tensors, *ctx.settings), *[None] * 10


attend.register_autograd(_gradients, setup_context=_save)
