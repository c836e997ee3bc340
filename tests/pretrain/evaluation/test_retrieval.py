"""Retrieval scores against a ranking by hand: ties, equal captions, chance."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from pretrain.evaluation.retrieval import KS, chance_of, nearest, recall, retrieval_scores


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
    assert (scores["images"], scores["captions"], scores["distinct_captions"]) == (73, 73, len(distinct))


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
    found = chance_of(torch.tensor(counts), total)
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
    chance: dict[str, Any] = {}
    for seed in range(60):
        generator = torch.Generator().manual_seed(seed)
        text = torch.randn(23, 16, generator=generator)[torch.tensor([int(caption.split()[1]) for caption in captions])]
        scores: dict[str, Any] = retrieval_scores(torch.randn(80, 16, generator=generator), text, captions)
        chance = scores["chance"]
        for way, values in found.items():
            values.append(scores[way]["r10"])
    chance = {way: values["r10"] for way, values in chance.items()}
    assert chance["image_to_text"] == pytest.approx(10 / 23)
    for way, values in found.items():
        mean = sum(values) / len(values)
        spread = math.sqrt(sum((value - mean) ** 2 for value in values) / len(values))
        assert mean == pytest.approx(chance[way], abs=4 * spread / math.sqrt(len(values)) + 1e-9), way


def test_few_answers_are_always_found() -> None:
    scores: dict[str, Any] = retrieval_scores(torch.randn(6, 3), torch.randn(6, 3), list("abcdef"))
    assert scores["image_to_text"]["r10"] == scores["text_to_image"]["r10"] == 1.0
    assert scores["chance"] == {
        key: {"r1": pytest.approx(1 / 6), "r5": pytest.approx(5 / 6), "r10": 1.0}
        for key in ("image_to_text", "text_to_image")
    }


@pytest.mark.parametrize("k", [1, 4, 9, 50])
def test_nearest_are_the_first_of_the_sorted(k: int) -> None:
    queries, answers = (torch.randn(5, 6, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    answers = answers.repeat(2, 1)[:9] + torch.arange(9)[:, None] * 1e-3
    values, found = nearest(queries, answers, k)
    expected = (queries @ answers.T).sort(1, descending=True)
    torch.testing.assert_close(values, expected.values[:, :k])
    assert torch.equal(found, expected.indices[:, :k])
    assert values.shape == (5, min(k, 9))


# Three images with five captions each, in the plane. Angles in degrees; the nearest in angle is the most similar.
IMAGES = (0.0, 40.0, 90.0)
CAPTIONS = (
    (10.0, 200.0, 210.0, 220.0, 230.0),  # of image 0: one good caption, four far away from everything
    (80.0, 85.0, 95.0, 44.0, 5.0),  # of image 1: three that lie at image 2, one its own, one at image 0
    (60.0, 66.0, 150.0, 160.0, 170.0),  # of image 2
)


def directions(angles: tuple[float, ...] | list[float]) -> torch.Tensor:
    return torch.stack([torch.tensor([math.cos(math.radians(a)), math.sin(math.radians(a))]) for a in angles])


def test_five_captions_an_image_by_the_published_protocol() -> None:
    """Worked out by hand.

    Image to text, the captions in order of their distance to each image, with the image they belong to:
      image 0, at 0:   5 (1), 10 (0)                      its first own is second: R@1 no, R@5 yes
      image 1, at 40:  44 (1)                             first: R@1 yes
      image 2, at 90:  85 (1), 95 (1), 80 (1), 66 (2)     fourth: R@1 no, R@5 yes
    Text to image, the nearest image to each of the 15 captions:
      of image 0: 10 -> 0, right; 200, 210, 220 -> 2 (110, 120, 130 away; 0 is 160, 150, 140), wrong; 230 -> 0 (130;
                  2 is 140), right: two of five
      of image 1: 80, 85, 95 -> 2, wrong; 44 -> 1, right; 5 -> 0, wrong: one of five
      of image 2: 60 -> 1 (20; 2 is 30), wrong; 66 -> 2 (24; 1 is 26), right; 150, 160, 170 -> 2, right: four of five
    """
    angles = CAPTIONS
    captions = [f"caption {owner} {number}" for owner in range(3) for number in range(5)]
    owners = [owner for owner in range(3) for _ in range(5)]
    text = directions([angle for each in angles for angle in each])
    scores: dict[str, Any] = retrieval_scores(directions(IMAGES), text, captions, owners)
    assert scores["image_to_text"] == pytest.approx({"r1": 1 / 3, "r5": 1.0, "r10": 1.0})
    assert scores["text_to_image"] == pytest.approx({"r1": (2 + 1 + 4) / 15, "r5": 1.0, "r10": 1.0})
    assert (scores["images"], scores["captions"], scores["distinct_captions"]) == (3, 15, 15)
    assert scores["chance"]["image_to_text"]["r1"] == pytest.approx(1 / 3)
    firsts: dict[str, Any] = retrieval_scores(directions(IMAGES), text[::5], captions[::5])
    assert firsts["text_to_image"]["r1"] == pytest.approx(1 / 3), "one caption an image is another score"
    shuffle = torch.randperm(15, generator=torch.Generator().manual_seed(1)).tolist()
    again = retrieval_scores(
        directions(IMAGES), text[shuffle], [captions[row] for row in shuffle], [owners[row] for row in shuffle]
    )
    assert again == scores


@pytest.mark.parametrize("block", [1, 7, 1 << 24])
def test_several_captions_against_brute_force(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Uneven numbers of captions, some equal within and between images; in blocks of any size."""
    monkeypatch.setattr("pretrain.evaluation.retrieval.BLOCK", block)
    words = random.Random(8)
    owners = [image for image in range(31) for _ in range(words.randrange(1, 7))]
    captions = [f"caption {words.randrange(60)}" for _ in owners]
    by_caption = {caption: row for caption, row in zip(sorted(set(captions)), whole_numbers(60, 4, 5), strict=False)}
    image, text = whole_numbers(31, 4, 6), torch.stack([by_caption[caption] for caption in captions])
    scores: dict[str, Any] = retrieval_scores(image, text, captions, owners)
    distinct = sorted(set(captions))
    own = [{captions[row] for row, owner in enumerate(owners) if owner == number} for number in range(31)]
    similarity = [[float(row @ by_caption[caption]) for caption in distinct] for row in image]
    right = [[caption in mine for caption in distinct] for mine in own]
    assert scores["image_to_text"] == pytest.approx(ranked_recall(similarity, right))
    turned = [list(column) for column in zip(*similarity, strict=True)]
    assert scores["text_to_image"] == pytest.approx(
        ranked_recall(turned, [list(column) for column in zip(*right, strict=True)])
    )


BAD = [math.nan, math.inf, -math.inf]


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("count", [2, 6, 40])
def test_what_is_not_finite_finds_nothing(bad: float, count: int) -> None:
    """Also where there are fewer answers than K, so that every finite query is right."""
    captions = [f"caption {number}" for number in range(count)]
    right, nothing = torch.eye(count), {"r1": 0.0, "r5": 0.0, "r10": 0.0}
    for image, text in [(right * bad, right), (right, right * bad), (right * bad, right * bad)]:
        scores: dict[str, Any] = retrieval_scores(image, text, captions)
        assert scores["image_to_text"] == scores["text_to_image"] == nothing
    one = right.clone()
    one[1] = bad
    scores = retrieval_scores(one, right, captions)
    assert scores["image_to_text"]["r1"] == pytest.approx((count - 1) / count), "the others still find theirs"
    assert scores["text_to_image"]["r1"] == 0.0, "an image that is as near as anything may be comes first"
    values, found = nearest(right, one, count)
    assert found[:, -1].tolist() == [1] * count
    assert values[:, -1].tolist() == [-math.inf] * count
