"""Batches for one rank: positions of the order in, uint8 images and token ids out, in process or by workers.

The way of a batch: step -> this rank's positions -> sample ids (order) -> bytes (reader) -> pixels (decode) ->
crop and resize (transforms) -> one row of the batch.

Design choices:
- A batch is a pure function of its positions. Workers are torch's DataLoader over the map "step -> batch": they hold no
  state, a run resumes at any step, and any number of ranks and workers reads the same global batches.
- Rows are written straight into the batch's tensors, which a worker makes in shared memory: one batch is one handle
  in a queue, no copy, no sample of its own.
- A sample that cannot be used is replaced by a pure function of (seed, position, attempt) and named in
  `Batch.corrupt`; batches keep their size. How many are too many is the trainer's decision.
- Errors travel from the workers as values, so the user sees our sentence and no traceback of another process.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
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
from data_pipeline.transforms import ImageTransform, TextTransform, sample_generator

ATTEMPTS = 16  # a position whose replacements all fail this often stands in a data set that is beyond repair
PREFETCH = 2  # batches a worker keeps ready


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

    image: torch.Tensor  # uint8 [b, 3, H, W]
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

    def __call__(self, positions: np.ndarray, samples: np.ndarray) -> Batch:
        """The batch of these sample ids at these positions of the order; both int64 [b].

        Raises DataError when a position finds no usable sample in ATTEMPTS replacements, or a shard is bad.
        """
        rows = len(positions)
        size = self.image.size if self.image else 0
        batch = Batch(
            image=_empty((rows, 3, size, size), torch.uint8),
            text=_empty((rows, self.text.context if self.text else 0), torch.int64),
            sample=_empty((rows,), torch.int64),
            position=_empty((rows,), torch.int64),
            corrupt=[],
        )
        batch.position.numpy()[:] = positions
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
            crops = sample_generator(self.seed, epoch, sample, "crop") if self.training else None
            batch.image[row] = self.image(decode_image(read.fields[read.image_field]), crops)
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

    def __iter__(self) -> Iterator[Batch]:
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
    """The map "step -> batch" that DataLoader's workers evaluate."""

    maker: BatchMaker
    order: Order
    global_batch: int
    rank: int
    world: int
    stop: int | None = None  # no position from here on

    def __getitem__(self, step: int) -> Batch | DataError | OSError:
        share = self.global_batch // self.world
        start = step * self.global_batch + self.rank * share
        positions = np.arange(start, start + share if self.stop is None else min(start + share, self.stop))
        try:
            return self.maker(positions, self.order.sample_ids(positions))
        except (DataError, OSError) as error:
            return error.with_traceback(None)


def _iterate(batches: _Batches, steps: range, workers: int, pin: bool) -> Iterator[Batch]:
    """Evaluate `batches` at `steps`, in order; the workers are gone when the iterator is."""
    loader = DataLoader(
        batches,
        batch_size=None,  # an item is a batch already
        sampler=steps,
        collate_fn=_unchanged,
        num_workers=workers,
        prefetch_factor=PREFETCH if workers else None,
        worker_init_fn=_ignore_interrupt if workers else None,
        multiprocessing_context=_worker_context() if workers else None,
        pin_memory=pin,
    )
    for batch in loader:
        if isinstance(batch, Exception):
            raise batch
        yield batch


def _unchanged(batch: Batch) -> Batch:
    return batch


def _ignore_interrupt(worker: int) -> None:
    """Ctrl-C reaches every process of the terminal; the parent finishes its step and ends the workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _worker_context() -> str:
    """Fork where it exists: a worker is there at once, and shares the tables of offsets that are loaded."""
    return "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """An empty tensor; in a worker it lies in shared memory, so that it reaches the trainer without a copy."""
    if get_worker_info() is None or 0 in shape:
        return torch.empty(shape, dtype=dtype)
    nbytes = int(np.prod(shape)) * dtype.itemsize
    return torch.empty(0, dtype=dtype).set_(torch.UntypedStorage._new_shared(nbytes)).view(shape)
