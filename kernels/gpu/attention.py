"""Attention as Triton kernels: softmax(scale q k^T) v and its gradients, O(Q + S) memory.

Source: Dao 2023, "FlashAttention-2". The kernels, and what is particular to them, are in attention_forward.py and
attention_backward.py, what they share in attention_blocks.py, their tile sizes in attention_tiles.py. Here they are
launched; kernels/attention.py makes an operator with gradients of it.

- Nothing waits for the device: key lengths, starts of documents and the seed are read by the kernels.
- All tiles compile for sm_80, sm_90, sm_100 and gfx942 without spilling registers, but for those that
  attention_spills.py lists. None has run on a GPU yet.

Axes: B batch, H heads, G heads of keys and values (H a multiple of G), Q queries, S keys, K size of a head.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton

from kernels.attention_spec import Spec, laid_out_as
from kernels.gpu.attention_backward import attention_delta_kernel, attention_dkdv_kernel, attention_dq_kernel
from kernels.gpu.attention_dropout import dropout_keep, threshold
from kernels.gpu.attention_forward import attention_forward_kernel
from kernels.gpu.attention_tiles import DELTA_ROWS, DKDV, DQ, FORWARD, Tile, choose, edge, parts
from kernels.gpu.target import ACCUMULATORS, INTERPRETED, dense, target_of, unit_of
from kernels.precision import accumulator_of, tf32_is_allowed

__all__ = ["aot_cases", "backward", "dropout_keep", "forward", "refusal", "shape_refusal"]
if TYPE_CHECKING:
    from kernels.aot import AotCase

LARGEST_HEAD = 256
LARGEST_WIDE_HEAD = 128  # of fp32 on a GPU: beyond it dq spills half a kilobyte a thread and more


def forward(
    q_BHQK: torch.Tensor,
    k_BGSK: torch.Tensor,
    v_BGSK: torch.Tensor,
    spec: Spec,
    *,
    key_lengths_B: torch.Tensor | None = None,
    query_starts: torch.Tensor | None = None,
    key_starts: torch.Tensor | None = None,
    seed: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(output [B, H, Q, K] laid out in memory as q is, log-sum-exp of the scores [B, H, Q] in fp32, fp64 for fp64).

    bf16, fp16, up to heads of 128 fp32; on a GPU heads of a multiple of 8, off it of any size, and fp64. Query head h
    reads head h // (H / G) of keys and values.
    `key_lengths_B` (int [B]): sample b has only its first key_lengths_B[b] keys.
    `query_starts` and `key_starts` (int [documents + 1], from 0 on, rising; the second as the first if None): the batch
    of one holds documents end to end, whose queries see their own document's keys only; causal and window count places
    within a document. Rows behind the last document belong to none.
    `seed` (int64 []): of the dropout; the same seed drops the same weights.
    A query that sees no key gives 0, and -inf for its log-sum-exp, which dropout does not touch.
    The caller has asked `refusal`, and kernels.dispatch.no_triton, before.
    """
    q, k, v = q_BHQK, k_BGSK, v_BGSK
    out = laid_out_as(q)
    lse = q.new_empty(q.shape[:3], dtype=accumulator_of(q.dtype))
    q, k, v = (_loadable(each) for each in (q, k, v))
    batch, heads, queries, _ = q.shape
    unit = _unit(q, k, v, out)
    call = _Call(q, k, spec, key_lengths_B, query_starts, key_starts, seed)
    tile = call.tile(FORWARD, queries)
    if out.numel():
        with torch.cuda.device_of(q):
            attention_forward_kernel[(batch * heads * call.programs(queries, tile),)](
                q, k, v, out, lse, *call.pointers, *_strides(unit, q, k, v, out), *call.numbers,
                UNIT=unit, ROWS=tile.own, KEYS=tile.step, EDGE=edge(tile, k.shape[2], call.ragged), **call.constants,
                num_warps=tile.warps, num_stages=tile.stages,
            )  # fmt: skip
    return out, lse


def backward(
    grad_BHQK: torch.Tensor,
    q_BHQK: torch.Tensor,
    k_BGSK: torch.Tensor,
    v_BGSK: torch.Tensor,
    out_BHQK: torch.Tensor,
    lse_BHQ: torch.Tensor,
    spec: Spec,
    *,
    key_lengths_B: torch.Tensor | None = None,
    query_starts: torch.Tensor | None = None,
    key_starts: torch.Tensor | None = None,
    seed: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v, laid out as these are, from that of the output and from what `forward` gave and got."""
    q, k, v = q_BHQK, k_BGSK, v_BGSK
    dq, dk, dv = (laid_out_as(each) for each in (q, k, v))
    lse = lse_BHQ.contiguous()
    delta = torch.empty_like(lse)
    grad, q, k, v, out = (_loadable(each) for each in (grad_BHQK, q, k, v, out_BHQK))
    batch, heads, queries, size = q.shape
    kv_heads, keys = k.shape[1:3]
    unit = _unit(q, k, v, grad, out, dq, dk, dv)
    call = _Call(q, k, spec, key_lengths_B, query_starts, key_starts, seed)
    dq_tile, dkdv_tile = call.tile(DQ, queries), call.tile(DKDV, keys)
    with torch.cuda.device_of(q):
        if dq.numel():
            attention_delta_kernel[(batch * heads * triton.cdiv(queries, DELTA_ROWS),)](
                grad, out, delta, *_strides(unit, grad, out), heads, queries,
                HEAD=size, WIDTH=triton.next_power_of_2(size), UNIT=unit, ROWS=DELTA_ROWS, ACC=call.constants["ACC"],
            )  # fmt: skip
            attention_dq_kernel[(batch * heads * call.programs(queries, dq_tile),)](
                q, k, v, grad, lse, delta, dq, *call.pointers, *_strides(unit, q, k, v, grad, dq), *call.numbers,
                UNIT=unit, ROWS=dq_tile.own, KEYS=dq_tile.step, EDGE=edge(dq_tile, keys, call.ragged), **call.constants,
                num_warps=dq_tile.warps, num_stages=dq_tile.stages,
            )  # fmt: skip
        if dk.numel():
            attention_dkdv_kernel[(batch * kv_heads * call.programs(keys, dkdv_tile),)](
                q, k, v, grad, lse, delta, dk, dv, *call.pointers, *_strides(unit, q, k, v, grad, dk, dv),
                *call.numbers, UNIT=unit, ROWS=dkdv_tile.step, KEYS=dkdv_tile.own, **call.constants,
                num_warps=dkdv_tile.warps, num_stages=dkdv_tile.stages,
            )  # fmt: skip
    return dq, dk, dv


def shape_refusal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> str:
    """Why such shapes do not fit each other, in words; empty when they do."""
    shapes = f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
    if not q.ndim == k.ndim == v.ndim == 4 or k.shape != v.shape or q.shape[::3] != k.shape[::3]:
        return f"{shapes}: need q [B, H, Q, K] and k and v [B, G, S, K]"
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        return f"{shapes}: the {q.shape[1]} heads are no multiple of the {k.shape[1]} heads of keys"
    return ""


def refusal(
    q_BHQK: torch.Tensor,
    k_BGSK: torch.Tensor,
    v_BGSK: torch.Tensor,
    spec: Spec,
    *,
    key_lengths_B: torch.Tensor | None = None,
    query_starts: torch.Tensor | None = None,
    key_starts: torch.Tensor | None = None,
    seed: torch.Tensor | None = None,
) -> str:
    """Why these kernels cannot do such a call, in words; empty when they can. Looks at no tensor's values."""
    q, k, v = q_BHQK, k_BGSK, v_BGSK
    if why_not := shape_refusal(q, k, v):
        return why_not
    if not 1 <= q.shape[3] <= LARGEST_HEAD:
        return f"heads of size {q.shape[3]}: sizes 1 to {LARGEST_HEAD} are there"
    if q.dtype not in ACCUMULATORS or not q.dtype == k.dtype == v.dtype:
        return f"q is {q.dtype}, k {k.dtype}, v {v.dtype}: need bfloat16, float16, float32 or float64 for all three"
    if q.device.type == "cuda" and q.shape[3] % 8:
        return f"heads of size {q.shape[3]} on a GPU: a multiple of 8 is needed to load them 16 bytes at a time"
    if q.device.type == "cuda" and q.element_size() > 2 and q.shape[3] > LARGEST_WIDE_HEAD:
        return f"heads of size {q.shape[3]} in {q.dtype}: sizes up to {LARGEST_WIDE_HEAD} are there, larger in 16 bits"
    if not q.is_cuda and not INTERPRETED:
        return f"the tensors are on {q.device}: Triton needs a GPU (or, for tests, TRITON_INTERPRET=1)"
    if not spec.scale > 0:
        return f"scale is {spec.scale}: it must be positive"
    if spec.window < 0 or spec.soft_cap < 0:
        return f"window is {spec.window}, soft_cap {spec.soft_cap}: need 0 (none) or more"
    if not 0 <= spec.dropout < 1:
        return f"dropout is {spec.dropout}: need a probability from 0 on, below 1"
    if spec.dropout and seed is None:
        return f"dropout is {spec.dropout} and there is no seed"
    if key_starts is not None and query_starts is None:
        return "key_starts without query_starts"
    if query_starts is not None:
        if q.shape[0] != 1 or key_lengths_B is not None:
            return f"documents are packed in a batch of 1 without key lengths; q is {list(q.shape)}"
        if key_starts is not None and key_starts.shape != query_starts.shape:
            return f"query_starts are {list(query_starts.shape)}, key_starts {list(key_starts.shape)}: need one shape"
        if query_starts.ndim != 1 or query_starts.shape[0] < 2:
            return f"query_starts are {list(query_starts.shape)}: need [documents + 1]"
    if key_lengths_B is not None and key_lengths_B.shape != q.shape[:1]:
        return f"key lengths are {list(key_lengths_B.shape)}: need [{q.shape[0]}]"
    if seed is not None and (seed.numel() != 1 or seed.dtype != torch.int64):
        return f"the seed is {seed.dtype} {list(seed.shape)}: need int64 []"
    integers = {"key_lengths": key_lengths_B, "query_starts": query_starts, "key_starts": key_starts}
    for name, tensor in integers.items():
        if tensor is not None and tensor.dtype not in (torch.int32, torch.int64):
            return f"{name} are {tensor.dtype}: need int32 or int64"
    for name, tensor in {"k": k, "v": v, "the seed": seed, **integers}.items():
        if tensor is not None and tensor.device != q.device:
            return f"{name} is on {tensor.device}, q on {q.device}: need one device"
    return ""


class _Call:
    """What the kernels of one call have in common."""

    def __init__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        spec: Spec,
        lengths: torch.Tensor | None,
        query_starts: torch.Tensor | None,
        key_starts: torch.Tensor | None,
        seed: torch.Tensor | None,
    ) -> None:
        queries, keys, size = q.shape[2], k.shape[2], q.shape[3]
        if key_starts is None:
            key_starts = query_starts
        given = (lengths, query_starts, key_starts, seed if spec.dropout else None)
        self.pointers = [None if each is None else dense(each) for each in given]
        window = spec.window if spec.window < max(queries, keys) else 0  # no two places are further apart
        left, right = parts(size)
        self.architecture, self.size, self.itemsize = target_of(q), size, q.element_size()
        self.documents = 0 if query_starts is None else query_starts.shape[0] - 1
        self.heavy = spec.soft_cap > 0 or spec.dropout > 0
        self.masked = window > 0 or lengths is not None or query_starts is not None
        self.causal, self.ragged = spec.causal, self.masked or spec.causal
        self.numbers = (
            q.shape[1], q.shape[1] // k.shape[1], queries, keys, self.documents, window, threshold(spec.dropout),
            spec.scale, spec.soft_cap,
        )  # fmt: skip
        self.constants = dict(
            HEAD=size, LEFT=left, RIGHT=right, CAUSAL=spec.causal, WINDOW=window > 0, CAP=spec.soft_cap > 0,
            DROP=spec.dropout > 0, **_numerics(q.dtype),
        )  # fmt: skip

    def tile(self, lists: dict[str, list[Tile]], length: int) -> Tile:
        """Where documents share out the length, that for one of mean length."""
        mean = length // max(self.documents, 1)
        tiles = lists[self.architecture]
        return choose(tiles, self.size, self.itemsize, mean, causal=self.causal, masked=self.masked, heavy=self.heavy)

    def programs(self, length: int, tile: Tile) -> int:
        """For one head; attention_blocks.slots says why."""
        return length // tile.own + self.documents + 1 if self.documents else triton.cdiv(length, tile.own)


def _loadable(tensor: torch.Tensor) -> torch.Tensor:
    """A copy where the elements of a row do not lie side by side, as in an expanded gradient, and where rows start at
    odd places: to load these one by one spills up to 3 KB a thread."""
    return tensor if tensor.stride(-1) == 1 and _unit(tensor) == 8 else dense(tensor)


def _unit(*tensors: torch.Tensor) -> int:
    """8 if every stride that matters is a multiple of it, and every start of 16 bytes, else 1."""
    return unit_of(*_strides(1, *tensors), of=tensors)


def _strides(unit: int, *tensors: torch.Tensor) -> list[int]:
    return [tensor.stride(axis) // unit if tensor.shape[axis] > 1 else 0 for tensor in tensors for axis in range(3)]


def _numerics(dtype: torch.dtype) -> dict[str, Any]:
    """fp32 follows torch's own switch for TF32; the other dtypes have no choice."""
    exact = dtype != torch.float32 or INTERPRETED or not tf32_is_allowed()
    return {"ACC": ACCUMULATORS[dtype], "PRECISION": "ieee" if exact else "tf32"}


def aot_cases() -> list[AotCase]:
    """Those of attention_cases.py, which says what they are and what is left out."""
    from kernels.gpu.attention_cases import cases

    return cases()
