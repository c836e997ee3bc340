"""Attention as Triton kernels: softmax(scale q k^T) v and its gradients, O(Q + S) memory.

Source: Dao 2023, "FlashAttention-2". The kernels, and what is particular to them, are in attention_forward_triton.py
and attention_backward_triton.py, their tile sizes in attention_tiles.py; here are the function and its operators for
autograd and torch.compile.

- Forward and backward are one opaque operator each (`weft::triton_attention`, `weft::triton_attention_backward`), so
  torch.compile neither breaks its graph at them nor looks inside.
- `aot_cases()` hands every tile size to the ahead-of-time gate: in bf16 all compile for sm_80, sm_90, sm_100 and
  gfx942 without spilling registers. None has run on a GPU yet.

Axes: B batch, H heads, G heads of keys and values (H a multiple of G), Q queries, S keys, K size of a head.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

from kernels.attention_backward_triton import attention_delta_kernel, attention_dkdv_kernel, attention_dq_kernel
from kernels.attention_forward_triton import attention_forward_kernel
from kernels.attention_tiles import DKDV, DQ, FORWARD, SHORT, Tile, choose, edge, parts

if TYPE_CHECKING:
    from kernels.aot import AotCase

ACCUMULATORS = {
    torch.bfloat16: (tl.float32, torch.float32),
    torch.float16: (tl.float32, torch.float32),
    torch.float32: (tl.float32, torch.float32),
    torch.float64: (tl.float64, torch.float64),
}
LARGEST_HEAD = 256
DELTA_ROWS = 32  # of a program that only reads rows
AOT_SIZES = (64, 72, 80, 96, 128, 256)
INTERPRETED = not isinstance(attention_forward_kernel, triton.JITFunction)


def triton_attention(
    q_BHQK: torch.Tensor,
    k_BGSK: torch.Tensor,
    v_BGSK: torch.Tensor,
    *,
    causal: bool = False,
    key_lengths_B: torch.Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention output [B, H, Q, K] in the inputs' dtype, laid out in memory as q is; differentiable in q, k and v.

    bf16, fp16, fp32 or fp64; query head h reads head h // (H / G) of keys and values. `causal`: query i sees keys up to
    i + S - Q (bottom-right aligned). `key_lengths_B` (int [B]): sample b has only its first key_lengths_B[b] keys, and
    both may hold at once. A query that sees no key gives 0 and gradient 0. `scale`: of the scores, K^-1/2 if None.
    `return_lse`: also the log-sum-exp of the scaled scores [B, H, Q] in fp32 (fp64 for fp64), -inf where no key is
    seen; it carries no gradient.
    Raises ValueError with the reason for what these kernels cannot do.
    """
    if reason := refusal(q_BHQK, k_BGSK, v_BGSK, key_lengths_B=key_lengths_B, scale=scale):
        raise ValueError(f"Triton attention: {reason}")
    scale = q_BHQK.shape[-1] ** -0.5 if scale is None else scale
    out_BHQK, lse_BHQ = _attention(q_BHQK, k_BGSK, v_BGSK, key_lengths_B, causal, scale)
    return (out_BHQK, lse_BHQ) if return_lse else out_BHQK


def refusal(
    q_BHQK: torch.Tensor,
    k_BGSK: torch.Tensor,
    v_BGSK: torch.Tensor,
    *,
    key_lengths_B: torch.Tensor | None = None,
    scale: float | None = None,
) -> str:
    """Why these kernels cannot take such tensors, in words; empty when they can."""
    q, k, v = q_BHQK, k_BGSK, v_BGSK
    shapes = f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
    if (
        not q.ndim == k.ndim == v.ndim == 4
        or k.shape != v.shape
        or (q.shape[0], q.shape[3]) != (k.shape[0], k.shape[3])
    ):
        return f"{shapes}: need q [B, H, Q, K] and k and v [B, G, S, K]"
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        return f"{shapes}: the {q.shape[1]} heads are no multiple of the {k.shape[1]} heads of keys"
    if not 1 <= q.shape[3] <= LARGEST_HEAD:
        return f"heads of size {q.shape[3]}: sizes 1 to {LARGEST_HEAD} are there"
    if q.dtype not in ACCUMULATORS or not q.dtype == k.dtype == v.dtype:
        return f"q is {q.dtype}, k {k.dtype}, v {v.dtype}: need bfloat16, float16, float32 or float64 for all three"
    if not q.device == k.device == v.device:
        return f"q is on {q.device}, k on {k.device}, v on {v.device}: need one device"
    if q.device.type != "cuda" and not INTERPRETED:
        return f"the tensors are on {q.device}: Triton needs a GPU (or, for tests, TRITON_INTERPRET=1)"
    if scale is not None and not scale > 0:
        return f"scale is {scale}: it must be positive"
    if key_lengths_B is not None:
        if key_lengths_B.shape != q.shape[:1] or key_lengths_B.dtype not in (torch.int32, torch.int64):
            return (
                f"key lengths are {key_lengths_B.dtype} {list(key_lengths_B.shape)}: need int32 or int64 [{q.shape[0]}]"
            )
        if key_lengths_B.device != q.device:
            return f"key lengths are on {key_lengths_B.device}, q on {q.device}: need one device"
    return ""


@torch.library.custom_op("weft::triton_attention", mutates_args=())
def _attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: torch.Tensor | None, causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(output, log-sum-exp)."""
    out, lse = _empty_outputs(q)
    q, k, v = (_dense_rows(each) for each in (q, k, v))
    batch, heads, queries, size = q.shape
    keys = k.shape[2]
    left, right = parts(size)
    tile = choose(FORWARD[_architecture(q)], size, q.element_size(), queries)
    unit = _unit(q, k, v, out)
    with torch.cuda.device_of(q):
        if out.numel():
            attention_forward_kernel[(batch * heads * triton.cdiv(queries, tile.own),)](
                q, k, v, out, lse, lengths, *_strides(unit, q, k, v, out),
                heads, heads // k.shape[1], queries, keys, scale,
                HEAD=size, LEFT=left, RIGHT=right, UNIT=unit, CAUSAL=causal, ROWS=tile.own, KEYS=tile.step,
                EDGE=edge(tile, keys, causal or lengths is not None), **_numerics(q.dtype),
                num_warps=tile.warps, num_stages=tile.stages,
            )  # fmt: skip
    return out, lse


@torch.library.custom_op("weft::triton_attention_backward", mutates_args=())
def _attention_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    lengths: torch.Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v."""
    dq, dk, dv = (torch.empty_like(each) for each in (q, k, v))
    delta = torch.empty_like(lse)
    grad, q, k, v = (_dense_rows(each) for each in (grad, q, k, v))
    batch, heads, queries, size = q.shape
    kv_heads, keys = k.shape[1:3]
    architecture = _architecture(q)
    dkdv_tile = choose(DKDV[architecture], size, q.element_size(), keys)
    dq_tile = choose(DQ[architecture], size, q.element_size(), queries)
    left, right = parts(size)
    unit = _unit(q, k, v, grad, out, dq, dk, dv)
    sizes = (heads, heads // kv_heads, queries, keys, scale)
    common = dict(HEAD=size, LEFT=left, RIGHT=right, UNIT=unit, CAUSAL=causal, **_numerics(q.dtype))
    with torch.cuda.device_of(q):
        if dq.numel():
            attention_delta_kernel[(batch * heads * triton.cdiv(queries, DELTA_ROWS),)](
                grad, out, delta, *_strides(unit, grad, out), heads, queries,
                HEAD=size, WIDTH=triton.next_power_of_2(size), UNIT=unit, ROWS=DELTA_ROWS, ACC=common["ACC"],
            )  # fmt: skip
            attention_dq_kernel[(batch * heads * triton.cdiv(queries, dq_tile.own),)](
                q, k, v, grad, lse, delta, dq, lengths, *_strides(unit, q, k, v, grad, dq), *sizes,
                ROWS=dq_tile.own, KEYS=dq_tile.step, EDGE=edge(dq_tile, keys, causal or lengths is not None), **common,
                num_warps=dq_tile.warps, num_stages=dq_tile.stages,
            )  # fmt: skip
        if dk.numel():
            attention_dkdv_kernel[(batch * kv_heads * triton.cdiv(keys, dkdv_tile.own),)](
                q, k, v, grad, lse, delta, dk, dv, lengths, *_strides(unit, q, k, v, grad, dk, dv), *sizes,
                ROWS=dkdv_tile.step, KEYS=dkdv_tile.own, **common,
                num_warps=dkdv_tile.warps, num_stages=dkdv_tile.stages,
            )  # fmt: skip
    return dq, dk, dv


@_attention.register_fake
def _(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: torch.Tensor | None, causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    return _empty_outputs(q)


@_attention_backward.register_fake
def _(
    grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    q, k, v, lengths, ctx.causal, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, *output, lengths)
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx: Any, grad: torch.Tensor, _: Any) -> tuple[torch.Tensor | None, ...]:
    return *_attention_backward(grad, *ctx.saved_tensors, ctx.causal, ctx.scale), None, None, None


_attention.register_autograd(_gradients, setup_context=_save)


def _empty_outputs(q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=ACCUMULATORS[q.dtype][1])


def _dense_rows(tensor: torch.Tensor) -> torch.Tensor:
    """The kernels read a row's elements side by side; an expanded gradient, for one, does not have them so."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _architecture(tensor: torch.Tensor) -> str:
    """The list of tile sizes to use. Consumer chips have the shared memory of sm_80's smaller tiles."""
    if INTERPRETED:
        return "interpreter"
    if torch.version.hip:
        return "gfx942"
    major, _ = torch.cuda.get_device_capability(tensor.device)
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_80")


def _unit(*tensors: torch.Tensor) -> int:
    """8 if every stride that matters is a multiple of it, else 1."""
    return 8 if all(stride % 8 == 0 for stride in _strides(1, *tensors)) else 1


def _strides(unit: int, *tensors: torch.Tensor) -> list[int]:
    return [tensor.stride(axis) // unit if tensor.shape[axis] > 1 else 0 for tensor in tensors for axis in range(3)]


def _numerics(dtype: torch.dtype) -> dict[str, Any]:
    """fp32 follows torch's own switch for TF32; the other dtypes have no choice."""
    exact = dtype != torch.float32 or INTERPRETED or torch.get_float32_matmul_precision() == "highest"
    return {"ACC": ACCUMULATORS[dtype][0], "PRECISION": "ieee" if exact else "tf32"}


def aot_cases() -> list[AotCase]:
    """Every tile of the lists, in bf16, for the head sizes that take it: no mask, causal, some with key lengths."""
    cases = {case.name: case for case in map(_aot_delta_case, AOT_SIZES)}
    for kernel, lists in (
        (attention_forward_kernel, FORWARD),
        (attention_dkdv_kernel, DKDV),
        (attention_dq_kernel, DQ),
    ):
        for architecture, tiles in lists.items():
            if architecture == "interpreter":
                continue
            for size in AOT_SIZES:
                for tile in {choose(tiles, size, 2, length) for length in (SHORT + 1, *(t.own for t in tiles))}:
                    for mask in ("full", "causal", "lengths") if size in (64, 72) else ("full", "causal"):
                        case = _aot_case(kernel, size, tile, mask, architecture)
                        known = cases.setdefault(case.name, case)
                        if architecture not in known.targets:
                            cases[case.name] = dataclasses.replace(known, targets=(*known.targets, architecture))
    return list(cases.values())


def _aot_case(kernel: Any, size: int, tile: Tile, mask: str, architecture: str, dtype: str = "bf16") -> AotCase:
    """Full attention is taken with 16 keys to an edge block, as for 257 keys; the others with whole ones."""
    from kernels.aot import AotCase

    left, right = parts(size)
    constexprs = dict(
        HEAD=size, LEFT=left, RIGHT=right, UNIT=8, CAUSAL=mask == "causal", ROWS=tile.own, KEYS=tile.step,
        EDGE=16 if mask == "full" else tile.step, ACC=tl.float32, PRECISION="ieee",
    )  # fmt: skip
    if mask != "lengths":
        constexprs["LENGTHS"] = None
    if kernel is attention_dkdv_kernel:
        constexprs |= {"ROWS": tile.step, "KEYS": tile.own}
        del constexprs["EDGE"]
    names = [name for name in kernel.arg_names if name not in constexprs]
    kinds = {"LSE": "*fp32", "DELTA": "*fp32", "LENGTHS": "*i64"}
    pointers = {name: kinds.get(name, f"*{dtype}") for name in names if name.isupper()}
    numbers = {name: "fp32" if name == "scale" else "i32" for name in names if name.islower()}
    stem = kernel.fn.__name__.removesuffix("_kernel")
    return AotCase(
        name=f"{stem} {size} {mask} {tile.own}x{tile.step} w{tile.warps} s{tile.stages}",
        kernel=kernel,
        signature=pointers | numbers,
        constexprs=constexprs,
        attrs=[*pointers],
        options=dict(num_warps=tile.warps, num_stages=tile.stages),
        targets=(architecture,),
        # a program holds 32 keys of such a head; Hopper's and Blackwell's matrix instructions take 64 rows or more
        matrix=not (kernel is attention_dkdv_kernel and size > 128),
    )


def _aot_delta_case(size: int) -> AotCase:
    from kernels.aot import AotCase

    names = [name for name in attention_delta_kernel.arg_names if not name.isupper()]
    return AotCase(
        name=f"attention_delta {size}",
        kernel=attention_delta_kernel,
        signature={"GRAD": "*bf16", "OUT": "*bf16", "DELTA": "*fp32"} | dict.fromkeys(names, "i32"),
        constexprs=dict(HEAD=size, WIDTH=triton.next_power_of_2(size), UNIT=8, ROWS=DELTA_ROWS, ACC=tl.float32),
        attrs=["GRAD", "OUT", "DELTA"],
        options={},
        matrix=False,
    )
