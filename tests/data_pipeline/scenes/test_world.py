"""The grammar: pure, composed as promised, and a test split that is told apart and never seen in training."""

from collections import Counter
from itertools import combinations

import pytest

from data_pipeline.scenes.world import (
    COLOURS,
    HELD_OUT,
    HOLDERS,
    RELATIONS,
    SHAPES,
    Scene,
    held_out_scenes,
    is_possible,
    is_told_by,
    scene,
)


def pairs_of(shown: Scene) -> set[tuple[str, str]]:
    return {(kind.colour, kind.shape) for kind in shown.kinds}


def test_a_scene_is_a_pure_function_of_seed_and_index() -> None:
    forwards = [scene(3, index) for index in range(50)]
    backwards = [scene(3, index) for index in reversed(range(50))]
    assert forwards == backwards[::-1]
    assert [scene(4, index) for index in range(50)] != forwards


def test_held_out_is_one_shape_a_colour_and_one_colour_a_shape() -> None:
    assert len(HELD_OUT) == len(COLOURS) == len({colour for colour, _ in HELD_OUT}) == len({s for _, s in HELD_OUT})


@pytest.mark.parametrize("seed", [0, 11])
def test_training_never_shows_a_held_out_combination_and_shows_every_other(seed: int) -> None:
    seen = Counter(pair for index in range(6000) for pair in pairs_of(scene(seed, index)))
    assert not HELD_OUT & set(seen)
    assert len(seen) == len(COLOURS) * len(SHAPES) - len(HELD_OUT)
    assert min(seen.values()) > 60  # none is rare
    assert {scene(seed, index).relation for index in range(200)} == {None, *RELATIONS}


def test_test_scenes_all_hold_one_and_are_told_apart() -> None:
    chosen = held_out_scenes(0, 301)
    assert all(HELD_OUT & pairs_of(shown) for shown in chosen)
    assert not any(is_told_by(a, b) or is_told_by(b, a) for a, b in combinations(chosen, 2))
    assert held_out_scenes(0, 7) == chosen[:7]
    assert held_out_scenes(1, 7) != chosen[:7]


@pytest.mark.parametrize("held_out", [False, True])
def test_scenes_are_possible_and_their_kinds_differ_visibly(held_out: bool) -> None:
    for index in range(1500):
        shown = scene(5, index, held_out)
        for place, kind in enumerate(shown.kinds):
            assert is_possible(kind, place, shown.relation)
        assert (len(shown.kinds) == 1) == (shown.relation is None)
        if shown.relation == "inside":
            inner, outer = shown.kinds
            assert (inner.size, inner.count, outer.size, outer.count) == ("small", 1, "large", 1)
            assert outer.shape in HOLDERS
            assert inner.colour != outer.colour
        elif shown.relation:
            assert len(pairs_of(shown)) == 2
