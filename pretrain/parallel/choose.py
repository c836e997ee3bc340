"""`layout=auto`: the first layout that fits the memory, in order of what it costs in communication and recomputation.

Data parallel ranks with ZeRO come first, from the default stage to 3; then tensor parallel ones, which should be
neighbours; then pipeline stages. In each of these the whole share of a rank at once comes first, then ever smaller
microbatches, then layers that are made again in backward: a dual encoder embeds everything twice as soon as there are
microbatches, which costs as much as to make every layer again, and with both it does both. Microbatches of fewer than
`SMALLEST` samples are tried last of all. The choice is a function of the recipe, the number of ranks and the memory
alone. Ranks of nodes with different memory may choose differently, and are refused when they meet: `layout.memory_gib`
says what to count on.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import torch

from pretrain.config import Recipe
from pretrain.errors import RequestError
from pretrain.parallel.groups import pick_device
from pretrain.parallel.layout import lay_out
from pretrain.parallel.memory import memory_of
from pretrain.sections import LayoutConfig

HEADROOM = 0.85  # of the memory: allocators leave gaps, and libraries need some too
SMALLEST = 16  # samples of a microbatch that still fill a card
GIB = 1 << 30


def with_layout(recipe: Recipe, world: int, memory_gib: float | None = None) -> Recipe:
    """The recipe with `layout.auto` replaced by a layout that fits; as it is where none is asked for.

    memory_gib: of one device; default `layout.memory_gib`, or what this machine has. Raises RequestError when nothing
    fits.
    """
    if not recipe.layout.auto:
        return recipe
    here = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    available = memory_gib or recipe.layout.memory_gib or device_memory_gib(recipe.run.device, here)
    least, smallest = float("inf"), ""
    for candidate in candidates(recipe, world):
        try:
            layout = lay_out(candidate, world)
        except RequestError:
            continue
        needed = max(memory_of(candidate, layout, stage).total for stage in range(layout.pp)) / GIB
        if needed <= HEADROOM * available:
            return candidate
        if needed < least:
            least, smallest = needed, str(layout)
    if not smallest:
        lay_out(next(candidates(recipe, world)), world)  # says why not even the simplest one is right
    raise RequestError(
        f"layout=auto: nothing fits {HEADROOM:.0%} of {available:.1f} GiB on {world} rank(s); {smallest} needs least, "
        f"{least:.1f} GiB: use more ranks, a smaller train.global_batch or model, or layout.offload=true"
    )


def candidates(recipe: Recipe, world: int) -> Iterator[Recipe]:
    """Layouts to try, the cheapest first; some of them cannot be right."""
    whole = recipe.train.micro_batch
    parts = sorted(_parts(recipe, world), reverse=True)
    large, small = ([size for size in parts if (size >= SMALLEST) == is_large] for is_large in (True, False))
    large_savers = [(recompute, size) for recompute in ("none", "full") for size in (whole, *large)]
    small_savers = [(recompute, size) for recompute in ("none", "full") for size in small]
    cuts = _cuts(world)
    for savers, layouts in [(large_savers, cut) for cut in cuts] + [(small_savers, cut) for cut in cuts]:
        for recompute, micro_batch in savers:
            train = recipe.train.model_copy(update={"micro_batch": micro_batch})
            for sizes in layouts:
                chosen = {**recipe.layout.model_dump(), **sizes, "auto": False, "memory_gib": None}
                layout = LayoutConfig.model_validate({**chosen, "recompute": recompute})
                yield recipe.model_copy(update={"layout": layout, "train": train})


def _parts(recipe: Recipe, world: int) -> set[int]:
    """Sizes of microbatches that divide what a rank of some cut reads: about halves, again and again."""
    batch, parts = recipe.train.global_batch, set[int]()
    for ranks in (world >> power for power in range(world.bit_length()) if world % (1 << power) == 0):  # data parallel
        if batch % ranks == 0:
            part = min(recipe.train.micro_batch or batch, batch // ranks)
            while part > 1:
                part //= next(factor for factor in range(2, part + 1) if part % factor == 0)
                parts.add(part)
    return parts


def _cuts(world: int) -> list[list[dict[str, int | bool | None]]]:
    """Sizes of the groups: data parallel ranks alone, with tensor parallel ones, with stages."""
    powers = [1 << power for power in range(world.bit_length()) if world % (1 << power) == 0]
    cuts: list[list[dict[str, int | bool | None]]] = [[], [], []]
    for pp in powers:
        for tp in powers:
            if tp <= 8 and tp * pp <= world:
                for zero in (None, 1, 2, 3) if pp == 1 else (None, 1):
                    for sequence_parallel in (True, False) if tp > 1 else (False,):
                        cut = cuts[2 if pp > 1 else 1 if tp > 1 else 0]
                        cut.append({"tp": tp, "pp": pp, "zero": zero, "sequence_parallel": sequence_parallel})
    return cuts


def device_memory_gib(device: str, ranks: int) -> float:
    """Of this rank's card, all of it; on CPU the share of the machine's memory that each of so many ranks has."""
    if device != "cpu" and torch.cuda.is_available():
        return torch.cuda.get_device_properties(pick_device(device)).total_memory / GIB
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB / ranks
