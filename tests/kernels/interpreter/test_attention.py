"""The Triton attention kernels, interpreted, against the fp64 definition: values, gradients, log-sum-exp, sizes,
invariances, refusals. Masks and dropout have files of their own.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from attention_calls import NAMES, PACKED, SEED, assert_close, check, draw, run, run_reference, starts
from torch._subclasses.fake_tensor import FakeTensorMode

from kernels.attention_spec import Spec
from kernels.gpu import attention_tiles
from kernels.gpu.attention import refusal
from kernels.gpu.attention_tiles import Tile, choose, edge, parts
from kernels.reference import attention_mask

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp2")  # of a sigmoid: the right answer


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("size", [64, 72, 80, 96, 128, 256])
def test_every_head_size(size: int, causal: bool) -> None:
    check(1, 1, 1, 33, 77, size, causal=causal)


@pytest.mark.parametrize("size", [1, 5, 13, 40, 200])
def test_head_sizes_that_fill_no_tile(size: int) -> None:
    check(1, 1, 1, 17, 19, size, causal=True)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (65, 65), (3, 257), (3, 1023)])
def test_odd_lengths(queries: int, keys: int, causal: bool) -> None:
    check(1, 1, 1, queries, keys, 16, causal=causal)


@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 2), (3, 1)])
def test_heads_share_keys(heads: int, kv_heads: int) -> None:
    check(1, heads, kv_heads, 33, 70, 16, causal=True)


# --- numbers


def test_large_scores_do_not_overflow() -> None:
    q, k, v, grad = draw(1, 1, 1, 33, 70, 16)
    mine = run([q * 300, k, v, grad])
    assert_close(mine, run_reference([q * 300, k, v, grad], {}), 2e-4)  # exp of rounded scores near 1000


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "settings", [{"causal": True}, {"soft_cap": 2.0, "window": 50}], ids=["causal", "capped window"]
)
def test_half_precision_is_at_most_twice_as_wrong_as_plain_torch(dtype: torch.dtype, settings: dict[str, Any]) -> None:
    """flash-attention's rule: error against fp64 at most twice that of the plain formula in the same dtype."""
    tensors = draw(1, 1, 1, 77, 130, 72, dtype=dtype)
    seen = attention_mask(77, 130, causal="causal" in settings, window=settings.get("window"))
    leaves = [each.detach().requires_grad_() for each in tensors[:3]]
    scores = leaves[0] @ leaves[1].mT / 72**0.5
    if cap := settings.get("soft_cap"):
        scores = cap * torch.tanh(scores / cap)
    plain = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ leaves[2]
    plain.backward(tensors[3])
    theirs = [plain, *(leaf.grad for leaf in leaves)]
    mine, truth = run(tensors, **settings), run_reference(tensors, {}, **settings)
    assert mine[0].dtype == dtype
    for name, a, b, exact in zip(NAMES, mine, theirs, truth, strict=False):
        error, allowed = ((each.double() - exact).abs().max() for each in (a, b))
        assert error <= 2 * allowed + 1e-5, f"{name}: {error:.2e}, plain torch {allowed:.2e}"


@pytest.mark.parametrize("causal", [False, True])
def test_is_exact_in_fp64(causal: bool) -> None:
    check(1, 2, 1, 33, 65, 20, dtype=torch.float64, limit=1e-13, causal=causal, scale=0.25)


# --- invariances


def test_heads_and_samples_are_independent() -> None:
    """Permuted, each gives the same bits."""
    tensors = draw(2, 2, 2, 33, 70, 16)
    heads = torch.tensor([1, 0])
    straight = run(tensors, {"key_lengths_B": torch.tensor([50, 70])}, causal=True)
    turned = run([each.flip(0)[:, heads] for each in tensors], {"key_lengths_B": torch.tensor([70, 50])}, causal=True)
    for a, b in zip(straight, turned, strict=True):
        assert torch.equal(a.flip(0)[:, heads], b)


def test_padding_changes_nothing() -> None:
    q, k, v, grad = draw(1, 1, 1, 33, 70, 16)
    plain = run([q, k, v, grad])
    padding = torch.full([1, 1, 60, 16], 5.0)
    longer = [q, torch.cat([k, padding], 2), torch.cat([v, padding], 2), grad]
    padded = run(longer, {"key_lengths_B": torch.tensor([70])})
    for a, b in zip(plain, (padded[0], padded[1], padded[2][:, :, :70], padded[3][:, :, :70], padded[4]), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("soft_cap", [0.0, 2.0])
def test_the_order_of_keys_and_of_queries_does_not_matter(soft_cap: float) -> None:
    q, k, v, grad = draw(1, 2, 1, 37, 70, 16)
    keys, queries = (torch.randperm(n, generator=torch.Generator().manual_seed(n)) for n in (70, 37))
    straight = run([q, k, v, grad], soft_cap=soft_cap)
    mixed = run([q[:, :, queries], k[:, :, keys], v[:, :, keys], grad[:, :, queries]], soft_cap=soft_cap)
    for a, b, order in zip(straight, mixed, (queries, queries, keys, keys, queries), strict=True):
        torch.testing.assert_close(a[:, :, order], b, atol=2e-6, rtol=1e-5)


def test_every_key_twice_halves_each_weight() -> None:
    q, k, v, grad = draw(1, 1, 1, 19, 41, 16)
    out, dq, dk, dv, lse = run([q, k, v, grad])
    twice = run([q, torch.cat([k, k], 2), torch.cat([v, v], 2), grad])
    expected = [out, dq, torch.cat([dk, dk], 2) / 2, torch.cat([dv, dv], 2) / 2, lse + torch.tensor(2.0).log()]
    for a, b in zip(twice, expected, strict=True):
        torch.testing.assert_close(a, b, atol=2e-6, rtol=1e-5)


def test_equal_keys_give_the_mean_of_the_values() -> None:
    q, k, v, grad = draw(1, 1, 1, 19, 41, 16)
    out, dq, *_ = run([q, k[:, :, :1].expand_as(k).contiguous(), v, grad])
    torch.testing.assert_close(out, v.mean(2, keepdim=True).expand_as(out), atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(dq, torch.zeros_like(dq), atol=2e-5, rtol=0)


def test_a_scale_of_100() -> None:
    """Scores of several hundred, whose rounding to fp32 alone is 100 times that of scores of a few."""
    unit = [torch.nn.functional.normalize(each, dim=-1) for each in draw(1, 1, 1, 23, 70, 64)]
    assert_close(run(unit, scale=100.0), run_reference(unit, {}, scale=100.0), 2e-5)


def test_strided_inputs_are_read_as_they_are() -> None:
    """[S, B, H, K] permuted, slices of one projection, and an expanded gradient; the output is laid out as q."""
    generator = torch.Generator().manual_seed(3)
    packed = torch.randn(11, 3, 2, 3 * 8, generator=generator)
    tensors = [each.permute(1, 2, 0, 3) for each in packed.split(8, -1)]
    mine = run([*tensors, torch.ones(()).expand(3, 2, 11, 8)], causal=True)
    assert mine[0].permute(2, 0, 1, 3).is_contiguous()
    expected = run([*(each.contiguous() for each in tensors), torch.ones(3, 2, 11, 8)], causal=True)
    for a, b in zip(mine, expected, strict=True):
        assert torch.equal(a, b)


def test_elements_of_a_head_that_do_not_lie_side_by_side() -> None:
    """Results cannot lie as such inputs do: they are contiguous."""
    tensors = [each.mT.contiguous().mT for each in draw(1, 2, 1, 11, 19, 8)]
    mine = run(tensors, causal=True)
    assert all(each.is_contiguous() for each in mine)
    for a, b in zip(mine, run(draw(1, 2, 1, 11, 19, 8), causal=True), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("own", "step"), [(128, 32), (64, 128)])
def test_other_tiles_give_the_same(monkeypatch: pytest.MonkeyPatch, own: int, step: int) -> None:
    """Tiles that are not square, both ways; an edge block smaller than a whole one, and as large."""
    for tiles in (attention_tiles.FORWARD, attention_tiles.DKDV, attention_tiles.DQ):
        monkeypatch.setitem(tiles, "interpreter", [Tile(2048, own, step, 4, 1)])
    check(1, 1, 1, 100, 145, 24)
    check(1, 1, 1, 70, 200, 16, causal=True, window=70)
    check(1, 1, 1, 150, 90, 16, window=33)
    check(1, 1, 1, 70, 133, 16, causal=True, where={"key_lengths_B": torch.tensor([130])})
    check(1, 1, 1, 100, 147, 16, causal=True, where=PACKED)


@pytest.mark.parametrize(("queries", "keys"), [(0, 5), (5, 0), (0, 0)])
def test_nothing_to_attend(queries: int, keys: int) -> None:
    out, dq, dk, dv, _ = run(draw(1, 2, 1, queries, keys, 16))
    assert out.shape == dq.shape == (1, 2, queries, 16)
    assert dk.shape == dv.shape == (1, 1, keys, 16)
    assert not any(each.count_nonzero() for each in (out, dq, dk, dv))


def test_refuses_with_the_reason() -> None:
    q, k, v, _ = draw(2, 3, 3, 4, 4, 8)
    one = (q[:1], k[:1], v[:1])
    for tensors, settings, where, reason in (
        ((q, k[:, :2], v[:, :2]), {}, {}, "no multiple"),
        ((q, k, v[:, :, :3]), {}, {}, "need q [B, H, Q, K]"),
        ((q, k.double(), v), {}, {}, "for all three"),
        ((q.int(), k.int(), v.int()), {}, {}, "for all three"),
        (tuple(draw(1, 1, 1, 2, 2, 257)[:3]), {}, {}, "sizes 1 to 256"),
        ((q, k, v), {"scale": -1.0}, {}, "must be positive"),
        ((q, k, v), {"window": -1}, {}, "window is -1"),
        ((q, k, v), {"dropout": 1.0}, {"seed": SEED}, "below 1"),
        ((q, k, v), {"dropout": 0.1}, {}, "there is no seed"),
        ((q, k, v), {"dropout": 0.1}, {"seed": SEED.int()}, "need int64 []"),
        ((q, k, v), {}, {"key_lengths_B": torch.tensor([1, 2, 3])}, "need [2]"),
        ((q, k, v), {}, {"key_lengths_B": torch.tensor([1.0, 2.0])}, "need int32 or int64"),
        ((q, k, v), {}, {"query_starts": starts(0, 4)}, "batch of 1"),
        (one, {}, {"query_starts": starts(0, 4), "key_lengths_B": torch.tensor([1])}, "without key lengths"),
        (one, {}, {"query_starts": starts(0, 4), "key_starts": starts(0, 2, 4)}, "need one shape"),
        (one, {}, {"query_starts": starts(0)}, "need [documents + 1]"),
        (one, {}, {"key_starts": starts(0, 4)}, "without query_starts"),
    ):
        assert reason in refusal(*tensors, Spec(**{"scale": 1.0, **settings}), **where)  # type: ignore[arg-type]


def test_refuses_heads_on_a_gpu_that_were_not_compiled_for_it() -> None:
    """Wide ones of fp32, and those whose rows do not start at multiples of 16 bytes."""
    with FakeTensorMode():
        for size in (8, 36, 65):
            q = torch.empty(1, 1, 4, size, device="cuda")
            assert ("a multiple of 8 is needed" in refusal(q, q, q, Spec(1.0))) == bool(size % 8)
        for size, dtype, refused in ((128, torch.float32, False), (136, torch.float32, True), (256, torch.half, False)):
            q = torch.empty(1, 1, 4, size, dtype=dtype, device="cuda")
            assert ("larger in 16 bits" in refusal(q, q, q, Spec(1.0))) == refused


def test_tiles_are_chosen_by_width_features_and_short_lengths() -> None:
    assert [parts(size) for size in (5, 16, 64, 72, 80, 96, 128)] == [
        (16, 0), (16, 0), (64, 0), (64, 16), (64, 16), (64, 32), (128, 0),
    ]  # fmt: skip
    tiles = [Tile(128, 128, 64, 4, 1, plain=True), Tile(128, 64, 64, 4, 1), Tile(256, 128, 32, 4, 1)]
    assert choose(tiles, 64, 2, 257) == tiles[1]  # 5 blocks of 64, not 3 of 128
    assert choose(tiles, 64, 2, 729) == tiles[0]  # 768 rows either way: the larger
    assert choose(tiles, 64, 2, 4097) == tiles[0]
    assert choose(tiles, 64, 2, 4097, masked=True) == tiles[1]
    assert choose(tiles, 64, 2, 4097, heavy=True) == tiles[2]
    assert choose(tiles, 72, 2, 257) == tiles[2]
    assert choose(tiles, 128, 2, 257, heavy=True) == tiles[2]  # there is none for twice the size
    more = [tiles[0], Tile(128, 64, 128, 4, 1, full=True), *tiles[1:]]
    assert choose(more, 64, 2, 257) == more[1]
    assert all(choose(more, 64, 2, 257, **{mask: True}) == more[2] for mask in ("causal", "masked"))
    assert [edge(tiles[0], keys, ragged=False) for keys in (257, 197, 256, 95, 127)] == [16, 16, 16, 32, 64]
    assert edge(tiles[0], 257, ragged=True) == 64
    for lists in (attention_tiles.FORWARD, attention_tiles.DKDV, attention_tiles.DQ):
        for tiles in lists.values():
            assert all(a.bytes <= b.bytes for a, b in pairwise(tiles))
            assert all(any(not (b.plain or b.full) for b in tiles if b.bytes == a.bytes) for a in tiles)
