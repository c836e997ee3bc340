"""Which way up a JPEG is: the orientation in its headers, read without decoding anything, as Pillow reads it.

A JPEG is a row of segments (marker, length, body) before its pixels; EXIF is the APP1 segment that starts with
"Exif", and inside it is a TIFF directory, where tag 0x0112 is the orientation, 1 (upright) to 8. Where EXIF has none,
that of XMP counts, the APP1 segment that starts with Adobe's name.

Formats: JPEG, ITU-T T.81 annex B.1.1.4; Exif 2.32 sections 4.5 and 4.6; XMP part 3, section 1.1.3.
"""

from __future__ import annotations

import re
import struct

APP1, START_OF_SCAN, FILL = 0xE1, 0xDA, 0xFF
EXIF, XMP = b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0"
ORIENTATION, UPRIGHT = 0x0112, 1
NUMBERS = {3: "H", 4: "I", 8: "h", 9: "i"}  # kind of a TIFF value -> how it is stored
IN_XMP = re.compile(rb'tiff:Orientation(="|>)([0-9])')


def jpeg_orientation(data: bytes) -> int:
    """Orientation of a JPEG, 1 to 8; 1 (upright) when it does not say or cannot be read."""
    position = 2  # after the start-of-image marker
    tiff, xmp = b"", b""
    while position + 4 <= len(data) and data[position] == 0xFF:
        if data[position + 1] == FILL:  # any number of fill bytes may stand before a marker
            position += 1
            continue
        marker, length = struct.unpack_from(">BH", data, position + 1)
        if marker == START_OF_SCAN:
            break
        body, end = position + 4, position + 2 + length
        if marker == APP1 and data.startswith(EXIF, body):
            tiff += data[body + len(EXIF) : end]  # long ones go on in the next segment
        elif marker == APP1 and data.startswith(XMP, body):
            xmp = data[body + len(XMP) : end]
        position = end
    orientation = _tiff_orientation(tiff)
    if orientation is None:
        match = IN_XMP.search(xmp)
        orientation = int(match[2]) if match else UPRIGHT
    return orientation if 1 <= orientation <= 8 else UPRIGHT


def _tiff_orientation(tiff: bytes) -> int | None:
    """The orientation in a TIFF header and its first directory; None when there is none, 0 when it makes no sense."""
    if tiff[:2] not in (b"II", b"MM"):
        return None
    endian = "<" if tiff[:2] == b"II" else ">"
    try:
        (directory,) = struct.unpack_from(endian + "I", tiff, 4)
        (entries,) = struct.unpack_from(endian + "H", tiff, directory)
        for entry in range(entries):
            place = directory + 2 + 12 * entry
            tag, kind, count = struct.unpack_from(endian + "HHI", tiff, place)
            if tag != ORIENTATION:
                continue
            number = NUMBERS.get(kind, "")
            if not number or not 0 < count * struct.calcsize(number) <= 4:
                return 0
            return int(struct.unpack_from(endian + number, tiff, place + 8)[0])  # of several, the first
    except struct.error:  # a directory that points outside: the pixels may still be fine
        return None
    return None
