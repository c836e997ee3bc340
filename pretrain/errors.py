"""What a user can mend, said in one sentence.

The command line prints the sentence and leaves with `exit_code`: 2 when the request is wrong (a bad key, a
missing file), 1 when the thing asked about is bad (a checkpoint that does not verify, a run that cannot go on).
"""


class WeftError(Exception):
    """A sentence for the user, and the exit code that goes with it."""

    exit_code = 1


class RequestError(WeftError, ValueError):
    """The request is wrong: a bad key or value, a missing file, a layout that cannot be right."""

    exit_code = 2
