"""Connect this process to a Ray: one of its own on this machine, or that of a cluster.

    address = connect("local")       # or connect("10.0.0.1:6379"); other processes: connect(address)
    disconnect()

Ray listens on every interface of the machine, and lets in who has its token. One of our own keeps its logs in a folder
that goes away with it.
"""

from __future__ import annotations

import atexit
import logging
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable
from typing import Any

import ray

from data_pipeline.errors import DataError, first_line

NAMESPACE = "weft"
LONGEST_PLACE = 24  # characters of a folder for temporary files in which Ray's sockets still have a place
LAST_WORDS = 20.0  # seconds that Ray's processes may still write into their folder
_folders: list[str] = []  # of a Ray that this process has started
# what ends threads that ask Ray: one that asks when Ray has gone ends the whole process, with exit code 1
before_leaving: list[Callable[[], None]] = []


def connect(address: str, processors: int = 2, store_bytes: int | None = None) -> str:
    """Connect this process to Ray and return the address for others to connect to.

    address: "local" starts a Ray on this machine that ends with this process, with so many processors and so much
    memory for objects; else that of a cluster. Raises DataError when there is no such cluster, or it does not start.
    """
    settings: dict[str, Any] = {
        "namespace": NAMESPACE,
        "log_to_driver": False,
        "logging_level": logging.ERROR,
        "configure_logging": False,
    }
    if address == "local":
        usual = tempfile.gettempdir()
        short = usual if len(usual) <= LONGEST_PLACE else "/tmp"  # a socket's path may not be long
        _folders.append(tempfile.mkdtemp(prefix="weft-ray-", dir=short))
        settings |= {"num_cpus": processors, "include_dashboard": False, "object_store_memory": store_bytes}
        settings |= {"_node_ip_address": "127.0.0.1", "_temp_dir": _folders[-1]}
    host, _, port = address.rpartition(":")
    if port.isdecimal():
        _refuse_nobody(host, int(port))  # Ray would try for minutes
    try:
        context: Any = ray.init(address=address, **settings)
    except Exception as error:  # of no class that one could name: Ray raises plain ones when its processes come late
        failed = "Ray did not start on this machine" if address == "local" else f"there is no Ray cluster at {address}"
        raise DataError(f"{failed} ({first_line(error)})") from error
    return str(context.address_info["gcs_address"])


@atexit.register
def disconnect() -> None:
    """Leave Ray; one that this process has started ends, and nothing of it stays."""
    while before_leaving:
        before_leaving.pop()()
    ray.shutdown()
    ends = time.monotonic() + LAST_WORDS
    while _folders:
        shutil.rmtree(_folders[-1], ignore_errors=True)
        if not os.path.exists(_folders[-1]) or time.monotonic() > ends:
            _folders.pop()
        else:
            time.sleep(0.1)


def _refuse_nobody(host: str, port: int) -> None:
    """DataError when nobody listens there."""
    if "//" in host:
        raise DataError(f"{host}:{port} is an address for Ray Client, which has no shared memory: give HOST:PORT")
    try:
        socket.create_connection((host, port), timeout=10).close()
    except (OSError, UnicodeError, OverflowError) as error:  # the last two: no name of a host, no number of a port
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"there is no Ray cluster at {host}:{port} ({reason})") from error
