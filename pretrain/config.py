"""The recipe: one typed tree that says everything about a run.

Design choices:
- A recipe is YAML laid over the defaults below, then dotted overrides (`train.lr=1e-3`); the resolved tree is
  saved with the run. Nothing else (environment, globals) changes what a run does.
- What is laid over a section gives some of its keys and leaves the others; a list is replaced as a whole.
- Every key is described where it is declared (sections.py), so `weft config RECIPE` is the reference manual.
- Unknown keys and wrong types are refused, and the sentence names the nearest key that exists.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from pretrain.errors import RequestError
from pretrain.recipe_yaml import parse
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


def saved_recipe(path: Path) -> Recipe:
    """The recipe that a run has written; that a key changes nothing is known better now and no fault of it.

    Raises RequestError for a file that is no recipe.
    """
    return recipe_of(_read(path), str(path))


def repeated(overrides: Sequence[str]) -> Iterator[str]:
    """A sentence for each key that overrides give several values: the last one counts."""
    given: dict[str, tuple[Any, str]] = {}
    for override in overrides:
        dotted, value = _parted(override)
        for key, each in _leaves(value, dotted):
            before, other = given.get(key, (each, override))
            if before != each:
                yield f"{key} is given twice: {other} does not count, {override} does"
            given[key] = each, override


def recipe_of(tree: Mapping[str, Any], name: str) -> Recipe:
    """The recipe of a tree as YAML or JSON gives it; RequestError, which begins with `name`, for one that is not."""
    told = dict(_truths_for_numbers(tree, Recipe))
    try:
        recipe = Recipe.model_validate(tree)
    except ValidationError as error:
        found = [each for each in _causes(error.errors()) if _dotted(each) not in told]
        # what compares numbers compares 1 and 0 where they were given as true and false
        found = [each for each in found if not (told and each["type"] == "value_error")]
        told |= {_sentence(each): _sentence(each) for each in found}
    if told:
        raise RequestError(f"{name}: " + "; ".join(told.values()))
    return recipe


def _truths_for_numbers(given: Any, kind: Any, dotted: str = "") -> Iterator[tuple[str, str]]:
    """(key, sentence) of each number given as true or false (in YAML also yes, no, on, off), 1 or 0 to pydantic.

    `kind`: the type that is asked for.
    """
    prefix = f"{dotted}." if dotted else ""
    if isinstance(given, Mapping) and isinstance(kind, type) and issubclass(kind, BaseModel):
        for key in (key for key in given if key in kind.model_fields):
            yield from _truths_for_numbers(given[key], kind.model_fields[key].annotation, f"{prefix}{key}")
    elif isinstance(given, (list, tuple)) and get_origin(kind) is tuple:
        kinds = get_args(kind)
        for number, each in enumerate(given):
            yield from _truths_for_numbers(
                each, kinds[0 if ... in kinds else min(number, len(kinds) - 1)], f"{prefix}{number}"
            )
    elif isinstance(given, bool):
        kinds = (kind, *get_args(kind), *(value for each in get_args(kind) for value in get_args(each)))
        if bool not in kinds and any(each in (int, float) or isinstance(each, int) for each in kinds):
            yield dotted, f"{dotted} is {_shown(given)}, but it must be a number"


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
    except RequestError:
        raise
    except ValueError as error:
        raise RequestError(f"{path} is not YAML: {error}") from None
    if not isinstance(tree, dict):
        held = {list: "a list", type(None): "nothing"}.get(type(tree), "a single value")
        raise RequestError(f"{path} holds {held}, but a recipe is a tree of keys (data: {{train: ...}})")
    return {key: _whole_section(key, value) for key, value in tree.items()}


def _lay_over(tree: dict[str, Any], override: str) -> set[str]:
    """Set one dotted `key=value` in the tree; the value is YAML (`train.lr=1e-3`, `data.crop_scale=[0.5, 1]`).

    Returns the dotted keys that it gave.
    """
    dotted, value = _parted(override)
    _refuse_inside_a_list(override, dotted)
    *parents, leaf = dotted.split(".")
    node = tree
    for parent in parents:
        child = node.get(parent, {})
        if not isinstance(child, dict):
            raise RequestError(f"override {override!r}: {parent!r} is a value, not a section")
        node[parent] = node = dict(child)  # a copy: to YAML's aliases it is one object
    node[leaf] = _merged(node.get(leaf), value)
    return {dotted, *_below(value, dotted)}


def _parted(override: str) -> tuple[str, Any]:
    """(dotted key, value) of `key=value`."""
    dotted, equals, text = override.partition("=")
    if not equals or not dotted:
        raise RequestError(f"override {override!r} is not of the form key=value")
    try:
        return dotted, _whole_section(dotted, parse(text, f"override {override!r}") if text else None)
    except RequestError:
        raise
    except ValueError as error:
        raise RequestError(f"override {override!r}: the value is not YAML ({error})") from None


def _whole_section(key: str, value: Any) -> Any:
    """`layout: auto` is short for a section with one key."""
    return {"auto": True} if (key, value) == ("layout", "auto") else value


def _refuse_inside_a_list(override: str, dotted: str) -> None:
    fields = dict(keys_of(Recipe))
    for key in accumulate(dotted.split(".")[:-1], "{}.{}".format):
        if key in fields and get_origin(fields[key].annotation) is tuple:
            raise RequestError(f"override {override!r}: {key!r} is a list, which is given as a whole: {key}=[...]")


def _merged(below: Any, above: Any) -> Any:
    """A value laid over another: the keys of a section one by one, anything else as a whole."""
    if not (isinstance(below, dict) and isinstance(above, dict)):
        return above
    return below | {key: _merged(below.get(key), each) for key, each in above.items()}


def _below(value: Any, prefix: str) -> Iterator[str]:
    """The dotted keys inside a value."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in inside:
        yield f"{prefix}.{key}"
        yield from _below(each, f"{prefix}.{key}")


def _leaves(value: Any, dotted: str) -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of what is no section; lists count as one value."""
    if not isinstance(value, dict):
        yield dotted, value
        return
    for key, each in value.items():
        yield from _leaves(each, f"{dotted}.{key}")


def _only_by_overrides(found: Ignored, given: set[str]) -> bool:
    """Whether a key that changes nothing stands in the file, and overrides made it change nothing."""
    changed = any(key == by or key.startswith(f"{by}.") for by in found.rule.by for key in given)
    return changed and found.key not in given


def _changes_nothing(found: Ignored) -> str:
    return f"{found.key} is {_shown(found.value)}, but {found.rule.why}: {found.rule.way_out}"


def _causes(details: list[ErrorDetails]) -> list[ErrorDetails]:
    """Without what only follows from an error further down: a list is not too short because its element is wrong."""
    places = [detail["loc"] for detail in details]
    return [
        detail
        for detail in details
        if not any(len(place) > len(detail["loc"]) and place[: len(detail["loc"])] == detail["loc"] for place in places)
    ]


def _dotted(detail: ErrorDetails) -> str:
    return ".".join(map(str, detail["loc"]))


def _sentence(detail: ErrorDetails) -> str:
    dotted, shown = _dotted(detail), _shown(detail["input"])
    match detail["type"]:
        case "extra_forbidden" if dotted in dict(keys_of(Recipe)):  # with a dot inside one of its parts
            nested = dotted.replace(".", ": {") + ": ..." + "}" * dotted.count(".")
            return f"key {dotted!r} has dots, which are for overrides: in YAML write it nested, {nested}"
        case "extra_forbidden":
            return f"unknown key {dotted!r}" + _nearest(dotted)
        case "missing" if isinstance(detail["loc"][-1], int):
            dotted = dotted.rpartition(".")[0]
            return f"{dotted} is {shown}: it must have {len(get_args(dict(keys_of(Recipe))[dotted].annotation))} items"
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
        case "empty_path":
            return f"{dotted} is empty, but it must be a path: give one, or leave it out"
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
    fields = dict(keys_of(Recipe))
    known = list(fields)
    if item := re.fullmatch(r"(.*?)\.\d+\..*", dotted):  # in a list of sections
        inner = item_section(fields[item[1]])
        section = dotted.rpartition(".")[0]
        known = [f"{section}.{name}" for name in inner.model_fields] if inner else []
    close = difflib.get_close_matches(dotted, known, n=1, cutoff=0.5)
    leaf = dotted.rpartition(".")[2]
    same_leaf = [key for key in known if key.rpartition(".")[2] == leaf]
    best = same_leaf[:1] or close
    return f" (did you mean {best[0]!r}?)" if best else ""
