"""Retrieval: does a picture find its caption among all of them, and a caption its picture?

R@K is the share of queries whose true answer is among the K nearest by cosine similarity. Captions that are equal to
the letter are one answer: a picture may not be blamed for finding its own words at another picture. Ties count against
the model (rank = 1 + how many wrong answers are at least as near), so embeddings that are all alike score nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

KS = (1, 5, 10)


def retrieval_scores(image_NE: torch.Tensor, text_NE: torch.Tensor, captions: Sequence[str]) -> dict[str, object]:
    """R@1/5/10 both ways of N pairs: image_to_text picks among the distinct captions, text_to_image among the pictures.

    Embeddings fp32 [N, E] of unit length; captions the N texts. Also "pictures", "captions" (how many to pick from) and
    "chance" (R@10 both ways of a coin).
    """
    ids = {caption: number for number, caption in enumerate(dict.fromkeys(captions))}
    caption_N = torch.tensor([ids[caption] for caption in captions])
    first = torch.tensor([captions.index(caption) for caption in ids])  # one row for each distinct caption
    similarity_NM = image_NE @ text_NE[first].T
    own_NM = caption_N[:, None] == torch.arange(len(first))[None]
    return {
        "image_to_text": recall(similarity_NM, own_NM),
        "text_to_image": recall(similarity_NM.T, own_NM.T),
        "pictures": len(captions),
        "captions": len(first),
        "chance": {
            "image_to_text": min(1.0, 10 / len(first)),
            "text_to_image": chance_of_text(own_NM.sum(0), len(captions)),
        },
    }


def recall(similarity_QA: torch.Tensor, right_QA: torch.Tensor) -> dict[str, float]:
    """{"r1", "r5", "r10"} of Q queries over A answers; right_QA (bool) marks the true ones, at least one a row."""
    best_right = similarity_QA.masked_fill(~right_QA, -torch.inf).amax(1, keepdim=True)
    ahead = (similarity_QA.masked_fill(right_QA, -torch.inf) >= best_right).sum(1)
    return {f"r{k}": float((ahead < k).double().mean()) for k in KS}


def chance_of_text(pictures_M: torch.Tensor, total: int, k: int = 10) -> float:
    """R@k of a coin, mean over captions: 1 - P(none of a caption's pictures is among k drawn from all)."""
    missed = torch.ones(len(pictures_M), dtype=torch.float64)
    for draw in range(min(k, total)):
        missed *= ((total - pictures_M.double() - draw) / (total - draw)).clamp(min=0)
    return float((1 - missed).mean())


def nearest(queries_QE: torch.Tensor, answers_AE: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(similarity, answer number), both [Q, k], nearest first."""
    best = (queries_QE @ answers_AE.T).topk(min(k, len(answers_AE)), dim=1)
    return best.values, best.indices
