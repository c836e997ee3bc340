"""What every importer shares: hold out captions for the test set, and write OUT/train and OUT/test, or neither.

Design choices:
- The split is by caption, not by image: samples that share a caption (case, blanks and punctuation aside), directly or
  through a third, stay together. So no caption of test was seen in training, and the test measures more than memory.
- A group's place in the draw is sha256(seed, a caption of it), so more data later does not reshuffle what was there.
- Samples keep the order of their source; shuffling is the reader's (`data_pipeline.order`).
- OUT/train appears last: where it is, the import is complete.
- Workers read what to make from files of one shard's size, so a million samples are not sent to each of them.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import re
import shutil
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from data_pipeline.errors import DataError
from data_pipeline.sample import Sample, Skipped
from data_pipeline.shards import SAMPLES_PER_SHARD, Progress, Written, write_shards


@dataclass(frozen=True)
class Candidate:
    """A sample to be: its name in the source (the key is made of it), its captions, and where its bytes are.

    `place` is whatever the importer's reading function needs, and picklable. `metadata` goes into the field "json",
    beside "captions" and "id", which is the name.
    """

    name: str
    captions: tuple[str, ...]
    place: Any
    metadata: dict[str, Any] = field(default_factory=dict)


Read = Callable[[Candidate], dict[str, bytes]]


@dataclass(frozen=True)
class Imported:
    """What an importer wrote; `test` is None when nothing was to be held out."""

    train: Written
    test: Written | None

    @property
    def skipped(self) -> tuple[Skipped, ...]:
        """Everything that did not become a sample, of either set."""
        return self.train.skipped + (self.test.skipped if self.test else ())

    def reasons(self) -> dict[str, int]:
        """Why things were skipped: reason -> how many, the most frequent first."""
        return dict(Counter(skip.reason for skip in self.skipped).most_common())


def refuse_existing(out: Path) -> None:
    """ValueError when `out` holds a data set, or is a file: call it before any work."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: give a folder to write train and test into")
    for part in (out / "train", out / "test"):
        if part.exists() and (not part.is_dir() or any(part.iterdir())):
            raise ValueError(f"{part} is there already: give another folder, or remove it to import again")


def write_split(
    out: Path,
    candidates: Sequence[Candidate],
    read: Read,
    *,
    skipped: Iterable[Skipped] = (),
    test_share: float,
    seed: int,
    processes: int | None = None,
    progress: Progress | None = None,
) -> Imported:
    """Write `candidates` into out/train and out/test, about `test_share` of them into test (0 = no test set).

    `read(candidate)` gives the fields other than "txt" and "json"; it must be picklable, and raises DataError or
    OSError for a candidate to skip with that reason. `skipped` is what the importer left out already; it is reported
    with train. `progress(done, total)` counts through both sets.
    Raises ValueError when `out` holds a data set or nothing can be held out, DataError when no sample can be made.
    """
    refuse_existing(out)
    _refuse_share(test_share)
    keys = unique_keys(candidate.name for candidate in candidates)
    items = list(zip(keys, candidates, strict=True))
    test, train, unreadable = _hold_out(items, read, test_share, seed)
    held_out: Written | None = None
    done = 0
    is_new = not out.exists()

    def report(of_this_set: int, _: int) -> None:
        if progress:
            progress(done + of_this_set, len(items) - len(unreadable))

    with tempfile.TemporaryDirectory(prefix="weft-import-") as temporary:
        try:
            if test:
                make = _spill(test, read, Path(temporary) / "test")
                held_out = write_shards(len(test), make, out / "test", processes=processes, progress=report)
                done = len(test)
            make = _spill(train, read, Path(temporary) / "train")
            written = write_shards(len(train), make, out / "train", processes=processes, progress=report)
        except BaseException:  # a Ctrl-C too: a test set without its training set is of no use
            if held_out is not None:
                shutil.rmtree(out / "test", ignore_errors=True)
            if is_new and out.is_dir() and not any(out.iterdir()):
                out.rmdir()
            raise
    return Imported(replace(written, skipped=(*skipped, *unreadable, *written.skipped)), held_out)


def choose_test(captions: Sequence[tuple[str, ...]], test_share: float, seed: int) -> set[int]:
    """Which samples to hold out, by number: about `test_share` of them, whole groups of shared captions at a time.

    At least one group is held out and at least one is kept when `test_share` > 0. Raises ValueError when all samples
    are one group.
    """
    _refuse_share(test_share)
    if test_share == 0:
        return set()
    groups = _groups(captions)
    if len(groups) < 2:
        raise ValueError(
            f"all {len(captions)} samples are bound together by shared captions, so no caption can be held out: "
            "give a test share of 0, or more captions"
        )
    drawn = sorted(groups, key=lambda caption: hashlib.sha256(f"split:{seed}:{caption}".encode()).digest())
    goal = round(test_share * len(captions))
    held_out: list[int] = []
    for caption in drawn[:-1]:  # the last stays for training, whatever the share
        if len(held_out) + len(groups[caption]) <= goal:
            held_out += groups[caption]
    return set(held_out or groups[min(drawn, key=lambda caption: len(groups[caption]))])


def plain(caption: str) -> str:
    """The caption by which samples are told apart: letters, digits and marks alone, in one case.

    A caption of nothing but punctuation stays as it is.
    """
    folded = unicodedata.normalize("NFKC", caption).casefold()
    return "".join(letter for letter in folded if unicodedata.category(letter)[0] in "LNM") or caption.strip()


def unique_keys(names: Iterable[str]) -> list[str]:
    """A key for each name, all different: the name, where it can be a key, and something close to it where not.

    A path's last extension goes; other dots and what a tar or a shell would stumble on become "_". A key that is taken
    gets a number.
    """
    keys: list[str] = []
    taken: set[str] = set()
    for name in names:
        folder, _, base = unicodedata.normalize("NFC", name).strip("/").rpartition("/")
        stem = base.rpartition(".")[0] or base
        parts = [re.sub(r"[^\w+=@,()-]", "_", part) for part in [*folder.split("/"), stem] if part]
        key = "/".join(parts).lstrip("_/") or "sample"  # "__x__/" at the front would be metadata to webdataset
        unique, number = key, 1
        while unique in taken:
            number += 1
            unique = f"{key}-{number}"
        taken.add(unique)
        keys.append(unique)
    return keys


Item = tuple[str, Candidate]  # with its key


def _hold_out(
    items: list[Item], read: Read, test_share: float, seed: int
) -> tuple[list[Item], list[Item], list[Skipped]]:
    """(test, train, what cannot be read), drawn so that at least one sample of test can be made."""
    unreadable: list[Skipped] = []
    while True:
        try:
            chosen = choose_test([candidate.captions for _, candidate in items], test_share, seed)
        except ValueError as error:
            if not unreadable:
                raise
            first = unreadable[0]
            raise DataError(
                f"nothing can be held out: {len(unreadable)} samples could not be read "
                f"(the first, {first.source}: {first.reason}), and what is left cannot be split by caption"
            ) from error
        test = [item for number, item in enumerate(items) if number in chosen]
        train = [item for number, item in enumerate(items) if number not in chosen]
        skips: list[Skipped] = []
        for item in test:
            made = _make_sample(item, read)
            if isinstance(made, Sample):
                return test, train, unreadable
            skips.append(made)
        if not test:
            return test, train, unreadable
        unreadable += skips  # all of test: draw again from the others
        items = train


def _groups(captions: Sequence[tuple[str, ...]]) -> dict[str, list[int]]:
    """Sample numbers by connected component of shared captions; the smallest plain caption names the component."""
    parent: dict[str, str] = {}

    def root(caption: str) -> str:
        while parent[caption] != caption:
            parent[caption] = parent[parent[caption]]
            caption = parent[caption]
        return caption

    firsts = []
    for of_sample in captions:
        plains = [plain(caption) for caption in of_sample]
        for caption in plains:
            parent.setdefault(caption, caption)
            first, other = root(plains[0]), root(caption)
            parent[max(first, other)] = min(first, other)
        firsts.append(plains[0])
    groups: dict[str, list[int]] = {}
    for number, first_caption in enumerate(firsts):
        groups.setdefault(root(first_caption), []).append(number)
    return groups


def _refuse_share(test_share: float) -> None:
    if not 0 <= test_share < 1:
        raise ValueError(f"the test share is {test_share}: give 0 (no test set) or more, and less than 1")


def _make_sample(item: Item, read: Read) -> Sample | Skipped:
    """The sample of one candidate, with its captions and metadata beside what `read` gives."""
    key, candidate = item
    try:
        fields = read(candidate)
    except DataError as error:
        return Skipped(candidate.name, str(error))
    except OSError as error:
        return Skipped(candidate.name, error.strerror or str(error))
    metadata = {"captions": list(candidate.captions), "id": candidate.name, **candidate.metadata}
    text = json.dumps(metadata, ensure_ascii=False).encode("utf-8", "backslashreplace")
    return Sample(key, {**fields, "txt": candidate.captions[0].encode("utf-8", "backslashreplace"), "json": text})


@dataclass(frozen=True)
class _MakeSpilled:
    """make(i) for `write_shards`: sample i of the items that lie in `folder`, in files of one shard each."""

    folder: Path
    read: Read

    def __call__(self, number: int) -> Sample | Skipped:
        file, place = divmod(number, SAMPLES_PER_SHARD)
        return _make_sample(_load_items(self.folder / str(file))[place], self.read)


def _spill(items: list[Item], read: Read, folder: Path) -> _MakeSpilled:
    """Put `items` on disk, for any process to make samples of."""
    folder.mkdir()
    for number, start in enumerate(range(0, len(items), SAMPLES_PER_SHARD)):
        (folder / str(number)).write_bytes(pickle.dumps(items[start : start + SAMPLES_PER_SHARD]))
    return _MakeSpilled(folder, read)


@lru_cache(maxsize=1)
def _load_items(path: Path) -> list[Item]:
    """What `_spill` wrote, a moment ago and into a folder of this user alone."""
    items: list[Item] = pickle.loads(path.read_bytes())
    return items
