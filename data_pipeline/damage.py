"""The one boundary around a sample: whatever goes wrong in reading or using it is the damage of that sample.

    with opened(dataset, number) as sample:
        pixels = decode_image(sample.fields["jpg"])

Design choices:
- Bytes from the web raise nearly anything: KeyError, struct.error, zlib.error, RecursionError, MemoryError, whatever a
  library has. So no list of exceptions is kept up: all of them are a DamagedSampleError here, and nowhere else.
- An error of our own code looks alike, so its type and place stay with the damage (`cause_of`), and quarantine.jsonl
  has them. One that hits every sample ends the run: no replacement is found, or the limit is passed.
- What is about the shard and not the sample passes: a file that is missing, truncated or cannot be read.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from traceback import extract_tb
from typing import Protocol

from data_pipeline.errors import DamagedSampleError, DataError, first_line
from data_pipeline.sample import Sample

EMPTY = "it is empty: its row holds no value"  # a row of Parquet; in a tar, what has no field is no sample
HERE = Path(__file__).resolve().parent


class Samples(Protocol):
    """A data set: `Dataset`, or `Joined`."""

    def read(self, sample: int) -> Sample:
        """The sample of this id."""

    def key(self, sample: int) -> str:
        """Its key."""

    def shard_file(self, sample: int) -> str:
        """The shard that holds it."""


@contextmanager
def opened(dataset: Samples, number: int) -> Iterator[Sample]:
    """The sample of this id. What is raised in the block is a DamagedSampleError that names the sample and its shard.

    Raises DataError or OSError when the shard itself cannot be read. Keep the block to what the sample is to blame
    for: an error of a model or of a disk that is written to is none of its own.
    """
    key = ""
    try:
        try:
            sample = dataset.read(number)
        except DamagedSampleError:
            raise
        except (DataError, OSError) as error:
            raise _ShardError(error) from error
        key = sample.key
        if not sample.fields:
            raise DamagedSampleError(key, EMPTY)
        yield sample
    except _ShardError as passed:
        raise passed.error from passed.error.__cause__
    except DamagedSampleError as error:
        error.shard = error.shard or dataset.shard_file(number)
        raise
    except Exception as error:  # see the module: this is the one place that takes whatever is raised
        reason = str(error) if isinstance(error, DataError) else f"{type(error).__name__}: {first_line(error)}"
        raise DamagedSampleError(key or dataset.key(number), reason, dataset.shard_file(number)) from error


class _ShardError(Exception):
    """An error of reading that is not the sample's, on its way past the boundary."""

    def __init__(self, error: Exception) -> None:
        super().__init__(error)
        self.error = error


def cause_of(error: BaseException) -> str:
    """What raised first, and where in our code: "KeyError in decode.py, line 94"."""
    while error.__cause__ is not None:
        error = error.__cause__
    name = type(error).__name__
    ours = [frame for frame in extract_tb(error.__traceback__) if Path(frame.filename).resolve().is_relative_to(HERE)]
    return f"{name} in {Path(ours[-1].filename).name}, line {ours[-1].lineno}" if ours else name
