"""Dropout of attention weights in plain torch: which are kept, how they are scaled, and that the backward agrees."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kernels import attention, attention_blocked
from kernels.reference import attention_mask, attention_with_options

DROPOUT = 0.3


def mask_of(batch: int, heads: int, queries: int, keys: int, seed: int | torch.Tensor, **options: Any) -> torch.Tensor:
    """Which weights are kept: with equal scores and one-hot values the output is weight by weight what dropout left."""
    q, k = (torch.zeros(batch, heads, length, keys, dtype=torch.float64) for length in (queries, keys))
    v = torch.eye(keys, dtype=torch.float64).expand(batch, heads, keys, keys)
    return attention(q, k, v, dropout=DROPOUT, seed=seed, **options) > 0


def test_keeps_the_right_share_of_every_row_column_and_head() -> None:
    kept = mask_of(2, 3, 200, 150, seed=1).double()
    share = 1 - DROPOUT
    for axes in ((), (3,), (2,), (0, 2, 3), (1, 2, 3)):
        shares = kept.mean(axes) if axes else kept.mean()
        deviation = (share * DROPOUT / (kept.numel() / shares.numel())) ** 0.5
        assert ((shares - share).abs() < 5 * deviation).all(), axes
    flat = kept.flatten(0, 1).flatten(1) - share
    for a in range(6):
        for b in range(a):  # heads draw their own: as masks of one seed, they do not correlate
            assert abs(float((flat[a] * flat[b]).mean())) < 5 * share * DROPOUT / flat.shape[1] ** 0.5


def test_a_seed_is_a_mask() -> None:
    same = [mask_of(1, 2, 20, 20, seed) for seed in (7, 7, torch.tensor(7), torch.tensor([7]))]
    assert all(torch.equal(same[0], each) for each in same)
    assert not torch.equal(same[0], mask_of(1, 2, 20, 20, 8))
    assert not torch.equal(same[0], mask_of(1, 2, 20, 20, None))


def test_without_a_seed_torchs_generator_gives_one() -> None:
    torch.manual_seed(3)
    first, second = (mask_of(1, 2, 20, 20, None) for _ in range(2))
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(first, mask_of(1, 2, 20, 20, None))


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": 5, "causal": True, "soft_cap": 2.0}], ids=str)
def test_forward_and_backward_are_those_of_the_mask(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]) -> None:
    """The mask is read off with one-hot values, and the same call with others must be the reference with that mask."""
    monkeypatch.setattr(attention_blocked, "BLOCK_BYTES", 4000)  # of several blocks
    monkeypatch.setattr(attention_blocked, "LEAST_ROWS", 3)
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = (torch.randn(2, 3, 17, 17, generator=generator, dtype=torch.float64) for _ in range(4))
    masks = {name: value for name, value in options.items() if name != "soft_cap"}
    seen = attention_mask(17, 17, **masks)
    keep = mask_of(2, 3, 17, 17, 5, **options)
    leaves = [each.requires_grad_() for each in (q, k, v)]
    out, lse = attention(*leaves, dropout=DROPOUT, seed=5, return_lse=True, **options)
    truth, true_lse = attention_with_options(
        *leaves,
        seen,
        keep=keep,
        dropout=DROPOUT,
        soft_cap=options.get("soft_cap"),
    )
    torch.testing.assert_close(out, truth, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(lse, true_lse, atol=1e-12, rtol=1e-12)  # as without dropout
    mine, theirs = (torch.autograd.grad(each, leaves, grad) for each in (out, truth))
    torch.testing.assert_close(mine, theirs, atol=1e-12, rtol=1e-12)


def test_the_mean_over_seeds_is_attention_without_dropout() -> None:
    q, k, v = (torch.randn(1, 1, 4, 4, generator=torch.Generator().manual_seed(place)) for place in range(3))
    outs = torch.stack([attention(q, k, v, dropout=DROPOUT, seed=seed) for seed in range(2000)])
    error = (outs.mean(0) - attention(q, k, v)).abs() / outs.std(0) * 2000**0.5  # in standard errors
    assert error.max() < 5


def test_checkpointing_replays_the_mask() -> None:
    """torch's activation checkpointing restores the generator, so a seed drawn from it is drawn again."""
    from torch.utils.checkpoint import checkpoint

    leaves = [torch.randn(1, 2, 9, 4).requires_grad_() for _ in range(3)]
    gradients = []
    for again in (False, True):
        torch.manual_seed(1)
        block = lambda *qkv: attention(*qkv, dropout=DROPOUT).sin()  # noqa: E731
        out = checkpoint(block, *leaves, use_reentrant=False) if again else block(*leaves)
        gradients.append(torch.autograd.grad(out.sum(), leaves))
    torch.testing.assert_close(gradients[0], gradients[1], atol=0, rtol=0)
