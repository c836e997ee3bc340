"""Questions about a scene, with answers that follow from it: one word, yes or no, and four choices with reasons.

Design choices:
- A question names a thing by as little as tells it apart (its shape, or its colour too when shapes are alike), so
  that the answer has to be seen.
- Yes or no is drawn before the question is made, and what is denied is as likely as what is affirmed: the text of a
  question does not give its answer away.
- The multiple choice is a pair, as in VCR (Zellers et al. 2019, "From Recognition to Cognition"): Q->A has four
  answers; QA->R has four reasons that would all lead to the right answer, of which one is true of the picture.
- A question about a training scene names no held-out combination of colour and shape, not even to deny it: a
  model would learn that they are never there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from data_pipeline.scenes.dice import Dice
from data_pipeline.scenes.words import NUMBERS, amount, is_or_are, noun
from data_pipeline.scenes.world import COLOURS, SHAPES, SIZES, TEXTURES, Kind, Scene, is_possible

Question = dict[str, str]  # "kind" (of question), "question", "answer"
Kinds = tuple[Kind, ...]
CHOICES = 4

_VALUES: dict[str, Sequence[Any]] = {
    "count": range(1, 6),
    "size": SIZES,
    "colour": COLOURS,
    "texture": TEXTURES,
    "shape": SHAPES,
}
_EVERYTHING = tuple(_VALUES)
_OTHER_SIDE = {"left of": "right of", "above": "below", "inside": "around"}
_BESIDE = ("left of", "right of", "above", "below")
_WAYS = {"left of": "from left to right", "above": "from top to bottom", "inside": "from the inside out"}


def questions(scene: Scene, dice: Dice) -> list[Question]:
    """One question of each kind: attribute, count, yes/no and, with two kinds of thing, relation."""
    asked = [_ask_attribute(scene, dice), _ask_count(scene, dice), _ask_yes_no(scene, dice)]
    if scene.relation is not None:
        asked.append(_ask_relation(scene, dice))
    return asked


def multiple_choice(scene: Scene, dice: Dice) -> dict[str, Any]:
    """A question with four choices, and four reasons for the right one.

    Keys: question, choices (4), answer (index into choices), rationales (4), rationale (index into rationales).
    """
    if scene.relation is None:
        puzzle = _puzzle_left_over(scene, dice)
    elif dice.happens(0.5):
        puzzle = _puzzle_first(scene, dice)
    else:
        puzzle = _puzzle_without(scene, dice)
    right, reason = puzzle.choices[0], puzzle.reason(scene.kinds)
    reasons = [reason]
    while len(reasons) < CHOICES:
        place, attributes = dice.pick(puzzle.free)
        wrong = puzzle.reason(_with_another(scene, place, attributes, dice))
        if wrong not in reasons:
            reasons.append(wrong)
    choices, reasons = dice.shuffled(puzzle.choices), dice.shuffled(reasons)
    return {
        "question": puzzle.question,
        "choices": choices,
        "answer": choices.index(right),
        "rationales": reasons,
        "rationale": reasons.index(reason),
    }


def _ask_attribute(scene: Scene, dice: Dice) -> Question:
    kind = dice.pick(scene.kinds)
    others = [other for other in scene.kinds if other is not kind]
    attributes = ["size", "texture"]
    if all(other.shape != kind.shape for other in others):
        attributes.append("colour")
    if all(other.colour != kind.colour for other in others):
        attributes.append("shape")
    attribute = dice.pick(attributes)
    if attribute == "shape":
        name = f"{kind.colour} {noun('thing', kind.count)}"
    else:
        name = _name(kind, scene)
    return _question("attribute", f"What {attribute} {is_or_are(kind.count)} the {name}?", getattr(kind, attribute))


def _ask_count(scene: Scene, dice: Dice) -> Question:
    if dice.happens(0.3):
        return _question("count", "How many things are there?", NUMBERS[scene.things])
    kind = dice.pick(scene.kinds)
    return _question("count", f"How many {_name(kind, scene, count=2)} are there?", NUMBERS[kind.count])


def _ask_relation(scene: Scene, dice: Dice) -> Question:
    first, second, relation = _from_either_side(scene, dice)
    text = f"Where {is_or_are(first.count)} the {_name(first, scene)}, seen from the {_name(second, scene)}?"
    return _question("relation", text, relation)


def _ask_yes_no(scene: Scene, dice: Dice) -> Question:
    true = dice.happens(0.5)
    form = dice.pick((_is_one, _is_exactly) if scene.relation is None else (_is_one, _is_exactly, _is_placed))
    return _question("yes/no", form(scene, dice, true), "yes" if true else "no")


def _is_one(scene: Scene, dice: Dice, true: bool) -> str:
    """ "Is there a red star?"."""
    place = dice.pick(range(len(scene.kinds)))
    kind = scene.kinds[place]
    shown = {(other.colour, other.shape) for other in scene.kinds}
    while not true and (kind.colour, kind.shape) in shown:
        kind = _with_another(scene, place, ("colour", "shape"), dice)[place]
    return f"Is there {amount(replace(kind, count=1), kind.colour)}?"


def _is_exactly(scene: Scene, dice: Dice, true: bool) -> str:
    """ "Are there exactly two small red striped stars?"."""
    place = dice.pick(range(len(scene.kinds)))
    kind = scene.kinds[place]
    while not true and kind in scene.kinds:
        kind = _with_another(scene, place, _EVERYTHING, dice)[place]
    told = f"{NUMBERS[kind.count]} {kind.size} {kind.colour} {kind.texture} {noun(kind.shape, kind.count)}"
    return f"{is_or_are(kind.count).capitalize()} there exactly {told}?"


def _is_placed(scene: Scene, dice: Dice, true: bool) -> str:
    """ "Are the stars left of the moon?"."""
    first, second, relation = _from_either_side(scene, dice)
    if not true:
        rivals = _BESIDE if relation in _BESIDE else ("inside", "around")
        relation = dice.pick([rival for rival in rivals if rival != relation])
    return f"{is_or_are(first.count).capitalize()} the {_name(first, scene)} {relation} the {_name(second, scene)}?"


@dataclass(frozen=True)
class _Puzzle:
    """A multiple choice before it is shuffled: the right choice comes first.

    `reason` tells why, of any kinds; `free` says what of which kind (by place) can change without changing the answer.
    """

    question: str
    choices: tuple[str, ...]
    reason: Callable[[Kinds], str]
    free: tuple[tuple[int, tuple[str, ...]], ...]


def _puzzle_left_over(scene: Scene, dice: Dice) -> _Puzzle:
    """One kind: how many are left when one goes?"""
    kind = scene.kinds[0]
    return _Puzzle(
        f"If one {kind.shape} were taken away, how many things would be left?",
        _number_choices(kind.count - 1, dice),
        lambda kinds: f"There {is_or_are(kinds[0].count)} {_full(kinds[0])}.",
        ((0, ("size", "colour", "texture")),),
    )


def _puzzle_without(scene: Scene, dice: Dice) -> _Puzzle:
    """Two kinds: how many things are left when one kind goes?"""
    gone = dice.pick((0, 1))
    kept = 1 - gone
    name = _name(scene.kinds[gone], scene)
    told_by = "shape" if scene.kinds[0].shape != scene.kinds[1].shape else "colour"
    return _Puzzle(
        f"If the {name} were taken away, how many things would be left?",
        _number_choices(scene.kinds[kept].count, dice),
        lambda kinds: f"Besides the {name} there {is_or_are(kinds[kept].count)} {_full(kinds[kept])}.",
        # the reason must not be about the things that went
        ((kept, tuple(name for name in ("size", "colour", "texture", "shape") if name != told_by)),),
    )


def _puzzle_first(scene: Scene, dice: Dice) -> _Puzzle:
    """Two kinds: which comes first on the way from one to the other?"""
    relation = scene.relation or ""
    asked = "shape" if scene.kinds[0].shape != scene.kinds[1].shape else "colour"
    right, other = (getattr(kind, asked) for kind in scene.kinds)
    rest = [value for value in _VALUES[asked] if value not in (right, other)]
    return _Puzzle(
        f"Going {_WAYS[relation]}, which {asked} comes first?",
        (right, other, *dice.shuffled(rest)[: CHOICES - 2]),
        lambda kinds: f"{_full(kinds[0]).capitalize()} {is_or_are(kinds[0].count)} {relation} {_full(kinds[1])}.",
        ((0, tuple(name for name in _EVERYTHING if name != asked)), (1, _EVERYTHING)),
    )


def _number_choices(right: int, dice: Dice) -> tuple[str, ...]:
    """Four numbers in words, the right one first."""
    wrong = dice.shuffled([number for number in range(5) if number != right])
    return tuple("none" if number == 0 else NUMBERS[number] for number in (right, *wrong[: CHOICES - 1]))


def _with_another(scene: Scene, place: int, attributes: Sequence[str], dice: Dice) -> Kinds:
    """The kinds of the scene, one attribute of the one at `place` replaced: what might have been, but is not."""
    while True:
        attribute = dice.pick(attributes)
        kind = Kind(**{**vars(scene.kinds[place]), attribute: dice.pick(_VALUES[attribute])})
        nameable = scene.is_held_out or not kind.is_held_out
        if nameable and kind not in scene.kinds and is_possible(kind, place, scene.relation):
            return (*scene.kinds[:place], kind, *scene.kinds[place + 1 :])


def _from_either_side(scene: Scene, dice: Dice) -> tuple[Kind, Kind, str]:
    """The two kinds of the scene and what the first is of the second, told from a random side."""
    first, second = scene.kinds
    relation = scene.relation or ""
    return (first, second, relation) if dice.happens(0.5) else (second, first, _OTHER_SIDE[relation])


def _name(kind: Kind, scene: Scene, count: int | None = None) -> str:
    """The least that tells this kind from the others of its scene: "stars", or "red stars" beside other stars."""
    name = noun(kind.shape, kind.count if count is None else count)
    alike = any(other is not kind and other.shape == kind.shape for other in scene.kinds)
    return f"{kind.colour} {name}" if alike else name


def _full(kind: Kind) -> str:
    return amount(kind, kind.size, kind.colour, kind.texture)


def _question(kind: str, question: str, answer: str) -> Question:
    return {"kind": kind, "question": question, "answer": answer}
