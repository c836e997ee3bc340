"""The one error of this package: the data itself is bad.

A missing file stays `FileNotFoundError` and a request that cannot be right stays `ValueError`; both are
the caller's to mend. `DataError` says that bytes on disk are not what they should be.
"""


class DataError(ValueError):
    """Bad data: one sentence that names the file and, where it is known, the byte."""
