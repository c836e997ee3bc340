"""Work of the first rank that all others wait for: its result and its errors reach every rank."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from pretrain.parallel.groups import Ranks

Result = TypeVar("Result")


def from_first(work: Callable[[], Result], ranks: Ranks) -> Result:
    """What `work` gives on the first rank, on every rank; whatever it raises there is raised on every rank."""
    if ranks.world == 1:
        return work()
    told: list[tuple[Exception | None, Result | None]] = [(None, None)]
    if ranks.is_first:
        try:
            told = [(None, work())]
        except Exception as error:  # whatever it is: the other ranks wait
            told = [(sendable(error), None)]
    dist.broadcast_object_list(told, src=0, group=ranks.control_group)
    failure, result = told[0]
    if failure is not None:
        raise failure
    return result  # type: ignore[return-value]  # it is a Result where there is no error


def sendable(error: Exception) -> Exception:
    """For the other ranks: the error itself, or what it says where it does not survive the way to another process."""
    error = error.with_traceback(None)
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # an exception of any class may refuse to be pickled, or to be made again, in any way
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
