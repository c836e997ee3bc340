"""A step of a dual encoder: the loss ties all samples of the global batch together, so it needs all embeddings first.

With one microbatch and no stages one pass has them. Otherwise a first pass embeds the microbatches without gradients,
the loss and its gradient with respect to the embeddings are computed once over all ranks, and a second pass
backpropagates sum <embedding, gradient> (gradient caching, Gao et al. 2021). All give the gradients of one process on
the whole batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from data_pipeline import Batch
from pretrain.models.dual import DualEncoder
from pretrain.objectives import OBJECTIVES
from pretrain.parallel.groups import Ranks
from pretrain.parallel.pipeline import Pipeline
from pretrain.parallel.rows import own_rows
from pretrain.parallel.updater import Updater
from pretrain.sections import Objective


@dataclass(frozen=True)
class Outcome:
    """The weighted sum of all objectives, and each by its name; the factor on similarities of a dual encoder."""

    loss: float
    losses: dict[str, float]
    logit_scale: float | None = None


@dataclass
class JointLoss:
    """The objectives over the embeddings of all ranks; a loss above `limit` makes the step change nothing."""

    objectives: Sequence[Objective]
    ranks: Ranks
    backend: str
    limit: float = math.inf

    def __call__(self, outputs: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss to backpropagate, and what `outcome` reads; the same on all ranks that have embeddings.

        Nothing here waits for a card, which would stand still until the first of backward reaches it.
        """
        rows = {name: own_rows(value, self.ranks.same_rows_group) for name, value in outputs.items()}
        total = torch.zeros((), device=self.ranks.device)
        losses: list[torch.Tensor] = []
        for objective in self.objectives:
            loss = OBJECTIVES[objective.name](rows, objective, self.ranks.all_rows_group, self.backend)
            losses.append(loss.detach())
            total = total + objective.weight * loss
        told = torch.stack([each.double() for each in (total.detach(), outputs["logit_scale"].detach(), *losses)])
        return nan_above(total, total.detach(), self.limit), told

    def outcome(self, told: torch.Tensor) -> Outcome:
        """What to report, when the step is done: `told` is fp64 [2 + objectives], the total and the scale first."""
        total, scale, *losses = told.tolist()
        return Outcome(total, dict(zip((each.name for each in self.objectives), losses, strict=True)), scale)


def nan_above(loss: torch.Tensor, value: torch.Tensor, limit: float) -> torch.Tensor:
    """The loss, or NaN where `value` is above the limit: gradients that are not finite change nothing, on any rank."""
    return loss * torch.where(value > limit, math.nan, 1.0).to(loss.dtype) if math.isfinite(limit) else loss


def step_at_once(updater: Updater, batch: Batch, loss_of: JointLoss) -> Outcome:
    """One microbatch: an ordinary step."""
    loss, told = loss_of(updater.forward(batch.image, batch.text))
    updater.backward(loss)
    return loss_of.outcome(told)


def step_with_cache(updater: Updater, parts: Sequence[Batch], loss_of: JointLoss) -> Outcome:
    """Several microbatches, without stages."""
    with torch.no_grad():
        passes = [updater.forward(part.image, part.text) for part in parts]
    # embeddings [n, E] are joined over microbatches; scalars are the same in each
    cached = {
        name: (torch.cat([each[name] for each in passes]) if value.ndim else value).requires_grad_()
        for name, value in passes[0].items()
    }
    loss, told = loss_of(cached)
    loss.backward()
    shares = {
        name: gradient.split([len(part) for part in parts]) if gradient.ndim else [gradient / len(parts)] * len(parts)
        for name, gradient in _gradients(cached).items()
    }
    for number, part in enumerate(parts):
        again = updater.forward(part.image, part.text)
        updater.backward(torch.stack([(again[name] * share[number]).sum() for name, share in shares.items()]).sum())
    return loss_of.outcome(told)


def step_in_stages(
    updater: Updater, pipeline: Pipeline, parts: Sequence[Batch], lengths: Mapping[str, int], loss_of: JointLoss
) -> Outcome:
    """With pipeline stages: each tower is a pipeline of its own, run one after the other on the same stages.

    lengths: of the sequence of each tower. The embeddings meet on the last stage, where the learned scalars are too.
    """
    model, ranks = updater.model, loss_of.ranks
    assert isinstance(model, DualEncoder)
    towers = {
        "image": (model.vision, [(part.image,) for part in parts], lengths["vision"]),
        "text": (model.text, [(part.text,) for part in parts], lengths["text"]),
    }
    embedded = {name: pipeline.outputs(*tower) for name, tower in towers.items()}
    told = torch.zeros(2 + len(loss_of.objectives), dtype=torch.float64, device=ranks.device)
    shares: dict[str, tuple[torch.Tensor, ...]] = {}
    with updater.gathering():
        if ranks.is_last_stage:
            cached = {name: torch.cat(each).requires_grad_() for name, each in embedded.items()}
            loss, told = loss_of({**cached, **model.logits_settings()})
            loss.backward()
            sizes = [len(part) for part in parts]
            shares = {name: gradient.split(sizes) for name, gradient in _gradients(cached).items()}
        for name, tower in towers.items():
            pipeline.backpropagate(*tower, partial(_inner_product, shares.get(name, ())))
    return loss_of.outcome(ranks.from_last_stage(told))


def _inner_product(shares: Sequence[torch.Tensor], number: int, embedding: torch.Tensor) -> torch.Tensor:
    """The part of the loss that a microbatch's embeddings stand for: its gradient with respect to them is a share."""
    return (embedding * shares[number]).sum()


def _gradients(cached: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Of what the loss has read."""
    return {name: value.grad for name, value in cached.items() if value.grad is not None}
