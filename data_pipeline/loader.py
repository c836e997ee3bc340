"""Batches for one rank: positions of the order in, uint8 images and token ids out, in process or by workers.

The way of a batch: step -> this rank's positions -> sample ids (order) -> bytes (reader) -> pixels (decode) ->
crop and resize (transforms) -> one row of the batch.

Design choices:
- A batch is a pure function of its positions. Workers are torch's DataLoader over the map "step -> batch": they hold no
  state, a run resumes at any step, and any number of ranks and workers reads the same global batches.
- Rows are written straight into the batch's tensors. A worker's images lie in memory that it shares with the trainer
  (slots.py) and only the number of the slot travels; the rest is small and travels as it is.
- Images are channels last in memory, as decoders and resizers work: [b, 3, H, W] by shape, [b, H, W, 3] by stride.
- A sample that cannot be used is replaced by a pure function of (seed, position, attempt) and named in
  `Batch.corrupt`; batches keep their size. How many are too many is the trainer's decision.
- Errors travel from the workers as values, so the user sees our sentence and no traceback of another process.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, get_worker_info
from torch.utils.data import Dataset as TorchDataset

from data_pipeline.decode import decode_image
from data_pipeline.errors import DataError
from data_pipeline.order import Order
from data_pipeline.reader import Dataset
from data_pipeline.sample import Sample
from data_pipeline.slots import Slots
from data_pipeline.transforms import ImageTransform, TextTransform, sample_generator

ATTEMPTS = 16  # a position whose replacements all fail this often stands in a data set that is beyond repair
PREFETCH = 2  # batches a worker keeps ready
HELD = 3  # batches the consumer may hold, before more are sent by copy: the last, the one in hand, and one in advance
SEES_SENDER = hasattr(signal, "sigtimedwait")  # not on macOS
WATCH_SECONDS = 1.0  # how often a worker looks whether the trainer is still there


@dataclass(frozen=True)
class Corrupt:
    """A sample that could not be used, and why; another stands in its row."""

    sample: int
    key: str
    shard: str
    reason: str


@dataclass
class Batch:
    """b rows. `sample` says what is in each row: the replacement, where a corrupt sample was replaced.

    Legend: b rows, H and W image size, T text context. A modality that was not asked for has size 0 (H = W = 0, T = 0).
    """

    image: torch.Tensor  # uint8 [b, 3, H, W], channels last in memory
    text: torch.Tensor  # int64 [b, T]
    sample: torch.Tensor  # int64 [b], sample ids
    position: torch.Tensor  # int64 [b], positions in the order
    corrupt: list[Corrupt]

    def __len__(self) -> int:
        return len(self.sample)

    def to(self, device: torch.device | str) -> Batch:
        """The batch on `device`; the copy from pinned memory overlaps with what the device is doing."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory; DataLoader's pinning calls this."""
        return self._each(lambda tensor: tensor.pin_memory())

    def rows(self, part: slice) -> Batch:
        """Some of the rows, as views; `corrupt` is about the whole batch and stays whole."""
        return self._each(lambda tensor: tensor[part])

    def _each(self, change: Any) -> Batch:
        tensors = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "corrupt"}
        return replace(self, **{name: change(tensor) for name, tensor in tensors.items()})


class BatchMaker:
    """Makes positions into a Batch; a pure function of them, so that any process may do it.

    `training` turns on augmentation and the random choice among captions. `image` or `text` None = not read.
    """

    def __init__(
        self,
        dataset: Dataset,
        image: ImageTransform | None,
        text: TextTransform | None,
        seed: int,
        training: bool,
    ) -> None:
        self.dataset = dataset
        self.image = image
        self.text = text
        self.seed = seed
        self.training = training

    def image_shape(self, rows: int) -> tuple[int, int, int, int]:
        """The images of a batch as they lie in memory: [rows, H, W, 3]."""
        size = self.image.size if self.image else 0
        return rows, size, size, 3

    def __call__(self, positions: np.ndarray, samples: np.ndarray, image_BHWC: torch.Tensor | None = None) -> Batch:
        """The batch of these sample ids at these positions of the order; both int64 [b].

        `image_BHWC` is where to write the images: uint8 of `image_shape(b)`; new memory by default.
        Raises DataError when a position finds no usable sample in ATTEMPTS replacements, or a shard is bad.
        """
        rows = len(positions)
        if image_BHWC is None:
            image_BHWC = torch.empty(self.image_shape(rows), dtype=torch.uint8)
        batch = Batch(
            image=image_BHWC.permute(0, 3, 1, 2),
            text=torch.empty((rows, self.text.context if self.text else 0), dtype=torch.int64),
            sample=torch.empty(rows, dtype=torch.int64),
            position=torch.tensor(positions, dtype=torch.int64),
            corrupt=[],
        )
        for row, (position, sample) in enumerate(zip(positions.tolist(), samples.tolist(), strict=True)):
            batch.sample[row] = self._fill(batch, row, position, sample)
        return batch

    def _fill(self, batch: Batch, row: int, position: int, sample: int) -> int:
        """Write a sample into its row, or the first of its replacements that can be used; returns its id."""
        epoch = position // len(self.dataset)
        for attempt in range(ATTEMPTS):
            read = self.dataset.read(sample)
            try:
                self._write(batch, row, epoch, sample, read)
            except DataError as error:
                corrupt = Corrupt(sample, read.key, self.dataset.shard_file(sample), str(error))
                batch.corrupt.append(corrupt)
                generator = sample_generator(self.seed, epoch, position, f"replacement {attempt}")
                sample = int(generator.integers(len(self.dataset)))
            else:
                return sample
        raise DataError(
            f"{ATTEMPTS} samples in a row of {self.dataset.folder} cannot be used, "
            f"the last being {corrupt.key!r} in {corrupt.shard}: {corrupt.reason}"
        )

    def _write(self, batch: Batch, row: int, epoch: int, sample: int, read: Sample) -> None:
        """Decode and transform one sample into its row; DataError when it cannot be used."""
        if self.image:
            if read.image_field is None:
                raise DataError("it has no image")
            draws = self.training and self.image.draws
            crops = sample_generator(self.seed, epoch, sample, "crop") if draws else None
            self.image(decode_image(read.fields[read.image_field]), crops, out=batch.image[row])
        if self.text:
            captions = read.captions()
            if not captions:
                raise DataError("it has no caption")
            chosen = 0
            if self.training and len(captions) > 1:
                chosen = int(sample_generator(self.seed, epoch, sample, "caption").integers(len(captions)))
            batch.text[row] = torch.from_numpy(self.text(captions[chosen]))


class Loader:
    """The batches of one rank, for steps start_step .. stop_step - 1; iterate it, or measure it with len().

    Step k is rows [k * global_batch + rank * share, + share) of the order, share = global_batch / world. `workers`
    processes make the batches, 0 = this one. `pin` puts batches in page-locked memory for a GPU.
    Raises ValueError when the batch, the ranks and the data set do not fit each other.
    """

    def __init__(
        self,
        maker: BatchMaker,
        order: Order,
        *,
        global_batch: int,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
        start_step: int = 0,
        stop_step: int,
        pin: bool = False,
    ) -> None:
        if order.samples != len(maker.dataset):
            raise ValueError(f"the order is of {order.samples} samples, the data set of {len(maker.dataset)}")
        if not 1 <= global_batch <= order.samples:
            raise ValueError(
                f"global batch {global_batch} does not fit a data set of {order.samples} samples "
                f"({maker.dataset.folder}): give 1 to {order.samples}, or more data"
            )
        if global_batch % world:
            raise ValueError(
                f"global batch {global_batch} does not divide by {world} ranks: "
                f"give {global_batch // world * world or world} or {(global_batch // world + 1) * world}"
            )
        if not 0 <= rank < world:
            raise ValueError(f"rank {rank} of {world} ranks: ranks are 0 to {world - 1}")
        if workers < 0:
            raise ValueError(f"workers is {workers}: give 0 (this process) or more")
        self.steps = range(start_step, stop_step)
        self._batches = _Batches(maker, order, global_batch, rank, world)
        self._workers = workers
        self._pin = pin

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Generator[Batch, None, None]:
        yield from _iterate(self._batches, self.steps, self._workers, self._pin)


def sequential_batches(
    maker: BatchMaker, samples: int, batch_size: int, rank: int = 0, world: int = 1, workers: int = 0
) -> Iterator[Batch]:
    """Samples 0 .. samples - 1 in order, for evaluation: batches rank, rank + world, ... and a short last one.

    Raises ValueError when the data set has fewer samples.
    """
    if not 0 <= samples <= len(maker.dataset):
        raise ValueError(f"{samples} samples asked of {maker.dataset.folder}, which has {len(maker.dataset)}")
    batches = _Batches(maker, Order(len(maker.dataset), 0, shuffle=False), batch_size, 0, 1, stop=samples)
    yield from _iterate(batches, range(rank, -(-samples // batch_size), world), workers, pin=False)


@dataclass(frozen=True)
class _Batches(TorchDataset):
    """The map "step -> batch" that DataLoader's workers evaluate; images go into `slots` where there are any."""

    maker: BatchMaker
    order: Order
    global_batch: int
    rank: int
    world: int
    stop: int | None = None  # no position from here on
    slots: Slots | None = None

    @property
    def share(self) -> int:
        """Rows of a batch."""
        return self.global_batch // self.world

    def __getitem__(self, request: tuple[int, int | None]) -> Batch | _Parcel | DataError | OSError:
        step, slot = request
        start = step * self.global_batch + self.rank * self.share
        stop = start + self.share
        positions = np.arange(start, stop if self.stop is None else min(stop, self.stop))
        image_BHWC = None if self.slots is None or slot is None else self.slots.tensor(slot)[: len(positions)]
        try:
            batch = self.maker(positions, self.order.sample_ids(positions), image_BHWC)
        except (DataError, OSError) as error:
            return error.with_traceback(None)
        return batch if get_worker_info() is None else _Parcel.pack(batch, self.slots, slot)


@dataclass
class _Parcel:
    """A batch on its way from a worker: its images in a slot, or sent as a tensor where no slot was free."""

    slots: Slots | None
    slot: int | None
    image: torch.Tensor | None
    text: np.ndarray
    sample: np.ndarray
    position: np.ndarray
    corrupt: list[Corrupt]

    @classmethod
    def pack(cls, batch: Batch, slots: Slots | None, slot: int | None) -> _Parcel:
        """In the worker."""
        text, sample, position = (tensor.numpy() for tensor in (batch.text, batch.sample, batch.position))
        if slots is None or slot is None:
            return cls(None, None, batch.image, text, sample, position, batch.corrupt)
        return cls(slots, slot, None, text, sample, position, batch.corrupt)

    def open(self) -> Batch:
        """In the trainer."""
        image = self.image
        if self.slots is not None and self.slot is not None:
            image = self.slots.lend(self.slot)[: len(self.sample)].permute(0, 3, 1, 2)
        assert image is not None
        text, sample, position = (torch.from_numpy(array) for array in (self.text, self.sample, self.position))
        return Batch(image, text, sample, position, self.corrupt)

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory; DataLoader's pinning calls this."""
        return self.open().pin_memory()


def _iterate(batches: _Batches, steps: range, workers: int, pin: bool) -> Iterator[Batch]:
    """Evaluate `batches` at `steps`, in order; the workers are gone when the iterator is."""
    workers = min(workers, len(steps))
    slots = None
    if workers and batches.maker.image and _worker_context() == "fork":  # only a forked worker has the same memory
        slots = Slots(workers * PREFETCH + HELD, batches.maker.image_shape(batches.share))
    loader = DataLoader(
        replace(batches, slots=slots),
        batch_size=None,  # an item is a batch already
        sampler=((step, slots.take() if slots else None) for step in steps),  # asked when a worker is given its task
        collate_fn=_unchanged,
        num_workers=workers,
        prefetch_factor=PREFETCH if workers else None,
        worker_init_fn=partial(_start_worker, os.getpid()) if workers else None,
        multiprocessing_context=_worker_context() if workers else None,
        pin_memory=pin,
    )
    for batch in loader:
        if isinstance(batch, Exception):
            raise batch
        yield batch.open() if isinstance(batch, _Parcel) else batch


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
