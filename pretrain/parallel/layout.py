"""How a run is spread over ranks, and which spreads are refused.

A layout is laid on from outside: model code never asks for it. `check` runs before any process group exists and
says why a layout cannot be right and what to use instead; running it would give wrong gradients or a hang.
"""

from __future__ import annotations

from dataclasses import dataclass

from pretrain.config import VOCABULARY_MULTIPLE, Recipe
from pretrain.errors import RequestError


@dataclass(frozen=True)
class Layout:
    """Sizes of the parallel groups; `world` ranks hold dp copies of a model cut into tp pieces.

    Ranks of one tensor parallel group are neighbours (0..tp-1), as Megatron-core numbers them.
    """

    world: int
    dp: int
    tp: int
    zero: int
    share: int  # samples of the global batch that each data parallel rank reads
    micro_batch: int  # samples a rank holds activations for

    @property
    def microbatches(self) -> int:
        """How many microbatches make a rank's share."""
        return self.share // self.micro_batch

    def __str__(self) -> str:
        return f"dp{self.dp} x tp{self.tp}, ZeRO-{self.zero}, {self.microbatches} microbatch(es) of {self.micro_batch}"


def lay_out(recipe: Recipe, world: int) -> Layout:
    """The layout of a recipe on `world` ranks. Raises RequestError for one that cannot be right."""
    asked, batch = recipe.layout, recipe.train.global_batch
    for key, value in (("pp", asked.pp), ("vpp", asked.vpp), ("cp", asked.cp), ("ep", asked.ep)):
        if value > 1:
            raise RequestError(f"layout.{key} is {value}, but only 1 is supported so far: use layout.tp or layout.zero")
    if asked.sequence_parallel:
        raise RequestError("layout.sequence_parallel is true, but it is not supported so far: leave it false")
    _refuse_uneven_pieces(recipe, world)
    if asked.zero == 0 and recipe.train.precision == "bf16":
        raise RequestError(
            "layout.zero=0 with train.precision=bf16 ends at another loss, undiagnosed: use layout.zero=1"
        )
    dp = world // asked.tp
    if batch % dp:
        fits = max(n for n in range(1, dp + 1) if batch % n == 0)
        raise RequestError(
            f"train.global_batch is {batch}, which does not divide over {dp} data parallel ranks: "
            f"use a multiple of {dp}, or {fits * asked.tp} rank(s)"
        )
    share = batch // dp
    micro = min(recipe.train.micro_batch or share, share)
    if share % micro:
        fits = max(n for n in range(1, micro + 1) if share % n == 0)
        raise RequestError(
            f"train.micro_batch is {micro}, which does not divide a rank's share of {share} samples: "
            f"use train.micro_batch={fits}"
        )
    return Layout(world=world, dp=dp, tp=asked.tp, zero=asked.zero, share=share, micro_batch=micro)


def _refuse_uneven_pieces(recipe: Recipe, world: int) -> None:
    """Tensor parallel ranks hold equal pieces of everything that is cut."""
    tp = recipe.layout.tp
    cut = {}
    for name, tower in (("vision", recipe.model.vision), ("text", recipe.model.text)):
        cut[f"model.{name}.heads"] = tower.heads
        cut[f"model.{name}.width * mlp_ratio"] = int(tower.width * tower.mlp_ratio)
    cut["the multiple that the token table's rows come in"] = VOCABULARY_MULTIPLE
    fits = max(n for n in range(1, tp + 1) if world % n == 0 and all(size % n == 0 for size in cut.values()))
    if world % tp:
        raise RequestError(
            f"layout.tp is {tp}, but {world} rank(s) do not divide into groups of {tp}: "
            f"use a multiple of {tp} ranks, or layout.tp={fits}"
        )
    for name, size in cut.items():
        if size % tp:
            raise RequestError(f"layout.tp is {tp}, which does not divide {name} ({size}): use layout.tp={fits}")
