"""A warm start: the weights of another run's checkpoint, whole or by the beginnings of their names, into a new run.

Only weights: the optimizer, the step and the schedule are the new run's own. That is how a finished run is trained
longer, how one that diverged is begun anew with a lower rate, and how a tower is taken over (LiT: it is frozen too).
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from pretrain.checkpoint.format import Checkpoint, describe, description_problem
from pretrain.config import Recipe, recipe_of
from pretrain.errors import RequestError, WeftError

TOKEN_TABLE = "tokens.weight"
# Settings of attention by the beginning of its weights' names. Shapes do not show them: the rows of linear_qkv are in
# order of the heads. An image of another size changes no meaning, for its fixed positions count on.
ATTENTION = ".self_attention."
UNSEEN = {"vision.": ("vision.heads",), "text.": ("text.heads", "text.causal"), "decoder.": ("text.heads",)}


@dataclass(frozen=True)
class WarmStart:
    """Which weights of which checkpoint a run begins with."""

    checkpoint: Checkpoint
    only: tuple[str, ...]  # beginnings of names; () = all

    @property
    def names(self) -> list[str]:
        """The parameters of the checkpoint that are taken over."""
        return [name for name in self.checkpoint.parameters if not self.only or name.startswith(self.only)]

    @property
    def brings_tokenizer(self) -> bool:
        """Whether a table of tokens is among them: it is of use only with the tokenizer that it was trained with."""
        return any(name.endswith(TOKEN_TABLE) for name in self.names)

    def record(self) -> dict[str, Any]:
        """For the manifest."""
        return {
            "path": str(self.checkpoint.path),
            "step": self.checkpoint.step,
            "data_fingerprint": self.checkpoint.data_fingerprint,
            "only": list(self.only),
        }

    def __str__(self) -> str:
        part = f"{len(self.names)} of {len(self.checkpoint.parameters)}" if self.only else "all"
        return f"{part} weights of {self.checkpoint.path} (step {self.checkpoint.step})"


def find_warm_start(recipe: Recipe) -> WarmStart | None:
    """What train.init_from and train.init_only name; None without.

    Raises RequestError for what is not there or of another model, WeftError for a changed `checkpoint.json`.
    """
    settings = recipe.train
    if settings.init_from is None:
        return None
    try:
        found = WarmStart(describe(settings.init_from.expanduser()), settings.init_only)
    except WeftError as error:
        raise RequestError(f"train.init_from: {error}") from error
    if not found.checkpoint.description_is_whole:
        raise WeftError(f"train.init_from: {description_problem(found.checkpoint)}")
    for prefix in settings.init_only:
        if not any(name.startswith(prefix) for name in found.checkpoint.parameters):
            raise RequestError(
                f"train.init_only: no parameter of {found.checkpoint.path} begins with {prefix!r}"
                f"{_nearest(prefix, list(found.checkpoint.parameters))}"
            )
    _refuse_another_meaning(found, recipe)
    return found


def _refuse_another_meaning(warm: WarmStart, recipe: Recipe) -> None:
    """RequestError for weights that fit in shape only; that all shapes fit is seen when they are loaded."""
    theirs = recipe_of(warm.checkpoint.recipe, str(warm.checkpoint.path))
    keys = ["kind"]
    for part, settings in UNSEEN.items():
        if any(name.startswith(part) and ATTENTION in name for name in warm.names):
            keys += settings
    values = {key: tuple(attrgetter(key)(each.model) for each in (theirs, recipe)) for key in keys}
    wrong = [f"model.{key}={there} there, {here} here" for key, (there, here) in values.items() if there != here]
    if wrong:
        part = (
            "" if warm.only or "model.kind" in wrong[0] else ", or take over a part, such as train.init_only=[vision.]"
        )
        raise RequestError(
            f"train.init_from: the weights of {warm.checkpoint.path} are of another model ({'; '.join(wrong)}): use "
            f"the model of that checkpoint{part}"
        )


def _nearest(prefix: str, names: list[str]) -> str:
    tops = list(dict.fromkeys(f"{name.split('.')[0]}." for name in names))
    close = difflib.get_close_matches(prefix, tops, n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else f": they begin with {', '.join(tops)}"
