"""Batches for one rank: steps of the order in, uint8 images and token ids out, in process or by worker processes.

The way of a batch: step -> this rank's positions -> sample ids (order) -> rows (batch).

Design choices:
- A batch is a pure function of its positions. Workers evaluate the map "step -> batch": they hold no state, a run
  resumes at any step, and any number of ranks and workers reads the same global batches. So one that dies or hangs is
  replaced, and what it was making is made again: no batch is lost or comes twice (crew.py).
- Nothing is forked from this process, which has threads (fork_server.py).
- A worker's batches lie in memory that it shares with the trainer (slots.py); where what lies there is what travels.
- Errors travel from the workers as values, so the user sees our sentence and no traceback of another process.
"""

from __future__ import annotations

import os
import queue
import sys
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from math import prod

import numpy as np
import torch

from data_pipeline import crew
from data_pipeline.batch import Batch, BatchMaker, Corrupt, Share, at_start
from data_pipeline.crew import AHEAD, Crew, LostError, Patience
from data_pipeline.errors import DataError
from data_pipeline.order import Order, ReadingOrder
from data_pipeline.sample import Sample
from data_pipeline.slots import Slot, Slots, mapped

PREFETCH = AHEAD  # batches a worker keeps ready
HELD = 3  # batches the consumer may hold, before more get new memory: the last, the one in hand, and one in advance
ALIGN = 64  # bytes at which a tensor in a slot begins
SMALL = 1 << 20  # bytes of a tensor that is copied out of its slot, so that who keeps it does not keep the slot
PATIENCE = Patience()
KEPT = ("image", "audio")  # those that are never copied


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
class _Parcel:
    """Where the tensors of a batch lie in its slot: the images first, and then the others, each (type, shape, byte)."""

    image: tuple[int, ...]  # [b, H, W, 3]
    others: dict[str, tuple[str, tuple[int, ...], int]]
    corrupt: list[Corrupt]

    @classmethod
    def pack(cls, batch: Batch, memory: torch.Tensor) -> _Parcel:
        """In the worker, whose images are in the slot already."""
        image = tuple(batch.image.permute(0, 2, 3, 1).shape)
        others, at = {}, prod(image)
        for name, tensor in batch.tensors().items():
            if name != "image":
                array = tensor.numpy()
                at = -(-at // ALIGN) * ALIGN
                memory.numpy()[at : at + array.nbytes] = array.reshape(-1).view(np.uint8)
                others[name] = array.dtype.str, array.shape, at
                at += array.nbytes
        return cls(image, others, batch.corrupt)

    def open(self, memory: torch.Tensor) -> Batch:
        """In the trainer: images and sounds are views of the slot."""
        tensors = {"image": at_start(memory, self.image).permute(0, 3, 1, 2)}
        for name, (kind, shape, at) in self.others.items():
            dtype = torch.from_numpy(np.empty(0, kind)).dtype
            tensor = memory[at : at + prod(shape) * dtype.itemsize].view(dtype).view(shape)
            tensors[name] = tensor if name in KEPT else tensor.clone()
        return Batch(corrupt=self.corrupt, **tensors)


class _Maker:
    """What workers run: (step, slot) -> the batch, in the slot. Errors about the data are values."""

    def __init__(self, share: Share, size: int) -> None:
        self._share, self._size = share, size
        self._slots: torch.Tensor | None = None  # in a worker

    def __call__(self, step: int, slot: int) -> _Parcel | DataError | OSError:
        if self._slots is None:
            torch.set_num_threads(1)
            _mark_reads(self._share.maker)
            self._slots = torch.from_numpy(mapped(crew.shared_fds[0], 0)).view(-1, self._size)
        memory = torch.from_numpy(mapped(crew.job_fds[0], 0)) if slot < 0 else self._slots[slot]
        try:
            return _Parcel.pack(self._share.batch(step, memory), memory)
        except (DataError, OSError) as error:
            return error.with_traceback(None)


def _mark_reads(maker: BatchMaker) -> None:
    """Note each sample before it is read: should this process end, it is known at which."""
    dataset = maker.dataset
    read = dataset.read

    def marked(sample: int) -> Sample:
        crew.mark(sample)
        return read(sample)

    dataset.read = marked  # type: ignore[method-assign]  # of this one object, in a process of our own


def _bytes_of_others(share: Share) -> int:
    """What the tensors of a batch beside images and sounds take in a slot."""
    maker, number = share.maker, 8
    tokens = maker.text.context if maker.text else 0
    if maker.question:
        tokens += maker.question.context + maker.question.answer_context
    return share.rows * number * (tokens + 4) + 16 * ALIGN


def _iterate(share: Share, steps: range, workers: int, pin: bool) -> Iterator[Batch]:
    """The batches of `steps`, in order; the workers are gone when the iterator is."""
    pin = pin and torch.accelerator.is_available()
    workers = min(workers, len(steps))
    if not workers:
        for step in steps:
            batch = share.batch(step)
            yield batch.pin_memory() if pin else batch
        return
    batches = _from_workers(share, steps, workers)
    with closing(_pinned(batches) if pin else batches) as received:
        yield from received


def _from_workers(share: Share, steps: range, workers: int) -> Generator[Batch, None, None]:
    slots = Slots(workers * PREFETCH + HELD, share.image_bytes + _bytes_of_others(share))
    at_work: dict[int, Slot] = {}
    came: dict[int, _Parcel | Exception] = {}

    def let_go() -> None:
        """Close what was not lent."""
        slots.close()
        for slot in at_work.values():
            if slot.fd is not None:
                os.close(slot.fd)

    def ask() -> None:
        """Give the workers what they may have in advance."""
        while team.room and len(at_work) < workers * PREFETCH and (step := next(ahead, None)) is not None:
            slot = at_work[step] = slots.take()
            team.give(step, (step, slot.number), [] if slot.fd is None else [slot.fd])

    ahead = iter(steps)
    with ExitStack() as stack:
        stack.callback(let_go)
        maker = _Maker(share, slots.size)
        team = stack.enter_context(
            closing(Crew(maker, workers, shared=[slots.fd], patience=PATIENCE, told=_tell(share)))
        )
        for step in steps:
            while step not in came:
                ask()
                try:
                    came.update(team.wait())
                except LostError as lost:
                    raise _too_many(share, lost) from None
            parcel = came.pop(step)
            memory = slots.lend(at_work.pop(step))
            if isinstance(parcel, Exception):
                raise parcel
            batch = parcel.open(memory)
            del memory, parcel
            ask()
            yield batch
            del batch


def _pinned(batches: Generator[Batch, None, None]) -> Generator[Batch, None, None]:
    """The batches in page-locked memory, copied there by a thread while the trainer is at work."""
    ready: queue.Queue[Batch | BaseException | None] = queue.Queue(1)
    over = threading.Event()
    device = torch.accelerator.current_device_index()

    def put(item: Batch | BaseException | None) -> None:
        while not over.is_set():
            try:
                return ready.put(item, timeout=0.1)
            except queue.Full:
                continue

    def copy() -> None:
        torch.accelerator.set_device_index(device)
        try:
            with closing(batches):
                for batch in batches:
                    put(batch.pin_memory())
                    if over.is_set():
                        return
            put(None)
        except BaseException as error:
            put(error)

    thread = threading.Thread(target=copy, name="pin", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        over.set()
        thread.join()


def _tell(share: Share) -> Callable[[str, int], None]:
    """Say on stderr that a worker was replaced."""

    def tell(how: str, sample: int) -> None:
        print(f"weft: a loader worker {how}{_while_reading(share, sample)}: another takes its place", file=sys.stderr)

    return tell


def _too_many(share: Share, lost: LostError) -> DataError:
    if lost.job is None:
        return DataError(f"{crew.ATTEMPTS} loader workers in a row did not start; the last {lost.how}")
    return DataError(
        f"{crew.ATTEMPTS} loader workers in a row ended at step {lost.job + 1}{_while_reading(share, lost.mark)}; the "
        f"last {lost.how}: give fewer data.workers if memory is short, else look at that sample"
    )


def _while_reading(share: Share, sample: int) -> str:
    """Words about the sample that a worker was at."""
    dataset = share.maker.dataset
    if not 0 <= sample < len(dataset):
        return ""
    name = str(sample)
    with suppress(DataError, OSError):
        name = repr(dataset.key(sample))
    return f" while reading sample {name} in {dataset.shard_file(sample)} of {dataset.folder}"
