"""Scenes in words: several phrasings of one scene, each true and complete.

Design choices:
- Every caption says everything a scene is: count, size, colour, texture and shape of each kind, and the relation. So
  the words alone find the picture among pictures told apart, whichever phrasing they come in.
- Phrasings differ in order and in side ("left of" from one is "to the right of" from the other), hardly in vocabulary:
  about 60 words, so that minutes of training are enough to learn them.
- The phrasing is drawn, from the scene's stream of words; what it says is not.
"""

from __future__ import annotations

from data_pipeline.scenes.dice import Dice
from data_pipeline.scenes.world import Kind, Scene

CAPTIONS = 3  # of each scene
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight")

_WITH = {"striped": "with stripes", "dotted": "with dots", "checkered": "with checks"}

_ALONE_FRAMES = (
    "{A}",
    "a picture of {A}",
    "there {is_A} {A}",
    "{A} and nothing else",
    "{A} on an empty background",
)
# {A} is the first kind of the scene, {B} the second; {is_A}, {is_B} agree with them.
_FRAMES = {
    "left of": (
        "{A} left of {B}",
        "{A} to the left of {B}",
        "{B} right of {A}",
        "{B} to the right of {A}",
        "{A} on the left and {B} on the right",
        "there {is_A} {A} to the left of {B}",
        "there {is_B} {B} to the right of {A}",
    ),
    "above": (
        "{A} above {B}",
        "{B} below {A}",
        "{B} under {A}",
        "a picture of {A} above {B}",
        "{A} at the top and {B} at the bottom",
        "there {is_A} {A} above {B}",
        "there {is_B} {B} below {A}",
    ),
    "inside": (
        "{A} inside {B}",
        "{B} around {A}",
        "{B} with {A} inside",
        "a picture of {A} inside {B}",
        "there {is_A} {A} inside {B}",
        "there {is_B} {B} around {A}",
    ),
}


def captions(scene: Scene, dice: Dice, count: int = CAPTIONS) -> tuple[str, ...]:
    """`count` different captions of the scene, each of which says all of it."""
    frames = _ALONE_FRAMES if scene.relation is None else _FRAMES[scene.relation]
    told = []
    for frame in dice.shuffled(frames)[:count]:
        phrases = [phrase(kind, dice, after=scene.relation != "inside") for kind in scene.kinds]
        verbs = [is_or_are(kind.count) for kind in scene.kinds]
        parts = {"A": phrases[0], "is_A": verbs[0], "B": phrases[-1], "is_B": verbs[-1]}
        told.append(frame.format(**parts))
    return tuple(told)


def phrase(kind: Kind, dice: Dice, after: bool = True) -> str:
    """All that a kind is, as "three small red striped stars"; `after`: the texture may follow ("with stripes")."""
    order = dice.pick(("colour first", "colour first", "texture first", "texture after"))
    if order == "texture after" and after and kind.texture in _WITH:
        return f"{amount(kind, kind.size, kind.colour)} {_WITH[kind.texture]}"
    if order == "texture first":
        return amount(kind, kind.size, kind.texture, kind.colour)
    return amount(kind, kind.size, kind.colour, kind.texture)


def amount(kind: Kind, *adjectives: str) -> str:
    """How many of what: "a small star", "an orange moon", "two red crosses"."""
    words = " ".join((*adjectives, noun(kind.shape, kind.count)))
    return f"{article(words)} {words}" if kind.count == 1 else f"{NUMBERS[kind.count]} {words}"


def noun(shape: str, count: int) -> str:
    """The shape's name in the number that `count` asks for."""
    return shape if count == 1 else f"{shape}es" if shape.endswith("s") else f"{shape}s"


def article(words: str) -> str:
    """The article of "a" or "an" that goes before these words."""
    return "an" if words[0] in "aeiou" else "a"


def is_or_are(count: int) -> str:
    """The verb for this many."""
    return "is" if count == 1 else "are"
