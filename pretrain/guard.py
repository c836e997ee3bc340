"""What becomes of a step that went wrong: it changes nothing, it is counted, and too many in a row end the run.

Two things go wrong: gradients that are not finite (the engine then leaves parameters and moments as they are), and,
where `train.spike` asks for it, a loss far above those before it, which a bad batch gives and which the moments would
remember. Every rank sees the same norms, so all decide alike. What is remembered goes into checkpoints, so a run that
was stopped judges as one that was not.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pretrain.checkpoint.format import newest_first, newest_of, step_folder
from pretrain.errors import DivergedError
from pretrain.parallel.engine import Stepped
from pretrain.sections import Train

REMEMBERED, LEAST = 50, 10  # losses that a new one is compared with; with fewer than LEAST nothing is a spike


class Guard:
    """Judges the steps of a run; `memory` is what `memory()` gave at the checkpoint it goes on from."""

    def __init__(self, settings: Train, run: Path, memory: Mapping[str, Any] | None = None) -> None:
        self._settings, self._run = settings, run
        memory = memory or {}
        self._losses: deque[float] = deque(memory.get("losses", ()), maxlen=REMEMBERED)
        self._in_a_row: int = memory.get("in_a_row", 0)
        self._not_finite: int = memory.get("not_finite", self._in_a_row)  # of those
        self.skipped: int = memory.get("skipped", 0)  # steps that changed nothing

    def memory(self) -> dict[str, Any]:
        """For a checkpoint; fits JSON."""
        return {
            "losses": list(self._losses),
            "in_a_row": self._in_a_row,
            "not_finite": self._not_finite,
            "skipped": self.skipped,
        }

    @property
    def loss_limit(self) -> float:
        """The next step is to change nothing when its loss is above this."""
        if not self._settings.spike or len(self._losses) < LEAST:
            return math.inf
        return self._settings.spike * statistics.median(self._losses)

    @property
    def problem(self) -> str:
        """Why a run that ends here has diverged, "" when it has not: of its last steps, which were skipped, some were
        not finite. Spikes are bad batches: the weights are those of a good step.
        """
        if not self._not_finite:
            return ""
        steps = "step was" if self._in_a_row == 1 else f"{self._in_a_row} steps were"
        return f"the last {steps} skipped, because the loss or its gradients were not finite"

    @property
    def steady(self) -> bool:
        """Whether the last step changed the parameters: a checkpoint is worth having then."""
        return self._in_a_row == 0

    def judge(self, stepped: Stepped, step: int, settle: Callable[[], None] = lambda: None) -> None:
        """Count; DivergedError when more than `train.max_skipped` steps in a row changed nothing.

        `settle` is called before: what is being saved is there when the message says what can be done.
        """
        if stepped.updated:
            self._losses.append(stepped.loss)
            self._in_a_row = self._not_finite = 0
            return
        self.skipped += 1
        self._in_a_row += 1
        self._not_finite += not self._spiked(stepped)
        if self._in_a_row > self._settings.max_skipped:
            settle()
            why, good = self._what_happened(stepped), self._last_good(stepped, step)
            sentence = f"step {step}: {why}; {self._what_can_be_done(stepped, good)}"
            raise DivergedError(sentence, step, why, good.name if good else None)

    def _spiked(self, stepped: Stepped) -> bool:
        return math.isfinite(stepped.loss) and stepped.loss > self.loss_limit

    def _what_happened(self, stepped: Stepped) -> str:
        if self._spiked(stepped):
            why = (
                f"the loss, {stepped.loss:.4g}, is above train.spike={self._settings.spike:g} times the median of "
                f"the last {len(self._losses)}, which makes {self.loss_limit:.4g}"
            )
        else:
            why = f"the loss is {stepped.loss:.4g} and the gradient norm {stepped.grad_norm:.4g}"
        skipped = f"the last {self._in_a_row} steps were" if self._in_a_row > 1 else "the step was"
        return f"{why}; {skipped} skipped, more than train.max_skipped={self._settings.max_skipped}"

    def _what_can_be_done(self, stepped: Stepped, good: Path | None) -> str:
        change = "a larger train.spike" if self._spiked(stepped) else "a lower train.lr or a longer train.warmup"
        if good is not None:
            return f"start a new run from the last good checkpoint, with {change}: run.dir=OTHER train.init_from={good}"
        again = f"there is no good checkpoint from before: start again in another run.dir with {change}"
        if self._settings.init_from is not None and not math.isfinite(stepped.loss):
            return f"{again}, or from other weights than train.init_from={self._settings.init_from}"
        return again

    def _last_good(self, stepped: Stepped, step: int) -> Path | None:
        """The newest checkpoint, but none of the weights whose loss is not finite; None when there is none."""
        newest = newest_of(self._run / "checkpoints")
        if newest is None or math.isfinite(stepped.loss):
            return newest
        spoilt = step_folder(self._run, step - self._in_a_row).name  # no step has changed the weights since
        return next((path for path in newest_first(self._run) if path.name < spoilt), None)
