"""Rotary position embedding: pairs of a head's elements turned by angles that grow with the position.

    (x1, x2) -> (x1 cos - x2 sin, x1 sin + x2 cos)

Source: Su et al. 2021, "RoFormer: Enhanced Transformer with Rotary Position Embedding", section 3.2. For image grids
(`grid_angles`): half of the pairs turn with the row and half with the column, as in Heo et al. 2024, "Rotary Position
Embedding for Vision Transformer", the axial variant.

Which elements are a pair, with R angles a position and 2R <= K rotated elements of a head:

    interleaved=False   r and r + R     (GPT-NeoX, Llama as in transformers)
    interleaved=True    2r and 2r + 1   (RoFormer, Llama as first released)

What stands behind the first 2R elements passes through. Weights trained with one pairing do not work with the other.

Design choices:
- The rotation is orthogonal: the backward is the same kernel with -sin, and saves no activation. So it can be
  differentiated twice. The Triton kernels give no gradient of the angles.
- Arithmetic is fp32 (fp64 for fp64); angles are made in fp64 and given as fp32, because in bf16 neighbours at position
  1000 have one angle.
- Backends: "torch" (slices, products, a concatenation) and "triton" (kernels/gpu/rotary.py: x read and written once,
  a table entry used for several heads). "auto" on a GPU: triton, but plain torch under torch.compile, where Inductor
  fuses it; on CPU: torch. Counted, not timed: the Triton kernel compiles for sm_80/90/100 and gfx942 and has not run on
  a GPU yet. An opaque operator (`weft::rotary`) for the reason given in kernels/norm.py.

Axes: B batch, H heads, S positions, K size of a head, R angles (pairs).
"""

from __future__ import annotations

from typing import Any

import torch

from kernels import dispatch
from kernels.dispatch import Choice, chosen_by
from kernels.precision import accumulator_of

BACKENDS = ("triton", "torch")
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
LARGEST_HEAD = 512


def _choice(
    x_BHSK: torch.Tensor,
    cos_SR: torch.Tensor,
    sin_SR: torch.Tensor,
    *,
    interleaved: bool = False,
    backend: str = dispatch.AUTO,
) -> Choice:
    order = BACKENDS if x_BHSK.is_cuda and not torch.compiler.is_compiling() else ("torch", "triton")
    return dispatch.choose("rotary", backend, order, lambda each: _refusal(each, x_BHSK, cos_SR, sin_SR, backend))


@chosen_by(_choice)
def rotary(
    x_BHSK: torch.Tensor,
    cos_SR: torch.Tensor,
    sin_SR: torch.Tensor,
    *,
    interleaved: bool = False,
    backend: str = dispatch.AUTO,
) -> torch.Tensor:
    """x [B, H, S, K] with its first 2R elements turned, in its dtype; differentiable in x.

    cos and sin [S, R], or [B, S, R] where samples differ in positions, of any floating-point dtype (fp32 is meant).
    Raises ValueError for shapes that do not fit, and for a named backend that cannot do it.
    """
    _check(x_BHSK, cos_SR, sin_SR)
    choice = _choice(x_BHSK, cos_SR, sin_SR, interleaved=interleaved, backend=backend)
    if dispatch.record(choice) == "triton":
        return _rotary(x_BHSK, cos_SR, sin_SR, interleaved, False)
    return _torch(x_BHSK, cos_SR, sin_SR, interleaved)


def angles(
    positions_S: torch.Tensor, pairs: int, *, base: float = 10_000.0, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [..., S, R] of position * base^(-r / R) for r = 0 .. R - 1, R = pairs; positions [..., S]."""
    if pairs < 1:
        raise ValueError(f"rotary angles: pairs is {pairs}: need at least 1")
    device = positions_S.device
    speeds_R = base ** (-torch.arange(pairs, dtype=torch.float64, device=device) / pairs)
    angles_SR = positions_S.to(torch.float64)[..., None] * speeds_R
    return angles_SR.cos().to(dtype), angles_SR.sin().to(dtype)


def grid_angles(
    rows: int,
    columns: int,
    pairs: int,
    *,
    first: int = 0,
    base: float = 100.0,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [first + rows * columns, pairs] of the patches of an image, row by row.

    The first half of the pairs turns with the patch's row, the second with its column. `first` tokens in front (a class
    token, registers) are not turned. `base` is small because a grid is: 100 in Heo et al. 2024, section 3.
    Raises ValueError for an odd number of pairs.
    """
    if pairs < 2 or pairs % 2:
        raise ValueError(f"rotary grid angles: pairs is {pairs}: need an even number, half for rows, half for columns")
    row_S = torch.arange(rows, device=device).repeat_interleave(columns)
    column_S = torch.arange(columns, device=device).repeat(rows)
    down, across = (angles(each, pairs // 2, base=base, dtype=dtype) for each in (row_S, column_S))
    cos_SR, sin_SR = (torch.cat(both, 1) for both in zip(down, across, strict=True))
    still = cos_SR.new_zeros(first, pairs)
    return torch.cat([still + 1, cos_SR]), torch.cat([still, sin_SR])


def _check(x_BHSK: torch.Tensor, cos_SR: torch.Tensor, sin_SR: torch.Tensor) -> None:
    shapes = f"x {list(x_BHSK.shape)}, cos {list(cos_SR.shape)}, sin {list(sin_SR.shape)}"
    if x_BHSK.ndim != 4 or x_BHSK.dtype not in DTYPES:
        raise ValueError(f"rotary: {shapes}: x is {x_BHSK.dtype}: need floating-point x [B, H, S, K]")
    batch, _, positions, size = x_BHSK.shape
    pairs = cos_SR.shape[-1] if cos_SR.ndim else 0
    fits = cos_SR.shape in ((positions, pairs), (batch, positions, pairs))
    if not fits or cos_SR.shape != sin_SR.shape or not 1 <= pairs <= size // 2:
        raise ValueError(f"rotary: {shapes}: need x [B, H, S, K], cos and sin [S, R] or [B, S, R] with 2R <= K")


def _torch(x_BHSK: torch.Tensor, cos_SR: torch.Tensor, sin_SR: torch.Tensor, interleaved: bool) -> torch.Tensor:
    precise = accumulator_of(x_BHSK.dtype)
    cos, sin = (each.to(precise) if each.ndim == 2 else each.to(precise)[:, None] for each in (cos_SR, sin_SR))
    turned, rest = x_BHSK.split([2 * cos.shape[-1], x_BHSK.shape[-1] - 2 * cos.shape[-1]], -1)
    if interleaved:
        first, second = turned[..., 0::2], turned[..., 1::2]
    else:
        first, second = turned.chunk(2, -1)
    halves = [(first * cos - second * sin).to(x_BHSK.dtype), (first * sin + second * cos).to(x_BHSK.dtype)]
    return torch.cat([torch.stack(halves, -1).flatten(-2), rest] if interleaved else [*halves, rest], -1)


# --- which backend


def _refusal(backend: str, x_BHSK: torch.Tensor, cos_SR: torch.Tensor, sin_SR: torch.Tensor, asked: str) -> str:
    if backend == "torch":
        return ""
    if why_not := dispatch.no_triton(x_BHSK.device.type, x_BHSK.dtype):
        return why_not
    if x_BHSK.shape[-1] > LARGEST_HEAD:
        return f"heads of size {x_BHSK.shape[-1]}: sizes up to {LARGEST_HEAD} are there"
    if cos_SR.requires_grad or sin_SR.requires_grad:
        return "the angles require a gradient, which this kernel does not make"
    return _trial(x_BHSK.device, x_BHSK.dtype) if asked == dispatch.AUTO else ""


def _trial(device: torch.device, dtype: torch.dtype) -> str:
    def compare() -> None:
        x_BHSK = torch.randn(2, 3, 67, 72, generator=torch.Generator().manual_seed(0)).to(device)
        cos_SR, sin_SR = angles(torch.arange(67, device=device), 32)
        for pairing in (False, True):
            dispatch.must_agree(
                lambda x, pairing=pairing: (_rotary(x, cos_SR, sin_SR, pairing, False),),
                lambda x, pairing=pairing: (_torch(x, cos_SR, sin_SR, pairing),),
                [x_BHSK.to(dtype)],
                dispatch.LIMITS[dtype],
            )

    return dispatch.trial(f"rotary in {dtype}", device, compare)


# --- the Triton kernel as an operator


@torch.library.custom_op("weft::rotary", mutates_args=())
def _rotary(
    x_BHSK: torch.Tensor, cos_SR: torch.Tensor, sin_SR: torch.Tensor, interleaved: bool, inverse: bool
) -> torch.Tensor:
    from kernels.gpu.rotary import rotate

    out_BHSK = _empty(x_BHSK)
    rotate(x_BHSK, cos_SR, sin_SR, out_BHSK, interleaved, inverse)
    return out_BHSK


@_rotary.register_fake
def _(
    x_BHSK: torch.Tensor, cos_SR: torch.Tensor, sin_SR: torch.Tensor, interleaved: bool, inverse: bool
) -> torch.Tensor:
    return _empty(x_BHSK)


def _empty(x_BHSK: torch.Tensor) -> torch.Tensor:
    """Laid out as x; but the kernel writes the elements of a head side by side."""
    side_by_side = x_BHSK.stride(3) == 1
    return torch.empty_like(x_BHSK, memory_format=torch.preserve_format if side_by_side else torch.contiguous_format)


def _save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, cos_SR, sin_SR, ctx.interleaved, ctx.inverse = inputs
    ctx.save_for_backward(cos_SR, sin_SR)


def _gradients(ctx: Any, grad_BHSK: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    cos_SR, sin_SR = ctx.saved_tensors
    return _rotary(grad_BHSK, cos_SR, sin_SR, ctx.interleaved, not ctx.inverse), None, None, None, None


_rotary.register_autograd(_gradients, setup_context=_save)
