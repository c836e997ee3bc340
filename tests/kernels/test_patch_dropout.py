"""Patch dropout: what stays, that it is random and uniform, and the same wherever it is computed."""

from __future__ import annotations

import math

import pytest
import torch

from kernels.patch_dropout import _hash, _subset, patch_dropout


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


@pytest.mark.parametrize(
    ("tokens", "keep", "first", "stay"),
    [
        (197, 0.5, 1, 99),
        (16, 0.25, 0, 4),
        (1, 0.1, 0, 1),
        (7, 1.0, 2, 7),
        (3, 0.5, 3, 3),
        (5, 0.01, 4, 5),
        (0, 0.5, 0, 0),
    ],
)
def test_keeps_a_sorted_subset_and_the_first_tokens(tokens: int, keep: float, first: int, stay: int) -> None:
    x = draw(3, tokens, 5)
    kept, indices = patch_dropout(x, keep, 7, first=first)
    assert kept.shape == (3, stay, 5)
    assert indices.shape == (3, stay)
    assert indices.dtype == torch.int64
    assert (indices.diff(dim=1) > 0).all()
    assert torch.equal(indices[:, :first], torch.arange(first).expand(3, first))
    for b in range(3):
        assert torch.equal(kept[b], x[b, indices[b]])


def test_gradient_reaches_the_kept_tokens_only() -> None:
    x = draw(2, 9, 3).requires_grad_()
    kept, indices = patch_dropout(x, 0.5, 1)
    above = draw(*kept.shape)
    (dx,) = torch.autograd.grad(kept, x, above)
    expected = torch.zeros_like(x)
    for b in range(2):
        expected[b, indices[b]] = above[b]
    assert torch.equal(dx, expected)
    assert torch.autograd.gradcheck(lambda x: patch_dropout(x, 0.5, 1, first=1)[0], (x,))


def test_every_subset_is_as_likely_as_the_others() -> None:
    """The chi-squared statistic of the 70 subsets of 4 of 8 patches over 70,000 samples of 10 seeds."""
    x = torch.zeros(7000, 8, 1)
    indices = torch.cat([patch_dropout(x, 0.5, seed)[1] for seed in range(10)])
    counts = torch.bincount((2**indices).sum(1))
    counts = counts[counts > 0].double()
    assert len(counts) == math.comb(8, 4)
    assert float(((counts - 1000) ** 2 / 1000).sum()) < 69 + 5 * math.sqrt(2 * 69)


def test_samples_and_seeds_are_independent() -> None:
    """Two subsets of half of 196 patches share half of them, whichever samples, seeds or halves of a seed differ."""
    x = torch.zeros(50, 196, 1)
    seeds = (0, 1, 2, 3, 2**32, 2**32 + 1, 2**33, -1)
    chosen = torch.zeros(len(seeds) * 50, 196, dtype=torch.float64)
    chosen.scatter_(1, torch.cat([patch_dropout(x, 0.5, seed)[1] for seed in seeds]), 1)
    shared = (chosen @ chosen.T)[tuple(torch.triu_indices(len(chosen), len(chosen), 1))] / 98
    assert abs(float(shared.mean()) - 0.5) < 1e-3
    assert float(shared.min()) > 0.3
    assert float(shared.max()) < 0.7  # six standard deviations of 0.036 are 0.21


def test_replays() -> None:
    x = draw(4, 49, 2)
    first, again, other = (patch_dropout(x, 0.5, seed)[1] for seed in (5, torch.tensor(5), 6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    # the very patches: another draw would make runs of earlier versions impossible to repeat
    assert patch_dropout(torch.zeros(2, 8, 1), 0.5, 5)[1].tolist() == PINNED


PINNED = [[2, 4, 6, 7], [3, 5, 6, 7]]


def test_a_seed_a_sample_does_not_depend_on_the_batch() -> None:
    x, seeds = draw(5, 49, 2), torch.tensor([3, -9, 2**40, 3, 0])
    together = patch_dropout(x, 0.5, seeds)[1]
    for b in range(5):
        assert torch.equal(patch_dropout(x[b : b + 1], 0.5, seeds[b : b + 1])[1][0], together[b])
    assert torch.equal(together[0], together[3])
    assert len({tuple(row) for row in together.tolist()}) == 4


def test_the_hash_is_lowbias32() -> None:
    def plain(bits: int) -> int:
        bits = (bits ^ bits >> 16) * 0x7FEB352D % 2**32
        bits = (bits ^ bits >> 15) * 0x846CA68B % 2**32
        return bits ^ bits >> 16

    numbers = [0, 1, 2**31, 2**32 - 1, *range(123, 2**32, 41_000_011)]
    assert _hash(torch.tensor(numbers)).tolist() == [plain(number) for number in numbers]


def test_operator() -> None:
    torch.library.opcheck(_subset, (torch.tensor(3), 2, 7, 4))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_code_keeps_the_same_patches(backend: str) -> None:
    x = draw(4, 21, 3).float()
    compiled = torch.compile(lambda x, seed: patch_dropout(x, 0.5, seed, first=1), backend=backend, fullgraph=True)
    for seed in (3, 4, 2**40, torch.tensor(-5), torch.arange(4)):
        kept, indices = compiled(x, seed)
        assert torch.equal(indices, patch_dropout(x, 0.5, seed, first=1)[1])
        assert torch.equal(kept, patch_dropout(x, 0.5, seed, first=1)[0])


def test_what_does_not_fit_is_refused() -> None:
    x = torch.zeros(2, 5, 3)
    for keep in (0, -0.5, 1.5, float("nan")):
        with pytest.raises(ValueError, match="the share that stays"):
            patch_dropout(x, keep, 0)
    with pytest.raises(ValueError, match="first is 6: need 0 to 5"):
        patch_dropout(x, 0.5, 0, first=6)
    with pytest.raises(ValueError, match=r"seed is torch.int32 \[\]"):
        patch_dropout(x, 0.5, torch.tensor(3, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"need int64 \[\] or \[2\]"):
        patch_dropout(x, 0.5, torch.arange(3))
    with pytest.raises(ValueError, match=r"need \[B, S, D\]"):
        patch_dropout(x[0], 0.5, 0)
