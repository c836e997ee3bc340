"""Write a safetensors file from memory that already lies as the file does, and know its sha256 without reading it back.

`safetensors.torch.save_file` holds Python's lock while it copies and gives no checksum; here the bytes go to the disk
in pieces, and both `write` and `update` of a hash run without the lock, so training goes on beside them.
The format (github.com/huggingface/safetensors, "Format"): 8 bytes little-endian length of the header, the header as
JSON, then the tensors without gaps.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import torch

PIECE = 8 << 20  # bytes
ALIGNMENT = 8  # bytes; where the first tensor begins


def write_tensors(path: Path, shapes: dict[str, tuple[int, ...]], numbers: torch.Tensor) -> str:
    """Write fp32 tensors that lie one behind the other in `numbers` (flat, CPU); returns the file's sha256 (hex).

    Every byte is on disk when this returns. Raises OSError where it cannot be written.
    """
    digest = hashlib.sha256()
    with path.open("wb", buffering=0) as file:
        for piece in _pieces(shapes, numbers):
            digest.update(piece)
            written = 0
            while written < len(piece):  # a disk that is nearly full takes a part
                written += file.write(piece[written:])
        os.fsync(file.fileno())
    return digest.hexdigest()


def _pieces(shapes: dict[str, tuple[int, ...]], numbers: torch.Tensor) -> Iterator[memoryview]:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + 4 * torch.Size(shape).numel()
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, end]}
    assert end == 4 * numbers.numel(), "shapes and numbers belong together"
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    yield memoryview(len(text).to_bytes(8, "little") + text)
    body = memoryview(numbers.numpy().view("u1"))  # type: ignore[arg-type]  # numpy before Python 3.12's Buffer
    for at in range(0, len(body), PIECE):
        yield body[at : at + PIECE]


def write_text(path: Path, text: str) -> str:
    """Write a small file to the disk; returns its sha256 (hex)."""
    data = text.encode()
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return hashlib.sha256(data).hexdigest()
