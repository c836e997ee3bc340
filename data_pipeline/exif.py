"""Which way up a JPEG is: the orientation in its EXIF header, read without decoding anything.

A JPEG is a row of segments (marker, length, body) before its pixels; EXIF is the APP1 segment that starts with
"Exif", and inside it is a TIFF directory, where tag 0x0112 is the orientation, 1 (upright) to 8.

Formats: JPEG, ITU-T T.81 annex B.1.1.4; Exif 2.32 sections 4.5 and 4.6.
"""

from __future__ import annotations

import struct

APP1, START_OF_SCAN, FILL = 0xE1, 0xDA, 0xFF
ORIENTATION, SHORT = 0x0112, 3


def jpeg_orientation(data: bytes) -> int:
    """EXIF orientation of a JPEG, 1 to 8; 1 (upright) when it does not say or cannot be read."""
    position = 2  # after the start-of-image marker
    while position + 4 <= len(data) and data[position] == 0xFF:
        if data[position + 1] == FILL:  # any number of fill bytes may stand before a marker
            position += 1
            continue
        marker, length = struct.unpack_from(">BH", data, position + 1)
        if marker == START_OF_SCAN:
            break
        body = position + 4
        if marker == APP1 and data[body : body + 6] == b"Exif\0\0":
            return _tiff_orientation(data[body + 6 : position + 2 + length])
        position += 2 + length
    return 1


def _tiff_orientation(tiff: bytes) -> int:
    """The orientation in a TIFF header and its first directory."""
    if tiff[:2] not in (b"II", b"MM"):
        return 1
    endian = "<" if tiff[:2] == b"II" else ">"
    try:
        (directory,) = struct.unpack_from(endian + "I", tiff, 4)
        (entries,) = struct.unpack_from(endian + "H", tiff, directory)
        for entry in range(entries):
            tag, kind, _, value = struct.unpack_from(endian + "HHIH", tiff, directory + 2 + 12 * entry)
            if tag == ORIENTATION and kind == SHORT:
                return value if 1 <= value <= 8 else 1
    except struct.error:  # a directory that points outside: the pixels may still be fine
        return 1
    return 1
