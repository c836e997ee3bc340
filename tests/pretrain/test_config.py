"""The recipe: overrides, refusals that name the key and its neighbour, and a tree that reads back as it was written."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from pydantic import BaseModel, ValidationError

from pretrain.cli import _expanded
from pretrain.config import RECIPES, Recipe, builtin_recipes, keys_of, load_recipe, recipe_of, repeated
from pretrain.errors import RequestError
from pretrain.recipe_yaml import parse
from pretrain.relevance import RULES, rules_of
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
    ("model.logit_scale_init=3.5", "model.logit_scale_init", 3.5),
]


@pytest.mark.parametrize(("override", "key", "value"), OVERRIDES)
def test_an_override_changes_its_key_and_nothing_else(override: str, key: str, value: Any) -> None:
    changed, before = load_recipe("quickstart", [override]), load_recipe("quickstart")
    assert value_at(changed, key) == value
    assert type(value_at(changed, key)) is type(value)
    section = key if override.startswith(f"{key}=") else key.rpartition(".")[0]
    for other, _ in keys_of(Recipe):
        if not (other == section or other.startswith(f"{section}.") or section.startswith(f"{other}.")):
            idle = other in dict(rules_of(changed)) or isinstance(value_at(changed, other), BaseModel)
            assert value_at(changed, other) == value_at(before, other) or idle, other


def test_the_last_override_wins_and_later_ones_reach_into_earlier_ones() -> None:
    overrides = ["train.lr=1", "train.lr=2", "model.text={layers: 3}", "model.text.width=64"]
    recipe = load_recipe("quickstart", overrides)
    assert (recipe.train.lr, recipe.model.text.layers, recipe.model.text.width) == (2, 3, 64)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["train.lr=1", "train.lr=2"], ["train.lr is given twice: train.lr=1 does not count, train.lr=2 does"]),
        (["train.lr=1", "train.steps=9", "train.lr=1"], []),
        (["model.text={layers: 3}", "model.text.width=64"], []),
        (["model.text.width=64", "model.text={layers: 3}", "model.text.width=64"], []),
        (
            ["model.text.width=64", "model.text={width: 32, heads: 2}"],
            [
                "model.text.width is given twice: model.text.width=64 does not count, "
                "model.text={width: 32, heads: 2} does"
            ],
        ),
    ],
)
def test_an_override_that_does_not_count_is_said(overrides: list[str], said: list[str]) -> None:
    assert list(repeated(overrides)) == said


def test_an_override_of_a_section_leaves_the_keys_that_it_does_not_give(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "data: {train: x, crop_scale: [0.5, 1]}\ntrain: {steps: 6, global_batch: 16, warmup: 1}\n"
        "model: {vision: &tower {layers: 1, width: 32}, text: *tower}\nlayout: auto\n"
    )
    more = ["train={lr: 5e-4}", "model={text: {width: 64}}", "model.vision.heads=8", "data={crop_scale: [0.2, 1]}"]
    recipe = load_recipe(str(path), [*more, "layout.memory_gib=4"])
    assert (recipe.train.steps, recipe.train.global_batch, recipe.train.lr) == (6, 16, 5e-4)
    towers = recipe.model.vision, recipe.model.text
    assert [(each.layers, each.width, each.heads) for each in towers] == [(1, 32, 8), (1, 64, 4)]
    assert (recipe.data.train, recipe.data.crop_scale) == ("x", (0.2, 1.0))
    assert (recipe.layout.auto, recipe.layout.memory_gib) == (True, 4.0)


def test_layout_auto_by_name_is_a_section() -> None:
    layout = load_recipe("quickstart", ["layout=auto", "layout.memory_gib=4"]).layout
    assert (layout.auto, layout.memory_gib) == (True, 4.0)
    assert load_recipe("quickstart", ["layout={recompute: full, auto: false}"]).layout.recompute == "full"


def test_objectives_are_a_list_of_name_and_weight() -> None:
    recipe = load_recipe("quickstart", ["objectives=[{name: sigmoid, weight: 0.25}, {name: contrastive}]"])
    assert [(each.name, each.weight) for each in recipe.objectives] == [("sigmoid", 0.25), ("contrastive", 1.0)]


def test_a_recipe_does_not_change_once_it_is_loaded() -> None:
    recipe = load_recipe("quickstart")
    with pytest.raises(ValidationError, match="frozen"):
        recipe.train.lr = 3.0  # type: ignore[misc]  # that this is refused is the test


# --- refusals

BOMB = "".join(
    f"{name}: &{name} [{', '.join([inner] * 9)}]\n"
    for name, inner in zip("abcdefghi", ["1", *map("*{}".format, "abcdefgh")], strict=True)
).encode()


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
        ("data.also=[{data: x, wieght: 2}]", "data.also.0.wieght", "data.also.0.weight"),
        ("data.schedule=[{stp: 2, weights: [1]}]", "data.schedule.0.stp", "data.schedule.0.step"),
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
        ("train.steps=0", ["train.steps is 0", "must be at least 1"]),
        ("train.steps=many", ["train.steps is 'many': it must be a whole number"]),
        ("train.steps=1.5", ["train.steps is 1.5: it must be a whole number"]),
        ("train.steps=1:30", ["train.steps is '1:30': it must be a whole number"]),
        ("train.lr=fast", ["train.lr is 'fast': it must be a finite number"]),
        ("checkpoint.asynchronous=maybe", ["is 'maybe': it must be true or false"]),
        ("train.lr=-1", ["train.lr is -1", "greater than 0"]),
        ("train.lr=.nan", ["train.lr is nan", "finite"]),
        ("train.weight_decay=.inf", ["train.weight_decay is inf", "finite"]),
        ("train.beta2=1", ["train.beta2 is 1", "less than 1"]),
        ("train.precision=fp8", ["train.precision is 'fp8'", "'fp32' or 'bf16'"]),
        ("layout.zero=4", ["layout.zero is 4", "0, 1, 2 or 3"]),
        ("train.lr=on", ["train.lr is true, but it must be a number"]),
        ("run.seed=no", ["run.seed is false, but it must be a number"]),
        ("layout.zero=yes", ["layout.zero is true, but it must be a number"]),
        ("data.crop_scale=[off, 1]", ["data.crop_scale.0 is false, but it must be a number"]),
        ("data.crop_scale=[yes, 1]", ["data.crop_scale.0 is true, but it must be a number"]),
        ("train.stop_at=yes", ["train.stop_at is true, but it must be a number"]),
        ("run.dir=no", ["run.dir is false", "path: put it in quotes"]),
        ("eval.templates=[no]", ["eval.templates.0 is false", "string: put it in quotes"]),
        ("data.flip=perhaps", ["data.flip is 'perhaps'", "true or false"]),
        ("data.train=null", ["data.train is null", "string"]),
        ("data=null", ["data is null", "it is a section"]),
        ("train=7", ["train is 7", "it is a section"]),
        ("model.text.vocab_size={a: 1}", ["model.text.vocab_size is a section", "whole number"]),
        ("objectives=contrastive", ["objectives is 'contrastive'", "must be a list"]),
        ("objectives=[]", ["objectives is []: it must have at least 1 item"]),
        ("objectives=[{name: clip}]", ["objectives.0.name is 'clip'", "'contrastive', 'sigmoid' or 'caption'"]),
        ("objectives=[{weight: 1}]", ["'objectives.0.name' has no value and no default"]),
        ("data.crop_scale=[0.9, 0.5]", ["crop_scale is [0.9, 0.5]", "0 < low <= high <= 1"]),
        ("data.crop_scale=[0, 1]", ["crop_scale is [0.0, 1.0]"]),
        ("model.vision.heads=3", ["model.vision.width 128 does not divide into 3 heads"]),
        ("model.vision.patch=7", ["model.vision", "image_size 64 is not a multiple of patch 7"]),
        ("model.vision={width: 6, heads: 2}", ["model.vision", "multiple of 4, not 6"]),
        ("train.warmup=900", ["train.warmup is 900", "train.steps is only 900"]),
        ("train.min_lr=1", ["train.min_lr is 1.0", "above lr=0.0007"]),
        ("train.lr=1e38", ["train.lr is '1e38'", "must be at most"]),
        ("train={lr: 1.0e+30, beta1: 0.999999999}", ["train.lr is 1e+30", "fp32"]),
        ("train.spike=0.5", ["train.spike is 0.5", "more than 1"]),
        ("train.spike=1", ["train.spike is 1.0", "more than 1"]),
        ("train.stop_at=901", ["train.stop_at is 901", "steps=900"]),
        ("train.global_batch=1", ["train.global_batch is 1", "contrastive"]),
        ("objectives=[{name: contrastive, weight: 0}]", ["objectives.0.weight is 0", "greater than 0"]),
        ("objectives=[{name: contrastive, weight: -1}]", ["objectives.0.weight is -1", "greater than 0"]),
        ("model.vision.mlp_ratio=0.001", ["model.vision.mlp_ratio 0.001", "0.007812 or more"]),
        ("model.logit_scale_init=500", ["model.logit_scale_init is 500.0", "logit_scale_max=100.0"]),
        ("model={kind: captioner, text: {width: 30, heads: 2}}", ["objective 'contrastive' does not go with"]),
        ("data.schedule=[{step: 900, weights: [1]}]", ["data.schedule", "step 900", "train.steps is 900"]),
        ("run.dir=2024", ["run.dir is 2024", "path", "quotes"]),
        ("run.dir=[a]", ["run.dir is ['a']", "path"]),
        ("train.freeze=vision.", ["train.freeze is 'vision.'", "must be a list, such as [vision.]"]),
        ("data.crop_scale=[1]", ["data.crop_scale is [1]: it must have 2 items"]),
        ("data.train=' '", ["data.train is empty"]),
        ('data.test=""', ["data.test is empty", "leave it out"]),
        ('data.also=[{data: ""}]', ["data.also.0.data is empty"]),
    ],
)
def test_a_wrong_value_is_refused_with_key_value_and_what_is_allowed(override: str, words: list[str]) -> None:
    sentence = refusal(override)
    assert sentence.startswith("quickstart: ")
    for word in words:
        assert word in sentence, sentence


def test_a_number_given_as_a_truth_is_not_compared_with_others(tmp_path: Path) -> None:
    assert refusal("train.steps=yes") == "quickstart: train.steps is true, but it must be a number"
    assert refusal("train.lr=off") == "quickstart: train.lr is false, but it must be a number"


def test_every_path_of_a_recipe_refuses_emptiness() -> None:
    paths = [key for key, field in keys_of(Recipe) if "Path" in str(field.annotation)]
    assert {"run.dir", "train.init_from"} <= set(paths)
    for key in paths:
        assert f"{key} is empty" in refusal(f'{key}=""')


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
        ("objectives.0.name=sigmoid", ["'objectives' is a list, which is given as a whole: objectives=[...]"]),
        ("data.crop_scale.0=0.5", ["'data.crop_scale' is a list", "data.crop_scale=[...]"]),
        ("train=&a {lr: 1, steps: *a}", ["holds an alias of itself"]),
        ("train.freeze=&a [*a]", ["holds an alias of itself"]),
        ("train={[1]: 2}", ["a list or a mapping is given as a key"]),
        ("train={<<: 5}", ["<< brings the keys of a mapping"]),
        ("data.crop_scale=[1", ["'data.crop_scale=[1'", "not YAML"]),
        ("train.steps={", ["'train.steps={'", "not YAML"]),
        ("train={lr: 1, lr: 2}", ["'train={lr: 1, lr: 2}'", "'lr' is given twice"]),
        ("train.steps=" + "[" * 3000, ["nested too deeply"]),
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
        (b"", ["holds nothing", "tree of keys"]),
        (b"- a\n- b\n", ["holds a list", "tree of keys"]),
        (b"just words", ["a single value", "tree of keys"]),
        (b"train: {steps: 5, warmup: 1}", ["'data' has no value and no default"]),
        (b"data: {}", ["'data.train' has no value and no default"]),
        (b"data: {train: x}\n1: 2\n", ["1 is given as a key"]),
        (b"data: {train: x}\non: {a: 1}\n", ["true is given as a key"]),
        (b"!!python/object/apply:os.system [echo]", ["it has a tag (!...), but plain values are wanted"]),
        (b"data: {train: x}\n? [1]\n: 2\n", ["line 2: a list or a mapping is given as a key"]),
        (b"data: {train: x}\ntrain:\n  <<: 5\n", ["line 3: << brings the keys of a mapping"]),
        (b"data:\n\ttrain: x\n", ["line 2: a tab stands before a value: indent with spaces"]),
        (b"data: {train: x}\n---\ndata: {}\n", ["line 2: a second document begins (---): keep one"]),
        (b"data: {train: x\ntrain: 5\n", ["line 2: while parsing a flow mapping, expected ',' or '}'"]),
        (b"data: {train: x}\x00", ["special characters are not allowed at position 16"]),
        (BOMB, ["its aliases stand for more than 100,000 values"]),
        (b"data: {train: x}\ntrain.lr: 1e-2\n", ["'train.lr' has dots", "write it nested, train: {lr: ...}"]),
        (b"data: {train: x}\nmodel: {text.heads: 2}\n", ["nested, model: {text: {heads: ...}}"]),
    ],
)
def test_a_file_that_is_no_recipe_is_named(content: bytes, words: list[str], tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(content)
    sentence = refusal(recipe=str(path))
    assert str(path) in sentence
    assert "<unicode string>" not in sentence
    for word in words:
        assert word in sentence, sentence


def test_a_recipe_that_does_not_exist_is_told_from_a_name_that_is_none(tmp_path: Path) -> None:
    assert "quickstart" in refusal(recipe="quikstart")
    missing = tmp_path / "mine.yaml"
    assert refusal(recipe=str(missing)) == f"recipe {str(missing)!r} does not exist"
    assert refusal(recipe="mine.yml") == "recipe 'mine.yml' does not exist"


# --- keys once, numbers as they are written


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("data: {train: x}\ntrain:\n  lr: 1\nmodel: {}\ntrain: {lr: 5e-4}\n", "'train' is given twice (lines 2 and 5)"),
        ("data:\n  train: x\n  flip: true\n  train: y\n", "'train' is given twice (lines 2 and 4)"),
        ("data: {train: x, train: x}\n", "'train' is given twice"),
        (
            "data: {train: x}\nobjectives:\n- name: sigmoid\n  name: contrastive\n",
            "'name' is given twice (lines 3 and 4)",
        ),
        ("data: &d {train: x}\ntrain: {<<: *d, <<: *d}\n", "'<<' is given twice"),
        ("data: {train: x}\ntrain:\n  lr: 1\n  'lr': 1\n", "'lr' is given twice (lines 3 and 4)"),
    ],
)
def test_a_key_that_is_given_twice_is_refused_with_both_lines(tmp_path: Path, content: str, words: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(content)
    sentence = refusal(recipe=str(path))
    assert sentence.startswith(f"{path}: ")
    assert words in sentence


def test_what_a_merge_key_brings_may_be_replaced(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "data: {train: x}\nmodel:\n  vision: &tower {width: 64, layers: 2}\n"
        "  text: &text\n    <<: *tower\n    width: 32\n    context: 8\ntrain: {steps: 200}\n"
    )
    model = load_recipe(str(path)).model
    assert (model.vision.width, model.text.width, model.text.layers) == (64, 32, 2)
    chain = "a: &a {x: 1}\nb: &b {<<: *a, x: 2}\nc: {<<: *b, x: 3}\n"
    assert parse(chain, "")["c"] == {"x": 3}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("010", 10),
        ("08", 8),
        ("-010", -10),
        ("0x1F", 31),
        ("1_000", 1000),
        ("1:30", "1:30"),
        ("1:30.5", "1:30.5"),
        ("2024-01-01", "2024-01-01"),
        ("1.5e3", 1500.0),
        (".5", 0.5),
        ("yes", True),
        ("~", None),
    ],
)
def test_numbers_are_decimal_and_times_are_text(text: str, value: Any) -> None:
    assert parse(text, "") == value
    assert type(parse(text, "")) is type(value)


# --- keys that change nothing

CAPTIONER = ["model.kind=captioner", "objectives=[{name: caption}]"]
INIT_ONLY = ["train.init_from=x", "train.init_only=[vision., logit_]"]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([*CAPTIONER, "model.vision.layers=2"], ["model.vision.layers is 2", "no image tower"]),
        ([*CAPTIONER, "model.vision={width: 32, pool: class}"], ["model.vision.width", "model.vision.pool is 'class'"]),
        ([*CAPTIONER, "model.text.causal=false"], ["model.text.causal is false", "always causal"]),
        ([*CAPTIONER, "model.embed_dim=64"], ["model.embed_dim is 64"]),
        ([*CAPTIONER, "model.logit_scale_init=3"], ["model.logit_scale_init is 3.0"]),
        (["model.logit_bias_init=-3"], ["model.logit_bias_init is -3.0", "sigmoid"]),
        (["objectives=[{name: sigmoid, label_smoothing: 0.1}]"], ["objectives.0.label_smoothing is 0.1"]),
        (["data.weight=2"], ["data.weight is 2.0", "data.also is empty"]),
        (["data.schedule=[{step: 3, weights: [1]}]"], ["data.schedule is a list", "data.also is empty"]),
        (["data.window=4"], ["data.window is 4", "data.block"]),
        (["data.cache_gib=0"], ["data.cache_gib is 0.0", "URL"]),
        (["data.most_workers=4"], ["data.most_workers is 4", "data.loader=ray"]),
        (["data.ahead_gib=2"], ["data.ahead_gib is 2.0", "data.loader=ray"]),
        (["data.ray=auto"], ["data.ray is 'auto'", "data.loader=ray"]),
        (["layout.memory_gib=4"], ["layout.memory_gib is 4.0", "layout.auto"]),
        (["layout={auto: true, tp: 2}"], ["layout.tp is 2", "layout.auto=true"]),
        (["data.test=null", "eval.every=7"], ["eval.every is 7", "data.test"]),
        (["train.init_from=x", "model.logit_scale_init=50"], ["model.logit_scale_init is 50.0", "train.init_from"]),
        ([*INIT_ONLY, "model.logit_scale_init=50"], ["model.logit_scale_init is 50.0", "comes with the weights"]),
        (
            ["train.init_from=x", "objectives=[{name: sigmoid}]", "model.logit_bias_init=-3"],
            ["model.logit_bias_init is -3.0", "comes with the weights"],
        ),
        (["train.init_from=x", "model.logit_bias_init=-3"], ["model.logit_bias_init is -3.0", "only the sigmoid"]),
        ([*CAPTIONER, "eval.templates=['x {}']"], ["eval.templates is ['x {}']", "does not classify"]),
        (["data.also=[{data: x, weight: 0}]"], ["data.also.0.weight is 0.0", "this source is never read"]),
        (["data.also=[{data: x}]", "data.weight=0"], ["data.weight is 0.0", "this source is never read"]),
        (
            ["data.also=[{data: x, weight: 0}, {data: y, weight: 0}]", "data.schedule=[{step: 3, weights: [1, 0, 2]}]"],
            ["data.also.0.weight is 0.0", "name only sources that are read"],
        ),
    ],
)
def test_a_key_that_changes_nothing_is_refused(overrides: list[str], words: list[str]) -> None:
    sentence = refusal(*overrides)
    assert sentence.endswith(("leave it out", "name only sources that are read"))
    for word in words:
        assert word in sentence, sentence


def test_a_default_may_be_said_and_what_overrides_made_idle_has_its_default(tmp_path: Path) -> None:
    recipe = load_recipe("quickstart", [*CAPTIONER, "model.vision.layers=4", "model.embed_dim=128"])
    assert recipe.model.vision.mlp_ratio == 4.0, "quickstart's own 2 is of no use to a captioner"
    path = tmp_path / "mine.yaml"
    path.write_text("data: {train: x}\nmodel: {kind: captioner, vision: {layers: 2}}\nobjectives: [{name: caption}]\n")
    assert "model.vision.layers is 2" in refusal(recipe=str(path)), "the file itself asks for it"
    assert load_recipe("quickstart", ["data.test=null"]).eval.every == 500
    path.write_text("data: {train: x}\nmodel: {logit_scale_init: 20}\neval: {templates: ['x {}']}\n")
    assert load_recipe(str(path), ["train.init_from=x"]).model.logit_scale_init == 14.3
    assert load_recipe(str(path), ["train.init_from=x", "train.init_only=[vision.]"]).model.logit_scale_init == 20
    assert load_recipe(str(path), [*CAPTIONER, "train.init_from=x"]).eval.templates[0] == "{}"


def test_what_was_saved_before_a_key_was_refused_is_still_read() -> None:
    tree = load_recipe("quickstart").model_dump(mode="json")
    tree["data"]["window"] = 4
    assert recipe_of(tree, "a checkpoint").data.window == 4


def test_the_table_of_keys_that_change_nothing_names_keys() -> None:
    known = dict(keys_of(Recipe))
    for rule in RULES:
        for key in (*(f"{rule.section}.{each}" for each in rule.keys), *rule.by):
            assert key in known


def test_captioners_need_widths_for_their_positions() -> None:
    text = "model.text={width: 30, heads: 2}"
    assert "model.text.width is 30" in refusal(*CAPTIONER, text)
    load_recipe("quickstart", [*CAPTIONER, text, "model.vision.positions=learned"])


def test_a_tilde_is_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    keys = ["run.dir=~/r", "data.train=~/s", "data.test=~/t", "data.also=[{data: ~/u}]", "data.tokenizer=~/t.json"]
    recipe = load_recipe("quickstart", keys)
    assert (str(recipe.run.dir), recipe.data.train, recipe.data.test) == ("/home/me/r", "/home/me/s", "/home/me/t")
    assert (recipe.data.also[0].data, str(recipe.data.tokenizer)) == ("/home/me/u", "/home/me/t.json")
    assert _expanded(["eval", "~/r", "--data=~/s", "run.dir=~/x"]) == [
        "eval",
        "/home/me/r",
        "--data=/home/me/s",
        "run.dir=~/x",
    ]


# --- there and back


@pytest.mark.parametrize("overrides", [[], ["train.warmup=9", *(override for override, *_ in OVERRIDES)]])
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
