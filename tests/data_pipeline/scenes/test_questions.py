"""Questions, answered again from the scene by other code than made them; fair, and silent on what is held out."""

import re
from collections import Counter, defaultdict
from typing import Any

import pytest

from data_pipeline.scenes.dice import Dice, stream
from data_pipeline.scenes.questions import multiple_choice, questions
from data_pipeline.scenes.world import COLOURS, HELD_OUT, SHAPES, Kind, Scene, scene

NUMBERS = ["none", "one", "two", "three", "four", "five", "six"]
OPPOSITE = {"left of": "right of", "above": "below", "inside": "around"}


def asked(shown: Scene, index: int) -> tuple[list[dict[str, str]], dict[str, Any]]:
    dice = Dice(stream(0, "train words", index))
    return questions(shown, dice), multiple_choice(shown, dice)


def singular(word: str) -> str:
    return "cross" if word.startswith("cross") else word.removesuffix("s")


def read_kind(words: str) -> dict[str, Any]:
    """The attributes that some words tell: "two red stars" -> count, colour, shape."""
    found: dict[str, Any] = {}
    for word in words.split():
        if word in COLOURS:
            found["colour"] = word
        elif word in ("small", "large"):
            found["size"] = word
        elif word in ("solid", "striped", "dotted", "checkered"):
            found["texture"] = word
        elif word in ("a", "an"):
            found["count"] = 1
        elif word in NUMBERS:
            found["count"] = NUMBERS.index(word)
        elif singular(word) in SHAPES:
            found["shape"] = singular(word)
        else:
            assert word in ("the", "thing", "things"), word
    return found


def those(words: str, shown: Scene) -> list[Kind]:
    wanted = read_kind(words)
    return [kind for kind in shown.kinds if all(getattr(kind, name) == value for name, value in wanted.items())]


def the_one(words: str, shown: Scene) -> Kind:
    (kind,) = those(words, shown)  # a name must fit one kind only
    return kind


def relation_of(first: Kind, second: Kind, shown: Scene) -> str:
    assert shown.relation
    assert {first, second} == set(shown.kinds)
    return shown.relation if first == shown.kinds[0] else OPPOSITE[shown.relation]


def answer(question: str, shown: Scene) -> str:
    """The answer, from the text of the question and the scene."""
    if found := re.fullmatch(r"What (\w+) (is|are) the (.+)\?", question):
        return str(getattr(agreeing(found[2], the_one(found[3], shown)), found[1]))
    if question == "How many things are there?":
        return NUMBERS[sum(kind.count for kind in shown.kinds)]
    if found := re.fullmatch(r"How many (.+) are there\?", question):
        return NUMBERS[the_one(found[1], shown).count]
    if found := re.fullmatch(r"Where (is|are) the (.+), seen from the (.+)\?", question):
        first, second = agreeing(found[1], the_one(found[2], shown)), the_one(found[3], shown)
        return relation_of(first, second, shown)
    if found := re.fullmatch(r"(Is|Are) there exactly (.+)\?", question):
        assert len(read_kind(found[2])) == 5
        return "yes" if those(found[2], shown) else "no"
    if found := re.fullmatch(r"Is there (an? )(.+)\?", question):
        assert (found[1] == "an ") == (found[2][0] in "aeiou")
        return "yes" if those(found[2], shown) else "no"
    found = re.fullmatch(r"(Is|Are) the (.+) (left of|right of|above|below|inside|around) the (.+)\?", question)
    assert found, question
    first = agreeing(found[1].lower(), the_one(found[2], shown))
    return "yes" if found[3] == relation_of(first, the_one(found[4], shown), shown) else "no"


def agreeing(verb: str, kind: Kind) -> Kind:
    assert verb == ("is" if kind.count == 1 else "are")
    return kind


@pytest.mark.parametrize("held_out", [False, True])
def test_answers_follow_from_the_scene(held_out: bool) -> None:
    for index in range(2000):
        shown = scene(9, index, held_out)
        pairs, _ = asked(shown, index)
        kinds = [pair["kind"] for pair in pairs]
        assert kinds == ["attribute", "count", "yes/no"] + ["relation"] * (shown.relation is not None)
        for pair in pairs:
            assert answer(pair["question"], shown) == pair["answer"], (shown, pair)


def test_yes_and_no_are_even_in_every_form_and_for_every_relation() -> None:
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for index in range(6000):
        pairs, _ = asked(scene(0, index), index)
        question, said = pairs[2]["question"], pairs[2]["answer"]
        form = re.search(r"exactly|left of|right of|above|below|inside|around|$", question)
        assert form
        answers[form[0]][said] += 1
    assert len(answers) == 8
    for form, counts in answers.items():
        total = counts.total()
        assert abs(counts["yes"] / total - 0.5) < 2.5 / total**0.5, (form, counts)


def reason_is_true(reason: str, shown: Scene) -> bool:
    """Whether the picture shows what the reason says: "There is A.", "Besides the X there is A.", "A is left of B."."""
    text = reason[0].lower() + reason[1:].removesuffix(".")
    if found := re.fullmatch(r"(?:besides the (.+) )?there (?:is|are) (.+)", text):
        gone = those(found[1], shown) if found[1] else []
        return any(kind not in gone for kind in those(found[2], shown))
    found = re.fullmatch(r"(.+) (?:is|are) (left of|above|inside) (.+)", text)
    assert found, reason
    first, second = those(found[1], shown), those(found[3], shown)
    return (first, second) == ([shown.kinds[0]], [shown.kinds[1]]) and found[2] == shown.relation


def choose(question: str, shown: Scene) -> str:
    """The answer to a multiple choice question."""
    if found := re.fullmatch(r"If one (\w+) were taken away, how many things would be left\?", question):
        assert found[1] == shown.kinds[0].shape
        return NUMBERS[shown.things - 1]
    if found := re.fullmatch(r"If the (.+) were taken away, how many things would be left\?", question):
        return NUMBERS[shown.things - the_one(found[1], shown).count]
    way = {"left of": "left to right", "above": "top to bottom", "inside": "the inside out"}[shown.relation or ""]
    found = re.fullmatch(rf"Going from {way}, which (shape|colour) comes first\?", question)
    assert found, question
    return str(getattr(shown.kinds[0], found[1]))


@pytest.mark.parametrize("held_out", [False, True])
def test_of_four_choices_and_four_reasons_one_is_right(held_out: bool) -> None:
    for index in range(1500):
        shown = scene(4, index, held_out)
        _, choice = asked(shown, index)
        assert len(set(choice["choices"])) == len(set(choice["rationales"])) == 4
        assert choice["choices"][choice["answer"]] == choose(choice["question"], shown)
        true = [number for number, reason in enumerate(choice["rationales"]) if reason_is_true(reason, shown)]
        assert true == [choice["rationale"]], (shown, choice)


def test_every_reason_would_lead_to_the_right_answer() -> None:
    """So that the answer does not give the reason away."""
    for index in range(1500):
        shown = scene(4, index)
        _, choice = asked(shown, index)
        right = choice["choices"][choice["answer"]]
        for reason in choice["rationales"]:
            text = reason[0].lower() + reason[1:].removesuffix(".")
            told = re.sub(r"^besides the .+ (?=there)", "", text)
            first = read_kind(re.sub(r"^there (is|are) ", "", re.split(r" (?:is|are) (?:left|above|inside)", told)[0]))
            if "comes first" in choice["question"]:
                assert right in first.values()
            else:
                left = first["count"] - (1 if "If one" in choice["question"] else 0)
                assert NUMBERS[left] == right


def test_right_choices_stand_anywhere() -> None:
    places = Counter()
    for index in range(2000):
        _, choice = asked(scene(0, index), index)
        places["answer", choice["answer"]] += 1
        places["rationale", choice["rationale"]] += 1
    assert len(places) == 8
    assert all(430 < count < 570 for count in places.values())


def test_no_question_of_training_names_a_held_out_combination() -> None:
    for index in range(3000):
        pairs, choice = asked(scene(0, index), index)
        texts = [pair["question"] for pair in pairs] + choice["rationales"] + [choice["question"]]
        for text in texts:
            for things in re.findall(r"(?:red|orange|yellow|green|blue|purple|pink|white)[a-z ]*", text):
                colour, *rest = things.split()
                shapes = [singular(word) for word in rest if singular(word) in SHAPES]
                if shapes:
                    assert (colour, shapes[0]) not in HELD_OUT, text
