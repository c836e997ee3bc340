"""What is in a folder of shards and where: index.json for the folder, one table of offsets beside each tar.

Design choices:
- index.json is small and for everyone: format version, per shard its file, samples, bytes, checksum and modalities, and
  counts of what in it no run reads. Its fingerprint names the data a run has read, and tells whether it was edited.
- `<shard>.tar.idx.npz` (table.py) says where each sample and field lies. It is loaded when a shard is first read.
- Any folder of WebDataset tars is indexed on first sight; nobody has to convert anything.
- A stale index is found when it is opened: every shard must be there with the size it had, and no other beside them.
  Bytes that changed under an equal size are found by `weft data check`, which reads them all.
- What lies in the folder and is not read (compressed tars, folders of tars) is known to whoever opens it: `remarks`.
- Files appear whole or not at all (written aside, then renamed), so ranks that index the same folder do not clash.
"""

from __future__ import annotations

import hashlib
import json
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from data_pipeline.errors import DataError
from data_pipeline.folder import empty_remark, gap_in, hint_of_pattern, ignored_in, remark_of, shard_files
from data_pipeline.parallel import run_jobs
from data_pipeline.sample import modalities_of
from data_pipeline.scan import LeftOut, Pace, scan_tar, sentences
from data_pipeline.strict_json import read_json
from data_pipeline.table import ShardTable, read_stored, write_table

INDEX_FILE = "index.json"
FORMAT = "weft-index"
VERSION = 1
TABLES = 2  # version of the tables: from 2 on they have details
CHECKSUM = re.compile(r"sha256:[0-9a-f]{64}")
MODALITIES = ("audio", "image", "text")
MOST = 1 << 62  # bytes of a shard
LARGEST_INDEX = 1 << 30  # bytes of an index.json


@dataclass(frozen=True)
class ShardEntry:
    """One shard in the index; `checksum` is "sha256:<hex>" of the tar, `bytes` its size."""

    file: str
    samples: int
    bytes: int
    checksum: str
    modalities: tuple[str, ...]
    left_out: LeftOut = field(default_factory=LeftOut)
    repeated: tuple[int, str] = (0, "")  # ShardTable.repeated_keys

    def as_tree(self) -> dict[str, Any]:
        """As it is in index.json; counts of 0 are left out."""
        tree, (keys, first) = self.identity(), self.repeated
        if left_out := {name: count for name, count in asdict(self.left_out).items() if count}:
            tree["left_out"] = left_out
        return tree | {"repeated": {"keys": keys, "first": first}} if keys else tree

    def identity(self) -> dict[str, Any]:
        """What of it the fingerprint is made of."""
        names = ("file", "samples", "bytes", "checksum", "modalities")
        return {name: getattr(self, name) for name in names}

    @classmethod
    def from_tree(cls, tree: Any) -> ShardEntry:
        """The entry in a tree from JSON; ValueError, KeyError or TypeError when it is something else."""
        file, checksum = _text(tree["file"]), _text(tree["checksum"])
        if Path(file).name != file or not file.lower().endswith(".tar") or "\0" in file:
            raise ValueError(f"{file!r} is not the name of a shard beside it")
        if not CHECKSUM.fullmatch(checksum):
            raise ValueError(f"{checksum[:80]!r} is no checksum of {file!r}")
        samples, size = _count(tree["samples"], MOST), _count(tree["bytes"], MOST)
        modalities = tuple(_text(name) for name in tree["modalities"])
        if list(modalities) != sorted(set(modalities).intersection(MODALITIES)):
            raise ValueError(f"{modalities} are no modalities")
        if samples > size // 512:  # each begins with a header in the tar
            raise ValueError(f"{samples} samples do not go into the {size} bytes of {file!r}")
        counts = {_text(name): _count(count, MOST) for name, count in dict(tree.get("left_out", {})).items()}
        unknown = next((name for name in counts if name not in LeftOut.__dataclass_fields__), None)
        if unknown is not None:
            raise ValueError(f"{unknown!r} is nothing that is left out of {file!r}")
        repeated = tree.get("repeated", {"keys": 0, "first": ""})
        keys = _count(repeated["keys"], MOST), _text(repeated["first"])
        return cls(file, samples, size, checksum, modalities, LeftOut(**counts), keys)


@dataclass(frozen=True)
class Index:
    """The shards of a data set, in order: sample ids count through them from 0."""

    shards: tuple[ShardEntry, ...]
    ignored: tuple[tuple[str, str], ...] = field(default=(), compare=False)  # (name, why) of what lies beside them
    tables: int = field(default=TABLES, compare=False)  # version of the tables when it was made

    @cached_property
    def samples(self) -> int:
        """Number of samples in all shards."""
        return sum(shard.samples for shard in self.shards)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 (hex) over the shard entries: equal fingerprints are equal data in equal order."""
        entries = json.dumps([shard.identity() for shard in self.shards], sort_keys=True)
        return hashlib.sha256(entries.encode()).hexdigest()

    @cached_property
    def left_out(self) -> LeftOut:
        """What of all shards no run reads."""
        return sum((shard.left_out for shard in self.shards), LeftOut())

    def remarks(self) -> list[str]:
        """What is in the folder or in its shards and not read, or missing in some samples; a few words each."""
        gap = gap_in(shard.file for shard in self.shards)
        empty = empty_remark([shard.file for shard in self.shards if not shard.samples])
        ignored = remark_of(self.ignored) if self.ignored else ""
        told = (gap, empty, ignored, *sentences(self.left_out, self.samples), self._repeated_remark())
        return [*filter(None, told)]

    def _repeated_remark(self) -> str:
        """What is to be said of keys that a shard has more than once; or ""."""
        having = [shard for shard in self.shards if shard.repeated[0]]
        keys = sum(shard.repeated[0] for shard in having)
        if not keys:
            return ""
        first = f"{having[0].repeated[1]!r} in {having[0].file}"
        if keys == 1:
            return f"1 key is there twice, {first}: all samples of it are read"
        return f"{keys:,} keys are there twice, such as {first}: all samples of them are read"

    def save(self, folder: Path) -> None:
        """Write index.json into `folder`; the file appears whole or not at all."""
        tree = {
            "format": FORMAT,
            "version": VERSION,
            "tables": self.tables,
            "samples": self.samples,
            "fingerprint": self.fingerprint,
            "shards": [shard.as_tree() for shard in self.shards],
        }
        with written_whole(folder / INDEX_FILE) as unfinished:
            unfinished.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path, url: str = "") -> Index:
        """Read index.json of `folder`, the shards unseen; FileNotFoundError, or DataError for another file.

        `url`: the folder from which it was fetched, if it was, which errors name.
        """
        path = folder / INDEX_FILE
        named = f"{url}/{INDEX_FILE}" if url else str(path)
        remedy = f"have it made by `weft data stats` where {url} is stored" if url else _rebuild(folder)
        if not path.is_file():
            raise FileNotFoundError(f"no {INDEX_FILE} in {folder}")
        try:
            if path.stat().st_size > LARGEST_INDEX:
                raise ValueError(f"it has {path.stat().st_size} bytes")
            tree: Any = read_json(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise DataError(f"{named} is no index of ours ({error}): {remedy}") from error
        if not isinstance(tree, dict) or tree.get("format") != FORMAT:
            raise DataError(
                f"{named} is no index of ours, but a file of another tool: move it elsewhere (if nothing needs it, "
                "delete it), and the index is made anew"
            )
        try:
            if tree["version"] != VERSION:
                raise ValueError(f"it is {FORMAT} version {tree['version']!r}, not {VERSION}")
            if not isinstance(tree["shards"], list):
                raise ValueError("its shards are no list")
            shards = tuple(ShardEntry.from_tree(shard) for shard in tree["shards"])
            index = cls(shards, tables=_count(tree.get("tables", 1), TABLES))
            _refuse_contradictions(index, tree)
        except (ValueError, KeyError, TypeError) as error:
            words = f"it has no {error}" if isinstance(error, KeyError) else str(error)
            raise DataError(f"{named} is no index of ours ({words}): {remedy}") from error
        return index


def load_index(folder: str | Path) -> Index:
    """The index of `folder`, made now if there is none, checked against the shards that lie there.

    Raises FileNotFoundError when there is no such folder, DataError when index and shards disagree.
    """
    folder = Path(folder)
    if not folder.is_dir():
        what = "it is a file, not a folder of shards" if folder.exists() else "there is no such folder"
        raise FileNotFoundError(f"no data set at {folder}: {what}{hint_of_pattern(str(folder))}")
    if not (folder / INDEX_FILE).is_file():
        return build_index(folder)
    index = Index.load(folder)
    disagreement = next(disagreements(index, folder), None)
    if disagreement:
        raise DataError(f"{disagreement[1]}: {_rebuild(folder)}")
    return replace(index, ignored=ignored_in(folder))


def disagreements(index: Index, folder: Path) -> Iterator[tuple[str, str]]:
    """(shard file, sentence) for every shard that is not as the index has it; sizes only, no byte is read."""
    sizes: dict[str, int] = {}
    for path in shard_files(folder):
        try:
            sizes[path.name] = path.stat().st_size
        except FileNotFoundError:
            yield path.name, f"{path} is a link to a file that is not there"
            sizes[path.name] = -1
    for shard in index.shards:
        size = sizes.pop(shard.file, None)
        if size is None:
            yield shard.file, f"{folder / shard.file} is in the index, but there is no such file"
        elif size not in (shard.bytes, -1):
            yield shard.file, f"{folder / shard.file} has {size} bytes, but {shard.bytes} in the index"
    for file in (file for file, size in sizes.items() if size >= 0):
        yield file, f"{folder / file} is not in the index"


def build_index(folder: str | Path, processes: int | None = None) -> Index:
    """Read every tar of `folder` (in order of name) and write its index; replaces one that is there.

    `processes` at work: default all cores, 0 or 1 = in this process.
    Raises FileNotFoundError when there is no tar, DataError for a bad one or when all are without samples.
    """
    folder = Path(folder)
    paths, ignored = shard_files(folder), ignored_in(folder)
    if not paths:
        raise FileNotFoundError(f"no data set at {folder}: there is no .tar file in it{_instead(folder, ignored)}")
    pace, entries = Pace(f"indexing {folder}"), {}
    with run_jobs(index_shard, [(path,) for path in paths], processes=processes) as results:
        for number, entry in results:
            entries[number] = entry
            pace.at(len(entries), len(paths))
    index = Index(tuple(entries[number] for number in range(len(paths))), ignored)
    if index.samples == 0:
        raise DataError(f"there is no sample in the {len(paths)} .tar files of {folder}")
    index.save(folder)
    return index


def index_shard(path: Path) -> ShardEntry:
    """Read one tar, write its table of offsets beside it, and return its entry; DataError when it is bad."""
    try:
        scan = scan_tar(path)
    except FileNotFoundError as error:
        raise DataError(f"{path} is a link to a file that is not there") from error
    checksum = checksum_of(path)
    with written_whole(table_path(path)) as unfinished:
        write_table(unfinished, scan.table, checksum)
    names = modalities_of(scan.table.field_names)
    size, repeated = path.stat().st_size, scan.table.repeated_keys()
    return ShardEntry(path.name, len(scan.table), size, checksum, names, scan.left_out, repeated)


def load_table(path: Path, entry: ShardEntry) -> ShardTable:
    """The stored table of the tar at `path`; DataError when it is missing, damaged or of another tar."""
    stored = table_path(path)
    try:
        table, checksum = read_stored(stored, entry.bytes)
    except FileNotFoundError as error:
        raise DataError(f"{stored} is missing: {_rebuild(path.parent)}") from error
    except DataError as error:
        raise DataError(f"{error}: {_rebuild(path.parent)}") from error
    if (checksum, len(table), modalities_of(table.field_names)) != (entry.checksum, entry.samples, entry.modalities):
        raise DataError(f"{stored} describes another tar than {INDEX_FILE} does: {_rebuild(path.parent)}")
    return table


def complete_tables(folder: Path, index: Index) -> Index:
    """The index with tables that have details, made now where those of an early version have none.

    Raises DataError when a shard is not the one that was indexed, OSError when nothing can be written there.
    """
    if index.tables >= TABLES:
        return index
    pace, entries = Pace(f"completing the index of {folder}"), {}
    with run_jobs(index_shard, [(folder / shard.file,) for shard in index.shards]) as results:
        for number, entry in results:
            entries[number] = entry
            pace.at(len(entries), len(index.shards))
    complete = Index(tuple(entries[number] for number in range(len(entries))), index.ignored)
    if complete.fingerprint != index.fingerprint:
        raise DataError(f"the shards of {folder} changed since they were indexed: {_rebuild(folder)}")
    complete.save(folder)
    return complete


def shares_by_shard(index: Index, ranks: int, workers: int) -> list[list[int]]:
    """Samples that each worker of each rank gets where whole shards are dealt out in turn, as plain `webdataset` does.

    Ours deals out positions and not shards: there every rank has the same, whatever the shards hold.
    """
    shards = [shard.samples for shard in index.shards]
    return [[sum(shards[rank::ranks][worker::workers]) for worker in range(workers)] for rank in range(ranks)]


def checksum_of(path: Path) -> str:
    """ "sha256:<hex>" of a file's bytes."""
    with path.open("rb") as file:
        return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()


def table_path(path: Path) -> Path:
    """Where the table of offsets of the tar at `path` lies."""
    return path.with_name(path.name + ".idx.npz")


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A temporary neighbour to write, which takes the place of `path` at the end, or goes away on an error.

    Its name is no other's, in whatever container or on whatever machine; an OSError names `path` instead.
    """
    unfinished = path.with_name(f".{path.name[:200]}.{uuid.uuid4().hex[:16]}.tmp")
    try:
        yield unfinished
        unfinished.replace(path)
    except OSError as error:
        if error.filename in (unfinished, str(unfinished)):
            error.filename, error.filename2 = str(path), None
        raise
    finally:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)


def _refuse_contradictions(index: Index, tree: dict[str, Any]) -> None:
    """ValueError when a tree from JSON does not have what its shards add up to."""
    if index.samples != _count(tree["samples"], MOST):
        raise ValueError(f"it counts {tree['samples']} samples, its shards {index.samples}")
    files = [shard.file for shard in index.shards]
    twice = next((file for file in files if files.count(file) > 1), None) if len(set(files)) < len(files) else None
    if twice is not None:
        raise ValueError(f"it has the shard {twice!r} twice")
    if tree.get("fingerprint", index.fingerprint) != index.fingerprint:
        raise ValueError("its fingerprint is of other shards: it was edited or damaged")


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{str(value)[:80]!r} is no text")
    return value


def _count(value: Any, most: int) -> int:
    """A whole number from JSON, from 0 to `most`; ValueError for anything else."""
    if type(value) is not int or not 0 <= value <= most:  # True is an int, too
        raise ValueError(f"{str(value)[:80]!r} is no number from 0 to {most}")
    return value


def _instead(folder: Path, ignored: tuple[tuple[str, str], ...]) -> str:
    """What the user may have meant by a folder without tars."""
    parts = [part for part in ("train", "test") if shard_files(folder / part)]
    if parts:
        return f", but in {' and '.join(str(folder / part) for part in parts)}"
    return f": {remark_of(ignored)}" if ignored else ""


def _rebuild(folder: Path) -> str:
    return f"see `weft data check {folder}`, or delete {folder / INDEX_FILE} to have it made anew"
