"""One batch as a pure function of its positions: ids of samples -> bytes -> pixels, tokens and frames -> rows.

The way of a row: sample id -> bytes (reader) -> pixels (decode) -> crop and resize (transforms) -> a row of the batch;
beside it a caption, a question and its answer as tokens (transforms), and sound as log-mel frames (sound).
Who calls it, and in which process or on which machine, is the loaders' affair: loader.py, ray_loader.py.

Design choices:
- Rows are written straight into the batch's tensors, which may lie in memory that another process reads (slots.py).
- Images are channels last in memory, as decoders and resizers work: [b, 3, H, W] by shape, [b, H, W, 3] by stride.
- A sample that cannot be used is replaced by a pure function of (seed, position, attempt) and named in
  `Batch.corrupt`; batches keep their size. How many are too many is the trainer's decision.
- A sample without a modality that is asked for cannot be used, unless that one is `optional`: then its row is zero.
  What is there but damaged is never taken as missing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from data_pipeline.buckets import BucketOrder
from data_pipeline.damage import cause_of, opened
from data_pipeline.decode import decode_image
from data_pipeline.errors import DamagedSampleError, DataError
from data_pipeline.joined import Joined
from data_pipeline.order import ReadingOrder
from data_pipeline.reader import Dataset
from data_pipeline.sample import Sample
from data_pipeline.tokenizer import PAD
from data_pipeline.transforms import (
    ImageTransform,
    QuestionTransform,
    TextTransform,
    sample_generator,
)

if TYPE_CHECKING:  # it loads scipy, for those who read sound
    from data_pipeline.sound import AudioTransform

ATTEMPTS = 16  # a position whose replacements all fail this often stands in a data set that is beyond repair
MODALITIES = {"image": "image", "text": "caption", "audio": "sound", "question": "question"}  # and what a sample lacks
_LEFT_OUT: Any = None

Draws = Callable[[str], np.random.Generator]  # purpose -> the generator of this sample in this epoch


@dataclass(frozen=True)
class Corrupt:
    """A sample that could not be used, and why; another stands in its row."""

    sample: int
    key: str
    shard: str
    reason: str
    cause: str = ""  # what raised, and where: as damage.cause_of


@dataclass
class Batch:
    """b rows. `sample` says what is in each row: the replacement, where a corrupt sample was replaced.

    Legend: b rows, H and W image size, T text context, Q and A those of questions and answers, F frames, M mels.
    A modality that was not asked for has size 0 (H = W = 0, T = 0, Q = A = 0, F = M = 0), and so have those that are
    left out when a batch is made by hand. A row without an optional modality is zero there: tokens are all padding.
    """

    image: torch.Tensor  # uint8 [b, 3, H, W], channels last in memory
    text: torch.Tensor  # int64 [b, T]
    sample: torch.Tensor  # int64 [b], sample ids
    position: torch.Tensor  # int64 [b], positions in the order
    corrupt: list[Corrupt]
    has_image: torch.Tensor = _LEFT_OUT  # bool [b]
    audio: torch.Tensor = _LEFT_OUT  # float32 [b, F, M]
    audio_frames: torch.Tensor = _LEFT_OUT  # int64 [b]: how many frames hold sound; 0 = it has none
    question: torch.Tensor = _LEFT_OUT  # int64 [b, Q]
    answer: torch.Tensor = _LEFT_OUT  # int64 [b, A]

    def __post_init__(self) -> None:
        new = self.sample.new_zeros
        if self.has_image is None:
            self.has_image = new(len(self), dtype=torch.bool).fill_(self.image.numel() > 0)
        if self.audio is None:
            self.audio = new((len(self), 0, 0), dtype=torch.float32)
        if self.audio_frames is None:
            self.audio_frames = new(len(self))
        if self.question is None:
            self.question = new((len(self), 0))
        if self.answer is None:
            self.answer = new((len(self), 0))

    def __len__(self) -> int:
        return len(self.sample)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor by its name: all but `corrupt`."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "corrupt"}

    def to(self, device: torch.device | str) -> Batch:
        """The batch on `device`; the copy from pinned memory overlaps with what the device is doing."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory; DataLoader's pinning calls this."""
        return self._each(lambda tensor: tensor.pin_memory())

    def rows(self, part: slice) -> Batch:
        """Some of the rows, as views; `corrupt` is about the whole batch and stays whole."""
        return self._each(lambda tensor: tensor[part])

    @property
    def caption_length(self) -> float:
        """The mean number of tokens of a row's text, marks included."""
        return float((self.text != PAD).sum()) / max(1, len(self))

    def shortened(self, multiple: int = 1) -> Batch:
        """Without the last columns of the text that are padding in every row, cut off `multiple` at a time.

        No model looks at them: a causal one never sees what is behind a token, others are told the lengths.
        """
        context = self.text.shape[1]
        written = (self.text != PAD).any(0).nonzero()
        longest = int(written[-1]) + 1 if len(written) else min(1, context)
        return replace(self, text=self.text[:, : context - (context - longest) // multiple * multiple])

    def _each(self, change: Any) -> Batch:
        return replace(self, **{name: change(tensor) for name, tensor in self.tensors().items()})


class BatchMaker:
    """Makes positions into a Batch; a pure function of them, so that any process may do it.

    `training` turns on augmentation and the random choice among captions and questions. A transform that is None = not
    read. A sample may lack the modalities that are `optional` ("image", "text", "audio", "question"), but not all that
    are read. Raises ValueError for one that is not read.
    """

    def __init__(
        self,
        dataset: Dataset | Joined,
        image: ImageTransform | None,
        text: TextTransform | None,
        seed: int,
        training: bool,
        *,
        audio: AudioTransform | None = None,
        question: QuestionTransform | None = None,
        optional: frozenset[str] = frozenset(),
    ) -> None:
        self.dataset = dataset
        self.image = image
        self.text = text
        self.audio = audio
        self.question = question
        self.seed = seed
        self.training = training
        self.optional = optional
        read = [name for name in MODALITIES if getattr(self, name)]
        if not optional <= set(read):
            raise ValueError(f"optional is {sorted(optional)}, but what is read is {read}: give some of these")

    def image_shape(self, rows: int) -> tuple[int, int, int, int]:
        """The images of a batch as they lie in memory: [rows, H, W, 3]; buckets have no more pixels than that."""
        size = self.image.size if self.image else 0
        return rows, size, size, 3

    def audio_shape(self, rows: int) -> tuple[int, int, int]:
        """The sounds of a batch: [rows, F, M]."""
        return (rows, self.audio.frames, self.audio.mels) if self.audio else (rows, 0, 0)

    def __call__(
        self,
        positions: np.ndarray,
        samples: np.ndarray,
        image_BHWC: torch.Tensor | None = None,
        epochs: np.ndarray | None = None,
    ) -> Batch:
        """The batch of these sample ids at these positions of the order, in these epochs; all int64 [b].

        Epochs follow from the positions where the order is of one data set. `image_BHWC` is where to write the images:
        uint8 of `image_shape(b)` or of another height and width; new memory by default.
        Raises DataError when a position finds no usable sample in ATTEMPTS replacements, or a shard is bad.
        """
        rows = len(positions)
        if image_BHWC is None:
            image_BHWC = torch.empty(self.image_shape(rows), dtype=torch.uint8)
        asked = self.question
        batch = Batch(
            image=image_BHWC.permute(0, 3, 1, 2),
            text=torch.empty((rows, self.text.context if self.text else 0), dtype=torch.int64),
            sample=torch.empty(rows, dtype=torch.int64),
            position=torch.tensor(positions, dtype=torch.int64),
            corrupt=[],
            has_image=torch.zeros(rows, dtype=torch.bool),
            audio=torch.empty(self.audio_shape(rows), dtype=torch.float32),
            audio_frames=torch.zeros(rows, dtype=torch.int64),
            question=torch.empty((rows, asked.context if asked else 0), dtype=torch.int64),
            answer=torch.empty((rows, asked.answer_context if asked else 0), dtype=torch.int64),
        )
        epochs = positions // len(self.dataset) if epochs is None else epochs
        rows_of = zip(positions.tolist(), samples.tolist(), epochs.tolist(), strict=True)
        for row, (position, sample, epoch) in enumerate(rows_of):
            batch.sample[row] = self._fill(batch, row, position, sample, epoch)
        return batch

    def _fill(self, batch: Batch, row: int, position: int, sample: int, epoch: int) -> int:
        """Write a sample into its row, or the first of its replacements that can be used; returns its id."""
        for attempt in range(ATTEMPTS):
            corrupt = self._try(batch, row, epoch, sample)
            if corrupt is None:
                return sample
            batch.corrupt.append(corrupt)
            generator = sample_generator(self.seed, epoch, position, f"replacement {attempt}")
            alike = self.dataset.alike(sample)
            sample = alike[int(generator.integers(len(alike)))]
        assert corrupt is not None
        cause = "" if corrupt.cause.startswith(DataError.__name__) else f" ({corrupt.cause})"  # our own says all
        raise DataError(
            f"{ATTEMPTS} draws in a row from {self.dataset.folder} gave no sample that can be used, "
            f"the last being {corrupt.key!r} in {corrupt.shard}: {corrupt.reason}{cause}"
        )

    def _try(self, batch: Batch, row: int, epoch: int, sample: int) -> Corrupt | None:
        """Write a sample into its row; what is wrong with it when it cannot be used."""
        try:
            with opened(self.dataset, sample) as read:
                self._write(batch, row, epoch, sample, read)
        except DamagedSampleError as error:
            return Corrupt(sample, error.key, error.shard, error.reason, cause_of(error))
        return None

    def _write(self, batch: Batch, row: int, epoch: int, sample: int, read: Sample) -> None:
        """Decode and transform one sample into its row; DataError when it cannot be used."""

        def draws(purpose: str) -> np.random.Generator:
            return sample_generator(self.seed, epoch, sample, purpose)

        writers = {"image": self._image, "text": self._text, "audio": self._audio, "question": self._question}
        read_names = [name for name in writers if getattr(self, name)]
        there = False
        for name in read_names:
            if writers[name](batch, row, read, draws):
                there = True
            elif name not in self.optional:
                raise DataError(f"it has no {MODALITIES[name]}")
        if read_names and not there:
            raise DataError("it has " + " and ".join(f"no {MODALITIES[name]}" for name in read_names))

    # --- one modality of a row: whether the sample has it; if not, the row is zero

    def _image(self, batch: Batch, row: int, read: Sample, draws: Draws) -> bool:
        assert self.image is not None
        field = read.image_field
        batch.has_image[row] = field is not None
        if field is None:
            batch.image[row] = 0
            return False
        crops = draws("crop") if self.training and self.image.draws else None
        self.image(decode_image(read.fields[field]), crops, out=batch.image[row])
        return True

    def _text(self, batch: Batch, row: int, read: Sample, draws: Draws) -> bool:
        assert self.text is not None
        captions = read.captions()
        if not captions:
            batch.text[row] = 0
            return False
        batch.text[row] = torch.from_numpy(self.text(captions[self._choose(len(captions), draws, "caption")]))
        return True

    def _audio(self, batch: Batch, row: int, read: Sample, draws: Draws) -> bool:
        assert self.audio is not None
        if read.audio_field is None:
            batch.audio[row], batch.audio_frames[row] = 0, 0
            return False
        frames, valid = self.audio(read.fields[read.audio_field], draws("sound") if self.training else None)
        batch.audio[row], batch.audio_frames[row] = torch.from_numpy(frames), valid
        return True

    def _question(self, batch: Batch, row: int, read: Sample, draws: Draws) -> bool:
        assert self.question is not None
        pairs = read.questions()
        if not pairs:
            batch.question[row], batch.answer[row] = 0, 0
            return False
        question, answer = self.question(*pairs[self._choose(len(pairs), draws, "question")])
        batch.question[row], batch.answer[row] = torch.from_numpy(question), torch.from_numpy(answer)
        return True

    def _choose(self, count: int, draws: Draws, purpose: str) -> int:
        """Which of several: drawn in training, the first in evaluation."""
        return int(draws(purpose).integers(count)) if self.training and count > 1 else 0


@dataclass(frozen=True)
class Share:
    """The map "step -> this rank's batch": rows [step * global_batch + rank * rows, + rows) of the order.

    Picklable, and without state. `stop`: no position from there on, so that a last batch is short.
    Raises ValueError when the batch, the ranks and the data set do not fit each other.
    """

    maker: BatchMaker
    order: ReadingOrder
    global_batch: int
    rank: int = 0
    world: int = 1
    stop: int | None = None

    def __post_init__(self) -> None:
        samples, folder = self.order.samples, self.maker.dataset.folder
        if samples != len(self.maker.dataset):
            raise ValueError(f"the order is of {samples} samples, the data set of {len(self.maker.dataset)}")
        if self.stop is None and not 1 <= self.global_batch <= samples:
            raise ValueError(
                f"global batch {self.global_batch} does not fit a data set of {samples} samples "
                f"({folder}): give 1 to {samples}, or more data"
            )
        if self.global_batch % self.world:
            fewer = self.global_batch // self.world * self.world
            raise ValueError(
                f"global batch {self.global_batch} does not divide by {self.world} ranks: "
                f"give {fewer or self.world} or {fewer + self.world}"
            )
        if not 0 <= self.rank < self.world:
            raise ValueError(f"rank {self.rank} of {self.world} ranks: ranks are 0 to {self.world - 1}")

        if isinstance(self.order, BucketOrder) and self.maker.image:
            if self.order.global_batch != self.global_batch:
                raise ValueError(
                    f"the buckets are for a global batch of {self.order.global_batch}: {self.global_batch}"
                )
            most, size = max(height * width for height, width in self.order.open_sizes), self.maker.image.size
            if most > size**2:
                raise ValueError(f"a bucket has {most} pixels, over the {size**2} of image size {size}")

    @property
    def rows(self) -> int:
        """Rows of a batch."""
        return self.global_batch // self.world

    @property
    def image_bytes(self) -> int:
        """What the images of a batch take, and its sounds."""
        return math.prod(self.maker.image_shape(self.rows)) + 4 * math.prod(self.maker.audio_shape(self.rows))

    def batch(self, step: int, image_BHWC: torch.Tensor | None = None) -> Batch:
        """The batch of a step, its images at the start of `image_BHWC` if given. Raises as BatchMaker does."""
        start = step * self.global_batch + self.rank * self.rows
        stop = start + self.rows
        positions = np.arange(start, stop if self.stop is None else min(stop, self.stop))
        shape = self.maker.image_shape(len(positions))
        if isinstance(self.order, BucketOrder) and self.maker.image:
            shape = (len(positions), *self.order.size_of(step), 3)
        if image_BHWC is None:
            image_BHWC = torch.empty(shape, dtype=torch.uint8)
        else:
            image_BHWC = at_start(image_BHWC, shape)
        return self.maker(positions, self.order.sample_ids(positions), image_BHWC, self.order.epochs(positions))


def at_start(memory: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """The first elements of contiguous memory, as a tensor of another shape."""
    return memory.view(-1)[: math.prod(shape)].view(shape)
