"""Being told to stop: SIGINT and SIGTERM are collected, and looked at between steps."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

from pretrain.parallel.groups import world_size


@contextmanager
def stop_on_signal() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM instead of dying of them; a single process gives up at the second Ctrl-C."""
    received: list[int] = []

    def note(number: int, _: object) -> None:
        # with several ranks the terminal and the launcher both pass on the same Ctrl-C
        if received and number == signal.SIGINT and world_size() == 1:
            raise KeyboardInterrupt
        received.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
