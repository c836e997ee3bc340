"""Being told to stop: signals are collected, and looked at between steps and within an evaluation.

SIGINT is Ctrl-C, SIGTERM a scheduler's or a launcher's, SIGHUP that of a terminal or a connection which was closed;
nohup has the last ignored, and so it stays.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from pretrain.parallel.engine import Engine
from pretrain.parallel.groups import Ranks, world_size

STOPS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}


@contextmanager
def stop_on_signal() -> Iterator[list[int]]:
    """Collects what tells a run to stop instead of dying of it; a single process gives up at the second Ctrl-C."""
    received: list[int] = []

    def note(number: int, _: object) -> None:
        # with several ranks the terminal and the launcher both pass on the same Ctrl-C
        if received and number == signal.SIGINT and world_size() == 1:
            raise KeyboardInterrupt
        received.append(number)

    stops = STOPS if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN else STOPS - {signal.SIGHUP}
    before = {number: signal.signal(number, note) for number in stops}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class StopAskedError(Exception):
    """A rank was told to stop while all of them evaluated; raised on every rank at the same batch."""


class Interruptible:
    """An engine that an evaluation runs, until a rank is told to stop: asked of all ranks at each batch.

    Every rank runs the model equally often in an evaluation, so all of them leave it at the same place.
    """

    def __init__(self, engine: Engine, ranks: Ranks, received: list[int]) -> None:
        self._engine, self._ranks, self._received = engine, ranks, received

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._engine, name)
        return self._asking(found) if name in ("encode_image", "encode_text", "token_losses") else found

    def _asking(self, run: Callable[..., Any]) -> Callable[..., Any]:
        def asked(*inputs: Any) -> Any:
            if int(self._ranks.agree(torch.tensor([int(bool(self._received))]))):
                raise StopAskedError
            return run(*inputs)

        return asked
