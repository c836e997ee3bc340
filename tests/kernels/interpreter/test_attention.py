"""The Triton attention kernels, interpreted, against the fp64 definition: values, gradients, log-sum-exp, operators."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

from kernels import attention_tiles
from kernels.attention_tiles import Tile, choose, edge, parts
from kernels.attention_triton import triton_attention
from kernels.reference import attention as reference

CLOSE = 5e-6  # relative error allowed to fp32
NAMES = ("out", "dq", "dk", "dv")


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """q, k, v and the gradient of the output for (batch, heads, heads of keys, queries, keys, size of a head)."""
    batch, heads, kv_heads, queries, keys, size = shape
    generator = torch.Generator().manual_seed(sum(shape))
    shapes = ((heads, queries), (kv_heads, keys), (kv_heads, keys), (heads, queries))
    return [torch.randn(batch, *each, size, generator=generator).to(dtype) for each in shapes]


def seen_mask(queries: int, keys: int, causal: bool = False, lengths: torch.Tensor | None = None) -> torch.Tensor:
    """[B or 1, 1, Q, S]: query i sees keys up to i + S - Q, and of a sample only its first `length` keys."""
    rows, columns = torch.arange(queries)[:, None], torch.arange(keys)
    seen = (columns <= rows + keys - queries if causal else torch.ones(queries, keys, dtype=torch.bool))[None, None]
    return seen if lengths is None else seen & (columns < lengths[:, None])[:, None, None]


def shared_reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """The definition with keys and values repeated for the heads that share them."""
    repeats = q.shape[1] // k.shape[1]
    return reference(q, k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1), seen)


def run(function: Any, tensors: list[torch.Tensor], **options: Any) -> list[torch.Tensor]:
    """Output and gradients of q, k and v."""
    leaves = [each.detach().clone().requires_grad_() for each in tensors[:3]]
    out = function(*leaves, **options)
    out.backward(tensors[3].to(out.dtype))
    return [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def assert_close(mine: list[torch.Tensor], truth: list[torch.Tensor], limit: float = CLOSE) -> None:
    for name, a, b in zip(NAMES, mine, truth, strict=True):
        assert a.isfinite().all(), name
        error = (a.double() - b.double()).norm() / b.double().norm().clamp(min=1)  # of one key, dq is exactly 0
        assert error <= limit, f"{name} is off by {error:.2e}"


def check(*shape: int, causal: bool = False, lengths: list[int] | None = None) -> list[torch.Tensor]:
    tensors = draw(*shape)
    lengths_B = None if lengths is None else torch.tensor(lengths)
    mine = run(triton_attention, tensors, causal=causal, key_lengths_B=lengths_B)
    assert_close(mine, run(shared_reference, tensors, seen=seen_mask(*shape[3:5], causal, lengths_B)))
    return mine


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("size", [64, 72, 80, 96, 128])
def test_every_head_size(size: int, causal: bool) -> None:
    check(1, 2, 1, 65, 77, size, causal=causal)


@pytest.mark.parametrize("size", [1, 5, 13, 40, 200, 256])
def test_head_sizes_that_fill_no_tile(size: int) -> None:
    check(1, 1, 1, 17, 19, size, causal=True)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("length", [1, 7, 65, 77, 129, 197, 257])
def test_odd_lengths(length: int, causal: bool) -> None:
    check(1, 1, 1, length, length, 16, causal=causal)


@pytest.mark.parametrize(
    ("queries", "keys"),
    # the last two: the diagonal one key before the end of a block, and one behind it
    [(65, 129), (129, 65), (1, 200), (200, 1), (64, 128), (7, 71), (90, 89), (64, 126), (64, 65)],
)
def test_causal_is_aligned_to_the_bottom_right(queries: int, keys: int) -> None:
    out, dq, *_ = check(1, 1, 1, queries, keys, 16, causal=True)
    blind = max(queries - keys, 0)  # the first queries see nothing when there are more queries than keys
    assert torch.count_nonzero(out[:, :, :blind]) == 0
    assert torch.count_nonzero(dq[:, :, :blind]) == 0


@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 2), (3, 1), (2, 2)])
def test_heads_share_keys(heads: int, kv_heads: int) -> None:
    check(2, heads, kv_heads, 33, 70, 16, causal=True)


@pytest.mark.parametrize("causal", [False, True])
def test_key_lengths(causal: bool) -> None:
    lengths = [0, 1, 63, 64, 77, 129]
    _, _, dk, dv = check(6, 2, 1, 40, 129, 16, causal=causal, lengths=lengths)
    for sample, length in enumerate(lengths):
        assert torch.count_nonzero(dk[sample, :, length:]) == 0
        assert torch.count_nonzero(dv[sample, :, length:]) == 0


def test_lengths_beyond_the_keys_and_below_zero_are_held_to_them() -> None:
    q, k, v, _ = draw(2, 1, 1, 5, 7, 16)
    out = triton_attention(q, k, v, key_lengths_B=torch.tensor([100, -3], dtype=torch.int32))
    torch.testing.assert_close(out, reference(q, k, v, seen_mask(5, 7, lengths=torch.tensor([7, 0]))).float())


def test_hidden_keys_may_hold_anything() -> None:
    q, k, v, gradient = draw(2, 1, 1, 9, 70, 24)
    lengths = torch.tensor([20, 65])
    before = run(triton_attention, [q, k, v, gradient], key_lengths_B=lengths)
    hidden = (torch.arange(70) >= lengths[:, None])[:, None, :, None]
    k, v = (each.masked_fill(hidden, torch.nan) for each in (k, v))
    after = run(triton_attention, [q, k, v, gradient], key_lengths_B=lengths)
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a, b)


def test_log_sum_exp_and_scale() -> None:
    q, k, v, _ = draw(2, 2, 2, 40, 33, 16)
    out, lse = triton_attention(q, k, v, causal=True, scale=0.3, return_lse=True)
    seen = seen_mask(40, 33, causal=True)
    scores = (0.3 * q.double() @ k.double().mT).masked_fill(~seen, -torch.inf)
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), atol=1e-6, rtol=1e-6)  # 7 rows of it are -inf
    torch.testing.assert_close(out.double(), scores.softmax(-1).nan_to_num() @ v.double(), atol=1e-6, rtol=1e-5)
    assert lse.dtype == torch.float32
    assert not lse.requires_grad


def test_large_scores_do_not_overflow() -> None:
    tensors = draw(1, 1, 1, 33, 70, 16)
    tensors[0] = tensors[0] * 300
    truth = run(shared_reference, tensors, seen=seen_mask(33, 70))
    assert_close(run(triton_attention, tensors), truth, 2e-4)  # exp of rounded scores near 1000


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("causal", [False, True])
def test_half_precision_is_at_most_twice_as_wrong_as_plain_torch(dtype: torch.dtype, causal: bool) -> None:
    """flash-attention's rule: error against fp64 at most twice that of the plain formula in the same dtype."""
    tensors = draw(1, 2, 1, 77, 130, 72, dtype=dtype)
    seen = seen_mask(77, 130, causal)

    def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        k, v = (each.repeat_interleave(2, 1) for each in (k, v))
        return (q @ k.mT / 72**0.5).masked_fill(~seen, -torch.inf).softmax(-1) @ v

    truth = run(shared_reference, tensors, seen=seen)
    mine, theirs = run(triton_attention, tensors, causal=causal), run(plain, tensors)
    assert mine[0].dtype == dtype
    for name, a, b, exact in zip(NAMES, mine, theirs, truth, strict=True):
        error, allowed = ((each.double() - exact.double()).abs().max() for each in (a, b))
        assert error <= 2 * allowed + 1e-5, f"{name}: {error:.2e}, plain torch {allowed:.2e}"


@pytest.mark.parametrize("causal", [False, True])
def test_gradcheck_in_fp64(causal: bool) -> None:
    q, k, v, _ = draw(2, 1, 1, 3, 4, 2, dtype=torch.float64)
    leaves = tuple(each.requires_grad_() for each in (q, k, v))
    lengths = torch.tensor([0, 3])
    assert torch.autograd.gradcheck(
        lambda *tensors: triton_attention(*tensors, causal=causal, key_lengths_B=lengths), leaves, fast_mode=True
    )


def test_is_exact_in_fp64() -> None:
    tensors = draw(1, 2, 1, 33, 65, 16, dtype=torch.float64)
    seen = seen_mask(33, 65, causal=True)
    mine = run(triton_attention, tensors, causal=True)
    assert_close(mine, run(shared_reference, tensors, seen=seen), 1e-14)


def test_strided_inputs_are_read_as_they_are() -> None:
    """[S, B, H, K] permuted, slices of one projection, and an expanded gradient; the output is laid out as q."""
    generator = torch.Generator().manual_seed(3)
    packed = torch.randn(11, 3, 2, 3 * 8, generator=generator)
    tensors = [each.permute(1, 2, 0, 3) for each in packed.split(8, -1)]
    leaves = [each.detach().requires_grad_() for each in tensors]
    out = triton_attention(*leaves, causal=True)  # type: ignore[arg-type]
    assert out.permute(2, 0, 1, 3).is_contiguous()
    out.sum().backward()
    contiguous = [each.contiguous() for each in tensors]
    expected = run(triton_attention, [*contiguous, torch.ones(3, 2, 11, 8)], causal=True)
    for a, b in zip([out, *(leaf.grad for leaf in leaves)], expected, strict=True):
        assert torch.equal(a, b)


def test_other_tiles_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles that are not square, both ways; an edge block smaller than a whole one, and as large."""
    for own, step in ((128, 32), (32, 128)):
        for tiles in (attention_tiles.FORWARD, attention_tiles.DKDV, attention_tiles.DQ):
            monkeypatch.setitem(tiles, "interpreter", [Tile(2048, own, step, 4, 1)])
        check(1, 1, 1, 100, 145, 24)
        check(1, 1, 1, 150, 100, 16, causal=True)
        check(2, 1, 1, 70, 133, 16, lengths=[130, 32], causal=True)


def test_operators_pass_opcheck() -> None:
    q, k, v, gradient = draw(2, 1, 1, 5, 7, 16)
    lengths = torch.tensor([3, 7])
    leaves = [each.requires_grad_() for each in (q, k, v)]
    torch.library.opcheck(torch.ops.weft.triton_attention.default, (*leaves, lengths, True, 0.25))
    out, lse = torch.ops.weft.triton_attention(*leaves, lengths, False, 0.25)
    plain = [each.detach() for each in (gradient, *leaves, out, lse)]
    torch.library.opcheck(torch.ops.weft.triton_attention_backward.default, (*plain, lengths, False, 0.25))


def test_compiles_without_a_graph_break() -> None:
    tensors = draw(1, 2, 2, 9, 9, 16)

    def block(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return triton_attention(q * 2, k, v, causal=True).sin()  # type: ignore[union-attr]

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    assert_close(run(compiled, tensors), run(block, tensors), 1e-7)


@pytest.mark.parametrize(("queries", "keys"), [(0, 5), (5, 0), (0, 0)])
def test_nothing_to_attend(queries: int, keys: int) -> None:
    out, dq, dk, dv = run(triton_attention, draw(1, 2, 1, queries, keys, 16))
    assert out.shape == dq.shape == (1, 2, queries, 16)
    assert dk.shape == dv.shape == (1, 1, keys, 16)
    assert not any(each.count_nonzero() for each in (out, dq, dk, dv))


def test_refuses_with_the_reason() -> None:
    q, k, v, _ = draw(2, 3, 3, 4, 4, 8)
    for tensors, options, reason in (
        ((q, k[:, :2], v[:, :2]), {}, "no multiple"),
        ((q, k, v[:, :, :3]), {}, r"need q \[B, H, Q, K\]"),
        ((q, k.double(), v), {}, "for all three"),
        ((q.int(), k.int(), v.int()), {}, "for all three"),
        ((q, k, v), {"scale": -1.0}, "must be positive"),
        ((q, k, v), {"key_lengths_B": torch.tensor([1, 2, 3])}, r"need int32 or int64 \[2\]"),
        ((q, k, v), {"key_lengths_B": torch.tensor([1.0, 2.0])}, "need int32 or int64"),
        (draw(1, 1, 1, 2, 2, 257)[:3], {}, "sizes 1 to 256"),
    ):
        with pytest.raises(ValueError, match=reason):
            triton_attention(*tensors, **options)  # type: ignore[arg-type]


def test_tiles_are_chosen_by_width_and_short_lengths() -> None:
    assert [parts(size) for size in (5, 16, 64, 72, 80, 96, 128)] == [
        (16, 0), (16, 0), (64, 0), (64, 16), (64, 16), (64, 32), (128, 0),
    ]  # fmt: skip
    tiles = [Tile(128, 128, 64, 4, 1), Tile(128, 64, 64, 4, 1), Tile(256, 128, 32, 4, 1)]
    assert choose(tiles, 64, 2, 257) == tiles[1]  # 5 blocks of 64, not 3 of 128
    assert choose(tiles, 64, 2, 729) == tiles[0]  # 768 rows either way: the larger
    assert choose(tiles, 64, 2, 4097) == tiles[0]
    assert choose(tiles, 72, 2, 257) == tiles[2]
    assert [edge(tiles[0], keys, ragged=False) for keys in (257, 197, 256, 95, 127)] == [16, 16, 16, 32, 64]
    assert edge(tiles[0], 257, ragged=True) == 64
    for lists in (attention_tiles.FORWARD, attention_tiles.DKDV, attention_tiles.DQ):
        for tiles in lists.values():
            assert all(a.bytes <= b.bytes for a, b in pairwise(tiles))
