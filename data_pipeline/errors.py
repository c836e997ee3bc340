"""The one error of this package: the data itself is bad.

A missing file stays `FileNotFoundError` and a request that cannot be right stays `ValueError`; both are
the caller's to mend. `DataError` says that bytes on disk are not what they should be.
"""


class DataError(ValueError):
    """Bad data: one sentence that names the file and, where it is known, the byte."""


class DamagedSampleError(DataError):
    """The bytes of one sample are not those that were indexed; others of its shard may be."""

    def __init__(self, key: str, message: str) -> None:
        super().__init__(key, message)
        self.key = key

    def __str__(self) -> str:
        return str(self.args[1])


def first_line(error: BaseException) -> str:
    """What an error says, in one line: those of Arrow and Ray go on, or end in a line break."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
