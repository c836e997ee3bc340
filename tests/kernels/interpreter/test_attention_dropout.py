"""Soft cap and dropout of the Triton attention kernels, interpreted."""

from __future__ import annotations

import pytest
import torch
from attention_calls import CLOSE, PACKED, SEED, assert_close, check, draw, run, run_reference

from kernels.gpu import attention_tiles
from kernels.gpu.attention import dropout_keep
from kernels.gpu.attention_tiles import Tile

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp2")  # of a sigmoid: the right answer


@pytest.mark.parametrize("soft_cap", [2.0, 50.0])
def test_soft_cap(soft_cap: float) -> None:
    check(1, 1, 1, 65, 77, 16, soft_cap=soft_cap, causal=True, scale=0.7)


def test_soft_cap_holds_scores_that_would_overflow() -> None:
    q, k, v, grad = draw(1, 1, 1, 33, 40, 16)
    mine = run([q * 1e4, k, v, grad], soft_cap=5.0)
    truth = run_reference([q * 1e4, k, v, grad], {}, soft_cap=5.0)
    torch.testing.assert_close(mine[0].double(), truth[0], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(mine[4].double(), truth[4], atol=1e-6, rtol=1e-6)
    assert all(each.isfinite().all() for each in mine)


@pytest.mark.parametrize("causal", [False, True])
def test_dropout_of_the_mask_that_dropout_keep_shows(causal: bool) -> None:
    check(2, 2, 1, 33, 70, 16, dropout=0.3, causal=causal, where={"seed": SEED})


def test_dropout_of_documents() -> None:
    check(1, 1, 1, 100, 147, 16, dropout=0.1, where={**PACKED, "seed": SEED})


def test_dropout_depends_on_the_seed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = draw(1, 1, 1, 65, 65, 16)
    first = run(tensors, {"seed": SEED}, dropout=0.5)
    again = run(tensors, {"seed": SEED.clone()}, dropout=0.5)
    other = run(tensors, {"seed": SEED + (1 << 33)}, dropout=0.5)
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(first[0], other[0])
    assert torch.equal(first[4], run(tensors)[4])  # the log-sum-exp is without it
    for tiles in (attention_tiles.FORWARD, attention_tiles.DKDV, attention_tiles.DQ):
        monkeypatch.setitem(tiles, "interpreter", [Tile(2048, 128, 32, 4, 1)])
    assert_close(run(tensors, {"seed": SEED}, dropout=0.5), first, 1e-6)


def test_kept_weights_are_random() -> None:
    keep = dropout_keep((2, 2, 65, 129), 0.25, SEED)
    share = keep.float()
    assert abs(share.mean() - 0.75) < 5 * (0.25 * 0.75 / keep.numel()) ** 0.5
    flat = share.reshape(4, -1) - share.mean()
    correlation = flat @ flat.T / (0.25 * 0.75 * flat.shape[1])
    assert (correlation - torch.eye(4)).abs().max() < 5 / flat.shape[1] ** 0.5  # heads and samples are independent
    for shifted in (share[..., 1:] - 0.75, share[:, :, 1:] - 0.75):
        neighbours = (shifted * (share[..., : shifted.shape[2], : shifted.shape[3]] - 0.75)).mean() / (0.25 * 0.75)
        assert neighbours.abs() < 5 / shifted.numel() ** 0.5
    assert torch.equal(keep, dropout_keep((2, 2, 65, 129), 0.25, SEED))
    assert torch.equal(keep[:, :, :9, :30], dropout_keep((2, 2, 9, 30), 0.25, SEED))  # whatever the shape
    assert dropout_keep((1, 1, 9, 9), 0.0, SEED).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_everything_at_once(dtype: torch.dtype) -> None:
    where = {**PACKED, "seed": SEED}
    limit = CLOSE if dtype == torch.float32 else 1e-13
    check(
        1, 1, 1, 100, 147, 20, dtype=dtype, limit=limit, where=where,
        causal=True, window=30, soft_cap=3.0, dropout=0.25, scale=0.25,
    )  # fmt: skip
