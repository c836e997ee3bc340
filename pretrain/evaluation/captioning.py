"""Score a captioner on a test set: the mean cross entropy of a token of its captions, and the perplexity."""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
import torch.distributed as dist

from data_pipeline import BatchMaker, Dataset, ImageTransform, TextTransform, Tokenizer, sequential_batches
from data_pipeline.tokenizer import BOS, EOS, PAD
from pretrain.errors import WeftError
from pretrain.models.towers import end_marks
from pretrain.parallel.groups import Ranks
from pretrain.sections import Eval, Model


class Reader(Protocol):
    """A captioner, or an engine around one."""

    def token_losses(self, image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """The sum of the cross entropies of this rank's rows, []."""
        ...


@torch.no_grad()
def captioning_scores(
    reader: Reader, dataset: Dataset, tokenizer: Tokenizer, model: Model, settings: Eval, ranks: Ranks
) -> dict[str, Any]:
    """{"captioning": {"loss", "perplexity", "tokens"}} over the first `settings.samples` samples, on every rank.

    The ranks run the model equally often, on a blank batch where one has none left. Raises WeftError without a token.
    """
    text = TextTransform(tokenizer, model.text.context)
    maker = BatchMaker(dataset, ImageTransform(model.vision.image_size), text, seed=0, training=False)
    samples = min(settings.samples, len(dataset))
    batches = sequential_batches(maker, samples, settings.batch, rank=ranks.dp_rank, world=ranks.dp_size)
    sums = torch.zeros(2, dtype=torch.float64, device=ranks.device)  # of losses, of tokens
    blank = torch.tensor([[BOS, EOS] + [PAD] * (model.text.context - 2)], device=ranks.device)
    for _ in range(-(-samples // (settings.batch * ranks.dp_size))):
        batch = next(batches, None)
        if batch is None:
            size = model.vision.image_size
            reader.token_losses(torch.zeros(1, 3, size, size, dtype=torch.uint8, device=ranks.device), blank)
            continue
        # rows in which a replacement stands in for an unusable sample count like any other
        tokens = batch.text.to(ranks.device)
        losses = reader.token_losses(batch.image.to(ranks.device), tokens)
        context_ranks = ranks.zero_size // ranks.dp_size  # each has counted the same captions
        sums += torch.stack([losses.double(), end_marks(tokens).sum().double() / context_ranks])
    dist.all_reduce(sums, group=ranks.zero_group)
    losses, count = ranks.from_last_stage(sums).tolist()
    if not count:
        raise WeftError(f"{dataset.folder} has no caption with a token to predict")
    loss = losses / count
    return {"captioning": {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "tokens": int(count)}}
