"""Layouts: the sizes that come out, and for each layout that cannot be right a sentence with key, value and way out."""

from __future__ import annotations

import re

import pytest

from pretrain.config import Recipe, load_recipe
from pretrain.errors import RequestError
from pretrain.parallel.layout import lay_out


def recipe(*overrides: str) -> Recipe:
    return load_recipe("quickstart", ["train.global_batch=24", "model.text.layers=4", *overrides])


@pytest.mark.parametrize(
    ("world", "overrides", "dp", "tp", "share", "micro", "count"),
    [
        (1, [], 1, 1, 24, 24, 1),
        (1, ["train.micro_batch=1"], 1, 1, 24, 1, 24),
        (2, ["layout.tp=2"], 1, 2, 24, 24, 1),
        (3, ["train.micro_batch=4"], 3, 1, 8, 4, 2),
        (2, ["train.micro_batch=100"], 2, 1, 12, 12, 1),  # no more than there is
        (8, ["layout.tp=4", "train.micro_batch=12", "layout.zero=3"], 2, 4, 12, 12, 1),
        (24, ["layout.zero=2"], 24, 1, 1, 1, 1),
    ],
)
def test_the_ranks_share_the_batch(
    world: int, overrides: list[str], dp: int, tp: int, share: int, micro: int, count: int
) -> None:
    layout = lay_out(recipe(*overrides), world)
    assert (layout.world, layout.dp, layout.tp) == (world, dp, tp)
    assert (layout.share, layout.micro_batch, layout.microbatches) == (share, micro, count)
    assert layout.dp * layout.tp == world
    assert layout.dp * layout.share == 24
    assert f"dp{dp} x tp{tp}, ZeRO-{layout.zero}, {count} microbatch" in str(layout)


LARGE = [
    "model.vision={layers: 24, width: 1024, heads: 16, mlp_ratio: 4}",
    "model.text={layers: 12, width: 768, heads: 12, context: 32, mlp_ratio: 4}",
]


@pytest.mark.parametrize(
    ("world", "overrides", "stage"),
    [
        (1, [], 0),
        (8, [], 0),
        (2, ["layout.tp=2"], 0),
        (2, ["train.precision=bf16"], 1),
        (1, ["train.precision=bf16"], 1),
        (1, ["layout.offload=true"], 1),
        (2, ["layout.zero=1"], 1),
        (1, ["layout.zero=1"], 1),
        (1, LARGE, 0),
        (2, LARGE, 1),
        (2, [*LARGE, "layout.cp=2"], 1),
        (8, [*LARGE, "layout.tp=4"], 0),
        (2, [*LARGE, "layout.zero=0"], 0),
    ],
)
def test_the_state_is_shared_where_it_is_large(world: int, overrides: list[str], stage: int) -> None:
    assert lay_out(recipe(*overrides), world).zero == stage


REFUSED = [
    (2, ["layout.vpp=2", "train.micro_batch=6"], ["layout.vpp is 2", "no stages", "layout.pp=2"]),
    (2, ["layout.pp=2", "layout.zero=2"], ["layout.zero=2", "layout.pp=2", "at each microbatch", "use layout.zero=1"]),
    (4, ["layout.pp=2", "layout.zero=3"], ["layout.zero=3", "layout.pp=2", "at each microbatch", "use layout.zero=1"]),
    (3, ["layout.pp=3"], ["layout.pp * layout.vpp is 3", "model.vision.layers (4)", "use 2 in all", "6 layers"]),
    (
        4,
        ["layout.pp=2", "model.text.layers=3"],
        ["layout.pp * layout.vpp is 2", "model.text.layers (3)", "use 1 in all", "4 layers"],
    ),
    (
        2,
        ["layout.pp=2", "layout.vpp=2", "train.micro_batch=8", "model.text.layers=4"],
        ["layout.vpp is 2", "groups of layout.pp=2", "a rank has 3", "train.micro_batch=6"],
    ),
    (3, ["layout.pp=2"], ["1 * 2 * 1", "3 rank(s)", "multiple of 2 ranks"]),
    (2, ["layout.tp=2", "layout.cp=2"], ["2 * 1 * 2", "2 rank(s)", "copies of 4", "multiple of 4 ranks"]),
    (2, ["layout.cp=2", "model.text.context=31"], ["layout.cp is 2", "31 tokens of the text", "model.text.context=32"]),
    (2, ["layout.cp=2", "model.vision.pool=class"], ["layout.cp is 2", "65 tokens", "use model.vision.pool=mean"]),
    (
        4,
        ["layout.tp=4", "layout.sequence_parallel=true", "model.text.context=30"],
        ["layout.cp * layout.tp with layout.sequence_parallel is 4", "30 tokens of the text", "model.text.context=32"],
    ),
    (2, ["layout.ep=4"], ["layout.ep is 4", "no model here has experts", "use layout.ep=1"]),
    (
        2,
        ["layout.sequence_parallel=true"],
        ["layout.sequence_parallel", "layout.tp is 1", "layout.tp=2", "leave it false"],
    ),
    (1, ["layout.offload=true", "layout.zero=0"], ["layout.offload", "use layout.zero=1"]),
    (3, ["layout.tp=2"], ["layout.tp is 2", "3 rank", "multiple of 2 ranks", "layout.tp=1"]),
    (1, ["layout.tp=4"], ["layout.tp is 4", "1 rank", "multiple of 4 ranks", "layout.tp=1"]),
    (6, ["layout.tp=4"], ["layout.tp is 4", "6 rank", "multiple of 4 ranks", "layout.tp=2"]),
    (8, ["layout.tp=8"], ["layout.tp is 8", "model.vision.heads (4)", "layout.tp=4"]),
    (
        4,
        ["layout.tp=4", "model.text.heads=2"],
        ["layout.tp is 4", "model.text.heads (2)", "layout.tp=2"],
    ),
    (
        4,
        ["layout.tp=4", "model.vision.width=40", "model.vision.mlp_ratio=1.25"],
        ["layout.tp is 4", "model.vision.width * mlp_ratio (50)", "layout.tp=2"],
    ),
    (
        3,
        [
            "layout.tp=3",
            "model.vision={width: 24, heads: 3, layers: 1}",
            "model.text={width: 24, heads: 3, layers: 1}",
        ],
        ["layout.tp is 3", "token table", "(128)", "layout.tp=1"],
    ),
    (2, ["layout.zero=0", "train.precision=bf16"], ["layout.zero=0", "train.precision=bf16", "use layout.zero=1"]),
    (5, [], ["train.global_batch is 24", "5 data parallel ranks", "multiple of 5", "4 rank(s)"]),
    (10, ["layout.tp=2"], ["train.global_batch is 24", "5 data parallel ranks", "multiple of 5", "8 rank(s)"]),
    (25, [], ["train.global_batch is 24", "25 data parallel ranks", "24 rank(s)"]),
    (2, ["train.micro_batch=5"], ["train.micro_batch is 5", "12 samples", "train.micro_batch=4"]),
]


@pytest.mark.parametrize(("world", "overrides", "words"), REFUSED)
def test_what_cannot_be_right_is_refused_with_the_way_out(world: int, overrides: list[str], words: list[str]) -> None:
    with pytest.raises(RequestError) as caught:
        lay_out(recipe(*overrides), world)
    for word in words:
        assert word in str(caught.value), f"{word!r} is not in: {caught.value}"


@pytest.mark.parametrize(("world", "overrides", "words"), REFUSED)
def test_the_way_out_is_one(world: int, overrides: list[str], words: list[str]) -> None:
    """Where the sentence ends in a value to use, that value is accepted."""
    with pytest.raises(RequestError) as caught:
        lay_out(recipe(*overrides), world)
    advice = str(caught.value).rpartition(":")[2]
    if ranks := re.search(r"(\d+) rank\(s\)", advice):
        lay_out(recipe(*overrides), int(ranks[1]))
    if setting := re.search(r"[a-z]+(?:\.[a-z_]+)+=\d+", advice):
        lay_out(recipe(*overrides, setting[0]), world)
    assert ranks or setting or re.search(r"use \d+ in all|a multiple of \d+ ranks|pool=mean", advice)


def test_no_layout_that_is_accepted_has_a_remainder() -> None:
    """Every world and size in a range: refused, or exact."""
    accepted = 0
    for world in range(1, 13):
        for tp in (1, 2, 3, 4):
            for micro in ("null", "1", "2", "3", "8"):
                try:
                    layout = lay_out(recipe(f"layout.tp={tp}", f"train.micro_batch={micro}"), world)
                except RequestError:
                    continue
                accepted += 1
                assert layout.dp * layout.tp == world
                assert layout.micro_batch * layout.microbatches * layout.dp == 24
    assert accepted > 40
