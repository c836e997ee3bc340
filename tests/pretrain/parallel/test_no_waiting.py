"""Between forward and backward nothing asks a card for a number: a meta tensor has none to give, and would raise."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from data_pipeline import Batch
from pretrain.parallel import embedding_cache, token_losses
from pretrain.parallel.embedding_cache import JointLoss, nan_above
from pretrain.parallel.token_losses import TokenLoss
from pretrain.sections import Objective

RANKS: Any = SimpleNamespace(
    device=torch.device("meta"), same_rows_group=None, all_rows_group=None, dp_group=None, zero_group=None, zero_size=1
)
LIMITS = [math.inf, 3.0]


@pytest.mark.parametrize("limit", LIMITS)
def test_the_loss_of_a_dual_encoder(monkeypatch: pytest.MonkeyPatch, limit: float) -> None:
    monkeypatch.setattr(embedding_cache, "own_rows", lambda value, group: value)
    monkeypatch.setitem(embedding_cache.OBJECTIVES, "contrastive", lambda rows, *_: rows["image"].sum())
    image = torch.ones(4, 8, device="meta", requires_grad=True)
    loss_of = JointLoss([Objective(name="contrastive", weight=0.5)], RANKS, "auto", limit)
    loss, told = loss_of({"image": image, "logit_scale": torch.ones((), device="meta")})
    loss.backward()
    assert (told.shape, told.dtype, told.requires_grad) == ((3,), torch.float64, False)
    outcome = loss_of.outcome(torch.tensor([1.5, 14.0, 3.0]))
    assert (outcome.loss, outcome.logit_scale, outcome.losses) == (1.5, 14.0, {"contrastive": 3.0})


@pytest.mark.parametrize("limit", LIMITS)
def test_the_loss_of_a_captioner(monkeypatch: pytest.MonkeyPatch, limit: float) -> None:
    monkeypatch.setattr(dist, "all_reduce", lambda *_, **__: None)
    monkeypatch.setitem(token_losses.OBJECTIVES, "caption", lambda outputs, *_: outputs["token_losses"])
    loss_of = TokenLoss([Objective(name="caption", weight=0.5)], RANKS, "auto")
    loss_of.limit = limit
    part: Any = SimpleNamespace(text=torch.ones(2, 5, dtype=torch.int64, device="meta"))
    parts: list[Batch] = [part, part]
    loss_of.begin(parts)
    for _ in parts:
        loss_of(torch.ones((), device="meta", requires_grad=True)).backward()


def test_above_the_limit_gradients_are_not_finite() -> None:
    for value, spoils in ((2.0, False), (3.0, False), (3.1, True), (math.inf, True)):
        weight = torch.ones((), requires_grad=True)
        nan_above(weight * 2, torch.tensor(value), 3.0).backward()
        assert weight.grad is not None
        assert bool(weight.grad.isnan()) == spoils
