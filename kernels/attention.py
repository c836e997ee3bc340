"""Scaled dot-product attention: softmax(q k^T / sqrt(K)) v.

Source: Vaswani et al. 2017, "Attention Is All You Need", equation 1. Here by way of torch's fused
`scaled_dot_product_attention`, which picks FlashAttention or cuDNN on a GPU and a blocked kernel on CPU; our own
kernels will come in behind this one function.

Axes: B batch, H heads, Q queries, S keys, K size of a head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def attention(
    q_BHQK: torch.Tensor,
    k_BHSK: torch.Tensor,
    v_BHSK: torch.Tensor,
    *,
    causal: bool = False,
    key_lengths_B: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention output [B, H, Q, K] in the inputs' dtype.

    `causal`: query i sees keys up to i + S - Q (bottom-right aligned). `key_lengths_B` (int [B]): sample b has only
    its first key_lengths_B[b] keys; with 0 keys its output, and its gradient, are 0.
    Raises ValueError for both at once, which nothing here needs.
    """
    if key_lengths_B is None:
        if not causal or q_BHQK.shape[2] == k_BHSK.shape[2]:
            return F.scaled_dot_product_attention(q_BHQK, k_BHSK, v_BHSK, is_causal=causal)
        queries, keys = q_BHQK.shape[2], k_BHSK.shape[2]
        seen_QS = torch.ones(queries, keys, dtype=torch.bool, device=q_BHQK.device).tril(keys - queries)
        return _masked(q_BHQK, k_BHSK, v_BHSK, seen_QS)
    if causal:
        raise ValueError("causal attention with key_lengths: padding behind the end is never seen by a causal query")
    places_S = torch.arange(k_BHSK.shape[2], device=k_BHSK.device)
    return _masked(q_BHQK, k_BHSK, v_BHSK, (places_S < key_lengths_B[:, None])[:, None, None])


def _masked(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """Attention over the keys that are seen (bool, broadcast to [B, H, Q, S]); a row that sees none gives 0."""
    sees_any = seen.any(-1, keepdim=True)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen | ~sees_any)
    return torch.where(sees_any, out, 0)
