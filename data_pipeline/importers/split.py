"""What every importer shares: hold out captions for the test set, and write OUT/train and OUT/test, or neither.

Design choices:
- A split that the data set was published with is kept (`Candidate.part`), OUT/val included, unless a test share is
  asked for.
- Else the split is by caption, not by image: samples that share a caption (case, blanks and punctuation aside),
  directly or through a third, stay together. So no caption of test was seen in training, and the test measures more
  than memory.
- A class is different: its captions say nothing of one image, and a test of classes wants those that were trained. Such
  samples (`Candidate.by_class`) are drawn one by one, and both sets hold every class of some size.
- A group's place in the draw is sha256(seed, a caption of it), so more data later does not reshuffle what was there.
- Samples keep the order of their source; shuffling is the reader's (`data_pipeline.order`).
- OUT/train appears last: where it is, the import is complete.
- What was asked for is a `Request`, and it is kept with what was written. The same request again finds its work done;
  after a kill it goes on. Whether it is the same is told by names, captions and metadata, not by bytes of images.
- A worker is sent what to make a shard at a time, so a million samples are not sent to each of them.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from data_pipeline.errors import DataError
from data_pipeline.parallel import connected
from data_pipeline.sample import Sample, Skipped
from data_pipeline.shards import Origin, Progress, Workers, Written, read_origin, write_shards

PARTS = ("val", "test", "train")  # in the order in which they are written
TEST_SHARE = 0.1  # where no split was published and none is asked for


class Provenance(NamedTuple):
    """Where a sample comes from: the data set, its licence where that is known, and what the sample is called there."""

    source: str
    licence: str | None
    id: str | int


@dataclass(frozen=True)
class Request:
    """What an importer was asked for: everything that changes what it writes, in words that JSON can hold."""

    importer: str
    source: str
    options: dict[str, str | int | float | None]

    @classmethod
    def of(cls, importer: str, source: Path, **options: str | Path | float | None) -> Request:
        """The request to import `source`; paths become absolute texts."""
        plain = {name: str(value.absolute()) if isinstance(value, Path) else value for name, value in options.items()}
        return cls(importer, str(source.absolute()), plain)


@dataclass(frozen=True)
class Candidate:
    """A sample to be: its name in the source (the key is made of it), its captions, and where its bytes are.

    `place` is whatever the importer's reading function needs, and picklable. `metadata` goes into the field "json",
    beside "captions" and "id", which is the name. `by_class`: the captions are those of a class. `part`: "train", "val"
    or "test", where the data set has a split of its own. `bonds`: what else than captions may not be on both sides of a
    split, such as a speaker.
    """

    name: str
    captions: tuple[str, ...]
    place: Any
    metadata: dict[str, Any] = field(default_factory=dict)
    by_class: bool = False
    provenance: Provenance | None = None
    part: str | None = None
    bonds: tuple[str, ...] = ()


Read = Callable[[Candidate], dict[str, bytes]]


@dataclass(frozen=True)
class Imported:
    """What an importer wrote; a set that there is nothing for is None."""

    train: Written | None
    test: Written | None
    val: Written | None = None

    @property
    def parts(self) -> dict[str, Written]:
        """The sets that there are, by the names of their folders."""
        sets = {"train": self.train, "val": self.val, "test": self.test}
        return {name: written for name, written in sets.items() if written is not None}

    @property
    def skipped(self) -> tuple[Skipped, ...]:
        """Everything that did not become a sample, of any set."""
        return tuple(skip for written in self.parts.values() for skip in written.skipped)

    @property
    def already(self) -> bool:
        """Whether an earlier import of the same request wrote all this, and this one nothing."""
        return all(written.already for written in self.parts.values())

    def reasons(self) -> dict[str, int]:
        """Why things were skipped: reason -> how many, the most frequent first."""
        return dict(Counter(skip.reason for skip in self.skipped).most_common())


def refuse_existing(out: Path, request: Request | None = None) -> None:
    """ValueError when `out` holds a data set, unless it is of this request, or is a file: call it before any work."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: give a folder to write train and test into")
    for part in _filled_parts(out):
        origin = read_origin(part)
        if request is None or origin is None or origin.request != asdict(request):
            raise ValueError(f"{part} is there already: give another folder, or remove it to import again")


def write_split(
    out: Path,
    candidates: Sequence[Candidate],
    read: Read,
    *,
    skipped: Iterable[Skipped] = (),
    test_share: float | None,
    seed: int,
    request: Request | None = None,
    processes: int | None = None,
    on: str | None = None,
    reads: Sequence[Path] = (),
    progress: Progress | None = None,
) -> Imported:
    """Write `candidates` into out/train and out/test, about `test_share` of them into test (0 = no test set).

    A `test_share` of None keeps the split that the candidates have, out/val included, or is `TEST_SHARE` if they have
    none. `read(candidate)` gives the fields other than "txt" and "json"; it must be picklable, and raises DataError or
    OSError for a candidate to skip with that reason. `skipped` is what the importer left out already; it is reported
    with train. `processes`, and `on` with `reads`, which is what `read` reads: see `write_shards`.
    `progress(done, total)` counts through all sets. With a `request`, a finished import of the same is left
    as it is, and one that was killed goes on.
    Raises ValueError when `out` holds a data set or nothing can be held out, DataError when no sample can be made.
    """
    refuse_existing(out, request)
    published = test_share is None and any(candidate.part for candidate in candidates)
    share = TEST_SHARE if test_share is None else test_share
    _refuse_share(share)
    keys = unique_keys(candidate.name for candidate in candidates)
    items = list(zip(keys, candidates, strict=True))
    origin = _origin(request, items, read) if request else None
    if origin:
        _refuse_changed(out, origin)
    if published:
        sets = {part: [item for item in items if item[1].part == part] for part in PARTS}
        unreadable: list[Skipped] = []
    else:
        test, train, unreadable = _hold_out(items, read, share, seed)
        sets = {"test": test, "train": train}
    sets = {part: of for part, of in sets.items() if of} or {"train": []}
    with connected(on, processes):
        written = _write_sets(out, sets, read, origin, Workers(processes, on, reads), progress)
    told = next(part for part in reversed(PARTS) if part in written)  # train, where there is one
    written[told] = replace(written[told], skipped=(*skipped, *unreadable, *written[told].skipped))
    return Imported(written.get("train"), written.get("test"), written.get("val"))


def _write_sets(
    out: Path,
    sets: dict[str, list[Item]],
    read: Read,
    origin: Origin | None,
    workers: Workers,
    progress: Progress | None,
) -> dict[str, Written]:
    """Write each of the sets into the folder of its name, or none of them."""
    written: dict[str, Written] = {}
    total = sum(map(len, sets.values()))
    done = 0
    is_new = not out.exists()

    def report(of_this_set: int, _: int) -> None:
        if progress:
            progress(done + of_this_set, total)

    try:
        for part, items in sets.items():
            make = partial(_make_sample, read=read)
            written[part] = write_shards(
                items,
                make,
                out / part,
                processes=workers.processes,
                on=workers.on,
                reads=workers.reads,
                progress=report,
                origin=origin,
            )
            done += len(items)
    except BaseException:  # a Ctrl-C too: a test set without its training set is of no use
        for part in written:
            shutil.rmtree(out / part, ignore_errors=True)
        if is_new and out.is_dir() and not any(out.iterdir()):
            out.rmdir()
        raise
    return written


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
            f"all {len(captions)} samples are bound together by shared captions or speakers, so none can be held out: "
            "give a test share of 0, or more of them"
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
            bonds = [
                (candidate.name,) if candidate.by_class else (*candidate.captions, *candidate.bonds)
                for _, candidate in items
            ]
            chosen = choose_test(bonds, test_share, seed)
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


def _filled_parts(out: Path) -> list[Path]:
    """The folders of sets in `out` that hold something."""
    parts = [out / part for part in PARTS]
    return [part for part in parts if part.exists() and (not part.is_dir() or any(part.iterdir()))]


def _origin(request: Request, items: list[Item], read: Read) -> Origin:
    """The request, and a fingerprint over all that it came to. Places are left out: they follow from the names."""
    digest = hashlib.sha256(repr((asdict(request), getattr(read, "__qualname__", ""))).encode())
    for key, candidate in items:
        what = (candidate.part, key, candidate.name, candidate.captions, candidate.provenance, candidate.metadata)
        digest.update(repr(what).encode("utf-8", "surrogatepass"))
    return Origin(asdict(request), digest.hexdigest())


def _refuse_changed(out: Path, origin: Origin) -> None:
    for part in _filled_parts(out):
        if read_origin(part) != origin:
            raise ValueError(
                f"{part} is there already, and its source has changed since: give another folder, or remove it to "
                "import again"
            )


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
    if candidate.provenance:
        metadata["provenance"] = candidate.provenance._asdict()
    text = json.dumps(metadata, ensure_ascii=False).encode("utf-8", "backslashreplace")
    return Sample(key, {**fields, "txt": candidate.captions[0].encode("utf-8", "backslashreplace"), "json": text})
