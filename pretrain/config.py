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
from typing import Any, get_args

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from data_pipeline.strict_yaml import RepeatedKeyError, parse
from pretrain.errors import RequestError
from pretrain.relevance import Ignored, ignored
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
            raise ValueError(f"objectives are {names}: give each one once, with the sum of its weights")
        return self

    @model_validator(mode="after")
    def _objectives_fit_the_model(self) -> Recipe:
        for objective in self.objectives:
            if (objective.name == "caption") != (self.model.kind == "captioner"):
                raise ValueError(
                    f"objective {objective.name!r} does not go with model.kind={self.model.kind}: a dual encoder takes "
                    "contrastive and sigmoid, a captioner takes caption"
                )
            if objective.name == "contrastive" and self.train.global_batch < 2:
                raise ValueError(
                    "train.global_batch is 1, but the contrastive loss compares the samples of a batch: use 2 or more"
                )
        return self

    @model_validator(mode="after")
    def _decoder_can_have_positions(self) -> Recipe:
        vision, width = self.model.vision, self.model.text.width
        if self.model.kind == "captioner" and vision.positions == "sincos2d" and width % 4:
            raise ValueError(
                f"model.text.width is {width}, but with model.vision.positions=sincos2d the captioner's patches need a "
                "multiple of 4: use one, or positions=learned"
            )
        return self

    @model_validator(mode="after")
    def _warmup_fits(self) -> Recipe:
        if self.train.warmup >= self.train.steps:
            raise ValueError(f"train.warmup is {self.train.warmup}, but train.steps is only {self.train.steps}")
        return self

    @model_validator(mode="after")
    def _schedule_comes(self) -> Recipe:
        for phase in self.data.schedule:
            if phase.step >= self.train.steps:
                raise ValueError(
                    f"data.schedule changes weights at step {phase.step}, but train.steps is {self.train.steps}: "
                    "use earlier steps, or leave it out"
                )
        return self

    def yaml(self) -> str:
        """The resolved tree as YAML that `load_recipe` reads back."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def builtin_recipes() -> list[str]:
    """Names of the recipes that come with weft."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def load_recipe(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """The resolved recipe of a built-in name or a YAML file, with `key=value` overrides laid over it.

    A key that changes nothing is refused. One of the file that only the overrides have made so (model.vision.width, by
    model.kind=captioner) has its default again.
    Raises RequestError for a file that is missing or not YAML, an unknown key or a value of the wrong type.
    """
    tree = _read(_find(name))
    given: set[str] = set()
    for override in overrides:
        given |= _lay_over(tree, override)
    recipe = recipe_of(tree, name)
    left_out = [each for each in ignored(recipe) if _only_by_overrides(each, given)]
    refused = [each for each in ignored(recipe) if each not in left_out]
    if refused:
        raise RequestError(f"{name}: " + "; ".join(map(_changes_nothing, refused)))
    for each in left_out:
        *parents, leaf = each.key.split(".")
        node: Any = tree
        for parent in parents:
            node = node[parent]
        del node[leaf]
    return recipe_of(tree, name) if left_out else recipe


def repeated(overrides: Sequence[str]) -> Iterator[str]:
    """A sentence for each key that overrides give several values: the last one counts."""
    values: dict[str, str] = {}
    for override in overrides:
        key, _, text = override.partition("=")
        for other, before in values.items():
            if (other == key and before != text) or other.startswith(f"{key}."):
                yield f"{other} is given twice: {other}={before} does not count, {override} does"
        values = {other: text for other, text in values.items() if not other.startswith(f"{key}.")} | {key: text}


def recipe_of(tree: Mapping[str, Any], name: str) -> Recipe:
    """The recipe of a tree as YAML or JSON gives it; RequestError, which begins with `name`, for one that is not."""
    try:
        recipe = Recipe.model_validate(tree)
    except ValidationError as error:
        raise RequestError(f"{name}: " + "; ".join(map(_sentence, _causes(error.errors())))) from None
    if refused := list(_truths_for_numbers(tree, recipe.model_dump())):
        raise RequestError(f"{name}: " + "; ".join(refused))
    return recipe


def _truths_for_numbers(given: Any, taken: Any, dotted: str = "") -> Iterator[str]:
    """A sentence for each number that is given as true or false (in YAML also yes, on, no, off): 1 or 0 to pydantic."""
    if isinstance(given, bool) and not isinstance(taken, bool) and isinstance(taken, (int, float)):
        yield f"{dotted} is {_shown(given)}, but it must be a number"
    elif isinstance(given, Mapping) and isinstance(taken, Mapping):
        for key in (key for key in given if key in taken):
            yield from _truths_for_numbers(given[key], taken[key], f"{dotted}.{key}" if dotted else str(key))
    elif isinstance(given, (list, tuple)) and isinstance(taken, (list, tuple)):
        for number, pair in enumerate(zip(given, taken, strict=False)):
            yield from _truths_for_numbers(*pair, f"{dotted}.{number}")


def keys_of(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every dotted key below a section with its pydantic field, in the order of declaration."""
    for name, field in section.model_fields.items():
        yield f"{prefix}{name}", field
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from keys_of(field.annotation, f"{prefix}{name}.")


def item_section(field: Any) -> type[BaseModel] | None:
    """The section that each item of a list is (`objectives`); None for other keys."""
    inner = next(iter(get_args(field.annotation)), None)
    return inner if isinstance(inner, type) and issubclass(inner, BaseModel) else None


def _find(name: str) -> Path:
    if (builtin := RECIPES / f"{name}.yaml").is_file():
        return builtin
    if (path := Path(name)).is_file():
        return path
    if path.suffix in (".yaml", ".yml") or path.parent != Path("."):
        raise RequestError(f"recipe {name!r} does not exist")
    raise RequestError(f"{name!r} is not a recipe: give a YAML file or one of {', '.join(builtin_recipes())}")


def _read(path: Path) -> dict[str, Any]:
    try:
        tree = parse(path.read_text(encoding="utf-8-sig"), str(path))
    except RepeatedKeyError as error:
        raise RequestError(str(error)) from None
    except ValueError as error:
        raise RequestError(f"{path} is not YAML: {error}") from None
    if not isinstance(tree, dict):
        held = {list: "a list", type(None): "nothing"}.get(type(tree), "a single value")
        raise RequestError(f"{path} holds {held}, but a recipe is a tree of keys (data: {{train: ...}})")
    return tree


def _lay_over(tree: dict[str, Any], override: str) -> set[str]:
    """Set one dotted `key=value` in the tree; the value is YAML (`train.lr=1e-3`, `data.crop_scale=[0.5, 1]`).

    Returns the dotted keys that it gave.
    """
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
        node[leaf] = parse(text, f"override {override!r}") if text else None
    except RepeatedKeyError as error:
        raise RequestError(str(error)) from None
    except ValueError as error:
        raise RequestError(f"override {override!r}: the value is not YAML ({error})") from None
    return {dotted, *_below(node[leaf], dotted)}


def _below(value: Any, prefix: str, seen: frozenset[int] = frozenset()) -> Iterator[str]:
    """The dotted keys inside a value, which may hold itself (`&a {b: *a}`)."""
    if id(value) in seen:
        return
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in inside:
        yield f"{prefix}.{key}"
        yield from _below(each, f"{prefix}.{key}", seen | {id(value)})


def _only_by_overrides(found: Ignored, given: set[str]) -> bool:
    """Whether a key that changes nothing stands in the file, and overrides made it change nothing."""
    changed = any(key == by or key.startswith(f"{by}.") for by in found.rule.by for key in given)
    return changed and found.key not in given


def _changes_nothing(found: Ignored) -> str:
    return f"{found.key} is {_shown(found.value)}, but {found.rule.why}: leave it out"


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
    shown = _shown(detail["input"])
    match detail["type"]:
        case "extra_forbidden":
            return f"unknown key {dotted!r}" + _nearest(dotted)
        case "invalid_key":
            return f"{shown} is given as a key, but keys are names (unquoted, YAML reads yes, no, on and off as values)"
        case "missing":
            return f"key {dotted!r} has no value and no default"
        case "model_type":
            return f"{dotted or 'a recipe'} is {shown}, but it is a section: give its keys"
        case "value_error":
            told = str(detail["ctx"]["error"])
            is_of_key = f"{dotted}.{told.partition(' ')[0]}" in dict(keys_of(Recipe))
            return f"{dotted}{'.' if is_of_key else ': '}{told}" if dotted else told
        case "tuple_type":
            return f"{dotted} is {shown}: it must be a list, such as [{_example(detail['input'])}]"
        case "too_short" | "too_long":
            asked = detail["ctx"].get("min_length", detail["ctx"].get("max_length"))
            limit = "at least" if detail["type"] == "too_short" else "at most"
            return f"{dotted} is {shown}: it must have {limit} {asked} {'item' if asked == 1 else 'items'}"
        case "string_type" | "path_type":
            kind = "string" if detail["type"] == "string_type" else "path"
            quoted = (
                "" if detail["input"] is None or isinstance(detail["input"], (list, dict)) else ": put it in quotes"
            )
            return f"{dotted} is {shown}, but it must be a {kind}{quoted}"
        case "int_parsing" | "int_type" | "int_from_float":
            return f"{dotted} is {shown}: it must be a whole number"
        case "float_parsing" | "float_type" | "finite_number":
            return f"{dotted} is {shown}: it must be a finite number"
        case "bool_parsing" | "bool_type":
            return f"{dotted} is {shown}: it must be true or false"
        case _:
            message = detail["msg"][0].lower() + detail["msg"][1:]
            plain = message.replace("input should be", "it must be").replace("greater than or equal to", "at least")
            return f"{dotted} is {shown}: {plain.replace('less than or equal to', 'at most')}"


def _shown(value: Any) -> str:
    """A value as YAML would have it."""
    if isinstance(value, (Mapping, BaseModel)):
        return "a section"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, (list, tuple)) and any(isinstance(each, (Mapping, BaseModel)) for each in value):
        return f"a list of {len(value)} section(s)"
    return repr(str(value)) if isinstance(value, Path) else repr(list(value) if isinstance(value, tuple) else value)


def _example(value: Any) -> str:
    return str(value) if isinstance(value, (str, int, float)) and str(value) else "..."


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
