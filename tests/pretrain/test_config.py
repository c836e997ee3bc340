"""The recipe: overrides, refusals that name the key and its neighbour, and a tree that reads back as it was written."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from pydantic import BaseModel, ValidationError

from pretrain.config import RECIPES, Recipe, builtin_recipes, keys_of, load_recipe
from pretrain.errors import RequestError
from pretrain.sections import Kernels

# what scripts outside this repository rely on
STABLE = [
    "run.dir",
    "run.seed",
    "data.train",
    "data.test",
    "data.loader",
    "data.workers",
    "model.vision.layers",
    "model.vision.width",
    "model.vision.heads",
    "model.text.layers",
    "model.text.width",
    "model.text.heads",
    "model.vision.image_size",
    "model.vision.patch",
    "model.text.context",
    "model.embed_dim",
    "train.steps",
    "train.stop_at",
    "train.global_batch",
    "train.micro_batch",
    "train.lr",
    "train.warmup",
    "train.weight_decay",
    "train.precision",
    "train.resume",
    "train.log_every",
    "kernels.attention",
    "kernels.norm",
    "kernels.loss",
    "layout.tp",
    "layout.pp",
    "layout.vpp",
    "layout.cp",
    "layout.ep",
    "layout.sequence_parallel",
    "layout.zero",
    "checkpoint.every",
    "eval.every",
    "objectives",
]


def value_at(recipe: BaseModel, dotted: str) -> Any:
    value: Any = recipe
    for part in dotted.split("."):
        value = getattr(value, part)
    return value


def refusal(*overrides: str, recipe: str = "quickstart") -> str:
    with pytest.raises(RequestError) as caught:
        load_recipe(recipe, overrides)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value), "one sentence"
    return str(caught.value)


# --- what comes with weft


@pytest.mark.parametrize("name", builtin_recipes())
def test_every_recipe_that_comes_with_weft_loads_and_says_how_to_run_it(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.train.warmup < recipe.train.steps
    header = [line for line in (RECIPES / f"{name}.yaml").read_text().splitlines() if line.startswith("#")]
    assert any(f"weft train {name}" in line for line in header)


def test_quickstart_is_there() -> None:
    assert "quickstart" in builtin_recipes()


def test_every_key_is_described_and_the_stable_ones_are_there() -> None:
    keys = dict(keys_of(Recipe))
    assert len(keys) == len(list(keys_of(Recipe))), "no key twice"
    assert [key for key, field in keys.items() if not field.description] == []
    assert [key for key in STABLE if key not in keys] == []


def test_keys_are_exactly_the_leaves_of_the_tree() -> None:
    def leaves(tree: dict[str, Any], prefix: str = "") -> set[str]:
        found = set()
        for key, value in tree.items():
            found |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key}
        return found

    tree = load_recipe("quickstart").model_dump()
    sections = {key for key, _ in keys_of(Recipe) if isinstance(value_at(load_recipe("quickstart"), key), BaseModel)}
    assert {key for key, _ in keys_of(Recipe)} - sections == leaves(tree)


# --- overrides

OVERRIDES: list[tuple[str, str, Any]] = [
    ("train.lr=1e-3", "train.lr", 1e-3),  # YAML 1.1 alone reads this as a string
    ("train.lr=2", "train.lr", 2.0),
    ("train.steps=601", "train.steps", 601),
    ("run.dir=runs/a=b", "run.dir", Path("runs/a=b")),
    ("data.flip=true", "data.flip", True),
    ("data.test=null", "data.test", None),
    ("data.test=", "data.test", None),
    ("train.micro_batch=~", "train.micro_batch", None),
    ("data.crop_scale=[0.5, 1]", "data.crop_scale", (0.5, 1.0)),
    ("model.text.causal=no", "model.text.causal", False),
    ("model.vision={layers: 1, width: 8, heads: 2}", "model.vision.width", 8),
    ("model.vision.width=96", "model.vision.width", 96),
    ("eval.templates=['{}', 'das ist {}']", "eval.templates", ("{}", "das ist {}")),
    ("model.logit_bias_init=-3.5", "model.logit_bias_init", -3.5),
]


@pytest.mark.parametrize(("override", "key", "value"), OVERRIDES)
def test_an_override_changes_its_key_and_nothing_else(override: str, key: str, value: Any) -> None:
    changed, before = load_recipe("quickstart", [override]), load_recipe("quickstart")
    assert value_at(changed, key) == value
    assert type(value_at(changed, key)) is type(value)
    section = key if override.startswith(f"{key}=") else key.rpartition(".")[0]
    for other, _ in keys_of(Recipe):
        if not (other == section or other.startswith(f"{section}.") or section.startswith(f"{other}.")):
            assert value_at(changed, other) == value_at(before, other), other


def test_the_last_override_wins_and_later_ones_reach_into_earlier_ones() -> None:
    recipe = load_recipe("quickstart", ["train.lr=1", "train.lr=2", "model.text={layers: 3}", "model.text.width=64"])
    assert (recipe.train.lr, recipe.model.text.layers, recipe.model.text.width) == (2, 3, 64)


def test_objectives_are_a_list_of_name_and_weight() -> None:
    recipe = load_recipe("quickstart", ["objectives=[{name: sigmoid, weight: 0.25}, {name: contrastive}]"])
    assert [(each.name, each.weight) for each in recipe.objectives] == [("sigmoid", 0.25), ("contrastive", 1.0)]


def test_a_recipe_does_not_change_once_it_is_loaded() -> None:
    recipe = load_recipe("quickstart")
    with pytest.raises(ValidationError, match="frozen"):
        recipe.train.lr = 3.0  # type: ignore[misc]  # that this is refused is the test


# --- refusals


@pytest.mark.parametrize(
    ("override", "named", "nearest"),
    [
        ("train.lrr=1", "train.lrr", "train.lr"),
        ("train.step=5", "train.step", "train.steps"),
        ("model.vision.layer=2", "model.vision.layer", "model.vision.layers"),
        ("modle.embed_dim=2", "modle", "model"),
        ("micro_batch=4", "micro_batch", "train.micro_batch"),
        ("train.zero=1", "train.zero", "layout.zero"),
        ("data.wrokers=4", "data.wrokers", "data.workers"),
        ("objectives=[{name: sigmoid, weigth: 2}]", "objectives.0.weigth", "objectives.0.weight"),
    ],
)
def test_an_unknown_key_names_its_nearest_neighbour(override: str, named: str, nearest: str) -> None:
    sentence = refusal(override)
    assert f"unknown key {named!r}" in sentence
    assert f"did you mean {nearest!r}?" in sentence


def test_an_unknown_key_like_nothing_gets_no_false_advice() -> None:
    assert refusal("qqqqqq=1").endswith("unknown key 'qqqqqq'")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.steps=many", ["train.steps is 'many'", "integer"]),
        ("train.steps=1.5", ["train.steps is 1.5", "integer"]),
        ("train.steps=0", ["train.steps is 0", "greater than or equal to 1"]),
        ("train.lr=-1", ["train.lr is -1", "greater than 0"]),
        ("train.lr=.nan", ["train.lr is nan", "finite"]),
        ("train.weight_decay=.inf", ["train.weight_decay is inf", "finite"]),
        ("train.beta2=1", ["train.beta2 is 1", "less than 1"]),
        ("train.precision=fp8", ["train.precision is 'fp8'", "'fp32' or 'bf16'"]),
        ("layout.zero=4", ["layout.zero is 4", "0, 1, 2 or 3"]),
        ("data.flip=perhaps", ["data.flip is 'perhaps'", "boolean"]),
        ("data.train=null", ["data.train is None", "string"]),
        ("data=null", ["data is None", "it is a section"]),
        ("train=7", ["train is 7", "it is a section"]),
        ("model.text.vocab_size={a: 1}", ["model.text.vocab_size is a section", "integer"]),
        ("objectives=contrastive", ["objectives is 'contrastive'", "tuple"]),
        ("objectives=[]", ["objectives is []", "at least 1 item"]),
        ("objectives=[{name: clip}]", ["objectives.0.name is 'clip'", "'contrastive', 'sigmoid' or 'caption'"]),
        ("objectives=[{weight: 1}]", ["'objectives.0.name' has no value and no default"]),
        ("data.crop_scale=[0.9, 0.5]", ["crop_scale is [0.9, 0.5]", "0 < low <= high <= 1"]),
        ("data.crop_scale=[0, 1]", ["crop_scale is [0.0, 1.0]"]),
        ("model.vision.heads=3", ["model.vision", "width 128 does not divide into 3 heads"]),
        ("model.vision.patch=7", ["model.vision", "image_size 64 is not a multiple of patch 7"]),
        ("model.vision={width: 6, heads: 2}", ["model.vision", "multiple of 4, not 6"]),
        ("train.warmup=900", ["train.warmup is 900", "train.steps is only 900"]),
    ],
)
def test_a_wrong_value_is_refused_with_key_value_and_what_is_allowed(override: str, words: list[str]) -> None:
    sentence = refusal(override)
    assert sentence.startswith("quickstart: ")
    for word in words:
        assert word in sentence, sentence


def test_all_that_is_wrong_is_said_at_once() -> None:
    sentence = refusal("train.lrr=1", "train.steps=x", "model.text.heads=5")
    assert all(part in sentence for part in ("train.lrr", "train.steps", "5 heads"))
    assert sentence.count("; ") == 2


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.lr", ["'train.lr'", "not of the form key=value"]),
        ("=3", ["'=3'", "not of the form key=value"]),
        ("train.lr.x=3", ["'train.lr.x=3'", "'lr' is a value, not a section"]),
        ("objectives.0.name=sigmoid", ["'objectives'"]),
        ("data.crop_scale=[1", ["'data.crop_scale=[1'", "not YAML"]),
        ("train.steps={", ["'train.steps={'", "not YAML"]),
    ],
)
def test_a_bad_override_is_quoted(override: str, words: list[str], tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("data: {train: x}\nobjectives: [{name: contrastive}]\ntrain: {lr: 1}\n")
    sentence = refusal(override, recipe=str(path))
    for word in words:
        assert word in sentence, sentence


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"train: [", ["not YAML"]),
        (b"\xff\xfe\x00", ["not YAML"]),
        (b"", ["NoneType", "tree of keys"]),
        (b"- a\n- b\n", ["list", "tree of keys"]),
        (b"just words", ["str", "tree of keys"]),
        (b"train: {steps: 5, warmup: 1}", ["'data' has no value and no default"]),
        (b"data: {}", ["'data.train' has no value and no default"]),
        (b"data: {train: x}\n1: 2\n", ["1"]),
        (b"!!python/object/apply:os.system [echo]", ["not YAML"]),
    ],
)
def test_a_file_that_is_no_recipe_is_named(content: bytes, words: list[str], tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(content)
    sentence = refusal(recipe=str(path))
    assert str(path) in sentence
    for word in words:
        assert word in sentence, sentence


def test_a_recipe_that_does_not_exist_is_told_from_a_name_that_is_none(tmp_path: Path) -> None:
    assert "quickstart" in refusal(recipe="quikstart")
    missing = tmp_path / "mine.yaml"
    assert refusal(recipe=str(missing)) == f"recipe {str(missing)!r} does not exist"
    assert refusal(recipe="mine.yml") == "recipe 'mine.yml' does not exist"


# --- there and back


@pytest.mark.parametrize("overrides", [[], [override for override, *_ in OVERRIDES]])
@pytest.mark.parametrize("name", builtin_recipes())
def test_a_resolved_recipe_reads_back_the_same(tmp_path: Path, name: str, overrides: list[str]) -> None:
    recipe = load_recipe(name, overrides)
    path = tmp_path / "config.yaml"
    path.write_text(recipe.yaml(), encoding="utf-8")
    assert load_recipe(str(path)) == recipe
    assert load_recipe(str(path)).yaml() == recipe.yaml()
    tree = yaml.safe_load(recipe.yaml())
    assert list(tree) == list(Recipe.model_fields), "in the order of declaration"
    assert Recipe.model_validate(recipe.model_dump(mode="json")) == recipe, "as a checkpoint keeps it"


def test_backends_are_those_of_the_kernels() -> None:
    for key, module in (("attention", "attention"), ("norm", "norm"), ("loss", "contrastive")):
        backends = importlib.import_module(f"kernels.{module}").BACKENDS
        assert set(get_args(Kernels.model_fields[key].annotation)) == {"auto", *backends}
