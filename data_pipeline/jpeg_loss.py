"""Whether pixels of a JPEG are lost, where the first warning of the strict decoder does not say so.

Design choices:
- libjpeg tells its first warning only, so that a harmless one (stray bytes before a table) hides that the file ends
  early. The file is therefore written anew with nothing in it but tables, frame, scans and an end mark, and decoded
  strictly again.
- Where that still warns of something harmless, or its sampling is none that the strict decoder knows, the scans are
  looked at themselves. Their restart markers are to be there, in turn and as many as the frame has; and what pixels
  come out must not depend on what bytes are put behind the data of a scan: a decoder that has all of it reads no more.
- A file that nobody ended is not held against the zeros behind it: they may decode to pixels, and are cut off.

Format: JPEG, ITU-T T.81 annexes A.2 and B.
"""

from __future__ import annotations

import io
import re
import struct
import warnings
from dataclasses import dataclass, field

import numpy as np
import simplejpeg
from PIL import Image

from data_pipeline.errors import first_line

# what libjpeg-turbo says when pixels are lost (its jerror.h); of the rest that it warns of, all pixels are there
LOST = re.compile(r"premature end of data|bad huffman|instead of rst|bad arithmetic", re.IGNORECASE)
MARKER = re.compile(rb"\xff+([\x01-\xfe])")
START, END = b"\xff\xd8", b"\xff\xd9"
TABLES, RESTART_INTERVAL, START_OF_SCAN = (0xC4, 0xCC, 0xDB), 0xDD, 0xDA
FRAMES = (*range(0xC0, 0xC4), *range(0xC5, 0xC8), *range(0xC9, 0xCC), *range(0xCD, 0xD0))
ARITHMETIC = 0xC9  # from this frame on: such data may end before its last bits, which are zeros
RESTARTS = range(0xD0, 0xD8)
ALONE = (0x01, *RESTARTS)  # markers without a length
BEHIND = (b"\x55" * 64, b"\xaa" * 64)  # two kinds of bytes that may stand behind the data of a scan


@dataclass
class _Scan:
    """The data of one scan, cut at its restart markers, and how many of these there should be."""

    parts: list[bytes]
    markers: list[int]
    restarts: int


@dataclass
class _Jpeg:
    """A JPEG without all that is not needed for its pixels."""

    pieces: list[bytes | _Scan] = field(default_factory=list)
    frame: int = 0  # the marker of its frame
    components: dict[int, tuple[int, int]] = field(default_factory=dict)  # number -> sampling across and down
    size: tuple[int, int] = (0, 0)  # width and height

    def written(self, behind: bytes) -> bytes:
        """The file, with these bytes behind all data of its scans."""
        out = [START]
        for piece in self.pieces:
            if isinstance(piece, bytes):
                out.append(piece)
                continue
            for part, marker in zip(piece.parts, [*piece.markers, 0], strict=True):
                out += [part, behind, bytes([0xFF, marker]) if marker else b""]
        return b"".join([*out, END])


def lost_pixels(data: bytes) -> str:
    """What of the pixels of a JPEG is lost, in a few words; "" when nothing is.

    For files that the strict decoder refuses and Pillow reads: it takes several times as long as decoding.
    """
    try:
        jpeg = _parsed(data)
        told = _told(jpeg.written(b""), "CMYK" if len(jpeg.components) == 4 else "RGB")
        if not told or LOST.search(told):
            return told
        if any(scan.markers[: scan.restarts] != _in_turn(scan.restarts) for scan in _scans(jpeg)):
            return "a restart marker of its data is missing"
        if jpeg.frame < ARITHMETIC and _pixels(jpeg.written(BEHIND[0])) != _pixels(jpeg.written(BEHIND[1])):
            return "premature end of data segment"
        return ""
    except Exception as error:  # hostile bytes raise nearly anything in Pillow
        return first_line(error)


def _told(data: bytes, colorspace: str) -> str:
    """What the strict decoder says of a file, "" when it decodes it."""
    try:
        simplejpeg.decode_jpeg(data, colorspace=colorspace)
    except Exception as error:
        return str(error)
    return ""


def _pixels(data: bytes) -> bytes:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return np.asarray(Image.open(io.BytesIO(data), formats=["JPEG"])).tobytes()


def _scans(jpeg: _Jpeg) -> list[_Scan]:
    return [piece for piece in jpeg.pieces if isinstance(piece, _Scan)]


def _in_turn(restarts: int) -> list[int]:
    return [RESTARTS[number % len(RESTARTS)] for number in range(restarts)]


def _parsed(data: bytes) -> _Jpeg:
    """Take a JPEG apart as libjpeg does: what stands before a marker and belongs to nothing is passed over."""
    jpeg, position, interval = _Jpeg(), 2, 0
    while match := MARKER.search(data, position):
        marker, start = match[1][0], match.end()
        if marker == END[1]:
            break
        position = start
        if marker in ALONE:
            continue
        (length,) = struct.unpack_from(">H", data, start)
        position = start + length
        body = data[start + 2 : position]
        if marker in FRAMES:
            jpeg.frame = marker
            jpeg.size = (int.from_bytes(body[3:5]), int.from_bytes(body[1:3]))
            jpeg.components = {body[at]: (body[at + 1] >> 4, body[at + 1] & 15) for at in range(6, len(body) - 2, 3)}
        elif marker == RESTART_INTERVAL:
            interval = int.from_bytes(body[:2])
        if marker in FRAMES or marker in TABLES or marker in (RESTART_INTERVAL, START_OF_SCAN):
            jpeg.pieces.append(bytes([0xFF, marker]) + data[start:position])
        if marker == START_OF_SCAN:
            numbers = [body[1 + 2 * number] for number in range(body[0])]
            scan, position = _scan(data, position)
            scan.restarts = max(0, -(-_units(jpeg, numbers) // interval) - 1) if interval else 0
            jpeg.pieces.append(scan)
    return jpeg


def _scan(data: bytes, position: int) -> tuple[_Scan, int]:
    """The data of a scan that starts at byte `position`, and the byte of the marker after it."""
    scan = _Scan([], [], 0)
    while match := MARKER.search(data, position):
        scan.parts.append(data[position : match.start()])
        if match[1][0] not in RESTARTS:
            return scan, match.start()
        scan.markers.append(match[1][0])
        position = match.end()
    last = data[position:].rstrip(b"\xff").rstrip(b"\0")
    scan.parts.append(last + b"\0" if last.endswith(b"\xff") else last)
    return scan, len(data)


def _units(jpeg: _Jpeg, numbers: list[int]) -> int:
    """How many units a scan of these components has, between which restart markers stand (T.81, A.2)."""
    width, height = jpeg.size
    most_across, most_down = (max(factors) for factors in zip(*jpeg.components.values(), strict=True))
    across, down = jpeg.components[numbers[0]] if len(numbers) == 1 else (1, 1)
    return -(-width * across // (8 * most_across)) * -(-height * down // (8 * most_down))
