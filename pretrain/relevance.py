"""Keys that change nothing: which key matters under which condition, declared in one table.

A recipe that sets a key to something else than its default, where no code reads that key, asks for something that it
will not get: it is refused. Which keys those are is said here and nowhere else; `weft config` and the comparison of a
run with its checkpoint ask the same table.

To add a key that matters only sometimes, add a row to RULES.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pretrain.config import Recipe


@dataclass(frozen=True)
class Rule:
    """`keys` of `section` change nothing unless `matter` holds, which the keys `by` decide."""

    section: str
    keys: tuple[str, ...]
    matter: Callable[[Recipe], bool]
    by: tuple[str, ...]
    why: str  # ends the sentence "KEY is VALUE, but ..."


@dataclass(frozen=True)
class Ignored:
    """A key that changes nothing in a recipe."""

    key: str
    value: Any
    default: Any
    rule: Rule


def _is_dual(recipe: Recipe) -> bool:
    return recipe.model.kind == "dual"


def _has(*names: str) -> Callable[[Recipe], bool]:
    return lambda recipe: any(objective.name in names for objective in recipe.objectives)


def _at_a_url(recipe: Recipe) -> bool:
    data = recipe.data
    return any("://" in place for place in (data.train, data.test or "", *(source.data for source in data.also)))


RULES = (
    Rule(
        "model.vision",
        ("layers", "width", "heads", "mlp_ratio", "pool"),
        _is_dual,
        ("model.kind",),
        "model.kind=captioner has no image tower (its one decoder is model.text)",
    ),
    Rule("model.text", ("causal",), _is_dual, ("model.kind",), "the decoder of model.kind=captioner is always causal"),
    Rule("model", ("embed_dim",), _is_dual, ("model.kind",), "model.kind=captioner has no joint embedding"),
    Rule(
        "model",
        ("logit_scale_init", "logit_scale_max"),
        _has("contrastive", "sigmoid"),
        ("model.kind", "objectives"),
        "only the objectives contrastive and sigmoid use it",
    ),
    Rule("model", ("logit_bias_init",), _has("sigmoid"), ("model.kind", "objectives"), "only the sigmoid loss uses it"),
    Rule(
        "data",
        ("weight", "schedule"),
        lambda recipe: bool(recipe.data.also),
        ("data.also",),
        "there is nothing to mix with: data.also is empty",
    ),
    Rule(
        "data",
        ("window",),
        lambda recipe: recipe.data.block > 0,
        ("data.block",),
        "without data.block nothing is read in blocks",
    ),
    Rule(
        "data",
        ("cache_gib",),
        _at_a_url,
        ("data.train", "data.test", "data.also"),
        "no shards are at a URL, and only those are cached",
    ),
    Rule(
        "data",
        ("most_workers", "ahead_gib", "ray"),
        lambda recipe: recipe.data.loader == "ray",
        ("data.loader",),
        "only data.loader=ray uses it",
    ),
    Rule(
        "layout",
        ("memory_gib",),
        lambda recipe: recipe.layout.auto,
        ("layout.auto",),
        "only layout.auto=true chooses by memory",
    ),
    Rule(
        "layout",
        ("tp", "pp", "zero", "sequence_parallel", "recompute"),
        lambda recipe: not recipe.layout.auto,
        ("layout.auto",),
        "layout.auto=true chooses it",
    ),
    Rule(
        "eval",
        ("every",),
        lambda recipe: recipe.data.test is not None or recipe.eval.every == 0,
        ("data.test",),
        "data.test is not set, so nothing is evaluated",
    ),
)
SMOOTHING = Rule(
    "objectives", ("label_smoothing",), lambda recipe: False, ("objectives",), "only the contrastive loss uses it"
)


def rules_of(recipe: Recipe) -> Iterator[tuple[str, Rule]]:
    """Every key that changes nothing in this recipe, whatever its value, with the rule that says so."""
    for rule in RULES:
        if not rule.matter(recipe):
            yield from ((f"{rule.section}.{key}", rule) for key in rule.keys)


def ignored(recipe: Recipe) -> Iterator[Ignored]:
    """The keys with another value than their default that change nothing."""
    for key, rule in rules_of(recipe):
        *parents, leaf = key.split(".")
        section: Any = recipe
        for parent in parents:
            section = getattr(section, parent)
        default = type(section).model_fields[leaf].get_default(call_default_factory=True)
        if (value := getattr(section, leaf)) != default:
            yield Ignored(key, value, default, rule)
    for number, objective in enumerate(recipe.objectives):
        if objective.name != "contrastive" and objective.label_smoothing:
            yield Ignored(f"objectives.{number}.label_smoothing", objective.label_smoothing, 0.0, SMOOTHING)
