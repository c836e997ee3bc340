"""Score a captioner on a test set: the mean cross entropy of a token of its captions, and the perplexity."""

from __future__ import annotations

import math
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist

from data_pipeline import Corrupt, Dataset, ImageTransform, TextTransform
from pretrain.errors import WeftError
from pretrain.evaluation.rounds import blank_text
from pretrain.evaluation.test_set import Item, gathered_items, gathered_unusable, read_item
from pretrain.models.towers import end_marks
from pretrain.parallel.groups import Ranks


class Reader(Protocol):
    """A captioner, or an engine around one."""

    def token_losses(self, image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """The sum of the cross entropies of this rank's rows, []."""
        ...


@torch.no_grad()
def captioning_scores(
    reader: Reader,
    dataset: Dataset,
    samples: np.ndarray,
    image: ImageTransform,
    text: TextTransform,
    batch: int,
    ranks: Ranks,
) -> tuple[dict[str, Any], list[Item], list[Corrupt]]:
    """({"loss", "perplexity", "tokens", "images", "captions"}, the usable samples, those that are not), on every rank.

    Every caption of a sample counts. The ranks run the model equally often, on a blank batch where one has none left.
    Raises WeftError without a token.
    """
    sums = torch.zeros(2, dtype=torch.float64, device=ranks.device)  # of losses, of tokens
    blank = [(torch.zeros(3, image.size, image.size, dtype=torch.uint8), blank_text(text.context)[0])]
    items: list[Item] = []
    unusable: list[Corrupt] = []
    for first in range(0, -(-len(samples) // batch), ranks.dp_size):
        rows: list[tuple[torch.Tensor, torch.Tensor]] = []
        for sample in samples[(first + ranks.dp_rank) * batch :][:batch].tolist():
            read = read_item(dataset, sample, image, labels=False)
            if isinstance(read, Corrupt):
                unusable.append(read)
                continue
            items.append(read[0])
            rows += [(read[1], torch.from_numpy(text(caption)).long()) for caption in read[0].captions]
        parts = [rows[at : at + batch] for at in range(0, len(rows), batch)]
        for number in range(max(ranks.of_all(len(parts)))):
            used = number < len(parts)
            images, texts = zip(*(parts[number] if used else blank), strict=True)
            tokens = torch.stack(texts).to(ranks.device)
            losses = reader.token_losses(torch.stack(images).to(ranks.device), tokens)
            if used:
                context_ranks = ranks.zero_size // ranks.dp_size  # each has counted the same captions
                sums += torch.stack([losses.double(), end_marks(tokens).sum().double() / context_ranks])
    dist.all_reduce(sums, group=ranks.zero_group)
    total, count = ranks.from_last_stage(sums).tolist()
    scored = gathered_items(items, ranks)
    if not count:
        raise WeftError(f"{dataset.folder} has no usable sample with a caption")
    loss = total / count
    scores = {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "tokens": int(count),
        "images": len(scored),
        "captions": sum(len(item.captions) for item in scored),
    }
    return scores, scored, gathered_unusable(unusable, ranks)
