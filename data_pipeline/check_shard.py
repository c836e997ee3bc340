"""What is wrong with one tar: its headers, its end, its index, and each of its samples.

Reading goes on after a defect: at the next file after a refused one, at the next sound header after damage.
"""

from __future__ import annotations

import hashlib
import mmap
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data_pipeline.check_sample import Lacks, Problem, check_media, check_text
from data_pipeline.errors import DataError
from data_pipeline.index import INDEX_FILE, ShardEntry, checksum_of, load_table, table_path
from data_pipeline.sample import Sample
from data_pipeline.scan import HIDDEN, is_hidden, is_loose, read_table
from data_pipeline.tar import BLOCK, Member, TarError, next_header, read_members, split_name, tail_problem


@dataclass
class Finding:
    """What one shard gave; hashes and bytes are of each key's first sample in it."""

    problems: list[Problem] = field(default_factory=list)
    key_hashes: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint64))  # uint64 [keys]
    key_bytes: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))  # int64 [keys]
    samples: int = 0  # as a run counts them: neighbouring files of one key are one
    usable: int = 0  # samples that a run can learn from
    fields: Counter[str] = field(default_factory=Counter)  # field name -> samples that have it
    elsewhere: str = ""  # where captions are, or are not, that no run reads, in words


@dataclass
class _Group:
    """Neighbouring files of one key; `torn` when damage beside it may have taken some of them."""

    key: str
    fields: list[tuple[str, Member]]
    torn: bool = False


def check_shard(path: Path, entry: ShardEntry | None, decode: bool) -> Finding:
    """All that is wrong with the tar at `path`, which the index, where there is one, has as `entry`."""
    finding = Finding()
    try:
        size = path.stat().st_size
        if size == 0:
            finding.problems.append(Problem("error", path.name, 0, None, "the file is empty: not even an end mark"))
            return finding
        if entry and size == entry.bytes:  # another size is told already
            finding.problems += _check_against_entry(path, entry)
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as buffer:
            _check_samples(path.name, buffer, decode, finding)
    except OSError as error:
        link = path.is_symlink() and not path.exists()
        reason = "a link to a file that is not there" if link else f"cannot be read: {error.strerror or error}"
        finding.problems.append(Problem("error", path.name, None, None, reason))
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


def _check_samples(shard: str, buffer: mmap.mmap, decode: bool, finding: Finding) -> None:
    """Go through the samples of one shard and add to `finding` what is wrong with them."""
    found, loose, hidden, skipped = finding.problems, list[Member](), list[Member](), Counter[str]()
    places: dict[str, int] = {}  # key -> byte of its first sample
    lacks = Lacks(shard)
    for group in _groups(_walk(shard, buffer, found, skipped), loose, hidden):
        start = group.fields[0][1].offset
        if group.key in places:
            why = (
                "are its files torn apart?"
                if len(group.fields) == 1
                else "a run reads both; unpacking the tar and packing it anew keeps the later one"
            )
            reason = f"the key is that of the sample at byte {places[group.key]} too: {why}"
            found.append(Problem("error", shard, start, group.key, reason))
        places.setdefault(group.key, start)
        sample = Sample(group.key, {})
        for name, member in group.fields:
            if name in sample.fields:
                reason = f"the field {name!r} is there twice: one of them would never be read"
                found.append(Problem("error", shard, member.offset, group.key, reason))
            sample.fields[name] = buffer[member.offset : member.offset + member.size]
        offsets: dict[str, int | None] = {name: member.offset for name, member in group.fields}
        if decode:
            found += check_media(shard, sample, offsets)
        problems, words = check_text(shard, sample, offsets)
        found += problems
        lacks.add(sample, start, words, group.torn)
    found += lacks.problems()
    finding.usable, finding.fields, finding.elsewhere = lacks.usable, lacks.fields, lacks.elsewhere
    if loose:
        reason = f"{len(loose)} files without an extension belong to no sample and are not read, as {loose[0].name!r}"
        found.append(Problem("warning", shard, loose[0].offset, None, reason))
    if hidden:
        files = "1 file of an image or sound is" if len(hidden) == 1 else f"{len(hidden)} files of images or sound are"
        reason = f"{files} left out, {HIDDEN}, as {hidden[0].name!r}"
        found.append(Problem("warning", shard, hidden[0].offset, None, reason))
    if skipped:
        reason = f"entries that are no files are left out: {', '.join(f'{n} x {what}' for what, n in skipped.items())}"
        found.append(Problem("warning", shard, None, None, reason))
    hashes = [hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest() for key in places]
    finding.key_hashes = np.frombuffer(b"".join(hashes), np.uint64)
    finding.key_bytes = np.fromiter(places.values(), np.int64, len(places))
    finding.samples = lacks.samples


def _walk(shard: str, buffer: mmap.mmap, found: list[Problem], skipped: Counter[str]) -> Iterator[Member | None]:
    """Every file that can be read, whatever lies between; None where files may be missing."""
    position: int | None = 0
    while position is not None:
        try:
            end = yield from read_members(buffer, "the tar", position, skipped)
        except TarError as error:
            found.append(Problem("error", shard, error.byte, None, str(error)))
            position = error.resume_at
            if position is None:
                yield None
                position = next_header(buffer, error.byte + BLOCK)
            continue
        problem = tail_problem(buffer, "the tar", end)
        if problem:
            found.append(Problem("error", shard, problem.byte, None, str(problem)))
        return


def _groups(members: Iterator[Member | None], loose: list[Member], hidden: list[Member]) -> Iterator[_Group]:
    """Neighbouring files of one key, as every reader of WebDataset puts them together; the rest goes to two lists."""
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
            loose += [member] if is_loose(member.name) else []
            hidden += [member] if is_hidden(member.name) else []
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


def key_at(path: Path, place: int) -> str | None:
    """The key of the file whose bytes start at `place`."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as buffer:
        for member in _walk(path.name, buffer, [], Counter()):
            split = split_name(member.name) if member and member.offset == place else None
            if split:
                return split[0]
    return None
