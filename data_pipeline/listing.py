"""What servers tell of files: the names in a listing, a file's size, and the mark by which a change of it is seen.

And what web servers answer when a range of bytes is asked for, which fsspec gives without saying what it is.

Design choices:
- Names are what they are on the server's disk: an HTML listing has them encoded for a URL, and requests encode them.
- The mark is the server's own: an entity tag or checksum, else the time of the last change.
- A range is asked for without compression, and the status of the answer says whether it is the range or the whole file.
"""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import Any, NamedTuple
from urllib.parse import quote, unquote, urljoin, urlsplit

MARKS = (
    *("ETag", "etag", "Content-MD5", "md5Hash", "md5", "crc32c", "Digest", "version_id"),
    *("LastModified", "Last-Modified", "last_modified", "updated", "mtime"),
)
IN_URLS = "%/:?#[]@!$&'()*+,;=~"  # left as they are in a URL that a user gave


class Known(NamedTuple):
    """What a server tells of a file: its bytes (None: it does not say), and its mark ("": it has none)."""

    size: int | None = None
    mark: str = ""


def known_of(info: dict[str, Any]) -> Known:
    """The same of what fsspec tells of a file."""
    marks = (str(info[name]) for name in MARKS if info.get(name))
    size = info.get("size")
    return Known(None if size is None else int(size), next(marks, ""))


def names_in_page(page: str, url: str) -> list[str]:
    """The names of the files that an HTML page at the folder `url` links to."""
    base = urlsplit(url.rstrip("/") + "/")
    parser = _Links()
    parser.feed(page)
    names = []
    for link in parser.links:
        target = urlsplit(urljoin(base.geturl(), link))
        folder, _, name = target.path.rpartition("/")
        if name and target.netloc == base.netloc and unquote(folder + "/") == unquote(base.path):
            names.append(unquote(name))
    return list(dict.fromkeys(names))


def as_url(base: str, name: str) -> str:
    """The URL of the file `name` in the folder `base`."""
    return f"{base}/{quote(name)}"


def encoded(url: str) -> str:
    """A URL as it can be sent: what a user left as it is, such as a blank, is encoded."""
    return quote(url, safe=IN_URLS)


def is_refusal(error: Exception) -> bool:
    """Whether a server does not list, or does not tell, as opposed to failing, or having nothing there."""
    status = status_of(error)
    refused = status == 501 or (400 <= status < 500 and status not in (404, 408, 410, 425, 429))
    return refused or isinstance(error, PermissionError)


def status_of(error: BaseException | None) -> int:
    """The HTTP status that an error, or what it came from, is about; 0 when there is none."""
    while error is not None:
        status = getattr(error, "status", None)
        if isinstance(status, int):
            return status
        error = error.__cause__
    return 0


def web_range(client: Any, url: str, start: int, end: int, size: int) -> bytes:
    """Bytes start .. end - 1, fewer when the answer has fewer, of the file of `size` bytes at a URL.

    Raises OSError when the answer is neither those bytes nor the whole file, and what fsspec raises.
    """
    from fsspec.asyn import sync

    return sync(client.loop, _web_range, client, url, start, end, size)  # type: ignore[no-any-return]


async def _web_range(client: Any, url: str, start: int, end: int, size: int) -> bytes:
    async with await _ask_for_range(client, url, start, end) as answer:
        data: bytes = await answer.read()
        if answer.status != 206:  # as servers without ranges do
            if len(data) != size:
                raise OSError(f"the answer has {len(data)} bytes, and the whole file {size}")
            return data[start:end]
        told = _told_range(answer)
        if told is not None and told[0] != start:
            raise OSError(f"the answer is bytes from {told[0]} on, where those from {start} on were asked for")
        return data[: end - start]


def web_size(client: Any, url: str) -> int | None:
    """The size of the file at a URL as the answer with a range of it has it; None when that does not tell either."""
    from fsspec.asyn import sync

    return sync(client.loop, _web_size, client, url)  # type: ignore[no-any-return]


async def _web_size(client: Any, url: str) -> int | None:
    async with await _ask_for_range(client, url, 0, 1) as answer:
        told = _told_range(answer)
        return told[1] if told is not None and answer.status == 206 else None


async def _ask_for_range(client: Any, url: str, start: int, end: int) -> Any:
    options = dict(client.kwargs)
    headers = {**options.pop("headers", {}), "Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
    session = await client.set_session()
    answer = await session.get(client.encode_url(url), headers=headers, **options)
    if answer.status >= 400:
        answer.close()
    if answer.status == 404:
        raise FileNotFoundError(url)
    answer.raise_for_status()
    return answer


def _told_range(answer: Any) -> tuple[int, int | None] | None:
    """Of an answer with a range: its first byte, and the size of the file, None where that is not told."""
    told = re.match(r"\s*bytes\s+(\d+)-\d+/(\d+|\*)", answer.headers.get("Content-Range", ""))
    return None if told is None else (int(told[1]), None if told[2] == "*" else int(told[2]))


class _Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "a":
            self.links += [value for name, value in attrs if name == "href" and value]
