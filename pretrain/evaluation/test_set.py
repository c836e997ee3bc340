"""Which samples of a test set are scored, what is read of each, and which could not be used.

Design choices:
- A limit takes a spread over the whole set, one sample at random from each of `limit` equal stretches, because many
  sets are stored class by class. The draw depends on the size of the set and the limit alone: every run, every number
  of ranks and every batch size scores the same samples.
- A sample that cannot be used is left out of the scores and named. Nothing stands in for it.
- Images are read batch by batch and not kept.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from data_pipeline import Corrupt, DataError, Dataset, ImageTransform, decode_image, sample_generator
from data_pipeline.damage import cause_of, opened
from data_pipeline.errors import DamagedSampleError
from data_pipeline.index import written_whole
from data_pipeline.strict_json import read_json
from pretrain.errors import RequestError
from pretrain.parallel.groups import Ranks

# A pass over the json fields of more samples than this reads an even spread of so many
MOST_LABELS = 200_000


@dataclass(frozen=True)
class Item:
    """What is known of a usable sample beside its image: every caption, () when there is none, and the class."""

    sample: int
    captions: tuple[str, ...]
    label: str | None


@dataclass(frozen=True)
class Classes:
    """The class names of a whole test set, sorted; `partial`: some samples were not looked at."""

    names: tuple[str, ...]
    partial: bool


def spread(total: int, limit: int) -> np.ndarray:
    """Ascending sample ids, int64 [min(limit, total)]: one at random from each of `limit` equal stretches."""
    if limit >= total:
        return np.arange(total, dtype=np.int64)
    edges = np.arange(limit + 1, dtype=np.int64) * total // limit
    within = sample_generator(0, 0, limit, "evaluation").random(limit)
    return edges[:-1] + (within * np.diff(edges)).astype(np.int64)


def read_item(
    dataset: Dataset, sample: int, image: ImageTransform, labels: bool
) -> tuple[Item, torch.Tensor] | Corrupt:
    """A sample and its image, uint8 [3, size, size], or why it cannot be used.

    It needs an image and a caption; where `labels` count, a label will do for a caption.
    """
    try:
        with opened(dataset, sample) as read:
            if read.image_field is None:
                raise DataError("it has no image")
            item = Item(sample, tuple(each for each in read.captions() if each.strip()), read.label())
            if not item.captions and (item.label is None or not labels):
                raise DataError("it has no caption")
            return item, image(decode_image(read.fields[read.image_field]), None)
    except DamagedSampleError as error:
        return Corrupt(sample, error.key, error.shard, error.reason, cause_of(error))


def require_usable(dataset: Dataset, limit: int, captioner: bool) -> None:
    """RequestError when too few of the samples that an evaluation takes can be used: retrieval needs two.

    Reads no more samples than it takes to find as many.
    """
    needed, found, last = (1 if captioner else 2), 0, None
    for sample in spread(len(dataset), limit).tolist():
        read = read_item(dataset, sample, ImageTransform(1), labels=not captioner)
        if isinstance(read, Corrupt):
            last = read
            continue
        found += 1
        if found == needed:
            return
    why = f" ({last.key!r} in {last.shard} is left out: {last.reason})" if last else ""
    raise RequestError(
        f"the test set {dataset.folder} has {found} usable {'sample' if found == 1 else 'samples'}, and an evaluation "
        f"needs {needed} or more{why}: give another data.test, or data.test=null for none"
    )


def gathered_items(mine: Iterable[Item], ranks: Ranks) -> list[Item]:
    """The items of all ranks by sample id, on every rank. Ranks that read the same share have the same ones."""
    everyone = {item.sample: item for part in ranks.of_all(list(mine)) for item in part}
    return [everyone[sample] for sample in sorted(everyone)]


def gathered_unusable(mine: Iterable[Corrupt], ranks: Ranks) -> list[Corrupt]:
    """The unusable samples of all ranks by sample id, on every rank."""
    everyone = {each.sample: each for part in ranks.of_all(list(mine)) for each in part}
    return [everyone[sample] for sample in sorted(everyone)]


def classes_of(dataset: Dataset, known: Sequence[Item], chosen: int, memory: Path | None, ranks: Ranks) -> Classes:
    """The classes of the whole set; every rank calls this. `known`: the usable ones of the `chosen` samples.

    Where not all samples were chosen, the ranks read the json fields of the others, each a share, once: what they found
    is kept in the folder `memory`, by the fingerprint of the data.
    """
    names = {item.label for item in known if item.label is not None}
    if not names or chosen == len(dataset):
        return Classes(tuple(sorted(names)), False)
    file = memory / "classes" / f"{dataset.fingerprint}.json" if memory else None
    kept = ranks.of_first(_read_classes(file) if file and ranks.is_first else None)
    if kept is None:
        samples = spread(len(dataset), MOST_LABELS)
        found = ranks.of_all(labels_of(dataset, samples[ranks.rank :: ranks.world].tolist()))
        kept = Classes(tuple(sorted(set().union(*found))), len(samples) < len(dataset))
        if file and ranks.is_first:
            _write_classes(file, kept)
    return Classes(tuple(sorted(names.union(kept.names))), kept.partial)


def labels_of(dataset: Dataset, samples: Iterable[int]) -> set[str]:
    """The labels of these samples, from their json fields alone; those that cannot be read have none."""
    found = set()
    for sample in samples:
        try:
            label = dataset.read(sample, only=("json",)).label()
        except DataError:
            continue
        if label is not None:
            found.add(label)
    return found


def _read_classes(file: Path) -> Classes | None:
    """What an earlier evaluation has kept; None for anything else."""
    try:
        tree = read_json(file.read_text(encoding="utf-8"))
        names, partial = tree["names"], tree["partial"]
    except (OSError, ValueError, TypeError, KeyError):
        return None
    right = isinstance(names, list) and all(isinstance(name, str) for name in names) and isinstance(partial, bool)
    return Classes(tuple(names), partial) if right else None


def _write_classes(file: Path, classes: Classes) -> None:
    with suppress(OSError):  # a full or read-only disk costs another pass, no more
        file.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(file) as unfinished:
            text = json.dumps({"names": classes.names, "partial": classes.partial}, ensure_ascii=False)
            unfinished.write_text(text + "\n", encoding="utf-8")
