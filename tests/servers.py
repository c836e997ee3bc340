"""Servers of shards for tests, on loopback: a web server that may misbehave, a real S3 server that may be killed."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}


class WebServer:
    """Serves a folder with byte ranges and a listing; `spoil` may change an answer: (path, body) -> body or None.

    `listing`: the status of an answer to a question for the folder; 200 lists it. `mark`: tells a file's entity tag, or
    other headers, from its bytes; None tells none. `sizes`: whether answers with a whole file tell its length.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.spoil: Callable[[str, bytes], bytes | None] = lambda path, body: body
        self.ranges = True
        self.sizes = True
        self.listing = 200
        self.mark: Callable[[bytes], dict[str, str]] | None = None
        self.asked: list[str] = []
        self.port = 0
        self.start()

    def start(self) -> None:
        web = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self.do_GET()

            def do_GET(self) -> None:
                path = unquote(self.path.strip("/").partition("?")[0])
                file = web.folder / path
                web.asked.append(f"{self.command} {path} {self.headers.get('Range', '')}")
                self.marks: dict[str, str] = {}
                if not path and web.listing != 200:
                    return self.answer(web.listing, b"", 0)
                if not path:
                    names = (each.name for each in web.folder.iterdir())
                    listing = "".join(f'<a href="{quote(name)}">{name}</a>' for name in names).encode()
                    return self.answer(200, listing, len(listing))
                if not file.is_file():
                    return self.answer(404, b"", 0)
                whole = file.read_bytes()
                self.marks = web.mark(whole) if web.mark else {}
                asked = re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")) if web.ranges else None
                if asked is None:
                    return self.answer(200, whole, len(whole))
                first, last = int(asked[1]), min(int(asked[2] or len(whole) - 1), len(whole) - 1)
                if first >= len(whole):
                    return self.answer(416, b"", 0)
                body = whole[first : last + 1]
                return self.answer(206, body, len(body), f"bytes {first}-{last}/{len(whole)}")

            def answer(self, status: int, body: bytes, length: int, content_range: str = "") -> None:
                spoiled = web.spoil(self.path, body) if self.command == "GET" else body
                if spoiled is None:
                    return self.send_error(503)
                self.send_response(status)
                if web.sizes or status != 200:
                    self.send_header("Content-Length", str(length))
                for name, value in self.marks.items():
                    self.send_header(name, value)
                if web.ranges:
                    self.send_header("Accept-Ranges", "bytes")
                if content_range:
                    self.send_header("Content-Range", content_range)
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(spoiled)
                    if len(spoiled) < length:
                        self.close_connection = True

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


class S3Server:
    """A moto server in a process of its own, with the folder's files in a bucket; it forgets them when it is killed."""

    def __init__(self, folder: Path, log: Path) -> None:
        self.folder, self.log = folder, log
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        ends = time.monotonic() + 300
        while True:
            try:
                self.client().create_bucket(Bucket="weft")
                break
            except Exception:
                assert time.monotonic() < ends
                time.sleep(0.2)
        for path in self.folder.iterdir():
            self.put(path.name, path.read_bytes())

    def client(self) -> Any:
        import botocore.session

        return botocore.session.get_session().create_client("s3", endpoint_url=self.url)

    def put(self, name: str, data: bytes) -> None:
        self.client().put_object(Bucket="weft", Key=f"sets/scenes/{name}", Body=data)

    def remove(self, name: str) -> None:
        self.client().delete_object(Bucket="weft", Key=f"sets/scenes/{name}")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"
