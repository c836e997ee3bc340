"""Lint for a folder of shards: every defect with its shard, byte and key, not only the first.

Design choices:
- Nothing is written and no index is needed; where there is one, it is held against the shards, checksums included.
- Reading goes on after a defect: at the next file after a refused one, at the next sound header after damage.
- An error is what a run would trip over or silently lose; a warning is what is odd and may be meant.
- What holds for every sample of a shard (no image, say) is said once for the shard.
- Shards are checked side by side. Keys come back as 8-byte hashes, so data sets of any size fit in memory.
"""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from data_pipeline.decode import decode_and_remark
from data_pipeline.errors import DataError
from data_pipeline.folder import shard_files
from data_pipeline.index import INDEX_FILE, Index, ShardEntry, checksum_of, disagreements, load_table, table_path
from data_pipeline.parallel import run_jobs
from data_pipeline.sample import AUDIO_EXTENSIONS, IMAGE_EXTENSIONS, Sample
from data_pipeline.scan import read_table
from data_pipeline.tar import BLOCK, Member, TarError, next_header, read_members, split_name

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Problem:
    """One defect: where it is (`byte` in the shard, `key` of the sample, None where unknown or no matter) and why."""

    severity: Literal["error", "warning"]
    shard: str  # file name, or index.json
    byte: int | None
    key: str | None
    reason: str

    def __str__(self) -> str:
        place = [self.shard]
        if self.byte is not None:
            place.append(f"byte {self.byte}")
        if self.key is not None and repr(self.key) not in self.reason:
            place.append(f"sample {self.key!r}")
        return f"{', '.join(place)}: {self.reason}"


@dataclass(frozen=True)
class CheckReport:
    """What a check found: problems in order of shard and byte, samples and shards as far as they could be read."""

    problems: tuple[Problem, ...]
    samples: int
    shards: int

    @property
    def errors(self) -> tuple[Problem, ...]:
        """The problems that are errors."""
        return tuple(problem for problem in self.problems if problem.severity == "error")

    @property
    def ok(self) -> bool:
        """Whether there is no error; warnings do not count."""
        return not self.errors


def check_dataset(
    folder: Path, *, decode: bool = True, processes: int | None = None, progress: Progress | None = None
) -> CheckReport:
    """Read every byte of the shards in `folder` and report all that is wrong with them.

    decode=False leaves pictures and sound undecoded. `processes`: default all cores, 0 or 1 = this one.
    `progress(done, total)` counts shards. Raises FileNotFoundError when there is neither a tar nor an index.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no data set at {folder}: there is no such folder")
    paths = shard_files(folder)
    if not paths and not (folder / INDEX_FILE).is_file():
        raise FileNotFoundError(f"no data set at {folder}: there is no .tar file in it")
    entries, problems = _check_index(folder)
    findings = _check_shards([(path, entries.get(path.name), decode) for path in paths], processes, progress)
    problems += [problem for finding in findings for problem in finding.problems]
    problems += _keys_in_several_shards(paths, findings)
    samples = sum(len(finding.key_hashes) for finding in findings)
    if samples == 0:
        problems.append(Problem("error", INDEX_FILE, None, None, "there is no sample in the whole data set"))
    places = {INDEX_FILE: -1} | {path.name: number for number, path in enumerate(paths)}
    problems.sort(key=lambda problem: (places.get(problem.shard, -1), problem.byte or 0))
    return CheckReport(tuple(problems), samples, len(paths))


@dataclass
class _Finding:
    """What one shard gave; hashes and bytes are of each key's first sample in it."""

    problems: list[Problem] = field(default_factory=list)
    key_hashes: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint64))  # uint64 [samples]
    key_bytes: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))  # int64 [samples]


@dataclass
class _Group:
    """Neighbouring files of one key; `torn` when damage beside it may have taken some of them."""

    key: str
    fields: list[tuple[str, Member]]
    torn: bool = False


Job = tuple[Path, ShardEntry | None, bool]


def _check_index(folder: Path) -> tuple[dict[str, ShardEntry], list[Problem]]:
    """The entries of the index by file, and what is wrong between it and the shards, their bytes unread."""
    try:
        index = Index.load(folder)
    except FileNotFoundError:
        return {}, [
            Problem("warning", INDEX_FILE, None, None, "there is none yet: the first to open the data makes it")
        ]
    except DataError as error:
        return {}, [Problem("error", INDEX_FILE, None, None, str(error))]
    found = [Problem("error", shard, None, None, reason) for shard, reason in disagreements(index, folder)]
    return {entry.file: entry for entry in index.shards}, found


def _check_shards(jobs: list[Job], processes: int | None, progress: Progress | None) -> list[_Finding]:
    findings: dict[int, _Finding] = {}
    with run_jobs(_check_shard, jobs, processes=processes) as results:
        for number, finding in results:
            findings[number] = finding
            if progress:
                progress(len(findings), len(jobs))
    return [findings[number] for number in range(len(jobs))]


def _check_shard(path: Path, entry: ShardEntry | None, decode: bool) -> _Finding:
    finding = _Finding()
    size = path.stat().st_size
    if size == 0:
        finding.problems.append(Problem("error", path.name, 0, None, "the file is empty: not even an end mark"))
        return finding
    if entry and size == entry.bytes:  # another size is told already
        finding.problems += _check_against_entry(path, entry)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as buffer:
        _check_samples(path.name, buffer, decode, finding)
    return finding


def _check_against_entry(path: Path, entry: ShardEntry) -> list[Problem]:
    """Whether the tar's bytes and its table of offsets are those that the index speaks of."""
    if checksum_of(path) != entry.checksum:
        reason = "its bytes are not those that were indexed: the checksum differs, though the size does not"
        return [Problem("error", path.name, None, None, reason)]
    try:
        stored = load_table(path, entry)
    except DataError as error:
        return [Problem("error", path.name, None, None, str(error))]
    try:
        fresh = read_table(path)
    except DataError:  # a bad tar is told byte by byte elsewhere
        return []
    if stored.same_places(fresh):
        return []
    reason = f"{table_path(path).name} has other places than the tar: delete {INDEX_FILE} to have both made anew"
    return [Problem("error", path.name, None, None, reason)]


def _check_samples(shard: str, buffer: mmap.mmap, decode: bool, finding: _Finding) -> None:
    """Go through the samples of one shard and add to `finding` what is wrong with them."""
    found = finding.problems
    places: dict[str, int] = {}  # key -> byte of its first sample
    bare: dict[str, list[Problem]] = {"an image": [], "a caption": []}  # samples without one
    samples = 0
    for group in _groups(_walk(shard, buffer, found)):
        samples += 1
        start = group.fields[0][1].offset
        if group.key in places:
            reason = f"the key is that of the sample at byte {places[group.key]} too: are its files torn apart?"
            found.append(Problem("error", shard, start, group.key, reason))
        places.setdefault(group.key, start)
        sample = Sample(group.key, {})
        for name, member in group.fields:
            if name in sample.fields:
                reason = f"the field {name!r} is there twice: one of them would never be read"
                found.append(Problem("error", shard, member.offset, group.key, reason))
            sample.fields[name] = buffer[member.offset : member.offset + member.size]
        offsets = {name: member.offset for name, member in group.fields}
        if decode:
            found += _check_media(shard, sample, offsets)
        problems, has_caption = _check_text(shard, sample, offsets)
        found += problems
        names = ", ".join(sample.fields)
        if not group.torn and sample.image_field is None:
            bare["an image"].append(Problem("warning", shard, start, group.key, f"no image among its fields ({names})"))
        if not group.torn and not has_caption:
            bare["a caption"].append(Problem("warning", shard, start, group.key, f"no caption in its fields ({names})"))
    for what, without in bare.items():
        if len(without) == samples > 1:
            found.append(Problem("warning", shard, None, None, f"none of its {samples} samples has {what}"))
        else:
            found += without
    if samples == 0:
        found.append(Problem("warning", shard, None, None, "no sample in it could be read"))
    hashes = [hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest() for key in places]
    finding.key_hashes = np.frombuffer(b"".join(hashes), np.uint64)
    finding.key_bytes = np.fromiter(places.values(), np.int64, len(places))


def _walk(shard: str, buffer: mmap.mmap, found: list[Problem]) -> Iterator[Member | None]:
    """Every file that can be read, whatever lies between; None where files may be missing."""
    position: int | None = 0
    while position is not None:
        try:
            end = yield from read_members(buffer, "the tar", position)
        except TarError as error:
            found.append(Problem("error", shard, error.byte, None, str(error)))
            position = error.resume_at
            if position is None:
                yield None
                position = next_header(buffer, error.byte + BLOCK)
            continue
        hidden = next_header(buffer, end)
        if hidden is not None:
            reason = f"more files after the end mark, which is at byte {end}: no reader sees them (two tars joined?)"
            found.append(Problem("error", shard, hidden, None, reason))
        return


def _groups(members: Iterator[Member | None]) -> Iterator[_Group]:
    """Neighbouring files of one key, as every reader of WebDataset puts them together."""
    group: _Group | None = None
    after_damage = False
    for member in members:
        if member is None:
            after_damage = True
            if group:
                group.torn = True
            continue
        split = split_name(member.name)
        if split is None:
            continue
        key, name = split
        if group is None or group.key != key:
            if group:
                yield group
            group = _Group(key, [], torn=after_damage)
        after_damage = False
        group.fields.append((name, member))
    if group:
        yield group


def _check_media(shard: str, sample: Sample, offsets: dict[str, int]) -> Iterator[Problem]:
    """Decode every picture and every sound of a sample."""
    for name, data in sample.fields.items():
        extension = name.rpartition(".")[2]
        try:
            if extension in IMAGE_EXTENSIONS:
                _, odd = decode_and_remark(data)
                if odd:
                    reason = f"the {name} field is an odd JPEG, which Pillow reads whole ({odd})"
                    yield Problem("warning", shard, offsets[name], sample.key, reason)
            elif extension in AUDIO_EXTENSIONS:
                from data_pipeline.sound import decode_sound  # loads scipy, which only data with sound needs

                decode_sound(data)
        except DataError as error:
            yield Problem("error", shard, offsets[name], sample.key, f"the {name} field: {error}")


def _check_text(shard: str, sample: Sample, offsets: dict[str, int]) -> tuple[list[Problem], bool]:
    """What is wrong with a sample's captions and metadata, and whether it has, or should have had, a caption."""
    found: list[Problem] = []
    captions: list[str] = []
    readable = True
    for name in ("json", "txt"):  # each alone, so that a bad one does not hide the other
        if name not in sample.fields:
            continue
        alone = Sample(sample.key, {name: sample.fields[name]})
        try:
            mine = [text for _, texts in alone.written_captions() for text in texts]
            alone.label()
        except DataError as error:
            readable = False
            found.append(Problem("error", shard, offsets[name], sample.key, str(error)))
            continue
        if not captions:  # those of the json field are read instead of the txt field
            found += [
                Problem("warning", shard, offsets[name], sample.key, f"caption {number} in the {name} field is empty")
                for number, caption in enumerate(mine, start=1)
                if not caption
            ]
            captions = mine
    return found, bool(captions) or not readable


def _keys_in_several_shards(paths: list[Path], findings: list[_Finding]) -> Iterator[Problem]:
    """One warning for each shard that has keys of earlier shards."""
    hashes = np.concatenate([finding.key_hashes for finding in findings] or [np.empty(0, np.uint64)])
    shards = np.repeat(np.arange(len(findings)), [len(finding.key_hashes) for finding in findings])
    places = np.concatenate([finding.key_bytes for finding in findings] or [np.empty(0, np.int64)])
    order = np.argsort(hashes, kind="stable")  # stable: of equal hashes, that of the earlier shard comes first
    repeated = np.flatnonzero(hashes[order][1:] == hashes[order][:-1])
    earlier, later = order[repeated], order[repeated + 1]
    for shard in np.unique(shards[later]).tolist():
        of_shard = shards[later] == shard
        first = np.flatnonzero(of_shard)[0]
        place, other = int(places[later[first]]), int(shards[earlier[first]])
        key = _key_at(paths[shard], place)
        reason = f"{np.count_nonzero(of_shard)} of its keys are in other shards too, this one in {paths[other].name}"
        yield Problem("warning", paths[shard].name, place, key, reason)


def _key_at(path: Path, place: int) -> str | None:
    """The key of the file whose bytes start at `place`."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as buffer:
        for member in _walk(path.name, buffer, []):
            split = split_name(member.name) if member and member.offset == place else None
            if split:
                return split[0]
    return None
