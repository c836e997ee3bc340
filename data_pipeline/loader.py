"""Batches for one rank: steps of the order in, uint8 images and token ids out, in process or by worker processes.

The way of a batch: step -> this rank's positions -> sample ids (order) -> rows (batch).

Design choices:
- A batch is a pure function of its positions. Workers are torch's DataLoader over the map "step -> batch": they hold no
  state, a run resumes at any step, and any number of ranks and workers reads the same global batches.
- A worker's images lie in memory that it shares with the trainer (slots.py) and only the number of the slot travels;
  the rest is small and travels as it is.
- Errors travel from the workers as values, so the user sees our sentence and no traceback of another process.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, get_worker_info
from torch.utils.data import Dataset as TorchDataset

from data_pipeline.batch import Batch, BatchMaker, Corrupt, Share, at_start
from data_pipeline.errors import DataError
from data_pipeline.order import Order, ReadingOrder
from data_pipeline.slots import Slots

PREFETCH = 2  # batches a worker keeps ready
HELD = 3  # batches the consumer may hold, before more are sent by copy: the last, the one in hand, and one in advance
SEES_SENDER = hasattr(signal, "sigtimedwait")  # not on macOS
WATCH_SECONDS = 1.0  # how often a worker looks whether the trainer is still there


class Loader:
    """The batches of one rank, for steps start_step .. stop_step - 1; iterate it, or measure it with len().

    Step k is rows [k * global_batch + rank * share, + share) of the order, share = global_batch / world. `workers`
    processes make the batches, 0 = this one. `pin` puts batches in page-locked memory for a GPU.
    Raises ValueError when the batch, the ranks and the data set do not fit each other.
    """

    def __init__(
        self,
        maker: BatchMaker,
        order: ReadingOrder,
        *,
        global_batch: int,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
        start_step: int = 0,
        stop_step: int,
        pin: bool = False,
    ) -> None:
        self._share = Share(maker, order, global_batch, rank, world)
        if workers < 0:
            raise ValueError(f"workers is {workers}: give 0 (this process) or more")
        self.steps = range(start_step, stop_step)
        self._workers = workers
        self._pin = pin

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Generator[Batch, None, None]:
        yield from _iterate(self._share, self.steps, self._workers, self._pin)


def sequential_batches(
    maker: BatchMaker, samples: int, batch_size: int, rank: int = 0, world: int = 1, workers: int = 0
) -> Iterator[Batch]:
    """Samples 0 .. samples - 1 in order, for evaluation: batches rank, rank + world, ... and a short last one.

    Raises ValueError when the data set has fewer samples.
    """
    if not 0 <= samples <= len(maker.dataset):
        raise ValueError(f"{samples} samples asked of {maker.dataset.folder}, which has {len(maker.dataset)}")
    share = Share(maker, Order(len(maker.dataset), 0, shuffle=False), batch_size, stop=samples)
    yield from _iterate(share, range(rank, -(-samples // batch_size), world), workers, pin=False)


@dataclass(frozen=True)
class _Batches(TorchDataset):
    """What DataLoader's workers evaluate: (step, slot) -> batch, its images in the slot if there is one."""

    share: Share
    slots: Slots | None

    def __getitem__(self, request: tuple[int, int | None]) -> Batch | _Parcel | DataError | OSError:
        step, slot = request
        try:
            batch = self.share.batch(step, None if self.slots is None or slot is None else self.slots.tensor(slot))
        except (DataError, OSError) as error:
            return error.with_traceback(None)
        return batch if get_worker_info() is None else _Parcel.pack(batch, self.slots, slot)


@dataclass
class _Parcel:
    """A batch on its way from a worker: its images in a slot, or sent as a tensor where no slot was free."""

    slots: Slots | None
    slot: int | None
    shape: tuple[int, ...]  # of the images as they lie in the slot
    image: torch.Tensor | None
    others: dict[str, np.ndarray]  # the other tensors of the batch, by name
    corrupt: list[Corrupt]

    @classmethod
    def pack(cls, batch: Batch, slots: Slots | None, slot: int | None) -> _Parcel:
        """In the worker."""
        others = {name: tensor.numpy() for name, tensor in batch.tensors().items() if name != "image"}
        shape = tuple(batch.image.permute(0, 2, 3, 1).shape)
        if slots is None or slot is None:
            return cls(None, None, shape, batch.image, others, batch.corrupt)
        return cls(slots, slot, shape, None, others, batch.corrupt)

    def open(self) -> Batch:
        """In the trainer."""
        image = self.image
        if self.slots is not None and self.slot is not None:
            image = at_start(self.slots.lend(self.slot), self.shape).permute(0, 3, 1, 2)
        assert image is not None
        others = {name: torch.from_numpy(array) for name, array in self.others.items()}
        return Batch(image=image, corrupt=self.corrupt, **others)

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory; DataLoader's pinning calls this."""
        return self.open().pin_memory()


def _iterate(share: Share, steps: range, workers: int, pin: bool) -> Iterator[Batch]:
    """The batches of `steps`, in order; the workers are gone when the iterator is."""
    workers = min(workers, len(steps))
    slots = None
    if workers and share.maker.image and _worker_context() == "fork":  # only a forked worker has the same memory
        slots = Slots(workers * PREFETCH + HELD, share.maker.image_shape(share.rows))
    loader = DataLoader(
        _Batches(share, slots),
        batch_size=None,  # an item is a batch already
        sampler=((step, slots.take() if slots else None) for step in steps),  # asked when a worker is given its task
        collate_fn=_unchanged,
        num_workers=workers,
        prefetch_factor=PREFETCH if workers else None,
        worker_init_fn=partial(_start_worker, os.getpid()) if workers else None,
        multiprocessing_context=_worker_context() if workers else None,
        pin_memory=pin,
    )
    with _no_garbage_to_inherit():
        received = iter(loader)  # starts the workers
    for batch in received:
        if isinstance(batch, Exception):
            raise batch
        yield batch.open() if isinstance(batch, _Parcel) else batch


@contextmanager
def _no_garbage_to_inherit() -> Iterator[None]:
    """What is forked here collects nothing that was there before.

    Garbage of the trainer may have threads behind it, as process groups of an earlier run do: destroyed in a worker,
    which has no such threads, it ends the worker with a segmentation fault. So it is
    collected, and what is left is frozen: never looked at there.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _unchanged(batch: Any) -> Any:
    return batch


def _start_worker(trainer: int, worker: int) -> None:
    """Leave Ctrl-C and SIGTERM, which reach every process of a terminal or a job, to the trainer's process.

    It finishes its step, saves and ends its workers; were one of them gone before, DataLoader would raise instead.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if SEES_SENDER:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # only `_end_with` takes it, and sees who sent it
    threading.Thread(target=_end_with, args=(trainer,), daemon=True).start()


def _end_with(trainer: int) -> None:
    """End this worker when the trainer is gone, or sends SIGTERM itself.

    DataLoader sees to the first only where a worker waits for work: one that has more to send than a pipe holds would
    wait for a reader for ever, as every worker has inherited the reading end and so keeps the pipe open itself.
    """
    while os.getppid() == trainer:
        if not SEES_SENDER:
            time.sleep(WATCH_SECONDS)
        elif (told := signal.sigtimedwait({signal.SIGTERM}, WATCH_SECONDS)) and told.si_pid == trainer:
            break
    os._exit(1)


def _worker_context() -> str:
    """Fork where it exists: a worker is there at once, and shares the tables of offsets that are loaded."""
    return "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"
