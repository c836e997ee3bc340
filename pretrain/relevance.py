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
    way_out: str = "leave it out"


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


def _begins_anew(parameter: str) -> Callable[[Recipe], bool]:
    """Whether a parameter has its initial value, and is not one that a warm start brings."""

    def begins_anew(recipe: Recipe) -> bool:
        train = recipe.train
        return train.init_from is None or (bool(train.init_only) and not parameter.startswith(train.init_only))

    return begins_anew


def _never_read(recipe: Recipe) -> Iterator[tuple[str, float]]:
    """(key, weight) of each source of a mixture that no weight lets in: its own is 0, and those of the schedule too."""
    data = recipe.data
    weights = {"data.weight": data.weight} | {f"data.also.{i}.weight": each.weight for i, each in enumerate(data.also)}
    for number, (key, weight) in enumerate(weights.items() if data.also else ()):
        if not weight and not any(phase.weights[number] for phase in data.schedule):
            yield key, weight


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
        "model",
        ("logit_scale_init",),
        _begins_anew("logit_scale.log"),
        ("train.init_from", "train.init_only"),
        "the scale comes with the weights of train.init_from",
    ),
    Rule(
        "model",
        ("logit_bias_init",),
        _begins_anew("logit_bias.value"),
        ("train.init_from", "train.init_only"),
        "the bias comes with the weights of train.init_from",
    ),
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
    Rule("eval", ("templates",), _is_dual, ("model.kind",), "model.kind=captioner does not classify"),
)
SMOOTHING = Rule(
    "objectives", ("label_smoothing",), lambda recipe: False, ("objectives",), "only the contrastive loss uses it"
)
UNREAD = Rule(
    "data",
    ("also",),
    lambda recipe: False,
    (),
    "no weight of data.schedule is more, so that this source is never read",
    "give it a weight, or name only sources that are read",
)


def rules_of(recipe: Recipe) -> Iterator[tuple[str, Rule]]:
    """Every key that changes nothing in this recipe, whatever its value, with the rule that says so."""
    told: dict[str, Rule] = {}
    for rule in RULES:
        if not rule.matter(recipe):
            told |= {name: rule for key in rule.keys if (name := f"{rule.section}.{key}") not in told}
    yield from told.items()


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
    for key, weight in _never_read(recipe):
        yield Ignored(key, weight, 1.0, UNREAD)
