"""Calls of the Triton attention kernels and of their fp64 definition: `from attention_calls import check`."""

from __future__ import annotations

from typing import Any

import torch

from kernels.attention_spec import Spec
from kernels.gpu.attention import backward, dropout_keep, forward, refusal
from kernels.reference import attention_mask, attention_with_options

CLOSE = 5e-6  # relative error allowed to fp32
NAMES = ("out", "dq", "dk", "dv")
SEED = torch.tensor(77 + (5 << 33))


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """q, k, v and the gradient of the output for (batch, heads, heads of keys, queries, keys, size of a head)."""
    batch, heads, kv_heads, queries, keys, size = shape
    generator = torch.Generator().manual_seed(sum(shape))
    shapes = ((heads, queries), (kv_heads, keys), (kv_heads, keys), (heads, queries))
    return [torch.randn(batch, *each, size, generator=generator).to(dtype) for each in shapes]


def run(tensors: list[torch.Tensor], where: dict[str, torch.Tensor] | None = None, **settings: Any) -> list[Any]:
    """Output and gradients of q, k and v, and the log-sum-exp. `where`: lengths, starts and seed."""
    q, k, v, grad = tensors
    spec = Spec(**{"scale": q.shape[-1] ** -0.5, **settings})
    assert refusal(q, k, v, spec, **(where or {})) == ""
    out, lse = forward(q, k, v, spec, **(where or {}))
    assert lse.dtype == (torch.float64 if q.dtype == torch.float64 else torch.float32)
    return [out, *backward(grad, q, k, v, out, lse, spec, **(where or {})), lse]


def run_reference(tensors: list[torch.Tensor], where: dict[str, torch.Tensor], **settings: Any) -> list[Any]:
    """The same in plain fp64."""
    leaves = [each.double().detach().requires_grad_() for each in tensors[:3]]
    queries, keys = tensors[0].shape[2], tensors[1].shape[2]
    window, dropout = settings.get("window", 0) or None, settings.get("dropout", 0.0)
    places = {name: tensor for name, tensor in where.items() if name != "seed"}
    seen = attention_mask(queries, keys, causal=settings.get("causal", False), window=window, **places)
    keep = dropout_keep((*tensors[0].shape[:3], keys), dropout, where["seed"]) if dropout else None
    out, lse = attention_with_options(
        *leaves,
        seen,
        scale=settings.get("scale"),
        soft_cap=settings.get("soft_cap") or None,
        keep=keep,
        dropout=dropout,
    )
    out.backward(tensors[3].double())
    return [out.detach(), *(leaf.grad for leaf in leaves), lse.detach()]


def assert_close(mine: list[torch.Tensor], truth: list[torch.Tensor], limit: float = CLOSE) -> None:
    for name, a, b in zip(NAMES, mine, truth, strict=False):
        assert a.isfinite().all(), name
        error = (a.double() - b.double()).norm() / b.double().norm().clamp(min=1)  # of one key, dq is exactly 0
        assert error <= limit, f"{name} is off by {error:.2e}"
    torch.testing.assert_close(mine[4].double(), truth[4].double(), atol=2 * limit, rtol=limit)  # -inf where blind


def check(
    *shape: int, dtype: torch.dtype = torch.float32, limit: float = CLOSE, where: Any = None, **settings: Any
) -> list[torch.Tensor]:
    tensors = draw(*shape, dtype=dtype)
    mine = run(tensors, where, **settings)
    assert_close(mine, run_reference(tensors, where or {}, **settings), limit)
    return mine


def starts(*places: int) -> torch.Tensor:
    return torch.tensor(places, dtype=torch.int32)


# short ones, one without keys, one without queries, and rows behind the last
PACKED = {"query_starts": starts(0, 3, 67, 67, 90), "key_starts": starts(0, 64, 64, 66, 140)}
