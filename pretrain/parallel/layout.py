"""How a run is spread over ranks, and which spreads are refused.

A layout is laid on from outside: model code never asks for it. `lay_out` runs before any process group exists and says
why a layout cannot be right and what to use instead; running it would give wrong gradients or a hang.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from pretrain.config import Recipe
from pretrain.errors import RequestError
from pretrain.sections import VOCABULARY_MULTIPLE

TEXT_STEP = 8  # tokens
SMALL = 100_000_000  # parameters of a rank: gradients and moments of 1.2 GB


@dataclass(frozen=True)
class Layout:
    """Sizes of the parallel groups: `world` = dp * pp * cp * tp ranks.

    A model is cut into tp pieces within its layers and pp stages of vpp chunks between them; cp ranks share the
    sequence of each sample. Ranks of a tensor parallel group are neighbours, then come those of a context parallel one,
    then data parallel, then stages, as Megatron-core numbers them.
    """

    world: int
    dp: int
    tp: int
    zero: int
    share: int  # samples of the global batch that each data parallel rank reads
    micro_batch: int  # samples a rank holds activations for
    pp: int = 1
    vpp: int = 1
    cp: int = 1
    sequence_parallel: bool = False
    offload: bool = False  # ZeRO keeps master weights and moments in the host's memory

    @property
    def microbatches(self) -> int:
        """How many microbatches make a rank's share."""
        return self.share // self.micro_batch

    @property
    def sequence_pieces(self) -> int:
        """Into how many pieces the sequence is cut between layers."""
        return self.cp * (self.tp if self.sequence_parallel else 1)

    @property
    def text_step(self) -> int:
        """By a multiple of how many tokens a batch's text may be shorter than the context: few shapes, whole pieces."""
        return math.lcm(TEXT_STEP, self.sequence_pieces)

    @property
    def sizes(self) -> str:
        """Of the parallel groups, in words."""
        sizes = [f"dp{self.dp} x tp{self.tp}"]
        sizes += [f"{name}{size}" for name, size in (("pp", self.pp), ("vpp", self.vpp), ("cp", self.cp)) if size > 1]
        return " x ".join(sizes)

    def __str__(self) -> str:
        parts = [self.sizes, *(["sequence parallel"] if self.sequence_parallel else [])]
        zero = f"ZeRO-{self.zero}" + (" offloaded" if self.offload else "")
        return ", ".join(
            [*parts, zero, f"{self.microbatches} microbatch{'es' * (self.microbatches != 1)} of {self.micro_batch}"]
        )


def lay_out(recipe: Recipe, world: int) -> Layout:
    """The layout of a recipe on `world` ranks. Raises RequestError for one that cannot be right."""
    asked, batch = recipe.layout, recipe.train.global_batch
    if asked.ep > 1:
        raise RequestError(f"layout.ep is {asked.ep}, but no model here has experts: use layout.ep=1")
    _refuse_wrong_combinations(recipe)
    _refuse_uneven_pieces(recipe, world)
    copy = asked.tp * asked.pp * asked.cp
    if world % copy:
        raise RequestError(
            f"layout.tp * layout.pp * layout.cp is {asked.tp} * {asked.pp} * {asked.cp}, and {world} rank(s) do not "
            f"divide into copies of {copy}: use a multiple of {copy} ranks"
        )
    dp = world // copy
    if batch % dp:
        fits = max(n for n in range(1, dp + 1) if batch % n == 0)
        raise RequestError(
            f"train.global_batch is {batch}, which does not divide over {dp} data parallel ranks: "
            f"use a multiple of {dp}, or {fits * copy} rank(s)"
        )
    share = batch // dp
    micro = min(recipe.train.micro_batch or share, share)
    if share % micro:
        fits = max(n for n in range(1, micro + 1) if share % n == 0)
        raise RequestError(
            f"train.micro_batch is {micro}, which does not divide a rank's share of {share} samples: "
            f"use train.micro_batch={fits}"
        )
    if asked.vpp > 1 and share // micro % asked.pp:
        fits = max((n for n in range(1, micro + 1) if share % (n * asked.pp) == 0), default=0)
        way_out = f"use train.micro_batch={fits}" if fits else f"use a share that {asked.pp} divides, or layout.vpp=1"
        raise RequestError(
            f"layout.vpp is {asked.vpp}: its schedule takes microbatches in groups of layout.pp={asked.pp}, "
            f"and a rank has {share // micro}: {way_out}"
        )
    return Layout(
        world=world,
        dp=dp,
        tp=asked.tp,
        zero=_stage(recipe, dp * asked.cp),
        share=share,
        micro_batch=micro,
        pp=asked.pp,
        vpp=asked.vpp,
        cp=asked.cp,
        sequence_parallel=asked.sequence_parallel,
        offload=asked.offload,
    )


def _stage(recipe: Recipe, sharing: int) -> int:
    """The stage of ZeRO: by default 0 in fp32 where nobody shares, or where the whole state is small."""
    asked = recipe.layout
    if asked.zero is not None:
        return asked.zero
    if asked.offload or recipe.train.precision != "fp32":
        return 1
    return 0 if sharing == 1 or _numbers(recipe) <= SMALL * asked.tp * asked.pp else 1


def _numbers(recipe: Recipe) -> float:
    """In the matrices of the towers and the token table."""
    towers = recipe.model.towers.values()
    layers = sum(each.layers * each.width**2 * (4 + 2 * each.mlp_ratio) for each in towers)
    return layers + recipe.model.text.token_rows * recipe.model.text.width


def _refuse_wrong_combinations(recipe: Recipe) -> None:
    """What runs, but to other gradients than one process would have, or not at all."""
    asked = recipe.layout
    if asked.zero == 0 and recipe.train.precision == "bf16":
        # deepspeed/runtime/engine.py:2314 has no optimizer for bf16 gradients that are added up in fp32 at stage 0; the
        # one for bf16 sums (fp16/unfused_optimizer.py) also takes a missing gradient for zero, so a step that is to
        # change nothing would move the weights
        raise RequestError(
            "layout.zero=0 with train.precision=bf16 would add up the gradients of microbatches and ranks in bf16, "
            "because DeepSpeed keeps fp32 sums only from ZeRO-1 on: use layout.zero=1"
        )
    if asked.zero in (2, 3) and asked.pp > 1:
        raise RequestError(
            f"layout.zero={asked.zero} with layout.pp={asked.pp} would reduce gradients at each microbatch, while "
            "others are still in the pipeline: use layout.zero=1, or layout.pp=1"
        )
    if asked.vpp > 1 and asked.pp == 1:
        raise RequestError(f"layout.vpp is {asked.vpp}, but there are no stages to interleave: use layout.pp=2 or more")
    if asked.sequence_parallel and asked.tp == 1:
        raise RequestError(
            "layout.sequence_parallel shares the sequence over tensor parallel ranks, and layout.tp is 1: "
            "use layout.tp=2 or more, or leave it false"
        )
    cut = [key for key in ("pp", "cp") if getattr(asked, key) > 1] + ["sequence_parallel"] * asked.sequence_parallel
    if recipe.data.aspect > 1 and cut:
        raise RequestError(
            f"data.aspect is {recipe.data.aspect}, so sequences differ from step to step, and layout.{cut[0]} needs "
            "them of one length: use layout.tp or layout.zero, or data.aspect=1"
        )
    if asked.offload and asked.zero == 0:
        raise RequestError("layout.offload keeps the optimizer of ZeRO on the host: use layout.zero=1 or more")


def _refuse_uneven_pieces(recipe: Recipe, world: int) -> None:
    """Ranks hold equal pieces of everything that is cut."""
    asked = recipe.layout
    towers = {f"model.{name}": tower for name, tower in recipe.model.towers.items()}
    cut: dict[str, int] = {}
    for name, tower in towers.items():
        cut[f"{name}.heads"] = tower.heads
        cut[f"{name}.width * mlp_ratio"] = int(tower.width * tower.mlp_ratio)
    cut["the multiple that the token table's rows come in"] = VOCABULARY_MULTIPLE
    fits = max(n for n in range(1, asked.tp + 1) if world % n == 0 and all(size % n == 0 for size in cut.values()))
    if world % asked.tp:
        raise RequestError(
            f"layout.tp is {asked.tp}, but {world} rank(s) do not divide into groups of {asked.tp}: "
            f"use a multiple of {asked.tp} ranks, or layout.tp={fits}"
        )
    for name, size in cut.items():
        if size % asked.tp:
            raise RequestError(f"layout.tp is {asked.tp}, which does not divide {name} ({size}): use layout.tp={fits}")
    chunks = asked.pp * asked.vpp
    for name, tower in towers.items():
        if tower.layers % chunks:
            fits = max(n for n in range(1, chunks + 1) if all(each.layers % n == 0 for each in towers.values()))
            raise RequestError(
                f"layout.pp * layout.vpp is {chunks}, which does not divide {name}.layers ({tower.layers}): "
                f"use {fits} in all, or {tower.layers + -tower.layers % chunks} layers"
            )
    pieces = asked.cp * (asked.tp if asked.sequence_parallel else 1)
    key = "layout.cp" if not asked.sequence_parallel else "layout.cp * layout.tp with layout.sequence_parallel"
    for name, length in recipe.model.sequence_lengths.items():
        if length % pieces:
            if name != "vision":
                way_out = f"use model.text.context={recipe.model.text.context + -length % pieces}"
            elif recipe.model.vision.pool == "class" and recipe.model.vision.patches % pieces == 0:
                way_out = "use model.vision.pool=mean"
            else:
                way_out = f"use model.vision.image_size and patch that give a multiple of {pieces}, or fewer pieces"
            raise RequestError(
                f"{key} is {pieces}, which does not divide the {length} tokens of the {name} sequence: {way_out}"
            )
