"""What is in a data set, in numbers: counts, captions, pictures, sound, labels, and how even the shards are.

Design choices:
- Counts and balance come from the index and are exact. What needs a look inside comes from a bounded number of
  samples, drawn evenly over the whole data set and always the same ones.
- Pictures and sounds are asked for their size only: headers are read, nothing is decoded.
- A sample that cannot be read is counted, not raised: `weft data check` says what is wrong with it. A server that does
  not answer is raised: it would be waited for once more at each sample.
"""

from __future__ import annotations

import io
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
from PIL import Image

from data_pipeline.errors import DamagedSampleError, DataError
from data_pipeline.index import Index
from data_pipeline.order import Order
from data_pipeline.reader import Dataset, open_dataset
from data_pipeline.remote import is_url
from data_pipeline.sample import Sample, modalities_of

BINS = 10
MOST_NAMES = 100  # labels and picture sizes told apart by name, the most frequent


@dataclass(frozen=True)
class Spread:
    """How `count` numbers are spread; bin i holds the `counts[i]` numbers from `low[i]` to `high[i]`, both included."""

    count: int
    smallest: float
    mean: float
    largest: float
    low: tuple[float, ...]
    high: tuple[float, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True)
class DatasetStats:
    """Numbers about a data set: those above `opened` of all of it, the others of the samples that were opened."""

    samples: int
    shards: int
    bytes: int
    fingerprint: str
    shard_samples: Spread
    shard_bytes: Spread
    opened: int
    unreadable: int  # opened samples with something in them that could not be read
    modalities: dict[str, int]  # "audio", "image", "text" -> samples that hold it
    fields: dict[str, int]  # field name -> samples that have it
    captions_per_sample: Spread
    caption_characters: Spread
    caption_words: Spread
    image_side: Spread  # pixels of the shorter side
    image_sizes: dict[str, int]  # "width x height" -> pictures, the most frequent first
    sound_seconds: Spread
    labelled: int
    labels: dict[str, int]  # label -> samples, the most frequent first


def dataset_stats(path: str | Path, *, sample_limit: int = 2000) -> DatasetStats:
    """Numbers about what `open_dataset` finds at `path`, at most `sample_limit` samples of it opened.

    Raises FileNotFoundError when there is no data set, DataError when its index and shards disagree or a server does
    not answer, ValueError for a limit below 1.
    """
    if sample_limit < 1:
        raise ValueError(f"sample_limit is {sample_limit}: give 1 or more")
    dataset = open_dataset(path)
    seen = _Seen()
    for sample in _some_samples(dataset, sample_limit):
        seen.add(sample)
    shards = dataset.index.shards
    return DatasetStats(
        samples=len(dataset),
        shards=len(shards),
        bytes=sum(shard.bytes for shard in shards),
        fingerprint=dataset.fingerprint,
        shard_samples=spread_of([shard.samples for shard in shards]),
        shard_bytes=spread_of([shard.bytes for shard in shards]),
        opened=seen.opened,
        unreadable=seen.unreadable,
        modalities=dict(sorted(seen.modalities.items())),
        fields=dict(seen.fields.most_common()),
        captions_per_sample=spread_of(seen.captions_per_sample),
        caption_characters=spread_of(seen.caption_characters),
        caption_words=spread_of(seen.caption_words),
        image_side=spread_of(seen.image_sides),
        image_sizes=dict(seen.image_sizes.most_common(MOST_NAMES)),
        sound_seconds=spread_of(seen.sound_seconds),
        labelled=seen.labels.total(),
        labels=dict(seen.labels.most_common(MOST_NAMES)),
    )


def spread_of(numbers: Iterable[float]) -> Spread:
    """The spread of some numbers, in at most `BINS` bins of equal and, for whole numbers, whole width."""
    values = np.array(list(numbers), np.float64)
    if not values.size:
        return Spread(0, 0.0, 0.0, 0.0, (), (), ())
    smallest, largest = float(values.min()), float(values.max())
    if np.array_equal(values, np.round(values)):
        width = -(-(largest - smallest + 1) // BINS)
        last = width - 1  # a bin of width 5 from 10 on holds 10 to 14
    else:
        width = last = (largest - smallest) / BINS
    bins = min(BINS, int((largest - smallest) // width) + 1) if width else 1
    number = np.minimum((values - smallest) // (width or 1), bins - 1).astype(np.int64)
    low = tuple(smallest + width * bin_number for bin_number in range(bins))
    high = tuple(min(start + last, largest) for start in low)
    counts = tuple(np.bincount(number, minlength=bins).tolist())
    return Spread(values.size, smallest, float(values.mean()), largest, low, high, counts)


def image_size(data: bytes) -> tuple[int, int]:
    """(width, height) in pixels as the header of a JPEG, PNG or WebP has them; DataError when it cannot be read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # nothing is decompressed
            return Image.open(io.BytesIO(data), formats=["JPEG", "PNG", "WEBP"]).size
    except Exception as error:  # hostile bytes raise nearly anything in Pillow
        raise DataError(f"no header of an image: {error}") from error


def sound_seconds(data: bytes) -> float:
    """Length of a sound as its header has it; DataError when it cannot be read."""
    import soundfile  # loads libsndfile, which only data with sound needs

    try:
        return float(soundfile.info(io.BytesIO(data)).duration)
    except (soundfile.LibsndfileError, RuntimeError, ValueError, TypeError) as error:
        raise DataError(f"no header of a sound: {error}") from error


class _Seen:
    """What the opened samples held, added up."""

    def __init__(self) -> None:
        self.opened = 0
        self.unreadable = 0
        self.modalities: Counter[str] = Counter()
        self.fields: Counter[str] = Counter()
        self.captions_per_sample: list[int] = []
        self.caption_characters: list[int] = []
        self.caption_words: list[int] = []
        self.image_sides: list[int] = []
        self.image_sizes: Counter[str] = Counter()
        self.sound_seconds: list[float] = []
        self.labels: Counter[str] = Counter()

    def add(self, sample: Sample | None) -> None:
        """Count a sample; None is one that could not be read at all."""
        self.opened += 1
        if sample is None:
            self.unreadable += 1
            return
        self.fields.update(list(sample.fields))
        self.modalities.update(modalities_of(sample.fields))
        bad = 0
        for look in (self._add_text, self._add_image, self._add_sound):
            try:
                look(sample)
            except DataError:
                bad = 1
        self.unreadable += bad

    def _add_text(self, sample: Sample) -> None:
        label, captions = sample.label(), sample.captions()
        if label is not None:
            self.labels[label] += 1
        self.captions_per_sample.append(len(captions))
        self.caption_characters.extend(len(caption) for caption in captions)
        self.caption_words.extend(len(caption.split()) for caption in captions)

    def _add_image(self, sample: Sample) -> None:
        if sample.image_field:
            width, height = image_size(sample.fields[sample.image_field])
            self.image_sides.append(min(width, height))
            self.image_sizes[f"{width} x {height}"] += 1

    def _add_sound(self, sample: Sample) -> None:
        if sample.audio_field:
            self.sound_seconds.append(sound_seconds(sample.fields[sample.audio_field]))


def _some_samples(dataset: Dataset, limit: int) -> Iterator[Sample | None]:
    """At most `limit` samples, evenly drawn, in order; None for one whose bytes cannot be read."""
    count = min(limit, len(dataset))
    drawn = np.sort(Order(len(dataset), seed=0).sample_ids(np.arange(count))).tolist()
    for shard, places in groupby(map(dataset.locate, drawn), key=lambda place: place[0]):
        # a reader of this shard alone, so that its table of offsets goes when it is done
        reader = Dataset(dataset.source, Index((dataset.index.shards[shard],)))
        for _, offset in places:
            try:
                yield reader.read(offset)
            except DamagedSampleError:
                yield None
            except DataError:
                if is_url(dataset.folder):
                    raise
                yield None
        reader.close()
