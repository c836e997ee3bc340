"""The names of parameters that settings tell are those of the model that is built; freeze lists are checked by them."""

from __future__ import annotations

import pytest

from pretrain.config import Recipe, load_recipe
from pretrain.errors import RequestError
from pretrain.models.names import nearest_prefix, parameter_names
from pretrain.models.pieces import parameters_by_name
from pretrain.parallel.build import MODELS
from pretrain.parallel.groups import Ranks
from pretrain.parallel.layout import lay_out
from pretrain.preflight import check_freeze

SMALL = ["model.text={layers: 4, width: 8, heads: 2, vocab_size: 300}", "data.train=none", "train.global_batch=8"]
DUAL = [*SMALL, "model.vision={layers: 4, width: 8, heads: 2}"]
CAPTIONER = [*SMALL, "model.kind=captioner", "objectives=[{name: caption}]"]


def recipe(overrides: list[str], *more: str) -> Recipe:
    return load_recipe("quickstart", [*overrides, *more])


@pytest.mark.parametrize(
    "overrides",
    [
        DUAL,
        [*DUAL, "model.vision.pool=class", "model.vision.positions=learned"],
        CAPTIONER,
        [*CAPTIONER, "model.vision.positions=learned"],
    ],
)
def test_names_are_those_of_the_built_model(alone: Ranks, overrides: list[str]) -> None:
    model = recipe(overrides).model
    built = [name for name, _ in parameters_by_name(MODELS[model.kind](model))]
    assert sorted(name for name, _ in parameter_names(model)) == sorted(built)


def test_layers_are_on_the_stages_that_hold_their_chunk() -> None:
    stages = dict(parameter_names(recipe(DUAL).model, pp=2, vpp=2))
    weights = [f"text.block.layers.{layer}.mlp.linear_fc1.weight" for layer in range(4)]
    assert [stages[name] for name in weights] == [(0,), (1,), (0,), (1,)]
    assert stages["vision.patches.linear.weight"] == (0,)
    assert stages["logit_scale.log"] == (1,)
    assert dict(parameter_names(recipe(CAPTIONER).model, pp=2))["decoder.tokens.weight"] == (0, 1)


@pytest.mark.parametrize(
    ("wrong", "near"),
    [
        ("visual.", "vision."),
        ("vison.", "vision."),
        ("txt.", "text."),
        ("vision.blocks.", "vision.block."),
        ("logit_scal", "logit_scale."),
        ("text.block.layer.3.", "text.block.layers.3."),
        ("qqqqqq", None),
    ],
)
def test_the_nearest_prefix(wrong: str, near: str | None) -> None:
    assert nearest_prefix(wrong, [name for name, _ in parameter_names(recipe(DUAL).model)]) == near


@pytest.mark.parametrize(
    ("overrides", "world", "words"),
    [
        ([*DUAL, "train.freeze=[visual.]"], 1, ["'visual.'", "did you mean vision.?"]),
        ([*DUAL, "train.freeze=[vision., txt.]", "layout.tp=2"], 2, ["'txt.'", "did you mean text.?"]),
        ([*DUAL, "train.freeze=[qqqqqq]"], 1, ["'qqqqqq'", "vision., text., logit_scale., logit_bias."]),
        ([*CAPTIONER, "train.freeze=[vision.]"], 1, ["'vision.'", "decoder."]),
        ([*DUAL, "train.freeze=['']"], 1, ["train.freeze", "nothing to train"]),
        ([*DUAL, "train.freeze=[vision., text., logit_]"], 1, ["train.freeze", "nothing to train"]),
        (
            [*DUAL, "layout.pp=2", "train.freeze=[vision., text.block, text.projection, text.positions, logit_]"],
            2,
            ["train.freeze", "leaves pipeline stage 1 of layout.pp=2 nothing to train"],
        ),
    ],
)
def test_a_freeze_list_that_cannot_be_meant_is_refused(overrides: list[str], world: int, words: list[str]) -> None:
    asked = recipe(overrides)
    with pytest.raises(RequestError) as caught:
        check_freeze(asked, lay_out(asked, world))
    for word in words:
        assert word in str(caught.value)


def test_freeze_lists_that_leave_something_pass() -> None:
    for overrides in ([], ["train.freeze=[vision.]"], ["train.freeze=[vision., text., logit_bias.]"]):
        asked = recipe(DUAL, *overrides)
        check_freeze(asked, lay_out(asked, 1))
