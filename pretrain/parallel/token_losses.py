"""A step of a captioner: the mean over all predicted tokens of the global batch, microbatch by microbatch.

Each rank's part is the sum over its own rows divided by the number of tokens everywhere, which the captions tell
beforehand; so uneven captions weigh the same under every layout. The loss of the step is known before its last
microbatch goes backward: early enough to make the step change nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist

from data_pipeline import Batch
from pretrain.models.captioner import Captioner
from pretrain.models.towers import end_marks
from pretrain.objectives import OBJECTIVES
from pretrain.parallel.embedding_cache import Outcome, nan_above
from pretrain.parallel.groups import Ranks
from pretrain.parallel.pipeline import Pipeline
from pretrain.parallel.updater import Updater
from pretrain.sections import Objective


class TokenLoss:
    """The objectives over one microbatch's outputs, in a step whose batch has so many tokens to predict.

    A step's loss above `limit` makes the step change nothing.
    """

    def __init__(self, objectives: Sequence[Objective], ranks: Ranks, backend: str) -> None:
        self.objectives, self.ranks, self.backend = objectives, ranks, backend
        self.limit = math.inf
        weights = [each.weight for each in objectives]
        self._weights = torch.tensor(weights, dtype=torch.float64, device=ranks.device)  # to bring them there waits

    def begin(self, parts: Sequence[Batch]) -> None:
        """Count the step's tokens over all ranks."""
        tokens = torch.stack([end_marks(part.text).sum() for part in parts]).sum()
        dist.all_reduce(tokens, group=self.ranks.dp_group)
        self._tokens = tokens.clamp(min=1)
        self._microbatches_left = len(parts)
        self._sums = torch.zeros(len(self.objectives), device=self.ranks.device)

    def __call__(self, token_losses: torch.Tensor) -> torch.Tensor:
        """The scalar to backpropagate: the mean over ranks of the sum over microbatches is the loss."""
        outputs = {"token_losses": token_losses, "all_tokens": self._tokens}
        losses = torch.stack(
            [OBJECTIVES[each.name](outputs, each, self.ranks.zero_group, self.backend) for each in self.objectives]
        )
        self._sums += losses.detach()
        self._microbatches_left -= 1
        total = self._weighted(losses)
        if self._microbatches_left == 0 and math.isfinite(self.limit):
            total = nan_above(total, self._weighted(self._means()), self.limit)
        return total

    def outcome(self) -> Outcome:
        """What to report when all microbatches are done; the same on every rank of every stage."""
        losses = self.ranks.from_last_stage(self._means())
        names = [each.name for each in self.objectives]
        return Outcome(float(self._weighted(losses)), dict(zip(names, losses.tolist(), strict=True)))

    def _means(self) -> torch.Tensor:
        """[objectives] in fp64, over the ranks of the same stage."""
        losses = self._sums.double()
        dist.all_reduce(losses, group=self.ranks.zero_group)
        return losses / self.ranks.zero_size

    def _weighted(self, losses: torch.Tensor) -> torch.Tensor:
        return (losses * self._weights.to(losses.dtype)).sum()


def step_tokens(updater: Updater, parts: Sequence[Batch], loss_of: TokenLoss) -> Outcome:
    """Without stages."""
    loss_of.begin(parts)
    for part in parts:
        updater.backward(loss_of(updater.forward(part.image, part.text)["token_losses"]))
    return loss_of.outcome()


def step_tokens_in_stages(
    updater: Updater, pipeline: Pipeline, parts: Sequence[Batch], lengths: Mapping[str, int], loss_of: TokenLoss
) -> Outcome:
    """With pipeline stages."""
    model = updater.model
    assert isinstance(model, Captioner)
    loss_of.begin(parts)
    (length,) = lengths.values()
    if parts[0].image.shape[-1] == 0:
        length = parts[0].text.shape[1]  # captions alone
    with updater.gathering():
        pipeline.backpropagate(
            model.decoder, [(part.image, part.text) for part in parts], length, lambda _, sums: loss_of(sums)
        )
    return loss_of.outcome()
