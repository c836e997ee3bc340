"""Retrieval: does an image find its captions among all of them, and a caption its image?

R@K by the protocol that is published for COCO and Flickr30K: every caption of every image is a candidate. Image to text
is right when any of the image's own captions is among the K nearest by cosine similarity. Text to image asks once for
each caption, and is right when its image is among the K nearest.

Two things are stricter or fairer than most code for it:
- Captions that are equal to the letter are one caption of several images: one candidate, asked for once, right for each
  of its images. COCO's and Flickr30K's test captions hardly repeat (the output says how many are distinct); captions
  that are made from class names do.
- Ties count against the model, and so does what is not finite: rank = 1 + how many wrong answers are not further away.
  Embeddings that are all alike, or NaN, score nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

KS = (1, 5, 10)
BLOCK = 1 << 24  # similarities held at once


def retrieval_scores(
    image_NE: torch.Tensor, text_ME: torch.Tensor, captions: Sequence[str], owners: Sequence[int] | None = None
) -> dict[str, object]:
    """R@1/5/10 both ways of N images with M captions.

    Embeddings fp32 [N, E] and [M, E] of unit length; captions the M texts, owners the image row of each (default: one
    caption an image, in order). Also "images", "captions" (M), "distinct_captions" and "chance", what guessing gives.
    """
    ids = {caption: number for number, caption in enumerate(dict.fromkeys(captions))}
    first = dict(reversed([(ids[caption], row) for row, caption in enumerate(captions)]))
    text_DE = text_ME[[first[number] for number in range(len(ids))]]
    owner_M = torch.arange(len(image_NE)) if owners is None else torch.as_tensor(owners)
    caption_M = torch.tensor([ids[caption] for caption in captions])
    pairs_P2 = torch.stack([owner_M, caption_M], 1).unique(dim=0)
    scores: dict[str, object] = {
        "image_to_text": _recall_in_blocks(image_NE, text_DE, pairs_P2),
        "text_to_image": _recall_in_blocks(text_DE, image_NE, pairs_P2.flip(1)),
    }
    own_N, own_D = pairs_P2[:, 0].bincount(minlength=len(image_NE)), pairs_P2[:, 1].bincount(minlength=len(text_DE))
    chance = {
        "image_to_text": {f"r{k}": chance_of(own_N, len(text_DE), k) for k in KS},
        "text_to_image": {f"r{k}": chance_of(own_D, len(image_NE), k) for k in KS},
    }
    counts = {"images": len(image_NE), "captions": len(captions), "distinct_captions": len(text_DE)}
    return {**scores, **counts, "chance": chance}


def recall(similarity_QA: torch.Tensor, right_QA: torch.Tensor) -> dict[str, float]:
    """{"r1", "r5", "r10"} of Q queries over A answers; right_QA (bool) marks the true ones."""
    return {f"r{k}": float(hits) for k, hits in zip(KS, _hits(similarity_QA, right_QA).double().mean(1), strict=True)}


def chance_of(right_Q: torch.Tensor, total: int, k: int = 10) -> float:
    """R@k of guessing, mean over queries: 1 - P(none of a query's right answers is among k drawn from all)."""
    missed = torch.ones(len(right_Q), dtype=torch.float64)
    for draw in range(min(k, total)):
        missed *= ((total - right_Q.double() - draw) / (total - draw)).clamp(min=0)
    return float((1 - missed).mean())


def nearest(queries_QE: torch.Tensor, answers_AE: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(similarity, answer number), both [Q, k], nearest first; what is not finite is furthest, at -inf."""
    similarity_QA = (queries_QE @ answers_AE.T).nan_to_num(nan=-torch.inf, posinf=-torch.inf)
    best = similarity_QA.topk(min(k, len(answers_AE)), dim=1)
    return best.values, best.indices


def _recall_in_blocks(query_QE: torch.Tensor, answer_AE: torch.Tensor, pairs_P2: torch.Tensor) -> dict[str, float]:
    """Recall over pairs (query, right answer), without ever holding all similarities."""
    size = max(1, BLOCK // len(answer_AE))
    hits_K = torch.zeros(len(KS), dtype=torch.float64)
    for start in range(0, len(query_QE), size):
        rows_QE = query_QE[start : start + size]
        right_QA = torch.zeros(len(rows_QE), len(answer_AE), dtype=torch.bool)
        mine_P2 = pairs_P2[(pairs_P2[:, 0] >= start) & (pairs_P2[:, 0] < start + size)]
        right_QA[mine_P2[:, 0] - start, mine_P2[:, 1]] = True
        hits_K += _hits(rows_QE @ answer_AE.T, right_QA).double().sum(1)
    return {f"r{k}": float(hits / len(query_QE)) for k, hits in zip(KS, hits_K, strict=True)}


def _hits(similarity_QA: torch.Tensor, right_QA: torch.Tensor) -> torch.Tensor:
    """bool [len(KS), Q]: whether a right answer is among the K nearest."""
    usable_QA = similarity_QA.isfinite()
    best_Q1 = similarity_QA.masked_fill(~(right_QA & usable_QA), -torch.inf).amax(1, keepdim=True)
    ahead_Q = (~right_QA & ~(similarity_QA < best_Q1)).sum(1)  # a comparison with NaN is false
    return torch.stack([(ahead_Q < k) & best_Q1[:, 0].isfinite() for k in KS])
