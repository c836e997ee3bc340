"""One writer at a time: with flock, and where a file system has none."""

import errno
import fcntl
import json
import os
import subprocess
import sys

import pytest

from data_pipeline.lock import TakenError, held


def test_one_at_a_time_and_nothing_is_left(tmp_path):
    path = tmp_path / "lock"
    for _ in range(2):
        words = "another process is writing the set"
        with held(path, 0, "the set"), pytest.raises(TakenError, match=words), held(path, 0, "the set"):
            pass
        assert not list(tmp_path.iterdir())


def test_it_is_asked_of_a_file_that_is_open_for_writing(tmp_path, monkeypatch):
    """As NFS wants it: flock there is a lock of the bytes of a file, and EBADF on one that is open for reading."""
    modes = []

    def flock(file, how):
        modes.append(fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE)

    monkeypatch.setattr(fcntl, "flock", flock)
    with held(tmp_path / "lock", 0, "the set"):
        pass
    assert modes == [os.O_RDWR]


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF])
def test_without_locks_there_is_an_owner(tmp_path, monkeypatch, code):
    def flock(file, how):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    path, owner = tmp_path / "lock", tmp_path / "lock.owner"
    words = rf"process {os.getpid()} of .* remove .*lock\.owner"
    with held(path, 0, "the set"), pytest.raises(TakenError, match=words), held(path, 0, "the set"):
        pass
    assert not list(tmp_path.iterdir())
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    with held(path, 0, "the set"):
        of_ended = {**json.loads(owner.read_text()), "process": ended.pid}
    owner.write_text(json.dumps(of_ended))
    with held(path, 0, "the set"):  # of a writer that was killed
        assert json.loads(owner.read_text())["process"] == os.getpid()
    owner.write_text(json.dumps({**of_ended, "process": os.getpid(), "started": "1"}))
    with held(path, 0, "the set"):  # likewise, and its number has been used again
        assert json.loads(owner.read_text())["started"] != "1"
    for unknown in (json.dumps({**of_ended, "host": "elsewhere"}), json.dumps({**of_ended, "space": 1}), "", "[]"):
        owner.write_text(unknown)
        with pytest.raises(TakenError, match="may be written by"), held(path, 0, "the set"):
            pass
