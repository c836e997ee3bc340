"""The one error of this package: the data itself is bad.

A missing file stays `FileNotFoundError` and a request that cannot be right stays `ValueError`; both are
the caller's to mend. `DataError` says that bytes on disk are not what they should be.
"""


class DataError(ValueError):
    """Bad data: one sentence that names the file and, where it is known, the byte."""


class DamagedSampleError(DataError):
    """One sample cannot be used, whatever is wrong with it; others of its shard may be good.

    `reason` says what is wrong; the text of the error also names the sample and its shard, where that is known.
    """

    def __init__(self, key: str, reason: str, shard: str = "") -> None:
        super().__init__(key, reason, shard)
        self.key = key
        self.reason = reason
        self.shard = shard

    def __str__(self) -> str:
        return f"sample {self.key!r} in {self.shard}: {self.reason}" if self.shard else self.reason


LONGEST_REASON = 300  # characters


def first_line(error: BaseException) -> str:
    """What a library's error says, in one line of plain text that is not too long.

    Those of Arrow and Ray go on, or end in a line break; those of NumPy repeat what they cannot read.
    """
    line = printable(str(error).strip().partition("\n")[0]) or type(error).__name__
    return line if len(line) <= LONGEST_REASON else line[: LONGEST_REASON - 4] + " ..."


def first_bytes(data: bytes, most: int = 8) -> str:
    """How data begins, in words: as text where it is plain text, else as hexadecimal numbers."""
    head = data[:most]
    if not head:
        return "nothing"
    return repr(head.decode()) if head.isascii() and head.decode().isprintable() else f"the bytes {head.hex(' ')}"


def printable(text: str) -> str:
    """The text with what could move a terminal's cursor or break a line (control characters) as escapes."""
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)
