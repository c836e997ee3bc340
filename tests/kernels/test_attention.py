"""Attention against its fp64 definition: odd shapes, causal alignment, key lengths, gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from kernels import attention
from kernels.reference import attention as reference

# batch, heads, queries, keys, size of a head
SHAPES = [(1, 1, 1, 1, 1), (2, 3, 7, 7, 5), (1, 2, 65, 65, 13), (3, 1, 5, 17, 8), (2, 2, 17, 5, 16), (1, 1, 1, 33, 3)]


def draw(shape: tuple[int, int, int, int, int], dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """q, k, v and the gradient of the output."""
    batch, heads, queries, keys, size = shape
    generator = torch.Generator().manual_seed(sum(shape))
    lengths = (queries, keys, keys, queries)
    return [
        torch.randn(batch, heads, length, size, generator=generator, dtype=torch.float64).to(dtype)
        for length in lengths
    ]


def causal_mask(queries: int, keys: int) -> torch.Tensor:
    """The documented rule, element by element: query i sees keys up to i + S - Q."""
    return torch.tensor([[key <= query + keys - queries for key in range(keys)] for query in range(queries)])


def outputs_and_gradients(
    function: object, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, gradient: torch.Tensor, **options: object
) -> list[torch.Tensor]:
    leaves = [each.detach().clone().requires_grad_() for each in (q, k, v)]
    out = function(*leaves, **options)  # type: ignore[operator]
    out.backward(gradient.to(out.dtype))
    return [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_is_its_definition_in_fp64(shape: tuple[int, int, int, int, int], causal: bool) -> None:
    q, k, v, gradient = draw(shape)
    seen = causal_mask(shape[2], shape[3]) if causal else None
    mine = outputs_and_gradients(attention, q, k, v, gradient, causal=causal)
    truth = outputs_and_gradients(reference, q, k, v, gradient, seen=seen)
    torch.testing.assert_close(mine, truth, atol=1e-12, rtol=1e-12)


def test_causal_with_more_queries_than_keys_gives_zero_where_nothing_is_seen() -> None:
    q, k, v, gradient = draw((1, 2, 9, 4, 5))
    out, dq, *_ = outputs_and_gradients(attention, q, k, v, gradient, causal=True)
    assert torch.count_nonzero(out[:, :, :5]) == 0
    assert torch.count_nonzero(dq[:, :, :5]) == 0
    torch.testing.assert_close(out[:, :, 5], v[:, :, 0])  # the first query that sees a key sees one


@pytest.mark.parametrize("lengths", [[7, 1, 4], [0, 7, 3], [0, 0, 0], [7, 7, 7]])
def test_key_lengths_hide_the_rest_and_zero_keys_give_zero(lengths: list[int]) -> None:
    q, k, v, gradient = draw((3, 2, 5, 7, 3))
    keys = torch.arange(7)
    seen = (keys < torch.tensor(lengths)[:, None])[:, None, None]
    mine = outputs_and_gradients(attention, q, k, v, gradient, key_lengths_B=torch.tensor(lengths))
    truth = outputs_and_gradients(reference, q, k, v, gradient, seen=seen)
    assert all(each.isfinite().all() for each in mine)
    torch.testing.assert_close(mine, truth, atol=1e-12, rtol=1e-12)
    for sample, length in enumerate(lengths):
        assert torch.count_nonzero(mine[2][sample, :, length:]) == 0, "a hidden key has no gradient"
        assert torch.count_nonzero(mine[3][sample, :, length:]) == 0, "a hidden value has no gradient"


def test_hidden_keys_may_hold_anything() -> None:
    q, k, v, _ = draw((2, 1, 3, 6, 4))
    lengths = torch.tensor([2, 5])
    before = attention(q, k, v, key_lengths_B=lengths)
    hidden = torch.arange(6) >= lengths[:, None]
    k = k.masked_fill(hidden[:, None, :, None], 1e6)
    v = v.masked_fill(hidden[:, None, :, None], -1e6)
    torch.testing.assert_close(attention(q, k, v, key_lengths_B=lengths), before)


@pytest.mark.parametrize(("dtype", "least"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("causal", [False, True])
def test_is_at_most_twice_as_wrong_as_plain_torch(dtype: torch.dtype, least: float, causal: bool) -> None:
    """flash-attention's rule: the error against fp64 is at most twice that of the plain formula in the same dtype."""
    shape = (2, 3, 37, 37, 13)
    q, k, v, gradient = draw(shape, dtype)
    seen = causal_mask(37, 37) if causal else torch.ones(37, 37, dtype=torch.bool)

    def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        scores = (q @ k.transpose(-1, -2)) / 13**0.5
        return scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v

    truth = outputs_and_gradients(reference, q, k, v, gradient, seen=seen)
    mine = outputs_and_gradients(attention, q, k, v, gradient, causal=causal)
    theirs = outputs_and_gradients(plain, q, k, v, gradient)
    assert mine[0].dtype == dtype
    for name, a, b, exact in zip(("out", "dq", "dk", "dv"), mine, theirs, truth, strict=True):
        error, allowed = ((each.double() - exact.double()).abs().max() for each in (a, b))
        assert error <= 2 * allowed + least * exact.double().abs().max(), name


def test_strided_inputs_are_read_as_they_are() -> None:
    """The model hands over [S, B, H, K] permuted to [B, H, S, K]."""
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(11, 3, 2, 5, generator=generator).permute(1, 2, 0, 3) for _ in range(3))
    expected = attention(q.contiguous(), k.contiguous(), v.contiguous(), causal=True)
    torch.testing.assert_close(attention(q, k, v, causal=True), expected)


def test_gradcheck_with_causal_and_with_lengths() -> None:
    q, k, v, _ = draw((2, 1, 4, 6, 3))
    leaves = tuple(each.requires_grad_() for each in (q, k, v))
    assert torch.autograd.gradcheck(lambda q, k, v: attention(q, k, v, causal=True), leaves)
    lengths = torch.tensor([0, 4])
    assert torch.autograd.gradcheck(lambda q, k, v: attention(q, k, v, key_lengths_B=lengths), leaves)


def test_causal_together_with_lengths_is_refused() -> None:
    q, k, v, _ = draw((2, 1, 4, 4, 3))
    with pytest.raises(ValueError, match="causal attention with key_lengths"):
        attention(q, k, v, causal=True, key_lengths_B=torch.tensor([1, 2]))


def test_the_reference_is_the_textbook_sum() -> None:
    """The truth itself, against loops."""
    q, k, v, _ = draw((1, 1, 3, 4, 2))
    seen = causal_mask(3, 4)
    for query in range(3):
        places = [key for key in range(4) if seen[query, key]]
        scores = torch.stack([q[0, 0, query] @ k[0, 0, key] / 2**0.5 for key in places])
        expected = (F.softmax(scores, 0)[:, None] * v[0, 0, places]).sum(0)
        torch.testing.assert_close(reference(q, k, v, seen)[0, 0, query], expected)
