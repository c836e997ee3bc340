"""Zero-shot classification against the definition by hand: prompts, class means, ties."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from pretrain.evaluation.zero_shot import zero_shot_scores


class Texts:
    """An embedding of any prompt, the same for the same words; remembers what it was asked."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.asked: list[str] = []

    def one(self, prompt: str) -> torch.Tensor:
        seed = sum(place * ord(letter) for place, letter in enumerate(prompt, 1))
        return F.normalize(torch.randn(self.size, generator=torch.Generator().manual_seed(seed)), dim=0)

    def __call__(self, prompts: list[str]) -> torch.Tensor:
        self.asked += prompts
        return torch.stack([self.one(prompt) for prompt in prompts])


def by_hand(image: torch.Tensor, labels: list[str], templates: list[str], texts: Texts, k: int) -> float:
    """Mean of the prompts, unit length, cosine; the class is found if fewer than k others are at least as near."""
    classes = []
    for name in set(labels):
        mean = torch.stack([texts.one(template.replace("{}", name)) for template in templates]).mean(0)
        classes.append((name, mean / mean.norm()))
    found = 0
    for picture, label in zip(image, labels, strict=True):
        own = next(float(picture @ each) for name, each in classes if name == label)
        found += sum(float(picture @ each) >= own for name, each in classes if name != label) < k
    return found / len(labels)


@pytest.mark.parametrize("templates", [["{}"], ["{}", "a {}", "a picture of a {}"], ["two {} and one {}", "nothing"]])
@pytest.mark.parametrize(("pictures", "classes"), [(1, 1), (13, 4), (97, 11)])
def test_is_the_nearest_class_mean(pictures: int, classes: int, templates: list[str]) -> None:
    texts = Texts(7)
    labels = [f"class {number * number % classes}" for number in range(pictures)]
    image = F.normalize(torch.randn(pictures, 7, generator=torch.Generator().manual_seed(pictures)), dim=1)
    scores: dict[str, Any] = zero_shot_scores(image, labels, templates, texts)
    assert scores["top1"] == pytest.approx(by_hand(image, labels, templates, texts, 1))
    assert scores["top5"] == pytest.approx(by_hand(image, labels, templates, texts, 5))
    distinct = len(set(labels))
    assert (scores["classes"], scores["images"]) == (distinct, pictures)
    assert scores["chance"] == pytest.approx(1 / distinct)
    assert len(texts.asked) == distinct * len(templates)


def test_every_prompt_names_its_class_wherever_the_braces_stand() -> None:
    texts = Texts(3)
    zero_shot_scores(torch.randn(2, 3), ["{red}", "blue % star"], ["{}", "{} is a {}"], texts)
    assert sorted(texts.asked) == sorted(["{red}", "{red} is a {red}", "blue % star", "blue % star is a blue % star"])


def test_a_prompt_counts_by_its_direction_and_the_class_by_its_own() -> None:
    """A class whose prompts disagree has a short mean: brought to unit length, it is as near as any other."""
    table = {"a one": [1.0, 0.0], "a two": [-0.8, 0.6], "b one": [0.0, 1.0], "b two": [0.0, 1.0]}

    def embed(prompts: list[str]) -> torch.Tensor:
        return torch.tensor([table[prompt] for prompt in prompts])

    # the mean of a is (0.1, 0.3): of unit length (0.316, 0.949), and nearer to this picture than b = (0, 1)
    picture = F.normalize(torch.tensor([[0.3, 0.8]]), dim=1)
    assert zero_shot_scores(picture, ["a"], ["{} one", "{} two"], embed)["top1"] == 1.0
    both = zero_shot_scores(picture.repeat(2, 1), ["a", "b"], ["{} one", "{} two"], embed)
    assert both["top1"] == 0.5


def test_ties_count_against_the_model() -> None:
    texts = torch.tensor([[1.0, 0.0]])
    labels = [f"class {number % 7}" for number in range(21)]
    scores = zero_shot_scores(texts.repeat(21, 1), labels, ["{}"], lambda prompts: texts.repeat(len(prompts), 1))
    assert (scores["top1"], scores["top5"]) == (0.0, 0.0)


def test_a_perfect_model_gets_everything() -> None:
    names = [f"class {number}" for number in range(6)]
    directions = dict(zip(sorted(names), torch.eye(6), strict=True))
    labels = [names[number * 5 % 6] for number in range(12)]
    image = torch.stack([directions[label] for label in labels])
    scores = zero_shot_scores(
        image, labels, ["{}"], lambda prompts: torch.stack([directions[prompt] for prompt in prompts])
    )
    assert (scores["top1"], scores["top5"], scores["chance"]) == (1.0, 1.0, 1 / 6)


def test_a_few_classes_are_all_among_five() -> None:
    texts = Texts(4)
    image = torch.randn(10, 4, generator=torch.Generator().manual_seed(0))
    assert zero_shot_scores(image, list("abcde") * 2, ["{}"], texts)["top5"] == 1.0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_finds_nothing(bad: float) -> None:
    directions, names = torch.eye(3), ["class 0", "class 1", "class 2"]

    def embed(prompts: list[str]) -> torch.Tensor:
        return directions[[names.index(prompt) for prompt in prompts]]

    nothing = {"top1": 0.0, "top5": 0.0}
    assert zero_shot_scores(directions * bad, names, ["{}"], embed).items() >= nothing.items()
    assert zero_shot_scores(directions, names, ["{}"], lambda prompts: embed(prompts) * bad).items() >= nothing.items()


def test_classes_that_no_image_has_are_candidates_too() -> None:
    texts = {"a": [1.0, 0.0], "b": [0.0, 1.0], "c": [0.8, 0.6]}

    def embed(prompts: list[str]) -> torch.Tensor:
        return torch.tensor([texts[prompt] for prompt in prompts])

    picture = F.normalize(torch.tensor([[0.7, 0.6]]), dim=1)
    assert zero_shot_scores(picture, ["a"], ["{}"], embed)["top1"] == 1.0
    scores = zero_shot_scores(picture, ["a"], ["{}"], embed, ["b", "c"])
    assert (scores["top1"], scores["classes"], scores["chance"]) == (0.0, 3, 1 / 3)
