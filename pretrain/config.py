"""The recipe: one typed tree that says everything about a run.

Design choices:
- A recipe is YAML laid over the defaults below, then dotted overrides (`train.lr=1e-3`); the resolved tree is
  saved with the run. Nothing else (environment, globals) changes what a run does.
- Every key is described where it is declared (sections.py), so `weft config RECIPE` is the reference manual.
- Unknown keys and wrong types are refused, and the sentence names the nearest key that exists.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from pretrain.errors import RequestError
from pretrain.sections import Checkpoint, Data, Eval, Kernels, LayoutConfig, Model, Objective, Run, Section, Train

RECIPES = Path(__file__).parent / "recipes"


class Recipe(Section):
    """Everything about one run."""

    run: Run = Field(default_factory=lambda: Run(), description="where and from which seed")
    data: Data = Field(description="what to read")
    model: Model = Field(default_factory=lambda: Model(), description="what to train")
    objectives: tuple[Objective, ...] = Field(
        (Objective(name="contrastive"),), min_length=1, description="what to minimise: a list of name + weight"
    )
    train: Train = Field(default_factory=lambda: Train(), description="how to train")
    kernels: Kernels = Field(default_factory=lambda: Kernels(), description="which implementations to run on")
    layout: LayoutConfig = Field(default_factory=lambda: LayoutConfig(), description="how to spread over ranks")
    checkpoint: Checkpoint = Field(default_factory=lambda: Checkpoint(), description="when to save")
    eval: Eval = Field(default_factory=lambda: Eval(), description="when and how to evaluate")

    @model_validator(mode="after")
    def _objectives_differ(self) -> Recipe:
        names = [objective.name for objective in self.objectives]
        if len(set(names)) < len(names):
            raise ValueError(f"objectives are {names}, but each may stand there once: give it the sum of the weights")
        return self

    @model_validator(mode="after")
    def _objectives_fit_the_model(self) -> Recipe:
        for objective in self.objectives:
            if (objective.name == "caption") != (self.model.kind == "captioner"):
                raise ValueError(
                    f"objective {objective.name!r} does not go with model.kind={self.model.kind}: a dual encoder takes "
                    "contrastive and sigmoid, a captioner takes caption"
                )
        return self

    @model_validator(mode="after")
    def _warmup_fits(self) -> Recipe:
        if self.train.warmup >= self.train.steps:
            raise ValueError(f"train.warmup is {self.train.warmup}, but train.steps is only {self.train.steps}")
        return self

    def yaml(self) -> str:
        """The resolved tree as YAML that `load_recipe` reads back."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def builtin_recipes() -> list[str]:
    """Names of the recipes that come with weft."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def load_recipe(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """The resolved recipe of a built-in name or a YAML file, with `key=value` overrides laid over it.

    Raises RequestError for a file that is missing or not YAML, an unknown key or a value of the wrong type.
    """
    tree = _read(_find(name))
    for override in overrides:
        _lay_over(tree, override)
    return recipe_of(tree, name)


def recipe_of(tree: Mapping[str, Any], name: str) -> Recipe:
    """The recipe of a tree as YAML or JSON gives it; RequestError, which says `name`, for one that is none."""
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise RequestError(f"{name}: " + "; ".join(map(_sentence, _causes(error.errors())))) from None


def keys_of(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every dotted key below a section with its pydantic field, in the order of declaration."""
    for name, field in section.model_fields.items():
        yield f"{prefix}{name}", field
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from keys_of(field.annotation, f"{prefix}{name}.")


def _find(name: str) -> Path:
    if (builtin := RECIPES / f"{name}.yaml").is_file():
        return builtin
    if (path := Path(name)).is_file():
        return path
    if path.suffix in (".yaml", ".yml") or path.parent != Path("."):
        raise RequestError(f"recipe {name!r} does not exist")
    raise RequestError(f"{name!r} is no recipe: give a YAML file or one of {', '.join(builtin_recipes())}")


def _read(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RequestError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise RequestError(f"{path} holds {type(tree).__name__}, but a recipe is a tree of keys")
    return tree


def _lay_over(tree: dict[str, Any], override: str) -> None:
    """Set one dotted `key=value` in the tree; the value is YAML (`train.lr=1e-3`, `data.crop_scale=[0.5, 1]`)."""
    dotted, equals, text = override.partition("=")
    if not equals or not dotted:
        raise RequestError(f"override {override!r} is not of the form key=value")
    *parents, leaf = dotted.split(".")
    node = tree
    for parent in parents:
        child = node.setdefault(parent, {})
        if not isinstance(child, dict):
            raise RequestError(f"override {override!r}: {parent!r} is a value, not a section")
        node = child
    try:
        node[leaf] = yaml.safe_load(text) if text else None
    except yaml.YAMLError as error:
        raise RequestError(f"override {override!r}: the value is not YAML ({' '.join(str(error).split())})") from None


def _causes(details: list[ErrorDetails]) -> list[ErrorDetails]:
    """Without what only follows from an error further down: a list is not too short because its element is wrong."""
    places = [detail["loc"] for detail in details]
    return [
        detail
        for detail in details
        if not any(len(place) > len(detail["loc"]) and place[: len(detail["loc"])] == detail["loc"] for place in places)
    ]


def _sentence(detail: ErrorDetails) -> str:
    dotted = ".".join(str(part) for part in detail["loc"])
    match detail["type"]:
        case "extra_forbidden":
            return f"unknown key {dotted!r}" + _nearest(dotted)
        case "missing":
            return f"key {dotted!r} has no value and no default"
        case "model_type":
            return f"{dotted or 'a recipe'} is {detail['input']!r}, but it is a section: give its keys"
        case "value_error":
            return f"{dotted}: {detail['ctx']['error']}" if dotted else str(detail["ctx"]["error"])
        case _:
            message = detail["msg"][0].lower() + detail["msg"][1:]
            shown = "a section" if isinstance(detail["input"], Mapping) else repr(detail["input"])
            return f"{dotted} is {shown}: {message}"


def _nearest(dotted: str) -> str:
    known = [key for key, _ in keys_of(Recipe)]
    section = dotted.rpartition(".")[0]
    if section.startswith("objectives."):
        known = [f"{section}.{name}" for name in Objective.model_fields]
    close = difflib.get_close_matches(dotted, known, n=1, cutoff=0.5)
    leaf = dotted.rpartition(".")[2]
    same_leaf = [key for key in known if key.rpartition(".")[2] == leaf]
    best = same_leaf[:1] or close
    return f" (did you mean {best[0]!r}?)" if best else ""
