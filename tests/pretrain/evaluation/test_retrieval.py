"""Retrieval scores against a ranking by hand: ties, equal captions, chance."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from pretrain.evaluation.retrieval import KS, chance_of_text, nearest, recall, retrieval_scores


def ranked_recall(similarity: list[list[float]], right: list[list[bool]]) -> dict[str, float]:
    """The definition: sort all answers by similarity, wrong ones first among equals; is a right one in the first K?"""
    hits = dict.fromkeys(KS, 0)
    for values, truth in zip(similarity, right, strict=True):
        order = sorted(range(len(values)), key=lambda answer: (-values[answer], truth[answer]))
        place = next(position for position, answer in enumerate(order) if truth[answer])
        for k in KS:
            hits[k] += place < k
    return {f"r{k}": count / len(similarity) for k, count in hits.items()}


def whole_numbers(rows: int, size: int, seed: int, largest: int = 2) -> torch.Tensor:
    """Embeddings whose dot products are exact, so that ties are ties."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-largest, largest + 1, (rows, size), generator=generator).float()


@pytest.mark.parametrize("largest", [1, 3])
@pytest.mark.parametrize(("queries", "answers", "size"), [(1, 1, 3), (7, 23, 2), (61, 40, 3), (257, 101, 5)])
def test_recall_is_a_ranking_with_ties_against_the_model(queries: int, answers: int, size: int, largest: int) -> None:
    similarity = whole_numbers(queries, size, 1, largest) @ whole_numbers(answers, size, 2, largest).T
    generator = torch.Generator().manual_seed(3)
    right = torch.rand(queries, answers, generator=generator) < 2 / answers
    right[torch.arange(queries), torch.randint(0, answers, (queries,), generator=generator)] = True
    assert recall(similarity, right) == pytest.approx(ranked_recall(similarity.tolist(), right.tolist()))


def test_a_tie_with_a_wrong_answer_is_lost_and_one_with_a_right_answer_is_not() -> None:
    similarity = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0]])
    right = torch.tensor([[True, False, False], [True, True, False]])
    assert recall(similarity, right) == {"r1": 0.5, "r5": 1.0, "r10": 1.0}


def test_both_ways_with_equal_captions() -> None:
    """The whole function against brute force over captions: equal ones are one answer with several pictures."""
    words = random.Random(4)
    captions = [f"caption {words.randrange(17)}" for _ in range(73)]
    by_caption = {caption: row for caption, row in zip(sorted(set(captions)), whole_numbers(17, 4, 5), strict=False)}
    image, text = whole_numbers(73, 4, 6), torch.stack([by_caption[caption] for caption in captions])
    scores: dict[str, Any] = retrieval_scores(image, text, captions)
    distinct = sorted(set(captions))
    similarity = [[float(row @ by_caption[caption]) for caption in distinct] for row in image]
    right = [[caption == own for caption in distinct] for own in captions]
    assert scores["image_to_text"] == pytest.approx(ranked_recall(similarity, right))
    turned = [list(column) for column in zip(*similarity, strict=True)]
    assert scores["text_to_image"] == pytest.approx(
        ranked_recall(turned, [list(column) for column in zip(*right, strict=True)])
    )
    assert (scores["pictures"], scores["captions"]) == (73, len(distinct))


def test_a_perfect_model_gets_everything_and_a_constant_one_nothing() -> None:
    captions = [f"caption {number % 40}" for number in range(60)]
    perfect = torch.eye(40)[torch.arange(60) % 40]
    scores: dict[str, Any] = retrieval_scores(perfect, perfect, captions)
    assert scores["image_to_text"] == scores["text_to_image"] == {"r1": 1.0, "r5": 1.0, "r10": 1.0}
    for size in (33, 128):
        generator = torch.Generator().manual_seed(size)
        image, text = (F.normalize(torch.randn(1, size, generator=generator), dim=1).repeat(60, 1) for _ in range(2))
        scores = retrieval_scores(image, text, captions)
        assert scores["image_to_text"] == scores["text_to_image"] == {"r1": 0.0, "r5": 0.0, "r10": 0.0}


def test_the_order_of_the_samples_is_nothing() -> None:
    captions = [f"caption {number % 11}" for number in range(50)]
    image = whole_numbers(50, 3, 1)
    text = whole_numbers(11, 3, 2)[torch.arange(50) % 11]
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    shuffled = retrieval_scores(image[order], text[order], [captions[row] for row in order.tolist()])
    assert shuffled == retrieval_scores(image, text, captions)


@pytest.mark.parametrize("counts", [[1, 1, 1], [5, 1, 2, 9, 30], [1] * 25, [3] * 7, [40, 1]])
def test_chance_is_what_drawing_without_looking_gives(counts: list[int]) -> None:
    total = sum(counts)
    drawn = min(10, total)
    exact = [1 - math.comb(total - count, drawn) / math.comb(total, drawn) for count in counts]
    found = chance_of_text(torch.tensor(counts), total)
    assert found == pytest.approx(sum(exact) / len(exact), abs=1e-12)
    owner = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    trials = 4000
    orders = torch.rand(trials, total, generator=torch.Generator().manual_seed(total)).argsort(1)[:, :drawn]
    hit = torch.zeros(trials, len(counts)).scatter_(1, owner[orders], 1.0)
    assert found == pytest.approx(float(hit.mean()), abs=5 * 0.5 / math.sqrt(trials))


def test_the_reported_chance_is_what_a_model_that_knows_nothing_gets() -> None:
    """Random embeddings, 60 models: their mean R@10 both ways is the chance that is reported."""
    captions = [f"caption {number % 23 if number < 60 else 0}" for number in range(80)]
    found: dict[str, list[float]] = {"image_to_text": [], "text_to_image": []}
    chance: dict[str, float] = {}
    for seed in range(60):
        generator = torch.Generator().manual_seed(seed)
        text = torch.randn(23, 16, generator=generator)[torch.tensor([int(caption.split()[1]) for caption in captions])]
        scores: dict[str, Any] = retrieval_scores(torch.randn(80, 16, generator=generator), text, captions)
        chance = scores["chance"]
        for way, values in found.items():
            values.append(scores[way]["r10"])
    assert chance["image_to_text"] == pytest.approx(10 / 23)
    for way, values in found.items():
        mean = sum(values) / len(values)
        spread = math.sqrt(sum((value - mean) ** 2 for value in values) / len(values))
        assert mean == pytest.approx(chance[way], abs=4 * spread / math.sqrt(len(values)) + 1e-9), way


def test_few_answers_are_always_found() -> None:
    scores: dict[str, Any] = retrieval_scores(torch.randn(6, 3), torch.randn(6, 3), list("abcdef"))
    assert scores["image_to_text"]["r10"] == scores["text_to_image"]["r10"] == 1.0
    assert scores["chance"] == {"image_to_text": 1.0, "text_to_image": 1.0}


@pytest.mark.parametrize("k", [1, 4, 9, 50])
def test_nearest_are_the_first_of_the_sorted(k: int) -> None:
    queries, answers = (torch.randn(5, 6, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    answers = answers.repeat(2, 1)[:9] + torch.arange(9)[:, None] * 1e-3
    values, found = nearest(queries, answers, k)
    expected = (queries @ answers.T).sort(1, descending=True)
    torch.testing.assert_close(values, expected.values[:, :k])
    assert torch.equal(found, expected.indices[:, :k])
    assert values.shape == (5, min(k, 9))
