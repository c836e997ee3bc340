"""The captioner: what a prediction sees, what is predicted, and that the table is one parameter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from data_pipeline.tokenizer import BOS, EOS, PAD
from pretrain.models.captioner import Captioner
from pretrain.models.initialise import initialise
from pretrain.models.pieces import parameters_by_name
from pretrain.parallel.groups import Ranks
from pretrain.sections import Model

CONTEXT, SIZE = 7, 12


def captioner(**vision: Any) -> Captioner:
    model = Captioner(
        Model.model_validate(
            {
                "kind": "captioner",
                "vision": {"image_size": SIZE, "patch": 6, **vision},
                "text": {"layers": 2, "width": 12, "heads": 3, "context": CONTEXT, "vocab_size": 300},
            }
        )
    )
    initialise(model, 0)
    return model


def images(count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(0, 256, (count, 3, SIZE, SIZE), dtype=torch.uint8, generator=generator)


def caption(*tokens: int) -> torch.Tensor:
    row = [BOS, *tokens, EOS]
    return torch.tensor(row + [PAD] * (CONTEXT - len(row)))


CAPTIONS = torch.stack([caption(5, 6, 7), caption(), caption(9, 9, 8, 9, 9)])


@pytest.mark.parametrize("positions", ["learned", "sincos2d"])
def test_the_loss_is_the_cross_entropy_of_each_next_token(alone: Ranks, positions: str) -> None:
    """Against logits made row by row, up to the end mark; nothing is asked of patches and padding."""
    model = captioner(positions=positions)
    (decoder,) = model.decoder
    seen: list[torch.Tensor] = []
    decoder.block.register_forward_hook(lambda _, __, output: seen.append(output))
    found = model(images(3), CAPTIONS)["token_losses"]
    logits = seen[0][:, 4:] @ decoder.tokens.weight.T
    expected = sum(
        F.cross_entropy(logits[row, place].double(), CAPTIONS[row, place + 1])
        for row, end in enumerate((4, 1, 6))
        for place in range(end)
    )
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)


def test_a_prediction_sees_the_picture_and_what_is_before_it(alone: Ranks) -> None:
    model = captioner()
    before = model.token_losses(images(3), CAPTIONS)
    after = model.token_losses(images(3).flip(0), CAPTIONS)
    assert float(after.detach()) != pytest.approx(float(before.detach()), rel=1e-4)
    # the first prediction of a caption cannot depend on the tokens behind it
    (decoder,) = model.decoder
    seen: list[torch.Tensor] = []
    decoder.block.register_forward_hook(lambda _, __, output: seen.append(output))
    model.token_losses(images(1), caption(5, 6, 7)[None])
    model.token_losses(images(1), caption(5, 8, 7)[None])
    changed = (seen[0] - seen[1])[0].norm(dim=1) > 1e-5
    assert changed.tolist() == [False] * (4 + 2) + [True] * (CONTEXT - 2)


def test_padding_and_neighbours_change_nothing(alone: Ranks) -> None:
    model = captioner()
    together = model.token_losses(images(3), CAPTIONS)
    apart = sum(model.token_losses(images(3)[row : row + 1], CAPTIONS[row : row + 1]) for row in range(3))
    torch.testing.assert_close(together, apart)
    padded = CAPTIONS.clone()
    padded[1, 3:] = 17
    torch.testing.assert_close(model.token_losses(images(3), padded), together)


def test_every_parameter_learns_and_the_table_is_one(alone: Ranks) -> None:
    model = captioner(positions="learned")
    model.token_losses(images(3), CAPTIONS).backward()
    names = [name for name, _ in parameters_by_name(model)]
    assert len(set(names)) == len(names)
    assert [name for name in names if "tokens" in name] == ["decoder.tokens.weight"]
    for name, parameter in parameters_by_name(model):
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
    table = dict(parameters_by_name(model))["decoder.tokens.weight"].grad
    assert table is not None
    assert table[299].abs().max() > 0, "as an output weight each row takes part, in no caption or in all"


def test_captions_without_pictures_are_read_and_no_parameter_is_left_out(alone: Ranks) -> None:
    model = captioner()
    nothing = torch.empty(3, 3, 0, 0, dtype=torch.uint8)
    losses = model.token_losses(nothing, CAPTIONS)
    losses.backward()
    patches = dict(parameters_by_name(model))["decoder.patches.linear.weight"]
    assert patches.grad is not None, "under ZeRO-3 the other ranks wait for this one to gather them"
    assert patches.grad.abs().max() == 0
    assert float(losses.detach()) != pytest.approx(float(model.token_losses(images(3), CAPTIONS).detach()), rel=1e-4)
