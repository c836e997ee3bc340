"""The contrastive objective: which outputs and settings reach the kernel, and what CLIP's own lines make of them."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from pretrain.objectives import OBJECTIVES
from pretrain.objectives.contrastive import contrastive
from pretrain.sections import Objective

ALONE: dist.ProcessGroup = None  # type: ignore[assignment]  # the kernel takes no group for a process by itself


def outputs(pairs: int, size: int) -> dict[str, torch.Tensor]:
    """What a model returns: unit embeddings, scale and bias, all to be differentiated."""
    generator = torch.Generator().manual_seed(pairs)
    image, text = (
        F.normalize(torch.randn(pairs, size, generator=generator, dtype=torch.float64), dim=1) for _ in range(2)
    )
    scalars = {"logit_scale": torch.tensor(14.3).double(), "logit_bias": torch.tensor(-10.0).double()}
    return {name: each.requires_grad_() for name, each in {"image": image, "text": text, **scalars}.items()}


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(("pairs", "size"), [(1, 4), (2, 3), (129, 17)])
def test_is_the_loss_that_clip_is_trained_with(pairs: int, size: int, smoothing: float) -> None:
    mine, theirs = outputs(pairs, size), outputs(pairs, size)
    loss = contrastive(mine, Objective(name="contrastive", label_smoothing=smoothing), ALONE)
    logits = theirs["logit_scale"] * theirs["image"] @ theirs["text"].T
    labels = torch.arange(pairs)
    truth = sum(F.cross_entropy(each, labels, label_smoothing=smoothing) for each in (logits, logits.T)) / 2
    assert isinstance(truth, torch.Tensor)
    torch.testing.assert_close(loss, truth, atol=1e-12, rtol=1e-10)
    loss.backward()
    truth.backward()
    for name in ("image", "text", "logit_scale"):
        torch.testing.assert_close(mine[name].grad, theirs[name].grad, atol=1e-12, rtol=1e-9)
    assert mine["logit_bias"].grad is None, "the bias is the sigmoid loss's"


def test_the_weight_is_left_to_the_engine() -> None:
    heavy, light = (
        contrastive(outputs(9, 3), Objective(name="contrastive", weight=weight), ALONE) for weight in (5.0, 1.0)
    )
    assert heavy == light


def test_a_perfect_model_has_no_loss_and_a_blind_one_log_n() -> None:
    perfect = outputs(16, 16)
    perfect["image"] = perfect["text"] = torch.eye(16, dtype=torch.float64)
    assert 0 < contrastive(perfect, Objective(name="contrastive"), ALONE) < 16 * torch.tensor(-14.3).exp()
    blind = outputs(16, 16)
    blind["image"] = blind["text"] = torch.ones(16, 4, dtype=torch.float64) / 2
    torch.testing.assert_close(
        contrastive(blind, Objective(name="contrastive"), ALONE), torch.tensor(16.0).double().log()
    )


def test_is_found_by_its_name() -> None:
    assert OBJECTIVES["contrastive"] is contrastive
