"""What only the first rank does reaches every rank: its result, and whatever it raises."""

from __future__ import annotations

import torch
from ranks import run_ranks

from pretrain.parallel.first import from_first, sendable
from pretrain.parallel.groups import start_ranks, stop_ranks
from pretrain.parallel.layout import Layout


class OddError(Exception):
    """One that cannot be made again from its arguments."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


def first_works(rank: int, world: int) -> list[str]:
    ranks = start_ranks(Layout(world=world, dp=world, tp=1, zero=1, share=1, micro_batch=1), torch.device("cpu"))
    found = [from_first(lambda: f"made by rank {rank}", ranks)]
    for error in (KeyError("x"), OddError(1, 2), OSError(28, "No space left on device")):

        def fail(error: Exception = error) -> str:
            raise error

        try:
            from_first(fail, ranks)
        except Exception as raised:
            found.append(f"{type(raised).__name__}: {raised}")
    stop_ranks(ranks)
    return found


def test_all_ranks_have_it() -> None:
    first, second = run_ranks(first_works, 2, timeout=900)
    assert first[0] == second[0] == "made by rank 0"
    assert second[1] == first[1] == "KeyError: 'x'"
    assert first[3] == second[3] == "OSError: [Errno 28] No space left on device"
    assert "1 and 2" in second[2]


def test_an_error_that_cannot_travel_is_told_in_words() -> None:
    assert repr(sendable(OddError(1, 2))) == "RuntimeError('OddError: 1 and 2')"
    assert isinstance(sendable(ValueError("x")), ValueError)
