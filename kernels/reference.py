"""Plain fp64 definitions of the operations, for tests: short, slow, the whole matrix in memory, and obviously right.

Axes: N samples, D embedding size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor | None = None) -> torch.Tensor:
    """softmax(q k^T / sqrt(K)) v in fp64; `seen` (bool, broadcast to [B, H, Q, S]) says which keys a query sees."""
    q, k, v = q.double(), k.double(), v.double()
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    if seen is not None:
        scores = scores.masked_fill(~seen, -torch.inf)
    return torch.nan_to_num(scores.softmax(-1)) @ v


def contrastive_loss(
    x_ND: torch.Tensor,
    y_ND: torch.Tensor,
    scale: torch.Tensor,
    label_smoothing: float = 0.0,
    negatives_MD: torch.Tensor | None = None,
) -> torch.Tensor:
    """InfoNCE both ways (Radford et al. 2021, figure 3); negatives are more wrong answers for x."""
    columns = y_ND if negatives_MD is None else torch.cat([y_ND, negatives_MD])
    logits = scale.double() * x_ND.double() @ columns.double().T
    own = torch.arange(len(logits), device=logits.device)
    one_way = F.cross_entropy(logits, own, label_smoothing=label_smoothing)
    return (one_way + F.cross_entropy(logits[:, : len(own)].T, own, label_smoothing=label_smoothing)) / 2


def sigmoid_loss(
    x_ND: torch.Tensor,
    y_ND: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor,
    negatives_MD: torch.Tensor | None = None,
) -> torch.Tensor:
    """Pairwise sigmoid loss (Zhai et al. 2023, algorithm 1); negatives are wrong answers for every x."""
    columns = y_ND if negatives_MD is None else torch.cat([y_ND, negatives_MD])
    logits = scale.double() * x_ND.double() @ columns.double().T + bias.double()
    signs = 2 * torch.eye(*logits.shape, dtype=torch.float64, device=logits.device) - 1
    return -F.logsigmoid(signs * logits).sum() / len(logits)


def attention_mask(
    queries: int,
    keys: int,
    *,
    causal: bool = False,
    window: int | None = None,
    key_lengths_B: torch.Tensor | None = None,
    query_starts: torch.Tensor | None = None,
    key_starts: torch.Tensor | None = None,
) -> torch.Tensor:
    """[B or 1, 1, Q, S]: whether a query sees a key. A query's place among the keys is counted from the last."""
    if query_starts is not None:
        seen_QS = torch.zeros(queries, keys, dtype=torch.bool)
        q_places, k_places = query_starts.tolist(), (query_starts if key_starts is None else key_starts).tolist()
        for q_start, q_stop, k_start, k_stop in zip(q_places, q_places[1:], k_places, k_places[1:], strict=False):
            own = attention_mask(q_stop - q_start, k_stop - k_start, causal=causal, window=window)
            seen_QS[q_start:q_stop, k_start:k_stop] = own[0, 0]
        return seen_QS[None, None]
    behind_QS = (torch.arange(queries) + keys - queries)[:, None] - torch.arange(keys)
    seen = torch.ones(1, 1, queries, keys, dtype=torch.bool)
    if causal:
        seen = seen & (behind_QS >= 0)
    if window is not None:
        seen = seen & (behind_QS.abs() < window)
    if key_lengths_B is not None:
        seen = seen & (torch.arange(keys) < key_lengths_B.cpu()[:, None])[:, None, None]
    return seen


def attention_with_options(
    q_BHQK: torch.Tensor,
    k_BGSK: torch.Tensor,
    v_BGSK: torch.Tensor,
    seen: torch.Tensor,
    *,
    scale: float | None = None,
    soft_cap: float | None = None,
    keep: torch.Tensor | None = None,
    dropout: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(output, log-sum-exp); `seen` and `keep` (what dropout leaves) are bool, broadcast to [B, H, Q, S]."""
    q, k, v = q_BHQK.double(), k_BGSK.double(), v_BGSK.double()
    k, v = (each.repeat_interleave(q.shape[1] // each.shape[1], 1) for each in (k, v))
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if soft_cap is not None:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    scores = scores.masked_fill(~seen, -torch.inf)
    weights = torch.nan_to_num(scores.softmax(-1))
    if keep is not None:
        weights = weights * keep / (1 - dropout)
    return weights @ v, scores.logsumexp(-1)


def layer_norm(x: torch.Tensor, weight_D: torch.Tensor, bias_D: torch.Tensor, eps: float = 1e-5) -> torch.Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last axis (Ba et al. 2016, equation 4)."""
    x, weight_D, bias_D = x.double(), weight_D.double(), bias_D.double()
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * weight_D + bias_D


def rms_norm(x: torch.Tensor, weight_D: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis (Zhang and Sennrich 2019, equation 4)."""
    x, weight_D = x.double(), weight_D.double()
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight_D


def bias_gelu(x: torch.Tensor, bias_F: torch.Tensor, *, approximate: str = "none") -> torch.Tensor:
    """u Phi(u) of u = x + bias, or its approximation by tanh (Hendrycks and Gimpel 2016, section 2)."""
    u = x.double() + bias_F.double()
    if approximate == "tanh":
        return u / 2 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (u + 0.044715 * u**3)))
    return u / 2 * (1 + torch.erf(u / 2**0.5))


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up (Shazeer 2020, equation 6)."""
    gate, up = gate.double(), up.double()
    return gate / (1 + torch.exp(-gate)) * up


def rotary(
    x_BHSK: torch.Tensor, cos_SR: torch.Tensor, sin_SR: torch.Tensor, *, interleaved: bool = False
) -> torch.Tensor:
    """Pair r of a row turned by its angle, as a product of complex numbers (Su et al. 2021, section 3.2)."""
    x_BHSK, pairs = x_BHSK.double(), cos_SR.shape[-1]
    first, second = (0, 1) if interleaved else (0, pairs)
    places = torch.arange(pairs) * (2 if interleaved else 1)
    angles = torch.complex(cos_SR.double(), sin_SR.double())
    if angles.ndim == 3:  # by sample: the same for all heads
        angles = angles[:, None]
    turned = torch.complex(x_BHSK[..., places + first], x_BHSK[..., places + second]) * angles
    out_BHSK = x_BHSK.clone()
    out_BHSK[..., places + first] = turned.real
    out_BHSK[..., places + second] = turned.imag
    return out_BHSK


def linear_cross_entropy(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    targets_N: torch.Tensor,
    bias_V: torch.Tensor | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    soft_cap: float | None = None,
    reduction: str = "mean",
) -> torch.Tensor:
    """-log softmax of the linear layer at the targets (smoothed: Szegedy et al. 2016) + z_loss lse^2 (PaLM)."""
    logits = F.linear(hidden_ND.double(), weight_VD.double(), None if bias_V is None else bias_V.double())
    if soft_cap is not None:
        logits = soft_cap * torch.tanh(logits / soft_cap)
    kept_N = targets_N != ignore_index
    logs = logits.log_softmax(1)
    own_N = logs.gather(1, torch.where(kept_N, targets_N, 0)[:, None])[:, 0]
    losses_N = -(1 - label_smoothing) * own_N - label_smoothing * logs.mean(1) + z_loss * logits.logsumexp(1) ** 2
    losses_N = torch.where(kept_N, losses_N, 0)
    total = losses_N.sum()
    return {"none": losses_N, "sum": total, "mean": total / kept_N.sum().clamp(min=1)}[reduction]
