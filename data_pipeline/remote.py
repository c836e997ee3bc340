"""Shards at a URL (s3://, https://, whatever fsspec knows), read by byte ranges through a cache on this machine.

Design choices:
- Reads are widened to whole pieces, which are kept on disk up to a bound; the least recently used go first. Every
  process of the machine uses the same pieces. Where the order visits neighbours together, a piece is fetched once.
- A read that fails or comes short goes on from the byte that it has reached, after longer and longer pauses, for
  PATIENCE seconds without a byte; then one sentence names the shard and the bytes. A server that is killed and started
  again costs time, and no sample.
- index.json and the tables of offsets are fetched where they lie beside the shards. Where they do not, each shard is
  read through once, several side by side, and what is found is kept in the cache: nothing is written to the URL.
- A client belongs to the process that made it: a forked one makes its own.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.errors import DataError
from data_pipeline.index import (
    INDEX_FILE,
    Index,
    ShardEntry,
    ShardTable,
    index_shard,
    load_table,
    table_path,
    written_whole,
)

PIECE = 1 << 20  # bytes: a few samples, and as long on the way as a request needs to be answered
PATIENCE = 120.0  # seconds
MISSING = 5.0  # seconds for a file that is not there: a server that has just started may not know it yet
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 5.0  # seconds
STREAM = 8 << 20  # bytes of a shard that is read through, at a time
SIDE_BY_SIDE = 8


@dataclass(frozen=True)
class Cache:
    """A folder for what was fetched, and how many bytes of shards it may hold; 0: none are kept."""

    folder: Path
    bytes: int = 50 << 30


def is_url(path: str | Path) -> bool:
    """Whether this names a place for fsspec, and no folder of this machine."""
    return "://" in str(path)


def open_remote(url: str, cache: Cache) -> tuple[RemoteFiles, Index]:
    """The files at `url` and their index, which is made now where there is none.

    Raises FileNotFoundError when there is nothing, ValueError for a URL of an unknown kind or whose client is not
    installed, DataError when index and shards disagree or the server does not answer.
    """
    files = RemoteFiles(url.rstrip("/"), cache)
    text = files.whole(INDEX_FILE)
    if text is None:
        return files, _first_sight(files)
    with written_whole(files.folder / INDEX_FILE) as unfinished:
        unfinished.write_bytes(text)
    index = Index.load(files.folder)
    sizes = files.sizes()
    for shard in index.shards:
        size = sizes.get(shard.file)
        if sizes and shard.file not in sizes:
            raise DataError(f"{files.url}/{shard.file} is in the index, but there is no such file")
        if size is not None and size != shard.bytes:
            raise DataError(f"{files.url}/{shard.file} has {size} bytes, but {shard.bytes} in the index")
    return files, index


def _first_sight(files: RemoteFiles) -> Index:
    """Read every tar through, and keep tables and index in the cache; used again while names and sizes are the same."""
    sizes = files.sizes()
    names = sorted(sizes)
    if not names:
        raise FileNotFoundError(f"no data set at {files.url}: there is no {INDEX_FILE} and no .tar file to be seen")
    try:
        known = Index.load(files.folder)
        if [shard.file for shard in known.shards] == names and all(
            sizes[shard.file] in (None, shard.bytes) for shard in known.shards
        ):
            return known
    except (FileNotFoundError, DataError):
        pass
    with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
        index = Index(tuple(pool.map(files.read_through, names)))
    if index.samples == 0:
        raise DataError(f"there is no sample in the {len(names)} .tar files of {files.url}")
    index.save(files.folder)
    return index


class RemoteFiles:
    """The files of one folder at a URL. Picklable; safe to use in forked processes."""

    def __init__(self, url: str, cache: Cache) -> None:
        self.url, self._cache = url, cache
        self.folder = cache.folder / hashlib.sha256(url.encode()).hexdigest()[:16]
        self._pieces = self.folder / "pieces"
        self._pieces.mkdir(parents=True, exist_ok=True)
        self._client: Any = None
        self._root, self._process = "", 0
        self._written = 0  # bytes since this process last looked whether the cache is full
        self._connect()

    def __str__(self) -> str:
        return self.url

    def read(self, file: str, start: int, length: int) -> bytes:
        """Bytes start .. start + length - 1 of a file, fewer where it ends before. DataError as the module says."""
        if not self._cache.bytes:
            return self._fetch(file, start, length)
        first, last = start // PIECE, (start + length - 1) // PIECE
        joined = b"".join(self._piece(file, number) for number in range(first, last + 1))
        return joined[start - first * PIECE :][:length]

    def forget(self, file: str, start: int, length: int) -> None:
        """What is kept of these bytes is wrong: the next read fetches them again."""
        for number in range(start // PIECE, (start + length - 1) // PIECE + 1):
            self._piece_path(file, number).unlink(missing_ok=True)

    def table(self, entry: ShardEntry) -> ShardTable:
        """The table of offsets of a shard: from the cache, from beside the shard, or made by reading it through."""
        path = self.folder / entry.file
        if table_path(path).is_file():
            try:
                return load_table(path, entry)
            except DataError:
                table_path(path).unlink(missing_ok=True)  # of the shard that was there before
        stored = self.whole(table_path(path).name)
        if stored is None:
            self.read_through(entry.file)
        else:
            with written_whole(table_path(path)) as unfinished:
                unfinished.write_bytes(stored)
        return load_table(path, entry)

    def close(self) -> None:
        """Let go of connections; the next read makes new ones."""
        self._client = None

    def sizes(self) -> dict[str, int | None]:
        """The tars of the folder and their bytes, None where the server does not tell; {} when it lists nothing."""

        def listed() -> dict[str, int | None]:
            self._connect()
            try:
                found = self._client.ls(self._root, detail=True)
            except FileNotFoundError:
                return {}
            named = {each["name"].rstrip("/").rpartition("/")[2]: each.get("size") for each in found}
            return {name: size for name, size in named.items() if name.endswith(".tar") and not name.startswith(".")}

        return self._patiently(listed, f"{self.url} could not be listed")

    def whole(self, file: str) -> bytes | None:
        """All bytes of a small file; None when there is none."""

        def read() -> bytes | None:
            self._connect()
            try:
                data: bytes = self._client.cat_file(f"{self._root}/{file}")
            except FileNotFoundError:
                return None
            return data

        return self._patiently(read, f"{self.url}/{file} could not be read")

    def read_through(self, file: str) -> ShardEntry:
        """Bring a shard here, note where everything in it is, and let go of it."""
        folder = self.folder / f".{file}.{os.getpid()}"
        folder.mkdir(exist_ok=True)
        try:
            path = folder / file
            with path.open("wb") as out:
                for part in self._stream(file):
                    out.write(part)
            entry = index_shard(path)
            table_path(path).replace(table_path(self.folder / file))
        except DataError as error:
            raise DataError(str(error).replace(str(path), f"{self.url}/{file}")) from error
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        return entry

    # --- pieces

    def _piece(self, file: str, number: int) -> bytes:
        path = self._piece_path(file, number)
        try:
            data = path.read_bytes()
            os.utime(path)  # it is in use
            return data
        except FileNotFoundError:
            data = self._fetch(file, number * PIECE, PIECE)
        try:
            with written_whole(path) as unfinished:
                unfinished.write_bytes(data)
        except OSError:
            return data  # a full disk costs speed
        self._written += len(data)
        if self._written > self._cache.bytes // 16:
            self._written = 0
            _shrink(self._pieces, self._cache.bytes)
        return data

    def _piece_path(self, file: str, number: int) -> Path:
        return self._pieces / f"{file}.{number}"

    # --- the network

    def _fetch(self, file: str, start: int, length: int) -> bytes:
        """A range of bytes, in as many requests as it takes; shorter only where the file ends."""
        got = bytearray()
        end = start + length

        def more() -> bytes:
            self._connect()
            path = f"{self._root}/{file}"
            if got and start + len(got) >= self._size(path, otherwise=end):
                return b""  # a server without ranges would send the file from its beginning again
            try:
                data: bytes = self._client.cat_file(path, start=start + len(got), end=end)
            except FileNotFoundError:
                raise
            except Exception:
                if start + len(got) >= self._size(path, otherwise=end):
                    return b""  # nothing lies there, which some servers call an error
                raise
            if len(data) > end - start - len(got):
                data = data[start + len(got) : end]  # a server without ranges sends the whole file
            if not data and start + len(got) < self._size(path, otherwise=end):
                raise OSError("the answer was empty")
            return data

        while len(got) < length:
            what = f"{self.url}/{file}: bytes {start + len(got)} to {end - 1} could not be read"
            data = self._patiently(more, what)
            if not data:
                break
            got += data
        return bytes(got)

    def _size(self, path: str, otherwise: int) -> int:
        try:
            return int(self._client.info(path)["size"])
        except Exception:  # of any kind: what led to the question is the error to tell
            return otherwise

    def _stream(self, file: str) -> Iterator[bytes]:
        position = 0
        while len(data := self._fetch(file, position, STREAM)) == STREAM:
            yield data
            position += len(data)
        yield data

    def _patiently(self, attempt: Callable[[], Any], what: str) -> Any:
        """What `attempt` returns, tried again after an error for PATIENCE seconds; then DataError(what: error)."""
        began, pause = time.monotonic(), FIRST_PAUSE
        while True:
            try:
                return attempt()
            except Exception as error:  # each client has errors of its own
                if isinstance(error, PermissionError) or getattr(error, "status", 0) in (401, 403):
                    raise DataError(f"{what}: {error}") from error
                patience = MISSING if isinstance(error, FileNotFoundError) else PATIENCE
                if time.monotonic() - began > patience:
                    raise DataError(f"{what} for {patience:.0f} s: {error or type(error).__name__}") from error
                self._client = None
                time.sleep(pause * random.uniform(0.5, 1.5))
                pause = min(2 * pause, LONGEST_PAUSE)

    def _connect(self) -> None:
        """A client of this process, with short timeouts and no patience of its own."""
        if self._client is not None and self._process == os.getpid():
            return
        import fsspec

        options: dict[str, Any] = {"skip_instance_cache": True, "use_listings_cache": False}
        if self.url.startswith("s3://"):
            retries = {"max_attempts": 0}
            options["config_kwargs"] = {"connect_timeout": 5, "read_timeout": 20, "retries": retries}
        elif self.url.startswith("http"):
            import aiohttp

            timeout = aiohttp.ClientTimeout(total=None, sock_connect=5, sock_read=20)
            options["client_kwargs"] = {"timeout": timeout}
        try:
            self._client, self._root = fsspec.core.url_to_fs(self.url, **options)
        except (ValueError, ImportError) as error:
            raise ValueError(f"{self.url} cannot be read: {error}") from error
        self._process = os.getpid()

    def __getstate__(self) -> dict[str, Any]:
        return {"url": self.url, "cache": self._cache}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["url"], state["cache"])  # type: ignore[misc]


def _shrink(pieces: Path, most: int) -> None:
    """Drop the least recently used pieces until nine tenths of the bound are left; others may do so too."""
    found = []
    for each in os.scandir(pieces):
        try:
            status = each.stat()
        except FileNotFoundError:
            continue
        found.append((status.st_mtime, status.st_size, each.path))
    total = sum(size for _, size, _ in found)
    if total <= most:
        return
    for _, size, path in sorted(found):
        Path(path).unlink(missing_ok=True)
        total -= size
        if total <= 0.9 * most:
            return
