"""What lies in a folder of shards: its tars, and what looks like data and is not read.

A run reads the plain tars that lie in the folder itself. All else that may be meant as data is named with a reason, so
that nobody trains on half of a set without knowing.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path

COMPRESSED = re.compile(
    r"\.(tar\.(gz|bz2|xz|zst|lz4|lz|lzma|lzo|sz|br|z|7z|zip)|tgz|tbz2?|txz|tzst|tlz|zip|7z|rar)$", re.IGNORECASE
)
TAR_IN_NAME = re.compile(r"\.(tar|tgz|tbz2?|txz|tzst|tlz)(?![a-z0-9])", re.IGNORECASE)
UNFINISHED = re.compile(
    r"\.(part|partial|tmp|temp|crdownload|download|incomplete|aria2|filepart|gstmp|opdownload|!ut|!qb)$", re.IGNORECASE
)
SPLIT = re.compile(  # as `split` and others cut a tar
    r"\.(tar|tgz|tar\.(gz|bz2|xz|zst))\.(\d{2,}|[a-z]{2}|part\d+)$", re.IGNORECASE
)
OURS = re.compile(r"^\..*\.[0-9a-f]{16}\.tmp$")  # a file that is being written (index.written_whole)
ABOUT_A_TAR = re.compile(  # what other tools write beside one: indexes, checksums, signatures, notes
    r"\.(npz|npy|idx|index|jsonl?|txt|[ct]sv|ya?ml|md|html?|xml|log|lst|list|lock|done|meta|torrent|"
    r"(md5|sha\d+|crc\d*|crc32c)(sums?)?|asc|sig|sign|minisig)$",
    re.IGNORECASE,
)
GOES_ON = "its name goes on after .tar"
COPY = re.compile(r"(\.\d+|\s?\(\d+\)|~|[.-](bak|old|orig|copy))$", re.IGNORECASE)  # as browsers and editors do
PACKED = (b"\x1f\x8b", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd", b"BZh", b"\x04\x22\x4d\x18", b"PK\x03\x04", b"7z\xbc\xaf")
PARQUET = (".parquet", ".pq")
NUMBERED = re.compile(r"(.*?)([0-9]+)([^0-9]*)")  # the last number of a name
MOST_DIGITS = 12  # longer ones are hashes or times
MOST_FOLDERS = 200  # looked into for tars
NAMED = 3  # files in a remark


def is_shard(name: str) -> bool:
    """Whether a file of this name is a shard."""
    return name.lower().endswith(".tar") and not name.startswith(".")


def shard_files(folder: Path) -> list[Path]:
    """The tars of a folder, in order of name; a link to nothing is one of them, a folder is none."""
    if not folder.is_dir():
        return []
    found = (path for path in folder.iterdir() if is_shard(path.name))
    return sorted(path for path in found if path.is_file() or (path.is_symlink() and not path.exists()))


def ignored_in(folder: Path) -> tuple[tuple[str, str], ...]:
    """(name, why) of all in a folder that may be meant as data and is not read, in order of name."""
    with os.scandir(folder) as entries:
        return _of_note((entry.name, _why_ignored(entry)) for entry in entries)


def _why_ignored(entry: os.DirEntry[str]) -> str:
    if entry.is_dir():
        if entry.name.startswith("."):
            return ""
        return "a folder, and tars in it are not read" if _holds_tars(entry.path) or is_shard(entry.name) else ""
    if why := _why_by_name(entry.name):
        return why if why != GOES_ON or _is_archive(entry.path) else ""
    if is_shard(entry.name) and not entry.is_file() and os.path.exists(entry.path):
        return "not a regular file"
    return ""


def ignored_names(names: Iterable[str]) -> tuple[tuple[str, str], ...]:
    """As ignored_in, of the names of files that a server lists."""
    found = ((name, _why_by_name(name)) for name in names)
    return _of_note((name, why) for name, why in found if why != GOES_ON or COPY.search(name))


def _of_note(found: Iterable[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    """Those with a reason. Parquet with the name of a tar is that tar's metadata, as img2dataset writes it."""
    whys = dict(found)
    tars = {os.path.splitext(name)[0] for name in whys if is_shard(name)}
    return tuple(
        (name, why)
        for name, why in sorted(whys.items())
        if why and not (name.lower().endswith(PARQUET) and os.path.splitext(name)[0] in tars)
    )


def _why_by_name(name: str) -> str:
    hidden, of_a_tar = name.startswith("."), TAR_IN_NAME.search(name)
    if hidden and (not of_a_tar or name.startswith("._") or OURS.search(name)):  # the second as macOS puts them there
        return ""
    if COMPRESSED.search(name):
        return "compressed"
    if of_a_tar and UNFINISHED.search(name):
        return "an unfinished download, by its name"
    if SPLIT.search(name):
        return "a part of a split tar, by its name"
    if name.lower().endswith(PARQUET):
        return "Parquet, and beside tars only these are read"
    if hidden and name.lower().endswith(".tar"):
        return "hidden, as its name begins with a dot"
    return GOES_ON if of_a_tar and not (is_shard(name) or ABOUT_A_TAR.search(name)) else ""


def _is_archive(path: str) -> bool:
    """Whether a file begins as a tar does, or as what a tar is packed with."""
    try:
        with open(path, "rb") as file:
            start = file.read(512)
    except OSError:
        return False
    return start[257:262] == b"ustar" or start.startswith(PACKED)


def _holds_tars(path: str) -> bool:
    """Whether there is a tar, packed or not, anywhere under a folder, as far as that is quickly seen."""
    below = islice(os.walk(path), MOST_FOLDERS)
    return any(is_shard(name) or COMPRESSED.search(name) for _, _, files in below for name in files)


def remark_of(ignored: tuple[tuple[str, str], ...]) -> str:
    """What is to be said of such files, in a few words: the first NAMED of them, and how many there are."""
    named = _first((f"{name} ({why})" for name, why in ignored), len(ignored))
    count = "1 file or folder" if len(ignored) == 1 else f"{len(ignored)} files or folders"
    return f"{count} beside the tars {'is' if len(ignored) == 1 else 'are'} not read: {named}"


def _first(names: Iterable[str], count: int) -> str:
    """The first NAMED of so many, and how many more there are."""
    return ", ".join(islice(names, NAMED)) + (f" and {count - NAMED} more" if count > NAMED else "")


def empty_remark(names: Sequence[str]) -> str:
    """What is to be said of shards that hold no sample: a cut or a download may have left only zeros. Or ""."""
    if len(names) < 2:
        return f"{names[0]} holds no sample" if names else ""
    return f"{len(names)} shards hold no sample: {_first(names, len(names))}"


def gap_in(names: Iterable[str]) -> str:
    """What is to be said of shard numbers that are missing between others: "shard-000001.tar is not there, ..."; or "".

    Only where the names differ in one number and most of the numbers between the first and the last are there: of
    shards that were chosen or numbered otherwise nothing is known.
    """
    series: dict[tuple[str, str], dict[int, str]] = {}
    names = list(names)
    for name in names:
        if (match := NUMBERED.fullmatch(name)) is None or len(match[2]) > MOST_DIGITS:
            return ""
        series.setdefault((match[1], match[3]), {})[int(match[2])] = match[2]
    if len(series) != 1:
        return ""
    (before, after), numbers = series.popitem()
    span = max(numbers) - min(numbers) + 1
    missing = span - len(numbers)
    if not 0 < missing < len(numbers) == len(names):
        return ""
    width = min(map(len, numbers.values()))
    absent = (number for number in range(min(numbers), max(numbers)) if number not in numbers)
    named = _first((f"{before}{number:0{width}}{after}" for number in absent), missing)
    return f"{named} {'is' if missing == 1 else 'are'} not there, though shards before and after are"


def hint_of_pattern(path: str) -> str:
    """What to give instead of single shards or a pattern of them, as webdataset takes; "" for other paths."""
    folder, _, name = path.rpartition("/")
    special = "*{" if "://" in path else "*?[{"  # a URL may have the others for reasons of its own
    if not (is_shard(name) or any(letter in path for letter in special) or path.startswith("pipe:")):
        return ""
    while any(letter in folder for letter in special):
        folder = folder.rpartition("/")[0]
    return (
        f"; weft reads all tars of a folder and expands no patterns: give the folder, {folder or '.'}, several as "
        "data.train and data.also, or for some of the tars a new folder with links to them"
    )
