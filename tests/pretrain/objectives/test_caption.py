"""The mean over all tokens of the group, as a share that ranks average."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from pretrain.objectives import OBJECTIVES
from pretrain.sections import Objective


def share(rank: int, world: int, losses: list[float], tokens: list[int]) -> tuple[float, float]:
    """This rank's loss, and its gradient with respect to the sum of its tokens' losses."""
    total = torch.tensor(sum(tokens))
    mine = torch.tensor(losses[rank], requires_grad=True)
    assert dist.group.WORLD is not None
    outputs = {"token_losses": mine, "all_tokens": total}
    loss = OBJECTIVES["caption"](outputs, Objective(name="caption"), dist.group.WORLD, "auto")
    loss.backward()
    assert mine.grad is not None
    return float(loss.detach()), float(mine.grad)


@pytest.mark.parametrize("tokens", [[7, 1, 4], [3, 0, 9]])
def test_uneven_ranks_weigh_as_their_tokens(tokens: list[int]) -> None:
    losses = [2.0 * count + 0.5 for count in tokens]
    shares = run_ranks(share, 3, losses, tokens)
    assert sum(loss for loss, _ in shares) / 3 == pytest.approx(sum(losses) / sum(tokens))
    for _, gradient in shares:
        assert gradient / 3 == pytest.approx(1 / sum(tokens)), "each token's loss counts the same, wherever it is"
