"""Products of matrices as a GPU's tensor cores make them, for the interpreter, whose own are exact but for fp32.

The model: operands of 16 bits as they are, fp32 ones cut to TF32 (10 bits behind the point, the rest dropped as Hopper
drops it when it reads shared memory); DEPTH products and the accumulator are added at once, exactly or, with
`aligned`, each first cut to EXTRA_BITS below the last bit of the largest; and the sum is cut to fp32, toward zero,
where true fp32 rounds to the nearest. Sources: Fasi et al. 2021, "Numerical behavior of NVIDIA tensor cores"; Khattak
and Mikaitis 2025, "Accurate models of NVIDIA tensor cores". Hopper adds 16 products of 16 bits at a time and 8 of TF32,
so DEPTH 8 cuts as often as it does or twice as often.

"tf32x3" is what Triton makes of it (F32DotTC.cpp): big and small parts of both, and small x big, + big x small, + big x
big, each on the tensor cores, then the accumulator in fp32. "ieee" never comes to them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

DEPTH, EXTRA_BITS = 8, 2


def cut_to_fp32(values: np.ndarray) -> np.ndarray:
    """fp64 numbers of 24 significant bits, toward zero."""
    return (values.view(np.uint64) & np.uint64(0xFFFFFFFFE0000000)).view(np.float64)


def cut_to_tf32(values: np.ndarray) -> np.ndarray:
    return (np.ascontiguousarray(values, np.float32).view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)


def accumulate(a: np.ndarray, b: np.ndarray, total: np.ndarray, aligned: bool) -> np.ndarray:
    """total + a b in fp32; a and b hold what the multipliers take."""
    a, b, total = a.astype(np.float64), b.astype(np.float64), total.astype(np.float64)
    for start in range(0, a.shape[1], DEPTH):
        left, right = a[:, start : start + DEPTH], b[start : start + DEPTH]
        if aligned:
            terms = np.concatenate([total[:, None], left[:, :, None] * right[None]], 1)
            largest = np.abs(terms).max(1, keepdims=True)
            unit = np.ldexp(1.0, np.frexp(np.maximum(largest, 1e-300))[1] - 24 - EXTRA_BITS)
            total = cut_to_fp32((np.trunc(terms / unit) * unit).sum(1))
        else:
            total = cut_to_fp32(total + left @ right)
    return total.astype(np.float32)


def product(a: np.ndarray, b: np.ndarray, total: np.ndarray, precision: str, aligned: bool = False) -> np.ndarray:
    """total + a b as a dot of such an input_precision makes it, of two matrices in fp32 or (as fp32) in 16 bits."""
    if precision == "16 bits":
        return accumulate(a, b, total, aligned)
    if precision == "tf32":
        return accumulate(cut_to_tf32(a), cut_to_tf32(b), total, aligned)
    assert precision == "tf32x3", precision
    a_big, b_big = cut_to_tf32(a), cut_to_tf32(b)
    a_small, b_small = cut_to_tf32(a - a_big), cut_to_tf32(b - b_big)
    three = accumulate(a_small, b_big, np.zeros_like(total), aligned)
    three = accumulate(a_big, b_small, three, aligned)
    return accumulate(a_big, b_big, three, aligned) + total


def by_torch(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a b in fp32 of two matrices in 16 bits, as the matrix library has it."""
    nothing = np.zeros((len(a), b.shape[1]), np.float32)
    return torch.from_numpy(product(a.float().numpy(), b.float().numpy(), nothing, "16 bits"))


def emulate(patch: pytest.MonkeyPatch, aligned: bool = False) -> None:
    """Every product of our kernels that a GPU gives to its tensor cores: those in Triton and those left to torch."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    from kernels import linear_cross_entropy_chunks as chunks
    from kernels.gpu import contrastive

    plain_dot, plain_product = InterpreterBuilder.create_dot, contrastive._product
    plain_multiply, plain_add = chunks._multiply, chunks._add_product_
    names = {"TF32": "tf32", "TF32x3": "tf32x3"}

    def values(handle: Any) -> np.ndarray:
        if handle.dtype.scalar == tl.bfloat16:
            return (handle.data.astype(np.uint32) << 16).view(np.float32)
        return handle.data.astype(np.float32)

    def create_dot(self: Any, a: Any, b: Any, c: Any, precision: Any, *rest: Any) -> Any:
        narrow = a.dtype.scalar in (tl.bfloat16, tl.float16)
        how = "16 bits" if narrow else names.get(getattr(precision, "name", str(precision)), "")
        if not how or a.dtype.scalar == tl.float64:
            return plain_dot(self, a, b, c, precision, *rest)
        return TensorHandle(product(values(a), values(b), c.data, how, aligned), c.dtype.scalar)

    def multiply(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
        if a.dtype.itemsize > 2:
            plain_multiply(a, b, out)
        else:
            out.copy_(by_torch(a, b))

    def add_product_(total: torch.Tensor, g: torch.Tensor, hidden: torch.Tensor) -> None:
        if g.dtype.itemsize > 2:
            plain_add(total, g, hidden)
        else:
            total += by_torch(g.T, hidden)

    patch.setattr(InterpreterBuilder, "create_dot", create_dot)
    patch.setattr(contrastive, "_product", lambda a, b: plain_product(a, b) if a.dtype.itemsize > 2 else by_torch(a, b))
    patch.setattr(chunks, "_multiply", multiply)
    patch.setattr(chunks, "_add_product_", add_product_)
