"""What is in a data set, in numbers: counts, captions, images, sound, labels, and how even the shards are.

Design choices:
- Tables of offsets hold sizes of images, lengths of captions and labels, so that a folder of tars is counted whole and
  no sample is opened. Tables of an early version are completed first, where that is possible.
- Parquet, and what is large and at a URL, has no such tables at hand: there a bounded number of samples is opened,
  drawn evenly over the whole data set and always the same ones. Of images and sounds only the headers are read.
- A sample that cannot be read is counted, not raised: `weft data check` says what is wrong with it. A server that does
  not answer is raised: it would be waited for once more at each sample.
- What lies there and is not read, or is missing in some samples, is said (`remarks`).
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

from data_pipeline.errors import DamagedSampleError, DataError, first_line
from data_pipeline.files import LocalFiles
from data_pipeline.index import TABLES, Index, complete_tables
from data_pipeline.order import Order
from data_pipeline.parquet import ParquetFiles
from data_pipeline.reader import Dataset, open_dataset
from data_pipeline.remote import is_url
from data_pipeline.sample import Sample, modalities_of
from data_pipeline.table import ShardTable

BINS = 10
OPENED = 2000  # samples, where they have to be opened
MOST_FETCHED = 1_000_000  # samples whose tables are fetched from a URL to be counted
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
    remarks: tuple[str, ...] = ()  # what is not read, or missing in some samples


def dataset_stats(path: str | Path, *, sample_limit: int | None = None) -> DatasetStats:
    """Numbers about what `open_dataset` finds at `path`, at most `sample_limit` samples of it looked at.

    By default all samples where the tables of offsets tell of them, and else OPENED. Raises FileNotFoundError when
    there is no data set, DataError when its index and shards disagree or a server does not answer, ValueError for a
    limit below 1.
    """
    if sample_limit is not None and sample_limit < 1:
        raise ValueError(f"sample_limit is {sample_limit}: give 1 or more")
    dataset = _with_details(open_dataset(path))
    seen = _Seen()
    if _has_details(dataset):
        _look_into_tables(dataset, sample_limit, seen)
    else:
        for sample in _some_samples(dataset, sample_limit or OPENED):
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
        remarks=tuple(dataset.index.remarks()),
    )


def _with_details(dataset: Dataset) -> Dataset:
    """The data set with tables that have details, where they can be completed: in a folder that can be written to."""
    files = dataset.files
    if not isinstance(files, LocalFiles):
        return dataset
    try:
        return Dataset(files, complete_tables(files.tables or files.folder, dataset.index))
    except (OSError, DataError):  # it stays as it is, and samples are opened, one by one
        return dataset


def _has_details(dataset: Dataset) -> bool:
    """Whether the tables tell all, and are at hand or soon fetched."""
    if isinstance(dataset.files, ParquetFiles) or dataset.index.tables < TABLES:
        return False
    return not is_url(dataset.folder) or len(dataset) <= MOST_FETCHED


def _look_into_tables(dataset: Dataset, limit: int | None, seen: _Seen) -> None:
    """Count the samples, or so many of them, from the tables of offsets."""
    assert not isinstance(dataset.files, ParquetFiles)
    drawn = np.arange(0) if limit is None else _drawn(len(dataset), limit)
    start = 0
    for shard in dataset.index.shards:
        inside = drawn[(drawn >= start) & (drawn < start + shard.samples)] - start
        rows = np.arange(shard.samples) if limit is None else inside
        start += shard.samples
        if rows.size:
            seen.add_table(dataset.files.table(shard), rows)


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
        raise DataError(f"no header of an image: {first_line(error)}") from error


def sound_seconds(data: bytes) -> float:
    """Length of a sound as its header has it; DataError when it cannot be read."""
    import soundfile  # loads libsndfile, which only data with sound needs

    try:
        return float(soundfile.info(io.BytesIO(data)).duration)
    except (soundfile.LibsndfileError, RuntimeError, ValueError, TypeError) as error:
        raise DataError(f"no header of a sound: {first_line(error)}") from error


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

    def add_table(self, table: ShardTable, rows: np.ndarray) -> None:
        """Count the samples of a shard that these rows of its table are of."""
        details = table.details
        if details is None:
            raise DataError("a table of offsets has no details, though its index is of a version that has them")
        self.opened += rows.size
        self.unreadable += int(np.count_nonzero(details.unreadable[rows]))
        counts = np.diff(table.first)
        held = np.isin(np.repeat(np.arange(len(table)), counts), rows)
        for name, number in zip(table.field_names, np.bincount(table.field[held], minlength=1), strict=False):
            self.fields[name] += int(number)
        for modality in modalities_of(table.field_names):
            has = np.array([modality in modalities_of([name]) for name in table.field_names])
            holding = np.add.reduceat(has[table.field].astype(np.int64), table.first[:-1]) > 0
            self.modalities[modality] += int(np.count_nonzero(holding[rows]))
        captions = details.captions
        of_caption = np.isin(np.repeat(np.arange(len(table)), np.maximum(captions, 0)), rows)
        self.captions_per_sample.extend(captions[rows][captions[rows] >= 0].tolist())
        self.caption_characters.extend(details.caption_characters[of_caption].tolist())
        self.caption_words.extend(details.caption_words[of_caption].tolist())
        with_image = rows[details.width[rows] > 0]
        sizes = np.stack([details.width[with_image], details.height[with_image]], axis=1)
        self.image_sides.extend(sizes.min(axis=1).tolist() if sizes.size else [])
        for (width, height), number in zip(*np.unique(sizes, axis=0, return_counts=True), strict=True):
            self.image_sizes[f"{width} x {height}"] += int(number)
        seconds = details.seconds[rows]
        self.sound_seconds.extend(seconds[np.isfinite(seconds)].tolist())
        labels = np.bincount(details.label[rows] + 1, minlength=1)[1:]
        self.labels.update(
            {name: int(number) for name, number in zip(details.label_names, labels, strict=False) if number}
        )

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


def _drawn(samples: int, limit: int) -> np.ndarray:
    """At most `limit` sample ids, evenly drawn, ascending, always the same."""
    return np.sort(Order(samples, seed=0).sample_ids(np.arange(min(limit, samples))))


def _some_samples(dataset: Dataset, limit: int) -> Iterator[Sample | None]:
    """At most `limit` samples, evenly drawn, in order; None for one whose bytes cannot be read."""
    drawn = _drawn(len(dataset), limit).tolist()
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
