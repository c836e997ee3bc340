"""What every importer shares: hold out captions for the test set, and write OUT/train and OUT/test, or neither.

Design choices:
- A split that the data set was published with is kept (`Candidate.part`), OUT/val included, unless a test share is
  asked for.
- Else the split is by caption, not by image: samples that share a caption (case, blanks and punctuation aside),
  directly or through a third, stay together. So no caption of test was seen in training, and the test measures more
  than memory.
- A class is different: its captions say nothing of one image, and a test of classes wants those that were trained. Of
  such samples (`Candidate.by_class`) some of each class are drawn, so that both sets hold every class of two images.
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
from data_pipeline.importers.hold_out import choose_of_classes, choose_test, refuse_share
from data_pipeline.parallel import connected
from data_pipeline.sample import Sample, Skipped
from data_pipeline.shards import Origin, Progress, Workers, Written, read_origin, write_shards

PARTS = ("val", "test", "train")  # in the order in which they are written
TEST_SHARE = 0.1  # where no split was published and none is asked for
IN_NO_SET = "is in no set of the published split: give a test share to draw another split"


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
    """What an importer wrote; a set that there is nothing for is None. `notes`: what the user should know of it."""

    train: Written | None
    test: Written | None
    val: Written | None = None
    notes: tuple[str, ...] = ()

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
    notes: Sequence[str] = (),
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
    with train, as are `notes`. `processes`, and `on` with `reads`, which is what `read` reads: see `write_shards`.
    `progress(done, total)` counts through all sets. With a `request`, a finished import of the same is left
    as it is, and one that was killed goes on.
    Raises ValueError when `out` holds a data set or nothing can be held out, DataError when no sample can be made.
    """
    refuse_existing(out, request)
    published = test_share is None and any(candidate.part for candidate in candidates)
    share = TEST_SHARE if test_share is None else test_share
    refuse_share(share)
    keys = unique_keys(candidate.name for candidate in candidates)
    items = list(zip(keys, candidates, strict=True))
    origin = _origin(request, items, read) if request else None
    if origin:
        _refuse_changed(out, origin)
    if published:
        sets = {part: [item for item in items if item[1].part == part] for part in PARTS}
        unreadable = [Skipped(each.name, IN_NO_SET) for each in candidates if each.part not in PARTS]
    else:
        test, train, unreadable = _hold_out(items, read, share, seed)
        sets = {"test": test, "train": train}
    sets = {part: of for part, of in sets.items() if of} or {"train": []}
    with connected(on, processes):
        written = _write_sets(out, sets, read, origin, Workers(processes, on, reads), progress)
    told = next(part for part in reversed(PARTS) if part in written)  # train, where there is one
    written[told] = replace(written[told], skipped=(*skipped, *unreadable, *written[told].skipped))
    left = sorted(folder.name for folder in out.glob(".*.unfinished"))
    if left:
        notes = [
            *notes,
            f"{out} also holds what an interrupted import has left that was asked for otherwise, or whose source has "
            f"changed: remove {', '.join(left)}",
        ]
    return Imported(written.get("train"), written.get("test"), written.get("val"), tuple(notes))


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
    """(test, train, what cannot be read), drawn so that at least one sample of test, and of each class, can be made."""
    unreadable: list[Skipped] = []
    while True:
        try:
            chosen = _choose([candidate for _, candidate in items], test_share, seed)
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
        bad = _unreadable_classes(test, read)
        if not bad:
            return test, train, unreadable
        unreadable += bad.values()  # draw again from the others
        items = [item for item in items if item[0] not in bad]


def _choose(candidates: list[Candidate], test_share: float, seed: int) -> set[int]:
    """Which candidates to hold out, by number: some of each class, and of the others by caption."""
    classes = [number for number, candidate in enumerate(candidates) if candidate.by_class]
    others = [number for number, candidate in enumerate(candidates) if not candidate.by_class]
    chosen: set[int] = set()
    if classes:
        labels = [candidates[number].captions[0] for number in classes]
        names = [candidates[number].name for number in classes]
        chosen |= {classes[place] for place in choose_of_classes(labels, names, test_share, seed)}
    if others or not classes:
        bonds = [(*candidates[number].captions, *candidates[number].bonds) for number in others]
        chosen |= {others[place] for place in choose_test(bonds, test_share, seed)}
    return chosen


def _unreadable_classes(test: list[Item], read: Read) -> dict[str, Skipped]:
    """The samples, by key, of each class of which no sample in `test` can be made; all others count as one class."""
    members: dict[str, list[Item]] = {}
    for item in test:
        members.setdefault(item[1].captions[0] if item[1].by_class else "", []).append(item)
    bad: dict[str, Skipped] = {}
    for of_class in members.values():
        skips: dict[str, Skipped] = {}
        for item in of_class:
            made = _make_sample(item, read)
            if isinstance(made, Sample):
                break
            skips[item[0]] = made
        else:
            bad |= skips
    return bad


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
