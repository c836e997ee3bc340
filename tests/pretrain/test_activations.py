"""What autograd keeps: counted once a storage, given back when backward is through."""

from __future__ import annotations

import torch

from pretrain.activations import SavedBytes


def test_a_chain_keeps_each_input_once_and_gives_it_back() -> None:
    weight = torch.ones(10, 10, requires_grad=True)
    x = torch.ones(4, 10, requires_grad=True)
    with SavedBytes([weight]) as saved:
        hidden = x @ weight  # keeps x and the weight, which is not counted
        assert saved.now == 4 * 10 * 4
        squared = hidden * hidden  # keeps hidden twice, counted once
        assert saved.now == 2 * 4 * 10 * 4
        out = squared.exp()  # keeps its result
        assert saved.now == 3 * 4 * 10 * 4
        out.sum().backward()
        del out, squared, hidden
    assert saved.now == 0
    assert saved.peak == 3 * 4 * 10 * 4


def test_what_is_freed_early_lowers_the_peak() -> None:
    x = torch.ones(8, requires_grad=True)
    with SavedBytes() as saved:
        for _ in range(3):
            (x * x).sum().backward()
    assert saved.peak == 8 * 4


def test_a_view_counts_as_all_of_its_storage() -> None:
    big = torch.ones(100)
    x = torch.ones(10, requires_grad=True)
    with SavedBytes() as saved:
        out = x * big[:10]
        assert saved.now == 100 * 4
    del out
    assert saved.now == 0
