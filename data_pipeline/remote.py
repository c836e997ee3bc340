"""Shards at a URL (s3://, https://, whatever fsspec knows), read by byte ranges through a cache on this machine.

Design choices:
- Reads are widened to whole pieces, which are kept on disk up to a bound; the least recently used go first. Every
  process of the machine uses the same pieces. Where the order visits neighbours together, a piece is fetched once.
- A read that fails or comes short goes on from the byte that it has reached, after longer and longer pauses, for
  PATIENCE seconds without a byte; then one sentence names the shard and the bytes. A server that is killed and started
  again costs time, and no sample.
- index.json and the tables of offsets are fetched where they lie beside the shards. Where they do not, each shard is
  read through once, several side by side, and what is found is kept in the cache: nothing is written to the URL.
- Each time a data set is opened, the server is asked what lies there now: names from its listing, and of each shard the
  size and the mark (listing.py). An index is held against them as in a folder, one in the cache is made anew when they
  have changed, and pieces are kept under the mark: nothing is served from the cache that changed at the URL.
- A folder that may not be listed is read by its index.json alone.
- A client belongs to the process that made it: a forked one makes its own.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data_pipeline.errors import DataError, first_line
from data_pipeline.folder import ignored_names, is_shard
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
from data_pipeline.listing import (
    Known,
    as_url,
    encoded,
    is_refusal,
    known_of,
    names_in_page,
    status_of,
    web_range,
    web_size,
)
from data_pipeline.strict_json import read_json

PIECE = 1 << 20  # bytes: a few samples, and as long on the way as a request needs to be answered
PATIENCE = 120.0  # seconds
MISSING = 5.0  # seconds for a file that is not there: a server that has just started may not know it yet
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 5.0  # seconds
MARKS_FILE = "marks.json"  # in the cache: what the server told of the shards that were read through
STREAM = 8 << 20  # bytes of a shard that is read through, at a time
SIDE_BY_SIDE = 8
QUESTIONS = 32  # asked side by side


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
    index = Index.load(files.folder, files.url)
    names = files.names()
    listed = [] if names is None else [name for name in names if is_shard(name)]
    extra = sorted(set(listed) - {shard.file for shard in index.shards})
    if extra:
        raise DataError(
            f"{files.url}/{extra[0]} is not in the index: run `weft data stats` where the folder is stored, without "
            f"its {INDEX_FILE}, to have it made anew"
        )
    files.ask_about([shard.file for shard in index.shards])
    for shard in index.shards:
        known = files.known[shard.file]
        if known is None:
            raise DataError(f"{files.url}/{shard.file} is in the index, but there is no such file")
        if known.size is not None and known.size != shard.bytes:
            raise DataError(f"{files.url}/{shard.file} has {known.size} bytes, but {shard.bytes} in the index")
        files.known[shard.file] = known._replace(size=shard.bytes)  # which some servers do not tell
    return files, replace(index, ignored=ignored_names(names or ()))


def _first_sight(files: RemoteFiles) -> Index:
    """Read every tar through, and keep tables and index in the cache; used again while the server tells the same."""
    listed = files.names()
    if listed is None:
        raise DataError(
            f"{files.url} could not be listed, and there is no {INDEX_FILE}: allow the listing, or put an index there"
        )
    names = sorted(filter(is_shard, listed))
    if not names:
        raise FileNotFoundError(f"no data set at {files.url}: there is no {INDEX_FILE} and no .tar file to be seen")
    files.ask_about(names)
    told = {name: list(files.known[name] or ()) for name in names}
    try:
        known = Index.load(files.folder)
        if read_json((files.folder / MARKS_FILE).read_text(encoding="utf-8")) == told and [
            (shard.file, shard.bytes) for shard in known.shards
        ] == [(name, told[name][0] or shard.bytes) for name, shard in zip(names, known.shards, strict=True)]:
            return replace(known, ignored=ignored_names(listed))
    except (OSError, ValueError, DataError):
        pass
    with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
        index = Index(tuple(pool.map(files.read_through, names)), ignored_names(listed))
    if index.samples == 0:
        raise DataError(f"there is no sample in the {len(names)} .tar files of {files.url}")
    index.save(files.folder)
    with written_whole(files.folder / MARKS_FILE) as unfinished:
        unfinished.write_text(json.dumps(told), encoding="utf-8")
    return index


class RemoteFiles:
    """The files of one folder at a URL. Picklable; safe to use in forked processes."""

    def __init__(self, url: str, cache: Cache, known: dict[str, Known | None] | None = None) -> None:
        self.url, self._cache = url, cache
        self.known = known or {}  # what the server told of files; None: there is no such file
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

    def names(self) -> list[str] | None:
        """The files of the folder, in the server's order; None when it may not be listed, [] when it lists nothing."""

        def listed() -> list[str] | None:
            self._connect()
            try:
                if self._is_web:
                    return names_in_page(self._client.cat_file(f"{self._root}/").decode("utf-8", "replace"), self._root)
                found = self._client.ls(self._root, detail=True)
            except FileNotFoundError:
                return []
            except NotImplementedError:
                return None
            except Exception as error:
                if is_refusal(error):
                    return None
                raise
            named = {each["name"].rstrip("/").rpartition("/")[2]: known_of(each) for each in found}
            self.known.update({name: known for name, known in named.items() if known.size is not None and known.mark})
            return list(named)

        self.known.clear()
        return self._patiently(listed, f"{self.url} could not be listed")

    def ask_about(self, names: list[str]) -> None:
        """Ask the server about those files of which its listing did not tell size and mark."""
        unknown = [name for name in names if name not in self.known]
        if unknown:
            self._connect()
            with ThreadPoolExecutor(min(QUESTIONS, len(unknown))) as pool:
                self.known.update(zip(unknown, pool.map(self._ask, unknown), strict=True))

    def _ask(self, file: str) -> Known | None:
        """What the server tells of a file; None when there is none."""

        def asked() -> Known | None:
            self._connect()
            try:
                known = known_of(self._client.info(self._path(file)))
                if known.size is None and self._is_web:
                    known = known._replace(size=web_size(self._client, self._path(file)))
                return known
            except Exception as error:
                if is_refusal(error):
                    return Known()
                if isinstance(error, FileNotFoundError) and status_of(error) in (0, 404, 410):
                    return None
                raise

        return self._patiently(asked, f"{self.url}/{file} could not be asked for")

    def whole(self, file: str) -> bytes | None:
        """All bytes of a small file; None when there is none, or none that may be read.

        Where a folder may not be listed, some servers forbid what is not there.
        """

        def read() -> bytes | None:
            self._connect()
            try:
                data: bytes = self._client.cat_file(self._path(file))
            except (FileNotFoundError, PermissionError):
                return None
            except Exception as error:
                if status_of(error) == 403:
                    return None
                raise
            return data

        return self._patiently(read, f"{self.url}/{file} could not be read")

    def read_through(self, file: str) -> ShardEntry:
        """Bring a shard here, note where everything in it is, and let go of it."""
        folder = self.folder / f".{uuid.uuid4().hex}"
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
        """Where a piece is kept: under the file's mark, so that what replaces the file has pieces of its own."""
        known = self.known.get(file) or Known()
        name = "\n".join((file, str(known.size), known.mark))
        return self._pieces / f"{hashlib.sha256(name.encode('utf-8', 'surrogatepass')).hexdigest()[:24]}.{number}"

    def _path(self, file: str) -> str:
        """What the client calls a file."""
        return as_url(self._root, file) if self._is_web else f"{self._root}/{file}"

    @property
    def _is_web(self) -> bool:
        return self.url.startswith(("http://", "https://"))

    # --- the network

    def _fetch(self, file: str, start: int, length: int) -> bytes:
        """A range of bytes, in as many requests as it takes; shorter only where the file ends."""
        size = (self.known.get(file) or Known()).size
        if size is None:
            raise DataError(
                f"{self.url}/{file} cannot be read by ranges: its server does not tell its size; put an {INDEX_FILE} "
                "beside it, as `weft data stats` makes one where the folder is stored"
            )
        got, end = bytearray(), min(start + length, size)

        def more() -> bytes:
            self._connect()
            path, at = self._path(file), start + len(got)
            try:
                data: bytes = (
                    web_range(self._client, path, at, end, size)
                    if self._is_web
                    else self._client.cat_file(path, start=at, end=end)
                )
            except FileNotFoundError:
                raise
            except Exception:
                if at >= self._size(path, otherwise=size):
                    return b""  # it has become shorter, and nothing lies there, which some servers call an error
                raise
            if not data and at < self._size(path, otherwise=size):
                raise OSError("the answer was empty")
            return data

        while start + len(got) < end:
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
                    raise DataError(f"{what}: {first_line(error)}") from error
                patience = MISSING if isinstance(error, FileNotFoundError) else PATIENCE
                if time.monotonic() - began > patience:
                    raise DataError(f"{what} for {patience:.0f} s: {first_line(error)}") from error
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
        elif self._is_web:
            import aiohttp

            timeout = aiohttp.ClientTimeout(total=None, sock_connect=5, sock_read=20)
            options |= {"client_kwargs": {"timeout": timeout}, "encoded": True}
        try:
            url = encoded(self.url) if self._is_web else self.url
            self._client, self._root = fsspec.core.url_to_fs(url, **options)
        except (ValueError, ImportError) as error:
            raise ValueError(f"{self.url} cannot be read: {first_line(error)}") from error
        self._process = os.getpid()

    def __getstate__(self) -> dict[str, Any]:
        return {"url": self.url, "cache": self._cache, "known": self.known}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["url"], state["cache"], state["known"])  # type: ignore[misc]


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
