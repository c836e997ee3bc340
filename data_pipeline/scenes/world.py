"""The grammar of the scene world: what can be in a picture, and what the test split holds back.

Design choices:
- A scene is one or two kinds of thing. A kind is a count, a size, a colour, a texture and a shape ("three small red
  striped stars"). Two kinds stand in one relation: the first is left of, above or inside the second. Right of
  and below are the same scenes told the other way round, so they are a matter of language, not of content.
- `scene(seed, index)` is a pure function: any number of scenes, in any order, in any process.
- The test split holds back combinations of colour and shape (`HELD_OUT`: each colour with one shape, each shape
  with one colour). No training scene contains one of them, every test scene does, and every colour and every shape
  is common in training: what the test measures is composition, not memory. The list belongs to the world and
  not to the seed, so that no training set of any seed has seen a test combination.
- The test scenes are chosen so that no one's description is true of another (`is_told_by`): a perfect
  model finds every picture from its words, so 100% is the ceiling of retrieval.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count as count_up

from data_pipeline.scenes.dice import Dice, stream

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "white")
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross", "heart", "moon")
TEXTURES = ("solid", "striped", "dotted", "checkered")
SIZES = ("small", "large")
RELATIONS = ("left of", "above", "inside")

# One shape for each colour, never the one that comes to mind first (a red heart, a yellow star, a white moon).
HELD_OUT = frozenset(
    zip(COLOURS, ("star", "cross", "heart", "circle", "moon", "triangle", "square", "ring"), strict=True)
)
LABELS = tuple(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES)
HOLDERS = ("circle", "square", "ring", "heart", "triangle")  # shapes with room for another one inside

_ALONE = 0.25  # share of scenes with one kind only
_INSIDE = 0.2  # share of the scenes with two kinds where one is inside the other
_MOST_ALONE = {"small": 5, "large": 3}
_MOST_BESIDE = {"small": 3, "large": 2}


@dataclass(frozen=True)
class Kind:
    """Some things that are all alike: `count` of them, each with this size, colour, texture and shape."""

    count: int
    size: str
    colour: str
    texture: str
    shape: str

    @property
    def is_held_out(self) -> bool:
        """Whether no training scene may contain this colour with this shape."""
        return (self.colour, self.shape) in HELD_OUT


@dataclass(frozen=True)
class Scene:
    """One kind (`relation` is None), or two of which the first is `relation` (left of, above, inside) the second."""

    kinds: tuple[Kind, ...]
    relation: str | None = None

    @property
    def is_held_out(self) -> bool:
        """Whether the scene contains a combination that training never shows."""
        return any(kind.is_held_out for kind in self.kinds)

    @property
    def label(self) -> str | None:
        """Its class for zero-shot classification ("red star", one of LABELS); None with two kinds."""
        return f"{self.kinds[0].colour} {self.kinds[0].shape}" if len(self.kinds) == 1 else None

    @property
    def things(self) -> int:
        """How many things there are in all."""
        return sum(kind.count for kind in self.kinds)


def scene(seed: int, index: int, held_out: bool = False) -> Scene:
    """Scene `index` of an endless list: all without held-out combinations, or (`held_out`) all with one."""
    dice = Dice(stream(seed, "test scene" if held_out else "train scene", index))
    alone = dice.happens(_ALONE)
    inside = not alone and dice.happens(_INSIDE)
    rare = dice.pick((0,) if alone else (0, 1)) if held_out else None
    while True:
        kinds = tuple(_kind(dice, place, alone, inside, place == rare) for place in range(1 if alone else 2))
        if not held_out and any(kind.is_held_out for kind in kinds):
            continue
        if not alone and not _tell_apart(kinds[0], kinds[1], inside):
            continue
        return Scene(kinds, None if alone else "inside" if inside else dice.pick(("left of", "above")))


def held_out_scenes(seed: int, count: int) -> tuple[Scene, ...]:
    """`count` scenes with held-out combinations, of which no one's description is true of another.

    The list for a smaller count is the beginning of the list for a larger one. ValueError when the world
    does not hold so many.
    """
    chosen: list[Scene] = []
    wholes: set[frozenset[Kind]] = set()
    parts: set[Kind] = set()  # the kinds of chosen pairs: alone, they would be told by those pictures too
    tries_in_vain = 0
    for index in count_up():
        if len(chosen) == count:
            return tuple(chosen)
        if tries_in_vain > 10_000:
            raise ValueError(
                f"{count} test scenes were asked for, but after {len(chosen)} no new one was found: ask for fewer"
            )
        found = scene(seed, index, held_out=True)
        members = frozenset(found.kinds)
        lone = len(members) == 1
        known = members in wholes or (
            members <= parts if lone else any(frozenset((kind,)) in wholes for kind in members)
        )
        tries_in_vain = tries_in_vain + 1 if known else 0
        if not known:
            chosen.append(found)
            wholes.add(members)
            if not lone:
                parts |= members
    raise AssertionError("counting up never ends")


def is_told_by(picture: Scene, description: Scene) -> bool:
    """Whether the full description of one scene is true of the picture of another (counts read exactly)."""
    if description.relation is None:
        return description.kinds[0] in picture.kinds
    return picture == description


def is_possible(kind: Kind, place: int, relation: str | None) -> bool:
    """Whether a scene of this relation may hold this kind at this place (0 or 1)."""
    inside = relation == "inside"
    if kind.count > _most(kind.size, relation is None, inside):
        return False
    return not inside or (kind.size == SIZES[place] and (place == 0 or kind.shape in HOLDERS))


def _most(size: str, alone: bool, inside: bool) -> int:
    """How many things of this size a kind may have."""
    return 1 if inside else (_MOST_ALONE if alone else _MOST_BESIDE)[size]


def _kind(dice: Dice, place: int, alone: bool, inside: bool, rare: bool) -> Kind:
    """A random kind for this place (0 or 1) in the scene; `rare` asks for a held-out colour and shape."""
    size = SIZES[place] if inside else dice.pick(SIZES)
    most = _most(size, alone, inside)
    shapes = HOLDERS if inside and place == 1 else SHAPES
    colour = dice.pick(COLOURS)
    shape = dice.pick(shapes)
    if rare:
        colour, shape = dice.pick([pair for pair in sorted(HELD_OUT) if pair[1] in shapes])
    return Kind(1 + int(dice.uniform() * most), size, colour, dice.pick(TEXTURES), shape)


def _tell_apart(first: Kind, second: Kind, inside: bool) -> bool:
    """Whether the eye tells the two kinds apart, as words do: by shape or colour; inside one another by colour."""
    return first.colour != second.colour or (not inside and first.shape != second.shape)
