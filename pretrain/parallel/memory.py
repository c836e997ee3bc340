"""What one rank of a layout holds at the end of a step's backward pass, counted from the recipe; nothing is built.

Parameters are counted piece by piece as the models lay them out. Bytes of gradients and optimizer state are ours at
ZeRO-0 and DeepSpeed's from 1 on (P parameters of the rank, Z ranks that ZeRO shards over, b bytes of a parameter):

                  parameters   gradients                  optimizer
    ZeRO-0        b P          4 P                        8 P
    ZeRO-1        b P          4 P / Z, bf16: 4 P         12 P / Z
    ZeRO-2        b P          4 P / Z                    12 P / Z
    ZeRO-3        b P / Z      4 P / Z + b bucket         12 P / Z

Activations are those that autograd keeps for backward, per layer and token of width D with F in the feed-forward part:
norm and residual inputs 2 D, norm outputs 2 D, q, k, v, their result 4 D, feed-forward 2 F; tensor parallel ranks
share what lies between two linear layers, sequence parallel ones the rest too. A stage of a 1F1B pipeline holds
min(microbatches, stages behind it and itself) microbatches at a time (Narayanan et al. 2021, section 2.2); with v
chunks the interleaved schedule holds more, up to (pp - stage - 1) * 2 + (v - 1) * pp + 1 chunks' worth.

tests/pretrain/parallel/test_memory.py compares with what small real runs hold, to 5%.
"""

from __future__ import annotations

from dataclasses import dataclass

from pretrain.config import Recipe
from pretrain.parallel.layout import Layout
from pretrain.sections import Tower

BUCKET = 500_000_000  # numbers, at most; see parallel/zero.py
SMALL = 100_000  # ZeRO-3 keeps parameters below this whole (stage3_param_persistence_threshold)


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank."""

    parameter_count: int
    parameters: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """All of it; what libraries and the allocator need comes on top."""
        return self.parameters + self.gradients + self.optimizer + self.activations


@dataclass(frozen=True)
class Place:
    """A rank's stage; the others of its stage hold as much."""

    stage: int
    layout: Layout

    @property
    def first(self) -> bool:
        """Whether inputs enter here."""
        return self.stage == 0

    @property
    def last(self) -> bool:
        """Whether results come out here."""
        return self.stage == self.layout.pp - 1


def memory_of(recipe: Recipe, layout: Layout, stage: int = 0) -> Memory:
    """Of a rank of the given pipeline stage, while a step of the recipe runs."""
    place = Place(stage, layout)
    sizes = parameter_sizes(recipe, place)
    trained = sum(size for name, size in sizes if not name.startswith(recipe.train.freeze))
    count = sum(size for _, size in sizes)
    half = recipe.train.precision == "bf16"
    width = 2 if half else 4
    shards = layout.dp * layout.cp
    match layout.zero:
        case 0:
            parameters, gradients, optimizer = width * count, 4 * trained, 8 * trained
        case 1 | 2:
            whole = half and layout.zero == 1
            parameters, optimizer = width * count, 12 * trained // shards
            gradients = 4 * trained // (1 if whole else shards)
        case _:
            kept_whole = sum(size for _, size in sizes if size <= SMALL)
            parameters = width * (count // shards + kept_whole)
            gradients = 4 * trained // shards + width * min(count, BUCKET)
            optimizer = 12 * trained // shards
    return Memory(count, parameters, gradients, 0 if layout.offload else optimizer, activation_bytes(recipe, place))


def parameter_sizes(recipe: Recipe, place: Place) -> list[tuple[str, int]]:
    """(beginning of the name, numbers) of every parameter on a rank of this place."""
    model, tp = recipe.model, place.layout.tp
    sizes: list[tuple[str, int]] = []
    for name, tower in model.towers.items():
        prefix = f"{name if model.kind == 'dual' else 'decoder'}."
        layers = tower.layers // place.layout.pp
        sizes += [(prefix, size) for size in _layer_sizes(tower, tp)] * layers
        inner: list[int] = []
        if place.first and (name == "vision" or model.kind == "captioner"):
            inner += [3 * model.vision.patch**2 * tower.width, tower.width]
            if model.vision.positions == "learned":
                inner.append(model.vision.patches * tower.width)
            if name == "vision" and model.vision.pool == "class":
                inner.append(tower.width)
        table = model.text.token_rows * tower.width // tp
        if name == "text" and place.first:
            inner += [table, model.text.context * tower.width]
        if place.last:
            inner += [tower.width, tower.width]
            if model.kind == "dual":
                inner.append(tower.width * model.embed_dim)
            elif not place.first:
                inner.append(table)  # the other copy of the tied table
        sizes += [(prefix, size) for size in inner]
    if place.last and model.kind == "dual":
        sizes += [("logit_scale.", 1), ("logit_bias.", 1)]
    return sizes


def _layer_sizes(tower: Tower, tp: int) -> list[int]:
    width, hidden = tower.width, int(tower.width * tower.mlp_ratio)
    norms = [width] * 4
    attention = [3 * width * width // tp, 3 * width // tp, width * width // tp, width]
    return [*norms, *attention, width * hidden // tp, hidden // tp, width * hidden // tp, width]


def activation_bytes(recipe: Recipe, place: Place) -> int:
    """What autograd keeps at the worst moment of a step, by the towers that run."""
    layout = place.layout
    lengths = recipe.model.sequence_lengths
    towers = list(recipe.model.towers.values())
    each = [_tower_bytes(recipe, tower, length, place) for tower, length in zip(towers, lengths.values(), strict=True)]
    if layout.pp > 1:  # towers are pipelines that run one after the other
        return max(kept + again for kept, again in each)
    # one pass runs them all, text first; backward begins at the last one, and what it is done with is free
    each.reverse()
    return max(sum(kept for kept, _ in each[:number]) + each[number - 1][1] for number in range(1, len(each) + 1))


def _tower_bytes(recipe: Recipe, tower: Tower, length: int, place: Place) -> tuple[int, int]:
    """(kept from forward to backward, made again for a moment in backward)."""
    layout = place.layout
    half = recipe.train.precision == "bf16"
    width, hidden, number = tower.width, int(tower.width * tower.mlp_ratio), 2 if half else 4
    tokens = layout.micro_batch * length // layout.cp
    shared = layout.tp if layout.sequence_parallel else 1
    # on CPU a norm in bf16 keeps its input in fp32
    norm_input = 4 if half and recipe.run.device == "cpu" else number
    between = 2 * width * (norm_input + number) / shared + 16 / shared  # norms: inputs, outputs, mean and deviation
    inside = (4 * width + 2 * hidden) * number / layout.tp + 4 * tower.heads / layout.tp  # the last: log sums
    if layout.cp > 1:
        inside += 2 * layout.cp * width * number / layout.tp  # keys and values of all context parallel ranks
    packed = _is_packed(recipe, tower, layout)
    copied = width * number / layout.tp if packed else 0.0  # attention's output, by rows and side by side
    inside += copied
    layers = tower.layers // (layout.pp * layout.vpp)
    of_chunk, again = layers * (between + inside), 0.0
    if recipe.layout.recompute == "full":
        # the inputs of all layers, and all of the one that is being made again, whose input is there
        of_chunk = layers * width * number / shared
        again = between + inside - width * number / shared
    if recipe.layout.recompute == "selective":
        of_chunk -= layers * 4 * tower.heads / layout.tp
    ends, last_rows = 0.0, 1.0
    if packed:  # behind q, k and v, all of the last layer is one row a sample
        last_rows = 1 / length
        if recipe.layout.recompute != "full":
            of_chunk -= copied + (1 - last_rows) * (between / 2 + (width + 2 * hidden) * number / layout.tp)
    if place.first and (tower is recipe.model.vision or recipe.model.kind == "captioner"):
        ends += 3 * recipe.model.vision.patch**2 * number * recipe.model.vision.patches / length
    table = 0
    if place.last and recipe.layout.recompute != "full":  # else it is free when the first layer is made again
        ends += last_rows * (width * norm_input / shared + 8 / shared)
    if place.last and recipe.model.kind == "captioner":
        ends += width * number
        table = recipe.model.text.token_rows * width * number // layout.tp  # its gradient, made in forward
    kept = tokens * (of_chunk * _chunks_in_flight(place) + ends * _in_flight(place)) + table
    return int(kept), int(tokens * again)


def _is_packed(recipe: Recipe, tower: Tower, layout: Layout) -> bool:
    """As models/towers.py: a text tower whose sequence and layers no rank cuts."""
    whole = layout.pp == layout.cp == 1 and not layout.sequence_parallel
    return whole and recipe.model.kind == "dual" and tower is recipe.model.text


def _in_flight(place: Place) -> int:
    layout = place.layout
    return min(layout.microbatches, layout.pp - place.stage) if layout.pp > 1 else 1


def _chunks_in_flight(place: Place) -> int:
    """Chunks times microbatches whose activations this stage holds at its worst moment."""
    layout = place.layout
    if layout.vpp == 1:
        return _in_flight(place)
    warm_up = (layout.pp - place.stage - 1) * 2 + (layout.vpp - 1) * layout.pp
    return min(warm_up + 1, layout.microbatches * layout.vpp)
