"""A folder of shards without an index that may not be written to: its index is kept in the cache, as for a URL.

Design choices:
- In the cache is a folder of links to what lies in the real one. It is indexed as any folder is; samples are read from
  the real one, which is also what every message names.
- The index is made anew when names, sizes or times of the shards have changed.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path

from data_pipeline.errors import DataError
from data_pipeline.files import LocalFiles
from data_pipeline.folder import is_shard
from data_pipeline.index import INDEX_FILE, Index, load_index, written_whole
from data_pipeline.strict_json import read_json

SEEN_FILE = "seen.json"
CANNOT_WRITE = (errno.EROFS, errno.EACCES, errno.EPERM)


def may_write(folder: Path) -> bool:
    """Whether an index can be put into the folder, or is there already."""
    return (folder / INDEX_FILE).is_file() or not folder.is_dir() or os.access(folder, os.W_OK | os.X_OK)


def open_read_only(folder: Path, cache: Path) -> tuple[LocalFiles, Index]:
    """The files of `folder`, and their index, which is kept below `cache`. Raises as `load_index` does."""
    real = folder.absolute()
    mirror = cache / f"read-only-{hashlib.sha256(os.fsencode(real)).hexdigest()[:16]}"
    try:
        mirror.mkdir(parents=True, exist_ok=True)
        seen = _link(real, mirror)
        if _read(mirror / SEEN_FILE) != seen:
            (mirror / INDEX_FILE).unlink(missing_ok=True)
        index = load_index(mirror)
        with written_whole(mirror / SEEN_FILE) as unfinished:
            unfinished.write_text(json.dumps(seen), encoding="utf-8")
    except (DataError, FileNotFoundError) as error:
        raise type(error)(str(error).replace(str(mirror), str(folder))) from error
    except OSError as error:
        if error.errno not in CANNOT_WRITE:
            raise
        raise OSError(
            f"{folder} has no {INDEX_FILE} and is read-only, and the cache {cache} cannot be written either: give a "
            "data.cache that can, or run `weft data stats` once where the folder can be written"
        ) from error
    return LocalFiles(folder, tables=mirror), index


def _link(real: Path, mirror: Path) -> dict[str, list[int]]:
    """Make `mirror` a folder of links to what is in `real`; returns size and time of each shard."""
    names = {name for name in os.listdir(real) if not name.startswith(".") and name != INDEX_FILE}
    names = {name for name in names if not name.endswith(".npz")}
    for each in os.scandir(mirror):
        if each.is_symlink() and each.name not in names:
            with suppress(FileNotFoundError):
                os.unlink(each.path)
    for name in names:
        with suppress(FileExistsError):  # of another process, or of an earlier time
            os.symlink(real / name, mirror / name)
    shards = {name: (real / name).stat() for name in sorted(names) if is_shard(name)}
    return {name: [status.st_size, status.st_mtime_ns] for name, status in shards.items()}


def _read(path: Path) -> object:
    try:
        return read_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
