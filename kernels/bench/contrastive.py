"""The contrastive losses: what is checked and measured. Forward and backward together, since ours makes both at once.

Operations at least, without ever storing N^2: InfoNCE 8 N^2 D (the logits twice, one product for each gradient), the
sigmoid loss 6 N^2 D (the logits once). Bytes: x and y read, their gradients written.

Axes: N pairs, D embedding size, C rows of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from kernels.bench.case import Case, Check, Draw, Implementation, Operation, Outputs, Tensors, compiled, plain
from kernels.bench.measure import BOTH
from kernels.bench.peers import imported, imported_alone

OWN = frozenset({"triton", "torch", "auto"})
INFONCE = Operation("kernels.contrastive", "contrastive_loss", OWN)
SIGMOID = Operation("kernels.contrastive", "sigmoid_loss", OWN)
CHUNKS = (4096, 16384)  # rows of the chunked peers on a GPU; the better one counts
MOST_LOGITS = 2**34  # of a matrix that is stored: 64 GiB in fp32
START_SCALE, START_BIAS = 14.3, -10.0  # where CLIP's and SigLIP's training starts: 1/0.07; and SigLIP's own


def cases(device: torch.device, quick: bool) -> list[Case]:
    """The rows of the table."""
    if device.type != "cuda":
        pairs = 1024 if quick else 16384
        return [
            _case(INFONCE, f"N{pairs}", pairs, 512, torch.float32, 0.8, (pairs // 4,)),
            _case(SIGMOID, f"N{pairs}", pairs, 512, torch.float32, 0.8, (pairs // 4,)),
        ]
    half = torch.bfloat16
    rows = [
        _case(INFONCE, "N64k D512", 65536, 512, half, 0.4, CHUNKS),
        _case(SIGMOID, "N64k D512", 65536, 512, half, 0.4, CHUNKS),
    ]
    if quick:
        return rows
    return [
        *rows,
        _case(INFONCE, "N256k D1024", 262144, 1024, half, 0.6, CHUNKS),
        _case(SIGMOID, "N64k D1152", 65536, 1152, half, 0.4, CHUNKS),
    ]


def checks(device: torch.device) -> list[Check]:
    """Odd sizes; small and large scale. Embeddings in fp32, and in bf16 where the operation takes them.

    At a large scale the pairs are far apart, for the loss of near ones would be 1e-12: plain torch has no digits of it,
    and its error would excuse everything. On a GPU also bands of tiles and all stages of a loop, as the table has them.
    """
    found = []
    small = [(257, 48, START_SCALE, 1.0), (130, 64, 100.0, 4.0)]
    for dtype in (torch.float32, torch.bfloat16):
        long = [(3000, 512, START_SCALE, 1.0)] if device.type == "cuda" and dtype == torch.bfloat16 else []
        for pairs, size, scale, noise in (*small, *long):
            name = f"N{pairs} D{size} scale {scale:g}"
            draw = _draw(pairs, size, dtype, scale, noise)
            found.append(Check(INFONCE, name, dtype, draw, call_infonce, naive_infonce, naive_infonce))
            found.append(Check(SIGMOID, name, dtype, draw, call_sigmoid, naive_sigmoid, naive_sigmoid))
    return found


def _draw(pairs: int, size: int, dtype: torch.dtype, scale: float = START_SCALE, noise: float = 1.0) -> Draw:
    """Unit embeddings, y near x but for noise; scale and bias in fp32."""

    def draw(device: torch.device) -> Tensors:
        generator = torch.Generator(device).manual_seed(pairs + size)
        x = torch.randn(pairs, size, device=device, generator=generator)
        y = x + noise * torch.randn(pairs, size, device=device, generator=generator)
        tensors = {"x": F.normalize(x, dim=1).to(dtype), "y": F.normalize(y, dim=1).to(dtype)}
        tensors |= {"scale": torch.tensor(scale, device=device), "bias": torch.tensor(START_BIAS, device=device)}
        return {name: each.requires_grad_() for name, each in tensors.items()}

    return draw


def call_infonce(function: Callable[..., Any], tensors: Tensors) -> Outputs:
    named = _products(tensors)
    return function(tensors["x"], tensors["y"], tensors["scale"], **named)  # type: ignore[no-any-return]


def call_sigmoid(function: Callable[..., Any], tensors: Tensors) -> Outputs:
    x, y, scale, bias = (tensors[name] for name in ("x", "y", "scale", "bias"))
    return function(x, y, scale, bias, **_products(tensors))  # type: ignore[no-any-return]


def _products(tensors: Tensors) -> dict[str, torch.dtype]:
    """Products in 16 bits have to be asked for."""
    dtype = tensors["x"].dtype
    return {"products": dtype} if dtype.itemsize == 2 else {}


def naive_infonce(tensors: Tensors) -> torch.Tensor:
    """As CLIP's reference code: both matrices of logits, stored (Radford et al. 2021, figure 3).

    Products in the inputs' dtype, losses in fp32 or better, which is what autocast does with these lines.
    """
    x, y, scale = tensors["x"], tensors["y"], tensors["scale"]
    x_scaled = scale.to(x.dtype) * x
    labels = torch.arange(len(x), device=x.device)
    by_image, by_text = x_scaled @ y.T, y @ x_scaled.T
    return (F.cross_entropy(_exact(by_image), labels) + F.cross_entropy(_exact(by_text), labels)) / 2


def naive_sigmoid(tensors: Tensors) -> torch.Tensor:
    """The matrix of logits, stored (Zhai et al. 2023, algorithm 1)."""
    return _sigmoid_rows(tensors["x"], tensors["y"], tensors["scale"], tensors["bias"], 0) / len(tensors["x"])


def chunked_infonce(rows: int, tensors: Tensors) -> torch.Tensor:
    """Rows of both matrices by chunks, each made again in the backward (activation checkpointing)."""
    x, y, scale = tensors["x"], tensors["y"], tensors["scale"]
    total = torch.zeros((), device=x.device, dtype=torch.float32)
    for start in range(0, len(x), rows):
        for own, other in ((x, y), (y, x)):
            part = own[start : start + rows]
            total = total + checkpoint(_cross_entropy_rows, part, other, scale, start, use_reentrant=False)
    return total / (2 * len(x))


def chunked_sigmoid(rows: int, tensors: Tensors) -> torch.Tensor:
    """Rows of logits by chunks, each made again in the backward."""
    x, y, scale, bias = (tensors[name] for name in ("x", "y", "scale", "bias"))
    total = torch.zeros((), device=x.device, dtype=torch.float32)
    for start in range(0, len(x), rows):
        total = total + checkpoint(_sigmoid_rows, x[start : start + rows], y, scale, bias, start, use_reentrant=False)
    return total / len(x)


def _exact(logits: torch.Tensor) -> torch.Tensor:
    return logits.float() if logits.dtype.itemsize == 2 else logits


def _cross_entropy_rows(own: torch.Tensor, other: torch.Tensor, scale: torch.Tensor, start: int) -> torch.Tensor:
    logits = _exact((scale.to(own.dtype) * own) @ other.T)
    return F.cross_entropy(logits, torch.arange(start, start + len(own), device=own.device), reduction="sum")


def _sigmoid_rows(
    own: torch.Tensor, other: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor, start: int
) -> torch.Tensor:
    logits = _exact((scale.to(own.dtype) * own) @ other.T) + bias
    signs = torch.full_like(logits, -1.0)
    signs.diagonal(start).fill_(1.0)
    return -F.logsigmoid(signs * logits).sum()


def _case(
    operation: Operation,
    name: str,
    pairs: int,
    size: int,
    dtype: torch.dtype,
    target: float,
    chunks: Sequence[int],
) -> Case:
    infonce, storable = operation is INFONCE, pairs**2 < MOST_LOGITS
    naive, chunked = (naive_infonce, chunked_infonce) if infonce else (naive_sigmoid, chunked_sigmoid)
    peers = {f"chunks of {rows}, checkpointed": plain(partial(chunked, rows)) for rows in chunks}
    if storable:
        peers["naive"] = plain(naive)
        if dtype != torch.float32:
            peers["naive, torch.compile"] = compiled(naive)
        peers["open_clip"] = Implementation(_open_clip_infonce if infonce else _open_clip_sigmoid)
    if infonce:
        peers["Inf-CL"] = Implementation(_inf_cl)
    return Case(
        operation,
        name,
        f"N{pairs} D{size}",
        (BOTH,),
        _draw(pairs, size, dtype),
        call_infonce if infonce else call_sigmoid,
        peers,
        {BOTH: (8.0 if infonce else 6.0) * pairs**2 * size},
        {BOTH: 4.0 * pairs * size * dtype.itemsize},
        {BOTH: {"": target}},
        left_out={} if storable else {"torch": "8 N^2 D operations in fp32, without TF32"},
    )


# alone: its package imports transformers and torchvision, a quarter of a minute
def _open_clip_infonce() -> Callable[[Tensors], torch.Tensor]:
    loss = imported_alone("open_clip", "loss").ClipLoss()
    return lambda tensors: loss(tensors["x"], tensors["y"], tensors["scale"])  # type: ignore[no-any-return]


def _open_clip_sigmoid() -> Callable[[Tensors], torch.Tensor]:
    loss = imported_alone("open_clip", "loss").SigLipLoss()
    return lambda tensors: loss(tensors["x"], tensors["y"], tensors["scale"], tensors["bias"])  # type: ignore[no-any-return]


def _inf_cl() -> Callable[[Tensors], torch.Tensor]:
    loss = imported("inf_cl").cal_inf_loss  # fp32 only; needs a process group
    return lambda tensors: loss(tensors["x"].float(), tensors["y"].float(), scale=tensors["scale"])  # type: ignore[no-any-return]
