"""Tokens without their padding."""

import pytest
import torch

from pretrain.models.packing import Packing


@pytest.mark.parametrize("lengths", [[1], [5], [3, 1, 5, 2], [5, 5], [1, 1, 1]])
def test_tokens_go_there_and_back(lengths: list[int]) -> None:
    packing = Packing.of(torch.tensor(lengths), 5)
    padded = torch.arange(len(lengths) * 5 * 2.0).view(len(lengths), 5, 2)
    expected = torch.cat([row[:length] for row, length in zip(padded, lengths, strict=True)])
    assert torch.equal(packing.pack(padded), expected)
    assert packing.lengths_B.tolist() == lengths
    assert torch.equal(packing.last(expected), torch.stack([padded[i, n - 1] for i, n in enumerate(lengths)]))
    for row, whole, length in zip(packing.unpack(expected), padded, lengths, strict=True):
        assert torch.equal(row[:length], whole[:length])
    travelled = Packing(packing.places, len(expected))
    assert torch.equal(travelled.rows, packing.rows)


def test_gradients_are_those_of_indexing_and_padding_has_none() -> None:
    lengths = torch.tensor([3, 1, 4])
    packing, real = Packing.of(lengths, 4), torch.arange(4) < lengths[:, None]
    padded = torch.randn(3, 4, 2, dtype=torch.float64, requires_grad=True)
    packed = torch.randn(8, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(packing.pack, padded)
    assert torch.autograd.gradcheck(lambda x: packing.unpack(x)[real], packed)
    packing.unpack(packed)[~real].sum().backward()
    assert not packed.grad.any(), "what is done with padding is nobody's gradient"
