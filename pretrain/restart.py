"""Whether a job that ended is started again, and on how many ranks.

torch's elastic agent can restart by itself, but it does so after every failure, a misspelt key too, and always with as
many ranks. So each attempt is one launch without restarts of its own, and what comes next is decided here, by plain
functions of plain values: a scheduler that starts jobs over many machines can ask them the same.

What a new attempt trains on needs no decision: step k has the same samples at any number of ranks, and
train.resume=auto goes on from the newest complete checkpoint.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pretrain.checkpoint.format import describe, newest_first
from pretrain.config import Recipe
from pretrain.errors import RequestError, WeftError
from pretrain.parallel.choose import with_layout
from pretrain.parallel.layout import lay_out

NO_PROGRESS = 75  # exit code of a rank that its watchdog ended (EX_TEMPFAIL of sysexits.h: try again)
SAME_MOMENT = 1  # seconds; ranks that end so close together are looked at together, for clocks here have whole seconds


@dataclass(frozen=True)
class End:
    """How one rank ended that did not end well."""

    rank: int
    code: int  # exit code; minus the number of the signal that killed it
    seen: float = 0.0  # Unix seconds
    said: str = ""  # the sentence for the user with which it ended by itself: a mistake, bad data
    lasting: bool = True  # whether another attempt would end with that sentence too, as far as can be known

    @property
    def exit_code(self) -> int:
        """As a shell would say it."""
        return self.code if self.code > 0 else 128 - self.code

    @property
    def is_final(self) -> bool:
        """Whether another attempt would end the same way (a sentence for the user), or was not wanted (a stop)."""
        return bool(self.said and self.lasting) or self.code == RequestError.exit_code or self.exit_code in _STOPS

    def __str__(self) -> str:
        if self.code == NO_PROGRESS:
            how = "was ended by its watchdog"
        elif self.code < 0:
            how = f"was killed by {_signal_name(-self.code)}"
            if self.code == -signal.SIGKILL:
                how += " (someone's, or the system's for want of memory)"
        else:
            how = f"failed with exit code {self.code}"
        return f"rank {self.rank} {how}"


_STOPS = {128 + number for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}


def cause(ends: Sequence[End]) -> End:
    """The end that brought the others about: of those seen first, the one least likely to follow from another.

    A rank whose peer is gone fails with an error of its collective, is told to stop by the launcher, or is killed by it
    half a minute later; none of these is what happened.
    """
    first = min(end.seen for end in ends)
    return min((end for end in ends if end.seen <= first + SAME_MOMENT), key=lambda end: (_follows(end), end.rank))


def _follows(end: End) -> int:
    """0 for what surely came by itself, more for what may have followed from another rank's end."""
    if end.exit_code in _STOPS:  # the launcher may end a rank that has just said its sentence
        return 5
    if end.said and end.lasting:
        return 0
    if end.code == NO_PROGRESS:
        return 2
    if end.code < 0:
        return 3 if end.code == -signal.SIGABRT else 1  # libraries abort when a peer is gone
    return 4


def next_ranks(end: End, ranks: int, *, restarts_left: int, progressed: bool, smaller: Sequence[int]) -> int | None:
    """On how many ranks to start again after an attempt on `ranks` ranks that ended by `end`; None: not again.

    `progressed`: it left a newer checkpoint than it began from, so the same ranks may well get further. `smaller`: the
    allowed smaller numbers of ranks; the largest is taken after an attempt that got nowhere, the same as before where
    there is none.
    """
    if end.is_final or restarts_left < 1:
        return None
    return ranks if progressed else max(smaller, default=ranks)


class Restarts:
    """What `weft train --restarts` does between attempts: decides, and says so in one line on stderr."""

    def __init__(self, recipe: Recipe, ranks: int, restarts: int, least: int) -> None:
        self._recipe, self._ranks, self._restarts, self._least = recipe, ranks, restarts, least
        self._done = 0
        self._began = newest_step(recipe.run.dir)

    def __call__(self, ends: Sequence[End]) -> int | None:
        """The number of ranks of the next attempt, or None."""
        end, reached = cause(ends), newest_step(self._recipe.run.dir)
        smaller = [ranks for ranks in range(self._least, self._ranks) if fits(self._recipe, ranks)]
        left = self._restarts - self._done
        ranks = next_ranks(end, self._ranks, restarts_left=left, progressed=reached > self._began, smaller=smaller)
        if ranks is not None:
            self._done += 1
            self._ranks, self._began = ranks, reached
            self._say(
                f"{end}; restart {self._done} of {self._restarts} goes on from step {reached} with {ranks} rank(s)"
            )
        elif not end.is_final:
            self._say(f"{end}; all {self._restarts} restart(s) are used up, the newest checkpoint is of step {reached}")
        return ranks

    def _say(self, text: str) -> None:
        print(f"weft: {text}", file=sys.stderr, flush=True)


def fits(recipe: Recipe, ranks: int) -> bool:
    """Whether the recipe's layout is possible on so many ranks."""
    try:
        lay_out(with_layout(recipe, ranks), ranks)
    except RequestError:
        return False
    return True


def newest_step(run: Path) -> int:
    """The step of the newest complete checkpoint of a run folder that can be read; 0 where there is none."""
    for path in newest_first(run):
        with suppress(WeftError):
            return describe(path).step
    return 0


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
