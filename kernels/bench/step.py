"""A CLIP training step with a ViT-L/14 image tower, on operations of kernels and on the usual ones of torch.

Both are the same lines with other operations: attention, layer norm, bias + GELU and the loss. Parameters are bf16 and
so are AdamW's states, for both: this is a measure of speed, and what bf16 states do to training is not its matter.

Floating point operations of one pair, a multiply-add being 2: a block over S tokens of width D takes
S (8 D^2 + 16 D^2 + 4 S D) (projections, feed-forward of 4 D, attention), the patches 2 S 588 D, heads 2 D E;
backward twice forward. A causal mask does not halve attention (as pretrain/flops.py has it).

Axes: B batch, S tokens, D width, H heads, K size of a head, E embedding.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from kernels.bench.contrastive import naive_infonce
from kernels.bench.measure import Action, peak_bytes, take_turns
from kernels.bench.rows import ERROR, OK, WRONG, Bench, Row, failure, raise_if_lost
from kernels.cards import peak_flops

KERNELS, TORCH = "kernels", "torch"
SAME_LOSS = 2e-2  # relative; bf16 through 24 layers
SHORT_STEP = 0.3  # seconds; where one takes less, twice the batch fills the card better
STEP_SECONDS = 15.0  # for the repetitions of one pair of steps


@dataclass(frozen=True)
class Tower:
    """A transformer over `tokens` of `width`."""

    width: int
    layers: int
    heads: int
    tokens: int

    @property
    def flops(self) -> float:
        """Forward, one sample."""
        return float(self.layers * self.tokens * (24 * self.width**2 + 4 * self.tokens * self.width))


@dataclass(frozen=True)
class Size:
    """An image tower on patches, a causal text tower, and what they share."""

    name: str
    image: Tower
    text: Tower
    patch: int
    vocabulary: int
    embedding: int
    batch: int
    dtype: torch.dtype

    @property
    def training_flops(self) -> float:
        """Forward and backward of one pair."""
        patches = 2.0 * (self.image.tokens - 1) * 3 * self.patch**2 * self.image.width
        heads = 2.0 * (self.image.width + self.text.width) * self.embedding
        return 3 * (self.image.flops + self.text.flops + patches + heads)


VIT_L = Size(
    "ViT-L/14, 224", Tower(1024, 24, 16, 257), Tower(768, 12, 12, 77), 14, 49408, 768, 128, torch.bfloat16
)  # fmt: skip
SMALL = Size("small, CPU", Tower(192, 4, 3, 65), Tower(128, 2, 2, 32), 14, 1000, 64, 16, torch.float32)


@dataclass(frozen=True)
class Operations:
    """What differs between the two."""

    attention: Callable[..., torch.Tensor]
    layer_norm: Callable[..., torch.Tensor]
    bias_gelu: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    loss: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def of_kernels() -> Operations:
    """The public operations, each choosing its backend."""
    from kernels.activation import bias_gelu
    from kernels.attention import attention
    from kernels.contrastive import contrastive_loss
    from kernels.norm import layer_norm

    return Operations(attention, layer_norm, bias_gelu, contrastive_loss)  # type: ignore[arg-type]


def usual() -> Operations:
    """torch's own: SDPA as it chooses, its layer norm, its GELU, and both matrices of logits."""
    return Operations(
        lambda q, k, v, causal: F.scaled_dot_product_attention(q, k, v, is_causal=causal),
        lambda x, weight, bias: F.layer_norm(x, weight.shape, weight, bias),
        lambda x, bias: F.gelu(x + bias),
        lambda x, y, scale: naive_infonce({"x": x, "y": y, "scale": scale}),
    )


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, tower: Tower, causal: bool, operations: Operations) -> None:
        super().__init__()
        width = tower.width
        self.heads, self.causal, self.operations = tower.heads, causal, operations
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))  # holds weights; the operation is ours
        self.into, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width)
        self.up_bias = nn.Parameter(torch.zeros(4 * width))

    def forward(self, x_BSD: torch.Tensor) -> torch.Tensor:
        operations = self.operations
        first, second = self.norms
        heads_BSHK = (self.heads, x_BSD.shape[-1] // self.heads)
        qkv = self.into(operations.layer_norm(x_BSD, first.weight, first.bias)).chunk(3, -1)
        q, k, v = (each.unflatten(-1, heads_BSHK).transpose(1, 2) for each in qkv)
        mixed_BHSK = operations.attention(q, k, v, causal=self.causal)
        x_BSD = x_BSD + self.out(mixed_BHSK.transpose(1, 2).flatten(2))
        hidden = self.up(operations.layer_norm(x_BSD, second.weight, second.bias))
        return x_BSD + self.down(operations.bias_gelu(hidden, self.up_bias))  # type: ignore[no-any-return]


class Clip(nn.Module):
    """Two towers and the loss over their batch."""

    def __init__(self, size: Size, operations: Operations) -> None:
        super().__init__()
        self.operations, self.patch = operations, size.patch
        self.patches = nn.Linear(3 * size.patch**2, size.image.width)
        self.tokens = nn.Embedding(size.vocabulary, size.text.width)
        self.image_places = nn.Parameter(0.02 * torch.randn(size.image.tokens, size.image.width))
        self.text_places = nn.Parameter(0.02 * torch.randn(size.text.tokens, size.text.width))
        self.image = nn.ModuleList(Block(size.image, False, operations) for _ in range(size.image.layers))
        self.text = nn.ModuleList(Block(size.text, True, operations) for _ in range(size.text.layers))
        self.heads = nn.ModuleList(
            nn.Linear(each.width, size.embedding, bias=False) for each in (size.image, size.text)
        )
        self.log_scale = nn.Parameter(torch.tensor(14.3).log())

    def forward(self, pixels_BPC: torch.Tensor, text_BS: torch.Tensor) -> torch.Tensor:
        """The loss. Pixels come as patches [B, S - 1, 3 patch^2]; the first token of an image is its class."""
        image = F.pad(self.patches(pixels_BPC), (0, 0, 1, 0)) + self.image_places
        text = self.tokens(text_BS) + self.text_places
        for block in self.image:
            image = block(image)
        for block in self.text:
            text = block(text)
        pooled = (self.heads[0](image[:, 0]), self.heads[1](text[:, -1]))
        x_BE, y_BE = (F.normalize(each.float(), dim=-1) for each in pooled)
        return self.operations.loss(x_BE, y_BE, self.log_scale.float().exp())


def training_step(size: Size, operations: Operations, device: torch.device, compile_blocks: bool) -> Action:
    """One step of AdamW on random pairs; returns the loss. The same seed gives every caller the same start."""
    torch.manual_seed(0)
    with device:  # 428 million random numbers take seconds on a CPU
        model = Clip(size, operations).to(size.dtype)
    if compile_blocks:
        for block in (*model.image, *model.text):
            block.compile(fullgraph=True, dynamic=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    generator = torch.Generator(device).manual_seed(1)
    shape = (size.batch, size.image.tokens - 1, 3 * size.patch**2)
    pixels = torch.randn(shape, device=device, generator=generator).to(size.dtype)
    text = torch.randint(size.vocabulary, (size.batch, size.text.tokens), device=device, generator=generator)

    def step() -> torch.Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss: torch.Tensor = model(pixels, text)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


OPERATIONS: dict[str, Callable[[], Operations]] = {TORCH: usual, KERNELS: of_kernels}


def rows(bench: Bench) -> Iterator[Row]:
    """A pair of rows for each way to run the step: as it is; with twice the batch where it was short; with each block
    compiled. What is compared takes turns, and its first losses must be the same."""
    gpu = bench.device.type == "cuda"
    size = VIT_L if gpu else SMALL
    seconds = yield from _pair(size, False, bench)
    if not gpu:
        return
    if seconds < SHORT_STEP:
        larger = replace(size, batch=2 * size.batch)
        if (yield from _pair(larger, False, bench)) < 2 * seconds:
            size = larger
    yield from _pair(size, True, bench)


def _pair(size: Size, compile_blocks: bool, bench: Bench) -> Generator[Row, None, float]:
    """Both ways to write it; returns the seconds of the faster one."""
    steps: dict[str, Action] = {}
    started: dict[str, Row] = {}
    for name, operations in OPERATIONS.items():
        told = name + (", blocks compiled" if compile_blocks else ", twice the batch" * (size.batch > VIT_L.batch))
        row: Row = {"operation": "train step", "case": size.name, "batch": size.batch, "implementation": told}
        if why := bench.skipped("train step", "", told):
            yield {**row, "status": ERROR, "message": why}
            continue
        bench.started("step", row, True)
        try:
            action = training_step(size, operations(), bench.device, compile_blocks)
            first_loss = float(action())
            row |= {"first_loss": first_loss, "extra_bytes": peak_bytes(action, bench.device)}
        except Exception as error:
            raise_if_lost(bench.device, error)
            yield {**row, **failure(error)}
            continue
        wanted = started.get(TORCH, row)["first_loss"]
        if not abs(first_loss - wanted) <= SAME_LOSS * abs(wanted):
            yield {**row, "status": WRONG, "message": f"its first loss is {first_loss:.4f}, that of torch {wanted:.4f}"}
            continue
        steps[name], started[name] = action, row
    took = take_turns(
        bench.clock,
        {name: partial(_same, action) for name, action in steps.items()},
        bench.quick,
        time.monotonic() + STEP_SECONDS,
        lambda name: bench.started("step", started[name], False),
        lambda error: raise_if_lost(bench.device, error),
    )
    for name, each in took.items():
        if isinstance(each, Exception):
            yield {**started[name], **failure(each)}
            continue
        spread = {"seconds": each.seconds, "low": each.low, "high": each.high, "n": each.n}
        yield {**started[name], "status": OK, **spread, **figures(size, each.seconds, bench.device, bench.ceilings)}
    return min((each.seconds for each in took.values() if not isinstance(each, Exception)), default=float("inf"))


def _same(action: Action) -> Action:
    return action


def figures(size: Size, seconds: float, device: torch.device, ceilings: dict[str, Any] | Any) -> dict[str, Any]:
    """Samples a second and the utilisation, against the data sheet and against what was measured here."""
    flops = size.training_flops * size.batch
    peak = peak_flops(device)
    return {
        "samples_per_second": size.batch / seconds,
        "flops_per_sample": size.training_flops,
        "flops_per_second": flops / seconds,
        "mfu": flops / seconds / peak if peak else None,
        "fraction": flops / seconds / ceilings["flops_per_second"] if ceilings else None,
    }
