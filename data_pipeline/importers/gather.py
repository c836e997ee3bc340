"""What importers of published data sets have in common: find the files that annotations name, note where all is from.

An importer of this kind is a module with two functions:

    def import_mine(source: Path, out: Path, **options: Unpack[Options]) -> Imported:
        return run_import("mine", source, out, options, gather_mine, read_image)

    def gather_mine(source: Path, found: Gathered) -> None:
        found.source = "My data set 1.0"
        for record in ...:
            path = found.file(record["file"], source / "images")
            if path:
                found.add(record["file"], path, captions=[record["caption"]], id=record["id"], part="train")

Design choices:
- A name in an annotation file must lie in the folder that it is relative to (`locate`). It comes from somebody else,
  and with "../" or an absolute path it could pack any file of this machine into a data set that is handed on.
  Links inside the folder are followed: whoever keeps the folder put them there.
- Whether files are there is asked while gathering, so that a set of which nobody downloaded the images is left out as a
  whole instead of failing.
- An image or sound beside those that annotations name, of whatever kind, is told: it may be what was meant.
- A missing or refused file is told once, however many annotations it has.
- A row that cannot be used costs itself, and is told (`skipping`, and the `skip` of what reads rows).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

from data_pipeline.errors import DataError
from data_pipeline.importers.annotations import BadRowError, clean
from data_pipeline.importers.captions import NO_CAPTION, usable
from data_pipeline.importers.leftovers import unnamed
from data_pipeline.importers.split import (
    Candidate,
    Imported,
    Provenance,
    Read,
    Request,
    refuse_existing,
    write_split,
)
from data_pipeline.sample import Skipped
from data_pipeline.shards import Progress

NO_FILE = "the {} file is missing"
SET_NAMES = {
    "train": ("train", "training"),
    "val": ("dev", "val", "valid", "validation"),
    "test": ("test", "testing", "eval", "evaluation"),
}
SET_NAME = re.compile(rf"({'|'.join(name for names in SET_NAMES.values() for name in names)})(?![a-z])")


class Options(TypedDict, total=False):
    """What every importer of a published data set can be told.

    media: where the images or sounds lie, if not where the data set has them. licence: of the samples whose licence the
    data set does not tell. test_share: None keeps the published split; a share draws another one, with `seed`.
    processes, on: who works; see `shards.write_shards`.
    """

    media: Path | None
    licence: str | None
    test_share: float | None
    seed: int
    processes: int | None
    on: str | None
    progress: Progress | None


@dataclass
class Gathered:
    """The samples to be that an importer has found, and what it left out. `source` is the data set's name."""

    media: Path | None = None
    licence: str | None = None
    what: str = "image"
    source: str = ""
    candidates: list[Candidate] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    _refused: set[str] = field(default_factory=set)
    named: set[Path] = field(default_factory=set)  # files that annotations are about

    def folder(self, *usual: Path) -> Path:
        """Where files lie: the first of the `usual` folders that there is, or where the user says they are.

        A user may point at the folder itself or at its parent.
        """
        if self.media is not None:
            named = [self.media / folder.name for folder in usual]
            return next((folder for folder in named if folder.is_dir()), self.media)
        return next((folder for folder in usual if folder.is_dir()), usual[0])

    def file(self, written: str, folder: Path, name: str | None = None) -> Path | None:
        """The file that an annotation calls `written`, in `folder`; None, and told, when it is refused or missing.

        `name`: how to tell of it; default: as it is written.
        """
        path, reason = locate(written, folder, "data set")
        if path is not None and not os.path.isfile(path):
            path, reason = None, NO_FILE.format(self.what)
        if path is None:
            self.skip_once(written if name is None else name, reason)
        else:
            self.named.add(path)
        return path

    def add(
        self,
        name: str,
        place: Any,
        captions: Iterable[Any],
        *,
        id: str | int,
        spoken: bool = False,
        part: str | None = None,
        licence: str | None = None,
        bonds: Sequence[str] = (),
        **metadata: Any,
    ) -> None:
        """Take a sample with those of its captions that are `usable`; without any it is left out, and told.

        Of others, what is no caption is told too, blanks aside. `spoken`: the captions are transcripts.
        """
        texts: list[str] = []
        problems: dict[str, None] = {}
        for caption in captions:
            text, problem = usable(caption, spoken=spoken)
            texts += text
            if problem:
                problems[problem] = None
        told = [problem for problem in problems if problem != NO_CAPTION]
        if not texts:
            self.skipped.append(Skipped(name, told[0] if told else NO_CAPTION))
            return
        self.skipped += [Skipped(f"one of the captions of {name}", problem) for problem in told]
        provenance = Provenance(self.source, licence or self.licence, id)
        given = {key: value for key, value in metadata.items() if value is not None}
        self.candidates.append(
            Candidate(name, tuple(texts), place, given, provenance=provenance, part=part, bonds=tuple(bonds))
        )

    @contextmanager
    def skipping(self) -> Iterator[None]:
        """Leaves out, and tells, the row that is a BadRowError inside."""
        try:
            yield
        except BadRowError as error:
            self.skip(error.where, error.reason)

    def skip(self, name: str, reason: str) -> None:
        """Leave something out."""
        self.skipped.append(Skipped(clean(name), reason))

    def skip_once(self, name: str, reason: str) -> None:
        """Leave something out that several annotations are about."""
        if name not in self._refused:
            self._refused.add(name)
            self.skip(name, reason)


Gather = Callable[[Path, Gathered], None]


def run_import(
    importer: str, source: Path, out: Path, options: Options, gather: Gather, read: Read, what: str = "image"
) -> Imported:
    """Gather from `source` and write to `out`: what every importer of this kind does.

    Raises FileNotFoundError when there is no `source`, ValueError when `out` holds another data set, DataError when an
    annotation file is damaged or nothing in it can be used.
    """
    media, licence = options.get("media"), options.get("licence")
    test_share, seed = options.get("test_share"), options.get("seed", 0)
    request = Request.of(importer, source, media=media, licence=licence, test_share=test_share, seed=seed)
    refuse_existing(out, request)
    if not source.exists():
        raise FileNotFoundError(f"there is no {source}: give the folder of the data set")
    if media is not None and not media.is_dir():
        raise FileNotFoundError(f"there is no folder {media}: give the one that holds the {what} files")
    found = Gathered(media, licence, what)
    gather(source, found)
    found.skipped += unnamed(found.named, media or (source.parent if source.is_file() else source), what)
    if not found.candidates:
        why = f"; the first, {found.skipped[0].source}: {found.skipped[0].reason}" if found.skipped else ""
        raise DataError(f"nothing in {source} can be used, of {len(found.skipped)}{why}")
    return write_split(
        out,
        found.candidates,
        read,
        skipped=found.skipped,
        test_share=test_share,
        seed=seed,
        request=request,
        processes=options.get("processes"),
        on=options.get("on"),
        reads=[source, *([media] if media else [])],
        progress=options.get("progress"),
    )


def locate(written: str, folder: Path, whose: str = "table") -> tuple[Path | None, str]:
    """(the file that an annotation of `folder` means, "") or (None, why it is refused)."""
    if "://" in written[:12]:
        return None, "is a URL, and nothing is downloaded"
    if "\0" in written or not written:
        return None, "is no path"
    base = folder.absolute()
    path = Path(os.path.normpath(base / written))  # as text: "a/../b" is b, links are not asked
    if not path.is_relative_to(os.path.normpath(base)):
        return None, f"lies outside the {whose}'s folder, and a {whose} must not reach for other files of this machine"
    return path, ""


def part_of(name: str) -> str | None:
    """The set that a file or folder is of, by the word that its name begins with: "dev-clean" is of "val"."""
    found = SET_NAME.match(name.lower())
    return next(part for part, names in SET_NAMES.items() if found[0] in names) if found else None


def part_named(name: Any) -> str | None:
    """The set that a folder or a cell is called after: "dev" is "val"; None for any other name."""
    plain = re.sub(r"[\s_-]*\d+$", "", name.strip().casefold()) if isinstance(name, str) else ""
    return next((part for part, names in SET_NAMES.items() if plain in names), None)


def find_annotations(source: Path, patterns: Iterable[str], folders: Iterable[str], what: str) -> list[Path]:
    """The annotation files of a data set, in order of name: `source` itself, or those in the first of its `folders`.

    Raises FileNotFoundError that says what was looked for.
    """
    if source.is_file():
        return [source]
    patterns = list(patterns)
    for folder in folders:
        paths = sorted(path for pattern in patterns for path in (source / folder).glob(pattern) if path.is_file())
        if paths:
            return paths
    raise FileNotFoundError(f"no {' or '.join(patterns)} in {source}: give the folder with {what}")
