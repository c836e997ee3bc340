"""A warm start: the weights of another run's checkpoint, whole or by the beginnings of their names, into a new run.

Only weights: the optimizer, the step and the schedule are the new run's own. That is how a finished run is trained
longer, how one that diverged is begun anew with a lower rate, and how a tower is taken over (LiT: it is frozen too).
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Any

from pretrain.checkpoint.format import Checkpoint, describe
from pretrain.config import Recipe
from pretrain.errors import RequestError, WeftError

TOKEN_TABLE = "tokens.weight"


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
    """What train.init_from and train.init_only name; None without. Raises RequestError for what is not there."""
    settings = recipe.train
    if settings.init_from is None:
        return None
    try:
        found = WarmStart(describe(settings.init_from.expanduser()), settings.init_only)
    except WeftError as error:
        raise RequestError(f"train.init_from: {error}") from error
    for prefix in settings.init_only:
        if not any(name.startswith(prefix) for name in found.checkpoint.parameters):
            raise RequestError(
                f"train.init_only: no parameter of {found.checkpoint.path} begins with {prefix!r}"
                f"{_nearest(prefix, list(found.checkpoint.parameters))}"
            )
    return found


def _nearest(prefix: str, names: list[str]) -> str:
    tops = list(dict.fromkeys(f"{name.split('.')[0]}." for name in names))
    close = difflib.get_close_matches(prefix, tops, n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else f": they begin with {', '.join(tops)}"
