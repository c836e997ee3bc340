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
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pretrain.errors import WeftError
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
        self.skipped: int = memory.get("skipped", 0)  # steps that changed nothing

    def memory(self) -> dict[str, Any]:
        """For a checkpoint; fits JSON."""
        return {"losses": list(self._losses), "in_a_row": self._in_a_row, "skipped": self.skipped}

    @property
    def loss_limit(self) -> float:
        """The next step is to change nothing when its loss is above this."""
        if not self._settings.spike or len(self._losses) < LEAST:
            return math.inf
        return self._settings.spike * statistics.median(self._losses)

    def judge(self, stepped: Stepped, step: int) -> None:
        """Count; WeftError when more than `train.max_skipped` steps in a row changed nothing."""
        if stepped.updated:
            self._losses.append(stepped.loss)
            self._in_a_row = 0
            return
        self.skipped += 1
        self._in_a_row += 1
        if self._in_a_row > self._settings.max_skipped:
            raise WeftError(
                f"step {step}: loss {stepped.loss}, gradient norm {stepped.grad_norm}, and the last {self._in_a_row} "
                f"step(s) changed nothing (train.max_skipped={self._settings.max_skipped}); lower train.lr, or raise "
                f"train.warmup, and go on from the last checkpoint in {self._run / 'checkpoints'}"
            )
