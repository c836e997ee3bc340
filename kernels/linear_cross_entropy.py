"""Cross entropy of a linear layer, softmax(hidden weight^T + bias), in which the logits are never whole.

Row i has target t and logits z_iv = hidden_i . weight_v + bias_v, with a soft cap c tanh(z_iv / c). Then, with
lse_i = logsumexp_v z_iv, p_iv = exp(z_iv - lse_i), label smoothing e and z-loss weight k:

    loss_i    = lse_i - (1 - e) z_it - e / V sum_v z_iv + k lse_i^2
    dloss/dz  = (1 + 2 k lse_i) p_iv - (1 - e) [v = t] - e / V,  times 1 - (z_iv / c)^2 with a cap

Sources: Szegedy et al. 2016 (smoothing, section 7), Chowdhery et al. 2022, "PaLM" (z-loss, section 5), Shoeybi et al.
2019, "Megatron-LM" (the vocabulary over ranks), Hsu et al. 2024, "Liger Kernel" (gradients made in the forward).

Design choices:
- Chunks of rows. The matrix library makes a chunk of logits [C, V]; they become their own gradients g in place; then
  dhidden = g weight, dweight += g^T hidden. All of it in the forward, because there the logits exist: 6 N V D
  operations in all, and the backward only multiplies by a number (which takes another dweight for a moment). Gradients
  nobody asked for are not made. reduction="none" does not know its factors before the backward, which makes the logits
  anew: 8 N V D.
- The target is left out of the sum of exponentials. The loss is softplus(odds), odds = log sum_{v != t} exp z_iv
  - z_it, and g at the target comes from the odds too, so a token that is nearly certain keeps its digits where lse - z
  and p - 1 would be rounding noise.
- dweight and dbias are summed over chunks in fp32 (fp64 of fp64), dhidden over ranks too. Loss: fp32, or fp64.
- bf16 on a GPU: logits and g of the Triton kernel are bf16, as a plain linear layer's are; plain torch has them in
  fp32, twice the memory. On CPU bf16 is computed in fp32.
- Ranks exchange four numbers a row and chunk, [maximum, sum without the target, z at the target, sum of z], in one
  gather, and add them in rank order: every rank has the same bits. dhidden is all-reduced chunk by chunk, while the
  next chunk is computed.

Backends: "triton" (kernels/gpu/linear_cross_entropy.py; compiles for sm_80/90/100 and gfx942, not yet run on a GPU) and
"torch". Ways not taken: torch's own F.linear_cross_entropy (2.13 and later) chunks without smoothing, z-loss, cap or
ranks, and not under torch.compile; logits that stay inside the product kernel (Wijmans et al. 2024) need 8 N V D.

Axes: N rows, D size of a hidden state, V vocabulary (of this rank), C rows of a chunk, W ranks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from kernels.dispatch import AUTO, Choice, choose, chosen_by, no_triton, record, trial
from kernels.linear_cross_entropy_chunks import Loss, compare_with_torch, empty_gradients, run
from kernels.precision import accumulator_of

NAME = "linear_cross_entropy"
BACKENDS = ("triton", "torch")
DTYPES = (torch.bfloat16, torch.float32, torch.float64)


def _choice(hidden_ND: torch.Tensor, *_: Any, backend: str = AUTO, **__: Any) -> Choice:
    return choose(NAME, backend, BACKENDS, lambda name: _refusal(name, hidden_ND, named=backend != AUTO))


def _refusal(backend: str, hidden_ND: torch.Tensor, named: bool) -> str:
    """Why a backend cannot, or "". A named Triton may also run in the interpreter, and needs no trial."""
    if backend == "torch":
        return ""
    why_not = (
        no_triton(hidden_ND.device.type, hidden_ND.dtype) if named or hidden_ND.is_cuda else "it takes tensors on a GPU"
    )
    if why_not or named:
        return why_not
    device, dtype = hidden_ND.device, hidden_ND.dtype
    return trial(f"{NAME} in {dtype}", device, lambda: compare_with_torch(device, dtype))


@chosen_by(_choice)
def linear_cross_entropy(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    targets_N: torch.Tensor,
    *,
    bias_V: torch.Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    soft_cap: float | None = None,
    reduction: str = "mean",
    group: dist.ProcessGroup | None = None,
    backend: str = AUTO,
) -> torch.Tensor:
    """Cross entropy between softmax(hidden weight^T + bias) and the targets; fp32 (fp64 of fp64 hidden).

    hidden [N, D] bf16, fp32 or fp64; products are in its dtype (under autocast, in autocast's), whatever the weight's.
    targets: int64 or int32; rows with `ignore_index` have neither loss nor gradient. reduction: "mean" over the other
    rows (0 if there are none), "sum", or "none" for [N].
    group: the vocabulary is split over its ranks: each has its own rows of weight and bias, slices in rank order, maybe
    uneven; hidden and targets (ids of the whole vocabulary) are the same everywhere. Every rank returns the same loss,
    the whole gradient of hidden, and the gradient of its own rows of weight and bias.
    Raises ValueError for what does not fit together and, on CPU, for a target outside the vocabulary. On a GPU nobody
    looks, for that would stop the queue: the loss of such a row is inf.
    """
    _check(hidden_ND, weight_VD, targets_N, bias_V, label_smoothing, soft_cap, reduction)
    device = hidden_ND.device.type
    if hidden_ND.dtype == torch.float32 and torch.is_autocast_enabled(device):
        hidden_ND = hidden_ND.to(torch.get_autocast_dtype(device))
    group_name = "" if group is None or dist.get_world_size(group) == 1 else group.group_name
    settings = (label_smoothing, z_loss, soft_cap or 0.0, group_name, backend)
    factors_N = (targets_N != ignore_index).to(accumulator_of(hidden_ND.dtype))
    loss: torch.Tensor
    if reduction == "none":
        loss = _each(hidden_ND, weight_VD, bias_V, targets_N, factors_N, *settings)
        return loss
    if reduction == "mean":
        factors_N = factors_N / factors_N.sum().clamp(min=1)
    grad = torch.is_grad_enabled()
    wanted = [grad and each is not None and each.requires_grad for each in (hidden_ND, weight_VD, bias_V)]
    loss, *_ = _total(hidden_ND, weight_VD, bias_V, targets_N, factors_N, *settings, *wanted)
    return loss


def _check(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    targets_N: torch.Tensor,
    bias_V: torch.Tensor | None,
    label_smoothing: float,
    soft_cap: float | None,
    reduction: str,
) -> None:
    if hidden_ND.ndim != 2 or weight_VD.ndim != 2 or hidden_ND.shape[1] != weight_VD.shape[1]:
        raise ValueError(f"hidden {list(hidden_ND.shape)} and weight {list(weight_VD.shape)} must be [N, D] and [V, D]")
    if len(weight_VD) == 0:
        raise ValueError("weight has no rows: a vocabulary, and each rank's slice of it, needs one at least")
    if targets_N.shape != hidden_ND.shape[:1] or targets_N.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"targets {targets_N.dtype} {list(targets_N.shape)}: one int64 or int32 for each of {len(hidden_ND)} rows"
        )
    if bias_V is not None and bias_V.shape != weight_VD.shape[:1]:
        raise ValueError(f"bias {list(bias_V.shape)}: weight has {len(weight_VD)} rows")
    for name, dtype in (("hidden", hidden_ND.dtype), ("weight", weight_VD.dtype)):
        if dtype not in DTYPES:
            raise ValueError(f"{name} is {dtype}: bfloat16, float32 or float64 (in float16 a mean's gradients vanish)")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing {label_smoothing}: at least 0, below 1")
    if soft_cap is not None and soft_cap <= 0:
        raise ValueError(f"soft_cap {soft_cap}: above 0, or None for no cap")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction {reduction!r}: mean, sum or none")


# --- custom ops


@torch.library.custom_op("weft::linear_cross_entropy", mutates_args=())
def _total(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    factors: torch.Tensor,
    label_smoothing: float,
    z_loss: float,
    soft_cap: float,
    group_name: str,
    backend: str,
    want_hidden: bool,
    want_weight: bool,
    want_bias: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """sum_i factor_i loss_i and its gradients. A row with the factor 0 is left out."""
    loss = Loss(label_smoothing, z_loss, soft_cap)
    wanted = (want_hidden, want_weight, want_bias)
    chosen = record(_choice(hidden, backend=backend))
    losses_N, gradients = run(hidden, weight, bias, targets, factors, loss, group_name, chosen, wanted)
    return ((losses_N * factors).sum(), *gradients)


@_total.register_fake
def _(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    factors: torch.Tensor,
    *settings: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    return (factors.new_empty(()), *empty_gradients(hidden, weight, bias, settings[-3:]))


def _keep_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # zeros as large as the weight, for results that have no gradient
    ctx.save_for_backward(*output[1:])


@once_differentiable
def _scale_gradients(ctx: Any, dloss: torch.Tensor | None, *_: Any) -> tuple[torch.Tensor | None, ...]:
    needed = [need and dloss is not None for need in ctx.needs_input_grad[:3]]
    gradients = [each * dloss if need else None for each, need in zip(ctx.saved_tensors, needed, strict=True)]
    return (*gradients, *[None] * 10)


_total.register_autograd(_scale_gradients, setup_context=_keep_gradients)


@torch.library.custom_op("weft::linear_cross_entropy_rows", mutates_args=())
def _each(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    factors: torch.Tensor,
    label_smoothing: float,
    z_loss: float,
    soft_cap: float,
    group_name: str,
    backend: str,
) -> torch.Tensor:
    """[N] factor_i loss_i, without gradients."""
    loss = Loss(label_smoothing, z_loss, soft_cap)
    chosen = record(_choice(hidden, backend=backend))
    losses_N, _ = run(hidden, weight, bias, targets, factors, loss, group_name, chosen, (False, False, False))
    return losses_N * factors


@_each.register_fake
def _(hidden: torch.Tensor, weight: torch.Tensor, bias: Any, targets: Any, factors: torch.Tensor, *_: Any) -> Any:
    return torch.empty_like(factors)


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.settings = inputs[5:]


@once_differentiable
def _make_gradients(ctx: Any, dlosses_N: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    hidden, weight, bias, targets, factors = ctx.saved_tensors
    needed = [bool(need) for need in ctx.needs_input_grad[:3]]
    _, *gradients = _total(hidden, weight, bias, targets, factors * dlosses_N, *ctx.settings, *needed)
    return (*(each if need else None for each, need in zip(gradients, needed, strict=True)), *[None] * 7)


_each.register_autograd(_make_gradients, setup_context=_keep_inputs)
