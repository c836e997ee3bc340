"""What a filter step is: something that judges one sample alone, or one that needs a few bytes of all of them.

Design choices:
- A step is a pure function of the sample (and, for a `SetStep`, of all signatures in order), so any number of processes
  comes to the same result, and a sample can be looked at again when it is written.
- What a sample lacks is not judged: a step about pictures lets a sample without one pass.
- What cannot be read is not the step's to handle: it lets the DataError rise, and the sample is dropped for that.
- A reason is one of a few fixed texts, by which samples are counted; numbers of one sample belong into the detail.
  Neither quotes the sample: a report must not hold the personal data that was removed.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from data_pipeline.sample import Sample


@dataclass(frozen=True)
class Drop:
    """The sample goes: `reason` is what it is counted under, `detail` what it was in this one."""

    reason: str
    detail: str = ""


@dataclass(frozen=True)
class Change:
    """The sample stays as another one; `what` names the kinds of change, and it is counted under each."""

    sample: Sample
    what: tuple[str, ...]  # at least one


Outcome = Drop | Change | None  # None: the sample stays as it is


@dataclass(frozen=True)
class Signatures:
    """What was computed of the samples of a set, in their order; `place(row)` says in words which sample a row is."""

    rows: np.ndarray  # uint8 [samples, bytes]
    place: Callable[[int], str]

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True)
class Removed:
    """Rows to drop for one reason, ascending; `detail(row)` says what it was in one of them."""

    reason: str
    rows: np.ndarray  # int64
    detail: Callable[[int], str]


class _Named(ABC):
    """A step by the name it has on a command line; a subclass is a frozen dataclass, its fields are its options."""

    name: ClassVar[str]

    def options(self) -> dict[str, Any]:
        """Name -> value as JSON can hold it: what a report says of how the step was set."""
        assert dataclasses.is_dataclass(self), f"{type(self).__name__} is not a dataclass"
        tree = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: str(value) if isinstance(value, Path) else value for name, value in tree.items()}


class SampleStep(_Named):
    """A step that judges each sample alone."""

    @abstractmethod
    def look(self, sample: Sample) -> Outcome:
        """Keep, drop or change one sample; DataError when it cannot be read."""


class SetStep(_Named):
    """A step that judges a sample by all others: a cheap signature of each, and one decision over them."""

    width: ClassVar[int]  # bytes of a signature
    compares: ClassVar[bool] = False  # whether it also knows what to do with a test set

    @abstractmethod
    def signature(self, sample: Sample) -> Drop | bytes | None:
        """`width` bytes; None when the sample has nothing to compare, and stays. DataError when it cannot be read."""

    @abstractmethod
    def decide(self, mine: Signatures, test: Signatures | None) -> list[Removed]:
        """What to drop of `mine`, no row twice; `test`, where one was given, is what must not be in it."""


Step = SampleStep | SetStep
