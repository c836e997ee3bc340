"""What is in a folder of shards and where: index.json for the folder, one table of offsets beside each tar.

Design choices:
- index.json is small and for everyone: format version, per shard its file, samples, bytes, checksum and modalities.
  Its fingerprint names the data a run has read.
- `<shard>.tar.idx.npz` holds plain integer arrays (and so never a pickle): where each sample and field lies. It is
  loaded when a shard is first read, and carries the checksum of the tar that it describes.
- Any folder of WebDataset tars is indexed on first sight; nobody has to convert anything.
- A stale index is found when it is opened: every shard must be there with the size it had, and no other beside them.
  Bytes that changed under an equal size are found by `weft data check`, which reads them all.
- Files appear whole or not at all (written aside, then renamed), so ranks that index the same folder do not clash.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import uuid
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from data_pipeline.decode import image_aspect
from data_pipeline.errors import DataError
from data_pipeline.parallel import run_jobs
from data_pipeline.sample import IMAGE_EXTENSIONS, find_field, modalities_of
from data_pipeline.tar import open_members, split_name

INDEX_FILE = "index.json"
FORMAT = "weft-index"
VERSION = 1
ARRAYS = ("first", "offset", "size", "field", "crc", "aspect", "key_end", "keys")  # of a table, as they are stored


@dataclass(frozen=True)
class ShardEntry:
    """One shard in the index; `checksum` is "sha256:<hex>" of the tar, `bytes` its size."""

    file: str
    samples: int
    bytes: int
    checksum: str
    modalities: tuple[str, ...]


@dataclass(frozen=True)
class Index:
    """The shards of a data set, in order: sample ids count through them from 0."""

    shards: tuple[ShardEntry, ...]

    @cached_property
    def samples(self) -> int:
        """Number of samples in all shards."""
        return sum(shard.samples for shard in self.shards)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 (hex) over the shard entries: equal fingerprints are equal data in equal order."""
        entries = json.dumps([asdict(shard) for shard in self.shards], sort_keys=True)
        return hashlib.sha256(entries.encode()).hexdigest()

    def save(self, folder: Path) -> None:
        """Write index.json into `folder`; the file appears whole or not at all."""
        tree = {
            "format": FORMAT,
            "version": VERSION,
            "samples": self.samples,
            "shards": [asdict(shard) for shard in self.shards],
        }
        with written_whole(folder / INDEX_FILE) as unfinished:
            unfinished.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Index:
        """Read index.json of `folder`, the shards unseen; FileNotFoundError, or DataError for another file."""
        path = folder / INDEX_FILE
        if not path.is_file():
            raise FileNotFoundError(f"no {INDEX_FILE} in {folder}")
        try:
            tree: Any = json.loads(path.read_text(encoding="utf-8"))
            if tree["format"] != FORMAT or tree["version"] != VERSION:
                raise ValueError(f"it is {tree['format']} version {tree['version']}, not {FORMAT} version {VERSION}")
            index = cls(tuple(_entry(shard) for shard in tree["shards"]))
            if index.samples != tree["samples"]:
                raise ValueError(f"it counts {tree['samples']} samples, its shards {index.samples}")
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path} is no index of ours ({error}): {_rebuild(folder)}") from error
        return index


@dataclass(frozen=True)
class ShardTable:
    """Where everything in one shard lies: samples are rows of `first`, their fields rows of the other arrays."""

    first: np.ndarray  # int64 [samples + 1]: the fields of sample i are first[i]:first[i + 1]
    offset: np.ndarray  # int64 [fields]: byte in the tar
    size: np.ndarray  # int64 [fields]: bytes
    field: np.ndarray  # int32 [fields]: into field_names
    crc: np.ndarray  # uint32 [fields]: CRC-32 of the bytes
    key_end: np.ndarray  # int64 [samples]: where each key ends in `keys`
    keys: np.ndarray  # uint8 [bytes of all keys]: UTF-8, one after another
    field_names: tuple[str, ...]
    # float32 [samples]: width / height of the picture, upright; nan: none, or damaged. None in tables of early versions
    aspect: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.key_end)

    def key(self, sample: int) -> str:
        """The key of the shard's sample number `sample`."""
        start = int(self.key_end[sample - 1]) if sample else 0
        return self.keys[start : int(self.key_end[sample])].tobytes().decode("utf-8", "surrogatepass")

    def crcs(self, sample: int) -> list[int]:
        """The checksum of each field of the shard's sample number `sample`, in file order."""
        checksums: list[int] = self.crc[int(self.first[sample]) : int(self.first[sample + 1])].tolist()
        return checksums

    def places(self, sample: int) -> list[tuple[str, int, int]]:
        """(field name, offset, size) of each field of the shard's sample number `sample`, in file order."""
        rows = range(int(self.first[sample]), int(self.first[sample + 1]))
        return [(self.field_names[self.field[row]], int(self.offset[row]), int(self.size[row])) for row in rows]


def load_index(folder: str | Path) -> Index:
    """The index of `folder`, made now if there is none, checked against the shards that lie there.

    Raises FileNotFoundError when there is no such folder, DataError when index and shards disagree.
    """
    folder = Path(folder)
    if not folder.is_dir():
        what = "it is a file, not a folder of shards" if folder.exists() else "there is no such folder"
        raise FileNotFoundError(f"no data set at {folder}: {what}")
    if not (folder / INDEX_FILE).is_file():
        return build_index(folder)
    index = Index.load(folder)
    disagreement = next(disagreements(index, folder), None)
    if disagreement:
        raise DataError(f"{disagreement[1]}: {_rebuild(folder)}")
    return index


def disagreements(index: Index, folder: Path) -> Iterator[tuple[str, str]]:
    """(shard file, sentence) for every shard that is not as the index has it; sizes only, no byte is read."""
    sizes = {path.name: path.stat().st_size for path in shard_files(folder)}
    for shard in index.shards:
        size = sizes.pop(shard.file, None)
        if size is None:
            yield shard.file, f"{folder / shard.file} is in the index, but there is no such file"
        elif size != shard.bytes:
            yield shard.file, f"{folder / shard.file} has {size} bytes, but {shard.bytes} in the index"
    for file in sizes:
        yield file, f"{folder / file} is not in the index"


def build_index(folder: str | Path, processes: int | None = None) -> Index:
    """Read every tar of `folder` (in order of name) and write its index; replaces one that is there.

    `processes` at work: default all cores, 0 or 1 = in this process.
    Raises FileNotFoundError when there is no tar, DataError for a bad one or when all are without samples.
    """
    folder = Path(folder)
    paths = shard_files(folder)
    if not paths:
        raise FileNotFoundError(f"no data set at {folder}: there is no .tar file in it{_instead(folder)}")
    with run_jobs(index_shard, [(path,) for path in paths], processes=processes) as results:
        entries = dict(results)
    index = Index(tuple(entries[number] for number in range(len(paths))))
    if index.samples == 0:
        raise DataError(f"there is no sample in the {len(paths)} .tar files of {folder}")
    index.save(folder)
    return index


def index_shard(path: Path) -> ShardEntry:
    """Read one tar, write its table of offsets beside it, and return its entry; DataError when it is bad."""
    table = read_table(path)
    checksum = checksum_of(path)
    with written_whole(table_path(path)) as unfinished, unfinished.open("wb") as file:
        np.savez(
            file,
            allow_pickle=False,
            first=table.first,
            offset=table.offset,
            size=table.size,
            field=table.field,
            crc=table.crc,
            aspect=np.asarray(table.aspect, np.float32),
            key_end=table.key_end,
            keys=table.keys,
            field_names=np.frombuffer(json.dumps(table.field_names).encode(), np.uint8),
            checksum=np.frombuffer(checksum.encode(), np.uint8),
        )
    return ShardEntry(path.name, len(table), path.stat().st_size, checksum, modalities_of(table.field_names))


def read_table(path: Path) -> ShardTable:
    """The table of the tar at `path`, from the tar itself: neighbouring files of one key are one sample.

    Raises DataError when the tar is bad or a sample has a field twice.
    """
    keys: list[str] = []
    first, offsets, sizes, fields = [0], [], [], []
    numbers: dict[str, int] = {}  # field name -> its number
    seen: set[str] = set()  # fields of the sample at hand
    for member in open_members(path):
        split = split_name(member.name)
        if split is None:
            continue
        key, field = split
        if not keys or key != keys[-1]:
            keys.append(key)
            first.append(first[-1])
            seen = set()
        if field in seen:
            raise DataError(f"{path} has the field {field!r} of sample {key!r} twice, again at byte {member.offset}")
        seen.add(field)
        first[-1] += 1
        offsets.append(member.offset)
        sizes.append(member.size)
        fields.append(numbers.setdefault(field, len(numbers)))
    encoded = [key.encode("utf-8", "surrogatepass") for key in keys]
    pictures = _pictures(first, fields, tuple(numbers))
    checksums, aspects = _look(path, offsets, sizes, pictures)
    return ShardTable(
        first=np.array(first, np.int64),
        offset=np.array(offsets, np.int64),
        size=np.array(sizes, np.int64),
        field=np.array(fields, np.int32),
        crc=np.array(checksums, np.uint32),
        aspect=np.array(aspects, np.float32),
        key_end=np.cumsum([len(key) for key in encoded], dtype=np.int64),
        keys=np.frombuffer(b"".join(encoded), np.uint8),
        field_names=tuple(numbers),
    )


def load_table(path: Path, entry: ShardEntry) -> ShardTable:
    """The stored table of the tar at `path`; DataError when it is missing, damaged or of another tar."""
    stored = table_path(path)
    try:
        with np.load(stored, allow_pickle=False) as arrays:
            if "crc" not in arrays:
                raise DataError(f"{stored} was made by an earlier version, without checksums: {_rebuild(path.parent)}")
            checksum = arrays["checksum"].tobytes().decode()
            table = ShardTable(
                **{name: arrays[name] for name in ARRAYS if name in arrays},
                field_names=tuple(json.loads(arrays["field_names"].tobytes())),
            )
    except FileNotFoundError as error:
        raise DataError(f"{stored} is missing: {_rebuild(path.parent)}") from error
    except DataError:
        raise
    except (ValueError, KeyError, EOFError, BadZipFile) as error:
        raise DataError(f"{stored} is damaged ({error}): {_rebuild(path.parent)}") from error
    if checksum != entry.checksum or len(table) != entry.samples:
        raise DataError(f"{stored} describes another tar than {INDEX_FILE} does: {_rebuild(path.parent)}")
    return table


def _pictures(first: list[int], fields: list[int], names: tuple[str, ...]) -> list[int | None]:
    """Of each sample, which of all fields is its picture; None where it has none."""
    chosen: dict[tuple[int, ...], int | None] = {}  # fields of a sample, by number -> place among them
    pictures: list[int | None] = []
    for start, end in pairwise(first):
        of_sample = tuple(fields[start:end])
        if of_sample not in chosen:
            own = [names[number] for number in of_sample]
            picture = find_field(own, IMAGE_EXTENSIONS)
            chosen[of_sample] = None if picture is None else own.index(picture)
        place = chosen[of_sample]
        pictures.append(None if place is None else start + place)
    return pictures


def _look(
    path: Path, offsets: list[int], sizes: list[int], pictures: list[int | None]
) -> tuple[list[int], list[float]]:
    """(checksum of each field, aspect of each picture) in the tar at `path`."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as buffer:

        def field(number: int) -> bytes:
            return buffer[offsets[number] : offsets[number] + sizes[number]]

        checksums = [zlib.crc32(field(number)) for number in range(len(offsets))]
        return checksums, [math.nan if number is None else image_aspect(field(number)) for number in pictures]


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


def shard_files(folder: Path) -> list[Path]:
    """The tars of a folder, in order of name."""
    return sorted(path for path in folder.glob("*.tar") if not path.name.startswith("."))


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


def _entry(tree: dict[str, Any]) -> ShardEntry:
    """One shard entry from JSON; ValueError, KeyError or TypeError when it is something else."""
    file, checksum = str(tree["file"]), str(tree["checksum"])
    if Path(file).name != file or not file.endswith(".tar"):
        raise ValueError(f"{file!r} is not the name of a shard beside it")
    return ShardEntry(file, int(tree["samples"]), int(tree["bytes"]), checksum, tuple(tree["modalities"]))


def _instead(folder: Path) -> str:
    """What the user may have meant by a folder without tars."""
    parts = [part for part in ("train", "test") if shard_files(folder / part)]
    if parts:
        return f", but in {' and '.join(str(folder / part) for part in parts)}"
    if any(folder.glob("*.tar.*z*")):
        return ", only compressed ones, in which no sample can be found directly: decompress them"
    return ""


def _rebuild(folder: Path) -> str:
    return f"see `weft data check {folder}`, or delete {folder / INDEX_FILE} to have it made anew"
