"""Cross entropy of a linear layer: what is checked and measured. Forward and backward together.

Operations at least: 6 N V D (the logits once, one product for each gradient). Bytes: hidden and weight read, their
gradients written.

Axes: N tokens, D width, V vocabulary.
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
from kernels.bench.peers import imported

OPERATION = Operation("kernels.linear_cross_entropy", "linear_cross_entropy", frozenset({"triton", "torch", "auto"}))
CHUNKS = (2048, 8192)  # tokens of the chunked peers


def cases(device: torch.device, quick: bool) -> list[Case]:
    """The rows of the table."""
    if device.type != "cuda":
        return [
            _case(512, 256, 8192, torch.float32, (128,)) if quick else _case(4096, 512, 49408, torch.float32, (512,))
        ]
    rows = [_case(16384, 4096, 131072, torch.bfloat16, CHUNKS)]
    return rows if quick else [*rows, _case(65536, 512, 49408, torch.bfloat16, CHUNKS)]


def checks(device: torch.device) -> list[Check]:
    """Odd sizes, some targets ignored. On a GPU also rows of many blocks, with and without a part of one at the end."""
    found = [
        _check(tokens, width, vocabulary, dtype)
        for dtype in (torch.float32, torch.bfloat16)
        for tokens, width, vocabulary in ((131, 64, 1031), (67, 72, 257))
    ]
    if device.type == "cuda":
        found += [_check(67, 64, vocabulary, torch.bfloat16) for vocabulary in (49408, 65536)]
    return found


def _check(tokens: int, width: int, vocabulary: int, dtype: torch.dtype) -> Check:
    draw = _draw(tokens, width, vocabulary, dtype)
    return Check(OPERATION, f"N{tokens} D{width} V{vocabulary}", dtype, draw, call, naive, naive)


def _draw(tokens: int, width: int, vocabulary: int, dtype: torch.dtype) -> Draw:
    """Logits of about unit variance; every seventh target is ignored."""

    def draw(device: torch.device) -> Tensors:
        generator = torch.Generator(device).manual_seed(tokens)
        hidden = torch.randn(tokens, width, device=device, generator=generator)
        weight = torch.randn(vocabulary, width, device=device, generator=generator) * width**-0.5
        targets = torch.randint(vocabulary, (tokens,), device=device, generator=generator)
        targets[::7] = -100
        leaves = {"hidden": hidden.to(dtype).requires_grad_(), "weight": weight.to(dtype).requires_grad_()}
        return {**leaves, "targets": targets}

    return draw


def call(function: Callable[..., Any], tensors: Tensors) -> Outputs:
    return function(tensors["hidden"], tensors["weight"], tensors["targets"])  # type: ignore[no-any-return]


def naive(tensors: Tensors) -> torch.Tensor:
    """All logits, stored; the loss in fp32 or better."""
    return _rows(tensors["hidden"], tensors["weight"], tensors["targets"]) / (tensors["targets"] >= 0).sum()


def chunked(rows: int, tensors: Tensors) -> torch.Tensor:
    """Logits by chunks of tokens, made again in the backward."""
    hidden, weight, targets = tensors["hidden"], tensors["weight"], tensors["targets"]
    total = torch.zeros((), device=hidden.device, dtype=torch.float32)
    for own, wanted in zip(hidden.split(rows), targets.split(rows), strict=True):
        total = total + checkpoint(_rows, own, weight, wanted, use_reentrant=False)
    return total / (targets >= 0).sum()


def _rows(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    logits = hidden @ weight.T
    return F.cross_entropy(logits.float() if logits.dtype.itemsize == 2 else logits, targets, reduction="sum")


def _case(tokens: int, width: int, vocabulary: int, dtype: torch.dtype, chunks: Sequence[int]) -> Case:
    peers = {f"chunks of {rows}, checkpointed": plain(partial(chunked, rows)) for rows in chunks}
    peers["naive"] = plain(naive)
    if dtype != torch.float32:
        peers["naive, torch.compile"] = compiled(naive)
    peers["Liger"] = Implementation(_liger)
    peers["quack"] = Implementation(_quack)
    return Case(
        OPERATION,
        f"V{vocabulary}",
        f"N{tokens} D{width} V{vocabulary}",
        (BOTH,),
        _draw(tokens, width, vocabulary, dtype),
        call,
        peers,
        {BOTH: 6.0 * tokens * width * vocabulary},
        {BOTH: 2.0 * (tokens + vocabulary) * width * dtype.itemsize},
        {BOTH: {"": 1.15}},  # of the naive one, whose logits do not fit for long; 0.6 of Liger's
    )


def _liger() -> Callable[[Tensors], torch.Tensor]:
    function = imported("liger_kernel.transformers.functional").liger_fused_linear_cross_entropy
    return lambda tensors: function(tensors["hidden"], tensors["weight"], tensors["targets"])  # type: ignore[no-any-return]


def _quack() -> Callable[[Tensors], torch.Tensor]:
    function = imported("quack.linear_cross_entropy").chunked_linear_cross_entropy
    return lambda tensors: function(tensors["hidden"], tensors["weight"], tensors["targets"])  # type: ignore[no-any-return]
