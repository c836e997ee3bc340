"""Random recipes with every key: each trains, evaluates, saves, resumes to the same losses, or a sentence refuses it.

    pytest tests/pretrain/test_random_recipes.py --recipes 300                      all of them, some minutes
    pytest tests/pretrain/test_random_recipes.py --recipes 1 --first-recipe 17      recipe 17 again

Recipe n is a function of n. Values are legal each by itself; together they may not be, and then a sentence must say so.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from data_pipeline.scenes.synth import synthesise
from pretrain.cli import main
from pretrain.config import Recipe, keys_of, load_recipe, recipe_of
from pretrain.errors import RequestError
from pretrain.metrics import read_lines

STEPS = 2
Draw = Callable[[random.Random], Any]

# Drawn for every recipe, so that models are tiny and runs short, or because others depend on them
ALWAYS: dict[str, list[Any]] = {
    "run.seed": [0, 1, 7, 2**40],
    "data.workers": [0, 0, 0, 0, 0, 0, 0, 1],
    "model.kind": ["dual", "dual", "captioner"],
    "model.text.layers": [1, 2],
    "model.text.width": [8, 12, 16, 33],
    "model.text.heads": [1, 2],
    "model.text.context": [3, 8, 16],
    "model.text.vocab_size": [260, 300, 513],
    "model.vision.image_size": [16, 32],
    "model.vision.patch": [8, 16],
    "train.steps": [STEPS],
    "train.warmup": [0, 1],
    "train.global_batch": [1, 2, 4, 6, 8, 12],
    "eval.samples": [2, 5, 16],
}
DUAL: dict[str, list[Any]] = {
    "model.vision.layers": [1, 2],
    "model.vision.width": [8, 12, 16],
    "model.vision.heads": [1, 2, 4],
    "objectives": [
        [{"name": "contrastive"}],
        [{"name": "contrastive", "weight": 0.5, "label_smoothing": 0.1}],
        [{"name": "sigmoid"}],
        [{"name": "sigmoid", "weight": 3}, {"name": "contrastive"}],
    ],
}
# Each of these is drawn now and then
SOMETIMES: dict[str, list[Any]] = {
    "run.device": ["auto", "cpu"],
    "data.weight": [2],
    "data.schedule": [[{"step": 1, "weights": [1, 1]}]],
    "data.block": [2, 8],
    "data.window": [1, 3],
    "data.cache_gib": [0],
    "data.most_workers": [2],
    "data.ahead_gib": [0.5],
    "data.ray": ["auto"],
    "data.crop_scale": [[0.5, 1.0], [1, 1], [0.01, 0.02]],
    "data.aspect": [1.5, 2],
    "data.flip": [True],
    "data.max_corrupt": [0, 5],
    "data.max_corrupt_share": [0, 1],
    "model.vision.pool": ["class", "mean"],
    "model.vision.positions": ["learned", "sincos2d"],
    "model.vision.mlp_ratio": [0.01, 0.3, 1, 2.67],
    "model.text.mlp_ratio": [0.05, 0.5, 1, 2.66],
    "model.text.causal": [True, False],
    "model.embed_dim": [1, 7, 16],
    "model.logit_scale_init": [0.1, 1, 50, 500],
    "model.logit_scale_max": [20, 1000],
    "model.logit_bias_init": [-3, 0],
    "train.stop_at": [2],
    "train.micro_batch": [1, 2, 3, 100],
    "train.lr": [1e-6, 1e-2, 1],
    "train.min_lr": [1e-7, 1e-3],
    "train.weight_decay": [0, 1],
    "train.beta1": [0, 0.5, 0.999],
    "train.beta2": [0, 0.5, 0.9999],
    "train.eps": [1e-12, 1e-3],
    "train.grad_clip": [0, 1e-3, 100],
    "train.precision": ["fp32", "bf16"],
    "train.freeze": [["vision."], ["text.", "logit_"], ["text.block.layers.0."], ["decoder.block."], ["visual."], [""]],
    "train.max_skipped": [0, 1],
    "train.spike": [1.5, 10],
    "train.resume": ["auto"],
    "train.log_every": [1, 2],
    "train.watchdog": [0, 60],
    "kernels.attention": ["auto", "sdpa", "blocked", "flash"],
    "kernels.norm": ["auto", "torch"],
    "kernels.loss": ["auto", "torch"],
    "layout.auto": [True],
    "layout.memory_gib": [4],
    "layout.tp": [1, 2],
    "layout.pp": [1, 2],
    "layout.vpp": [1, 2],
    "layout.cp": [1, 2],
    "layout.ep": [1, 2],
    "layout.sequence_parallel": [True, False],
    "layout.zero": [0, 1, 2, 3],
    "layout.offload": [True],
    "layout.recompute": ["selective", "full"],
    "checkpoint.every": [1, 2, 7],
    "checkpoint.keep": [1, 3],
    "checkpoint.keep_every": [1, 2],
    "checkpoint.asynchronous": [False],
    "eval.every": [0, 1, 2],
    "eval.batch": [1, 3, 64],
    "eval.templates": [["{}"], ["{} {}", "a photo of {}"]],
}
# Given by the test; what starts a Ray has tests of its own
GIVEN = {"run.dir", "data.cache", "data.train", "data.test", "data.also", "data.tokenizer", "data.loader"}
RARE = (
    *("layout.tp", "layout.pp", "layout.vpp", "layout.cp", "layout.ep", "layout.sequence_parallel"),
    *("data.cache_gib", "data.ray"),
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    synthesise(folder, train=48, test=16, size=32, sound=False, processes=1)
    return folder


def recipe_number(number: int, data: Path) -> dict[str, Any]:
    """Dotted keys and values of a recipe; of five in six, the first draw that no rule refuses on sight."""
    for attempt in range(20):
        keys = draw_recipe(random.Random(f"recipe {number}, attempt {attempt}"), data)
        try:
            recipe_of(nested(keys), "drawn")
            load_recipe("photos", [f"{key}={yaml_of(value)}" for key, value in keys.items()])
            return keys
        except RequestError:
            if number % 6 == 5:
                return keys
    return keys


def draw_recipe(draw: random.Random, data: Path) -> dict[str, Any]:
    keys = {key: draw.choice(values) for key, values in ALWAYS.items()}
    keys["data.train"], keys["data.cache"] = str(data / "train"), str(data / "cache")
    keys["data.test"] = str(data / "test") if draw.random() < 0.9 else None
    if keys["model.kind"] == "dual":
        keys |= {key: draw.choice(values) for key, values in DUAL.items()}
    else:
        keys["objectives"] = [{"name": "caption"}]
    if draw.random() < 0.2:
        keys["data.also"] = [{"data": str(data / "test"), "weight": draw.choice([0.5, 2])}]
    for key, values in SOMETIMES.items():
        if draw.random() < (0.004 if key in RARE or (key in DEPENDENT and not DEPENDENT[key](keys)) else 0.15):
            keys[key] = draw.choice(values)
    return keys


# Where a key would be refused for changing nothing, it is drawn rarely: else hardly a recipe would train
DEPENDENT: dict[str, Callable[[dict[str, Any]], bool]] = {
    **dict.fromkeys(("data.weight", "data.schedule"), lambda keys: "data.also" in keys),
    **dict.fromkeys(("data.most_workers", "data.ahead_gib"), lambda keys: False),
    **dict.fromkeys(("layout.memory_gib", "layout.sequence_parallel"), lambda keys: "layout.auto" in keys),
    **dict.fromkeys(
        ("model.vision.pool", "model.vision.mlp_ratio", "model.text.causal", "model.embed_dim"),
        lambda keys: keys["model.kind"] == "dual",
    ),
    **dict.fromkeys(("model.logit_scale_init", "model.logit_scale_max"), lambda keys: keys["model.kind"] == "dual"),
    "model.logit_bias_init": lambda keys: any(each["name"] == "sigmoid" for each in keys["objectives"]),
    "data.window": lambda keys: "data.block" in keys,
    "data.aspect": lambda keys: "data.block" not in keys and "data.also" not in keys,
    "eval.every": lambda keys: keys["data.test"] is not None,
}


def test_every_key_is_drawn() -> None:
    """A new key wants a row above."""
    sections = {key.rpartition(".")[0] for key, _ in keys_of(Recipe)} | {"model.vision", "model.text"}
    drawn = {*ALWAYS, *DUAL, *SOMETIMES, *GIVEN}
    known = {key for key, _ in keys_of(Recipe)} - sections
    assert drawn - known == set()
    assert known - drawn <= {"train.init_from", "train.init_only"}


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_recipes_train_and_resume_or_are_refused(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], pytestconfig: pytest.Config
) -> None:
    count, first = pytestconfig.getoption("--recipes"), pytestconfig.getoption("--first-recipe")
    trained = 0
    refusals: list[str] = []
    wrong: list[str] = []
    for number in range(first, first + count):
        keys = recipe_number(number, data)
        try:
            refused = run_recipe(keys, tmp_path / str(number), capsys)
        except Exception as error:  # whatever it is, the recipe is to be told
            shown = " ".join(f"{key}={yaml_of(value)}" for key, value in keys.items())
            wrong.append(f"recipe {number}: {type(error).__name__}: {str(error)[:600]}\n  {shown}")
            continue
        trained += not refused
        refusals += [f"recipe {number}: {refused}"] if refused else []
    with capsys.disabled():
        print(f"\n{count} recipes: {trained} trained, {len(refusals)} refused, {len(wrong)} wrong")
    assert not wrong, "\n".join(wrong) + "\n--- refused:\n" + "\n".join(refusals)
    assert trained > count / 5 or count < 5, "\n".join(refusals)


def run_recipe(keys: dict[str, Any], folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Train at once, and stopped and resumed, and evaluate; the sentence of a recipe that is refused, else nothing."""
    folder.mkdir()
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(nested(keys)))
    code, said = weft(capsys, "train", path, f"run.dir={folder / 'whole'}")
    if code:
        assert code in (1, 2), (code, said)
        sentences = [line for line in said.splitlines() if line.startswith("weft: ")]
        assert len(sentences) == 1, said
        assert "Traceback" not in said
        return sentences[0]
    assert weft(capsys, "checkpoint", "verify", folder / "whole")[0] == 0
    parted = f"run.dir={folder / 'parted'}"
    for more in (["train.stop_at=1"], []):
        code, said = weft(capsys, "train", path, parted, *more)
        assert code == 0, said
    losses = [
        {line["step"]: line["loss"] for line in read_lines(folder / name / "metrics.jsonl")}
        for name in ("whole", "parted")
    ]
    assert list(losses[0]) == list(losses[1]) == [1, STEPS]
    for step in (1, STEPS):
        one, other = losses[0][step], losses[1][step]
        assert one == other or math.isclose(one, other, rel_tol=1e-6), losses
    evaluated = [line["step"] for line in read_lines(folder / "whole" / "evaluation.jsonl")]
    assert (STEPS in evaluated) == (keys["data.test"] is not None)
    if keys["data.test"]:
        code, said = weft(capsys, "eval", folder / "parted", "--json")
        assert code == 0, said
    return ""


def weft(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    code = main([str(each) for each in arguments])
    return code, capsys.readouterr().err


def nested(keys: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for dotted, value in keys.items():
        *parents, leaf = dotted.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree


def yaml_of(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=10_000).partition("\n")[0]
