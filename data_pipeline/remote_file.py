"""A file at a URL as Python's readers want one: seek and read, by ranges through the cache."""

from __future__ import annotations

import io
import os
import posixpath
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any
from urllib.parse import unquote

from data_pipeline.errors import DataError
from data_pipeline.remote import Cache, RemoteFiles


@dataclass(frozen=True)
class RemotePath:
    """A file in a folder at a URL, with what of pathlib.Path its readers use."""

    files: RemoteFiles
    name: str

    def __str__(self) -> str:
        return f"{self.files.url}/{self.name}"

    @property
    def stem(self) -> str:
        """The name without its extension."""
        return posixpath.splitext(self.name)[0]

    @property
    def suffix(self) -> str:
        """The extension, with its dot."""
        return posixpath.splitext(self.name)[1]

    def open(self, mode: str = "rb") -> RemoteFile:
        """The file, to be read. FileNotFoundError when it is not there, DataError when its size is not told."""
        self.files.ask_about([self.name])
        known = self.files.known[self.name]
        if known is None:
            raise FileNotFoundError(f"{self} is missing: there is no such file")
        if known.size is None:
            raise DataError(f"{self} cannot be read by ranges: its server does not tell its size")
        return RemoteFile(self, known.size)

    def forget(self) -> None:
        """What is kept of the file may be damaged: it is fetched again."""
        known = self.files.known.get(self.name)
        if known is not None and known.size:
            self.files.forget(self.name, 0, known.size)


class RemoteFile(io.RawIOBase):
    """An open `RemotePath`. What cannot be fetched is a DataError."""

    def __init__(self, path: RemotePath, size: int) -> None:
        super().__init__()
        self._path, self._size, self._at = path, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        self._at = max(0, base + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        length = min(len(buffer), self._size - self._at)
        if length <= 0:
            return 0
        data = self._path.files.read(self._path.name, self._at, length)
        if len(data) < length:
            raise DataError(f"{self._path} is truncated: it ends before byte {self._at + length} of {self._size}")
        buffer[:length] = data
        self._at += length
        return length


def find_remote(url: str, cache: Cache, extensions: tuple[str, ...]) -> list[RemotePath]:
    """The files with one of `extensions` that a URL means: a folder, a file, or a pattern in its last part.

    In order of name; [] when there is none, or the folder holds tars or an index of them.
    """
    folder, _, last = url.rstrip("/").rpartition("/")
    name = unquote(last) if url.startswith(("http://", "https://")) else last
    if not name.lower().endswith(extensions):
        files = RemoteFiles(url.rstrip("/"), cache)
        names = files.names() or []
        if any(each.endswith(".tar") or each == "index.json" for each in names):
            return []
    elif any(letter in name for letter in "*?["):
        files = RemoteFiles(folder, cache)
        names = [each for each in files.names() or [] if fnmatchcase(each, name)]
    else:
        return [RemotePath(RemoteFiles(folder, cache), name)]
    found = [each for each in names if each.lower().endswith(extensions) and each[0] not in "._"]
    return [RemotePath(files, each) for each in sorted(found)]
