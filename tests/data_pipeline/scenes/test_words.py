"""Captions, read back by a parser that knows only English: all of them say the scene, all of it, grammatically."""

import re
from collections import Counter

import pytest

from data_pipeline.scenes.dice import Dice, stream
from data_pipeline.scenes.words import captions
from data_pipeline.scenes.world import Kind, Scene, scene

NUMBERS = {"a": 1, "two": 2, "three": 3, "four": 4, "five": 5}
SINGULAR = "circle|square|triangle|star|ring|cross|heart|moon"
PLURAL = "circles|squares|triangles|stars|rings|crosses|hearts|moons"
COLOUR = "red|orange|yellow|green|blue|purple|pink|white"
TEXTURE = "solid|striped|dotted|checkered"
WITH = {"with stripes": "striped", "with dots": "dotted", "with checks": "checkered"}
THINGS = re.compile(
    rf"\b(?P<number>a|two|three|four|five) (?P<size>small|large)"
    rf" (?P<words>(?:{COLOUR}|{TEXTURE})(?: (?:{COLOUR}|{TEXTURE}))?)"
    rf" (?P<noun>{PLURAL}|{SINGULAR})(?P<after> with (?:stripes|dots|checks))?\b"
)
# The caption without its things -> relation, and whether the things come in the order of the scene.
MEANING = {
    "@ left of @": ("left of", True),
    "@ to the left of @": ("left of", True),
    "@ on the left and @ on the right": ("left of", True),
    "@ right of @": ("left of", False),
    "@ to the right of @": ("left of", False),
    "@ above @": ("above", True),
    "@ at the top and @ at the bottom": ("above", True),
    "@ below @": ("above", False),
    "@ under @": ("above", False),
    "@ inside @": ("inside", True),
    "@ around @": ("inside", False),
    "@ with @ inside": ("inside", False),
    "@": (None, True),
    "@ and nothing else": (None, True),
    "@ on an empty background": (None, True),
}


def read_things(match: re.Match[str]) -> Kind:
    count = NUMBERS[match["number"]]
    assert (re.fullmatch(SINGULAR, match["noun"]) is not None) == (count == 1), match[0]
    words = match["words"].split()
    colours = [word for word in words if re.fullmatch(COLOUR, word)]
    textures = [word for word in words if re.fullmatch(TEXTURE, word)]
    if match["after"]:
        textures.append(WITH[match["after"].strip()])
    assert (len(colours), len(textures)) == (1, 1), match[0]
    shape = re.match(SINGULAR, match["noun"])
    assert shape
    return Kind(count, match["size"], colours[0], textures[0], shape[0])


def read_caption(caption: str) -> Scene:
    kinds = [read_things(match) for match in THINGS.finditer(caption)]
    frame = THINGS.sub("@", caption).removeprefix("a picture of ")
    verb = re.match(r"there (is|are) ", frame)
    if verb:
        assert verb[1] == ("is" if kinds[0].count == 1 else "are"), caption
        frame = frame.removeprefix(verb[0])
    relation, in_order = MEANING[frame]
    return Scene(tuple(kinds if in_order else kinds[::-1]), relation)


def told(shown: Scene, index: int) -> tuple[str, ...]:
    return captions(shown, Dice(stream(0, "train words", index)))


@pytest.mark.parametrize("held_out", [False, True])
def test_every_caption_says_the_whole_scene(held_out: bool) -> None:
    for index in range(2500):
        shown = scene(7, index, held_out)
        for caption in told(shown, index):
            assert read_caption(caption) == shown, caption


def test_captions_of_a_scene_differ() -> None:
    for index in range(1000):
        assert len(set(told(scene(0, index), index))) == 3


def test_captions_are_pure_and_their_phrasing_varies() -> None:
    shown = scene(0, 1)
    assert told(shown, 4) == told(shown, 4)
    assert len({told(shown, index) for index in range(40)}) > 20


def test_the_vocabulary_is_small_and_every_word_common() -> None:
    words = Counter(w for index in range(3000) for caption in told(scene(0, index), index) for w in caption.split())
    assert len(words) < 70
    assert min(words.values()) > 50


def test_either_side_tells_a_relation() -> None:
    tellings = Counter()
    for index in range(2000):
        shown = scene(0, index)
        for caption in told(shown, index) if shown.relation else ():
            first = THINGS.search(caption)
            assert first
            tellings[shown.relation, read_things(first) == shown.kinds[0]] += 1
    for relation in ("left of", "above", "inside"):
        forwards, backwards = tellings[relation, True], tellings[relation, False]
        assert 0.5 < forwards / backwards < 2
