"""The sigmoid objective: which outputs reach the kernel, and what SigLIP's own lines make of them."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from pretrain.objectives import OBJECTIVES
from pretrain.objectives.sigmoid import sigmoid
from pretrain.sections import Objective

ALONE: dist.ProcessGroup = None  # type: ignore[assignment]  # the kernel takes no group for a process by itself
SETTINGS = Objective(name="sigmoid")


def outputs(pairs: int, size: int, bias: float = -10.0) -> dict[str, torch.Tensor]:
    """What a model returns: unit embeddings, scale and bias, all to be differentiated."""
    generator = torch.Generator().manual_seed(pairs)
    image, text = (
        F.normalize(torch.randn(pairs, size, generator=generator, dtype=torch.float64), dim=1) for _ in range(2)
    )
    scalars = {"logit_scale": torch.tensor(10.0).double(), "logit_bias": torch.tensor(bias).double()}
    return {name: each.requires_grad_() for name, each in {"image": image, "text": text, **scalars}.items()}


@pytest.mark.parametrize("bias", [-10.0, 0.0, 3.0])
@pytest.mark.parametrize(("pairs", "size"), [(1, 4), (2, 3), (129, 17)])
def test_is_the_loss_that_siglip_is_trained_with(pairs: int, size: int, bias: float) -> None:
    mine, theirs = outputs(pairs, size, bias), outputs(pairs, size, bias)
    loss = sigmoid(mine, SETTINGS, ALONE)
    logits = theirs["image"] @ theirs["text"].T * theirs["logit_scale"] + theirs["logit_bias"]
    labels = 2 * torch.eye(pairs, dtype=torch.float64) - 1
    truth = -F.logsigmoid(labels * logits).sum() / pairs
    torch.testing.assert_close(loss, truth, atol=1e-12, rtol=1e-10)
    loss.backward()
    truth.backward()
    for name in ("image", "text", "logit_scale", "logit_bias"):
        torch.testing.assert_close(mine[name].grad, theirs[name].grad, atol=1e-12, rtol=1e-9)


def test_each_pair_is_judged_alone() -> None:
    """N times the loss of a batch is the sum over all its pairs, so two batches add up but for the pairs across."""
    whole = outputs(12, 5)
    total = sigmoid(whole, SETTINGS, ALONE) * 12
    across = torch.zeros((), dtype=torch.float64)
    parts = torch.zeros((), dtype=torch.float64)
    for one in (slice(0, 7), slice(7, 12)):
        rows = {name: each[one] if each.ndim else each for name, each in whole.items()}
        parts += sigmoid(rows, SETTINGS, ALONE) * len(rows["image"])
        other = slice(7, 12) if one.start == 0 else slice(0, 7)
        logits = whole["image"][one] @ whole["text"][other].T * whole["logit_scale"] + whole["logit_bias"]
        across += F.softplus(logits).sum()
    torch.testing.assert_close(total, parts + across)


def test_is_found_by_its_name_as_is_every_objective_of_the_config() -> None:
    assert OBJECTIVES["sigmoid"] is sigmoid
    assert set(OBJECTIVES) == set(get_args(Objective.model_fields["name"].annotation))
