"""layout=auto: the cheapest layout that fits, the same on every rank, and a sentence when nothing does."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from pretrain.config import Recipe, load_recipe
from pretrain.errors import RequestError
from pretrain.parallel.choose import HEADROOM, with_layout
from pretrain.parallel.layout import lay_out
from pretrain.parallel.memory import memory_of

LARGE = [
    "layout=auto",
    "train.precision=bf16",
    "train.global_batch=4096",
    "model.vision={layers: 24, width: 1024, heads: 16, mlp_ratio: 4, image_size: 224, patch: 14}",
    "model.text={layers: 12, width: 768, heads: 12, mlp_ratio: 4, context: 80, vocab_size: 49408}",
    "model.embed_dim=768",
]


def recipe(*overrides: str) -> Recipe:
    return load_recipe("quickstart", [*LARGE, *overrides])


def total_gib(chosen: Recipe, world: int) -> float:
    layout = lay_out(chosen, world)
    return max(memory_of(chosen, layout, stage).total for stage in range(layout.pp)) / (1 << 30)


def test_what_is_not_asked_for_is_left_alone() -> None:
    plain = load_recipe("quickstart", ["layout.tp=2"])
    assert with_layout(plain, 2) is plain


def test_a_small_model_needs_nothing_special() -> None:
    chosen = with_layout(load_recipe("quickstart", ["layout=auto"]), 4, memory_gib=16)
    assert (chosen.layout.zero, chosen.layout.tp, chosen.layout.pp, chosen.layout.recompute) == (None, 1, 1, "none")
    assert not chosen.layout.auto
    assert chosen.train.micro_batch is None


@pytest.mark.parametrize("world", [1, 8, 64])
@pytest.mark.parametrize("memory_gib", [16.0, 40.0, 80.0])
def test_the_choice_fits_and_a_larger_card_is_never_worse(world: int, memory_gib: float) -> None:
    chosen = with_layout(recipe(), world, memory_gib)
    assert total_gib(chosen, world) <= HEADROOM * memory_gib
    roomy = with_layout(recipe(), world, 4 * memory_gib)
    savings = ("none", "selective", "full")
    assert savings.index(roomy.layout.recompute) <= savings.index(chosen.layout.recompute)
    assert lay_out(roomy, world).microbatches <= lay_out(chosen, world).microbatches


@pytest.mark.parametrize("world", [1, 8])
@pytest.mark.parametrize(
    ("gib", "micro_batch"), [(139.8, {1: 512, 8: 512}), (79.1, {1: 256, 8: 256}), (23.6, {1: 32, 8: 64})]
)
def test_vit_l_14_takes_microbatches_as_large_as_the_card(
    monkeypatch: pytest.MonkeyPatch, world: int, gib: float, micro_batch: dict[int, int]
) -> None:
    """The memory is that of this rank's own card, here an H200's, an A100's and an RTX 4090's."""
    properties = {
        torch.device("cuda", number): SimpleNamespace(total_memory=part * gib * (1 << 30))
        for number, part in enumerate((0.5, 1.0))
    }
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties.__getitem__)
    for name, value in {"RANK": "1", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    chosen = with_layout(load_recipe("vit_l_14"), world)
    layout = lay_out(chosen, world)
    assert (layout.dp, layout.zero, layout.micro_batch) == (world, 1, micro_batch[world])
    assert chosen.layout.recompute == "none"


@pytest.mark.parametrize(
    ("world", "batch", "asked", "micro_batch"),
    [(6, 24576, None, 64), (3, 24576, None, 64), (7, 3584, None, 64), (1, 1000, None, 25), (6, 24576, 9999, 64)],
)
def test_microbatches_divide_the_share_of_any_number_of_ranks(
    world: int, batch: int, asked: int | None, micro_batch: int
) -> None:
    """Halves of the global batch do not: the largest that did was one sample."""
    overrides = [f"train.global_batch={batch}", *([f"train.micro_batch={asked}"] if asked else [])]
    chosen = with_layout(load_recipe("vit_l_14", overrides), world, memory_gib=24)
    layout = lay_out(chosen, world)
    assert (layout.dp, layout.micro_batch, chosen.layout.recompute) == (world, micro_batch, "none")


def test_a_model_too_large_for_a_card_is_cut() -> None:
    """20 B parameters on 64 cards of 80 GiB: the state alone is 320 GB of fp32 numbers."""
    towers = [
        "model.vision={layers: 48, width: 4096, heads: 32, mlp_ratio: 4, image_size: 224, patch: 14}",
        "model.text={layers: 48, width: 4096, heads: 32, mlp_ratio: 4, context: 80, vocab_size: 49408}",
    ]
    chosen = with_layout(recipe(*towers), 64, 80.0)
    assert chosen.layout.zero >= 2 or chosen.layout.tp * chosen.layout.pp > 1
    assert total_gib(chosen, 64) <= HEADROOM * 80


def test_what_fits_nowhere_is_refused_with_what_it_needs() -> None:
    with pytest.raises(RequestError, match=r"nothing fits 85% of 1\.0 GiB on 2 rank\(s\).*needs least.*layout.offload"):
        with_layout(recipe(), 2, 1.0)


def test_a_mistake_beside_the_layout_is_told_as_such() -> None:
    with pytest.raises(RequestError, match=r"train\.global_batch is 7, which does not divide"):
        with_layout(recipe("train.global_batch=7"), 3, 80.0)


def test_the_memory_can_be_said_in_the_recipe() -> None:
    with pytest.raises(RequestError, match=r"85% of 0\.5 GiB"):
        with_layout(load_recipe("quickstart", [*LARGE, "layout={auto: true, memory_gib: 0.5}"]), 1)
