"""What a user can mend, said in one sentence.

The command line prints the sentence and leaves with `exit_code`: 2 when the request is wrong (a bad key, a
missing file), 1 when the thing asked about is bad (a checkpoint that does not verify, a run that cannot go on).
"""

from __future__ import annotations

import errno

# What torch, CUDA's libraries and C++ say when there is no memory left, on the host or on a card
NO_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "cannot allocate memory",
    "not enough memory",
    "cublas_status_alloc_failed",
    "bad_alloc",
)


class WeftError(Exception):
    """A sentence for the user, and the exit code that goes with it."""

    exit_code = 1


class RequestError(WeftError, ValueError):
    """The request is wrong: a bad key or value, a missing file, a layout that cannot be right."""

    exit_code = 2


class MemoryFullError(WeftError):
    """The memory is full; `lasting`: it would be at another attempt too."""

    def __init__(self, sentence: str, lasting: bool = True) -> None:
        super().__init__(sentence)
        self.lasting = lasting


class DivergedError(WeftError):
    """A run ended because its last steps went wrong, or because its model is of no use; the manifest keeps why."""

    def __init__(self, sentence: str, step: int = 0, why: str = "", good: str | None = None) -> None:
        super().__init__(sentence)
        self.step, self.why = step, why
        self.good = good  # the name of a checkpoint that is worth beginning with, where one is known


def is_memory_full(error: BaseException) -> bool:
    """Whether an error says that the memory of the host or of a card is full."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's, of a card
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in NO_MEMORY)
