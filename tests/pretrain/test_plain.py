"""Ours against the twin in plain torch: the same embeddings, loss and gradients from the same parameters."""

from typing import Any

import pytest
import torch

from kernels import contrastive_loss
from pretrain.models.dual import DualEncoder
from pretrain.models.initialise import initialise
from pretrain.parallel.groups import start_alone, stop_ranks
from pretrain.plain import PlainDualEncoder, plain_contrastive_loss
from pretrain.sections import Model, Text, Vision


@pytest.mark.parametrize(
    ("heads", "context", "batch", "vision"),
    [(2, 7, 5, {}), (4, 16, 3, {"pool": "class", "positions": "learned"}), (2, 8, 3, {"pool": "class"})],
)
def test_twins_agree(heads: int, context: int, batch: int, vision: dict[str, Any]) -> None:
    config = Model(
        vision=Vision(layers=2, width=32, heads=heads, image_size=24, patch=8, **vision),
        text=Text(layers=3, width=24, heads=heads, context=context, vocab_size=300),
        embed_dim=20,
    )
    ranks = start_alone(torch.device("cpu"))
    try:
        model = DualEncoder(config)
        initialise(model, seed=3)
        plain = PlainDualEncoder.from_weft(model, config)
        assert sum(p.numel() for p in plain.parameters()) == sum(p.numel() for p in model.parameters()) - 1  # the bias
        generator = torch.Generator().manual_seed(0)
        image = torch.randint(0, 256, (batch, 3, 24, 24), generator=generator, dtype=torch.uint8)
        text = torch.randint(4, 300, (batch, context), generator=generator)
        text[:, 4] = 1
        ours, theirs = model(image, text), plain(image, text)
        torch.testing.assert_close(ours["image"], theirs[0], atol=2e-6, rtol=1e-5)
        torch.testing.assert_close(ours["text"], theirs[1], atol=2e-6, rtol=1e-5)
        contrastive_loss(ours["image"], ours["text"], ours["logit_scale"]).backward()
        plain_contrastive_loss(*theirs).backward()
        mine = PlainDualEncoder.from_weft(_gradients(model), config)
        for (name, gradient), (_, parameter) in zip(mine.named_parameters(), plain.named_parameters(), strict=True):
            assert parameter.grad is not None
            scale = parameter.grad.abs().max().clamp(min=1e-3)
            torch.testing.assert_close(gradient / scale, parameter.grad / scale, atol=2e-5, rtol=0, msg=name)
    finally:
        stop_ranks(ranks)


def _gradients(model: DualEncoder) -> DualEncoder:
    """The model with each parameter replaced by its gradient, to be mapped name by name."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    return model
