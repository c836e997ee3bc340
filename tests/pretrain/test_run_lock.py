"""One training at a time in a run folder, whether its owner lives, was killed, or is on another machine."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from pretrain import run_lock
from pretrain.errors import RequestError, WeftError
from pretrain.run_lock import LOCK, OWNER, Owner, RunLock, refuse_if_held

HOLD = """
import sys, time
from pathlib import Path
from pretrain.run_lock import RunLock
with RunLock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path: Path) -> subprocess.Popen[str]:  # type: ignore[misc]
    """Another process that trains in tmp_path / "run"."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_the_second_is_refused_until_the_first_is_killed(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    run = tmp_path / "run"
    named = f"process {holder.pid} on .* trains in {run}"
    with pytest.raises(WeftError, match=named):
        refuse_if_held(run)
    with pytest.raises(WeftError, match=named), RunLock(run):
        pass
    holder.send_signal(signal.SIGSTOP)  # it may go on at any time
    with pytest.raises(WeftError, match=named), RunLock(run):
        pass
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    refuse_if_held(run)
    with RunLock(run):
        assert Owner.read(run).process == os.getpid()  # type: ignore[union-attr]


def test_where_locks_exclude_nobody_the_record_does(
    tmp_path: Path, holder: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    monkeypatch.setattr(run_lock, "_take", lambda file: True)
    with pytest.raises(WeftError, match=f"process {holder.pid} on "):
        refuse_if_held(run)
    with pytest.raises(WeftError, match=f"process {holder.pid} on "), RunLock(run):
        pass
    monkeypatch.setattr(psutil.Process, "create_time", lambda process: 1.0)  # the clock was set since
    with pytest.raises(WeftError, match=f"process {holder.pid} on "), RunLock(run):
        pass
    holder.kill()
    holder.wait()
    with RunLock(run):
        pass


def test_a_number_that_another_process_has_now_is_not_the_owner(
    tmp_path: Path, holder: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    owner = Owner.read(run)
    assert owner
    assert owner.lives_here
    other = tmp_path / "other"
    other.mkdir()
    replace(owner, started="1").write(other)  # as after a crash, when its number was given away again
    refuse_if_held(other)
    with RunLock(other):
        pass


def test_nothing_is_left_of_a_run_that_ended(tmp_path: Path) -> None:
    run = tmp_path / "run"
    refuse_if_held(run)
    assert not run.exists()
    for _ in range(2):
        with RunLock(run):
            assert (run / OWNER).is_file()
        assert [path.name for path in run.iterdir()] == [LOCK]


def test_an_owner_on_another_machine_counts_as_dead_once_it_stands_still(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run_lock, "STILL", 0.05)
    tmp_path.joinpath(LOCK).touch()
    replace(Owner.me(), token="theirs", host="far", machine="far away").write(tmp_path)
    refuse_if_held(tmp_path)  # only who waits for it can tell
    with RunLock(tmp_path):
        assert Owner.read(tmp_path).host != "far"  # type: ignore[union-attr]
    assert "process " in capsys.readouterr().err


def test_an_owner_on_another_machine_that_goes_on_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    far = replace(Owner.me(), token="theirs", host="far", machine="far away", process=5)
    beats = iter(replace(far, beat=number) for number in range(1000))
    monkeypatch.setattr(Owner, "read", lambda run: next(beats))
    with pytest.raises(WeftError, match=f"process 5 on far trains in {tmp_path}"), RunLock(tmp_path):
        pass


@pytest.mark.parametrize("text", ["", "{", "[]", '{"process": 1}', "\x00" * 50])
def test_a_damaged_record_is_nobody(tmp_path: Path, text: str) -> None:
    (tmp_path / OWNER).write_text(text)
    with RunLock(tmp_path):
        pass


def test_a_job_that_was_queued_again_waits_for_its_predecessor(
    tmp_path: Path, holder: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    record = json.loads((run / OWNER).read_text())
    (run / OWNER).write_text(json.dumps(record | {"job": "77"}))
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    with pytest.raises(WeftError, match="trains in"), RunLock(run):  # the same start of the job: another step of it
        pass
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    refuse_if_held(run)
    monkeypatch.setattr(run_lock.time, "sleep", lambda seconds: (holder.kill(), holder.wait()))
    with RunLock(run):
        pass
    assert "queued again" in capsys.readouterr().err


def no_plain_file(path: Path, kind: str) -> None:
    path.parent.mkdir()
    os.mkfifo(path) if kind == "pipe" else path.mkdir()


@pytest.mark.parametrize("kind", ["pipe", "folder"])
def test_a_lock_that_is_no_plain_file_is_refused_without_waiting(tmp_path: Path, kind: str) -> None:
    no_plain_file(tmp_path / "run" / LOCK, kind)
    for hold in (refuse_if_held, lambda run: RunLock(run).__enter__()):
        with pytest.raises(RequestError, match=rf"{LOCK} is no plain file"):
            hold(tmp_path / "run")


def test_a_record_that_is_a_pipe_is_nobody(tmp_path: Path) -> None:
    no_plain_file(tmp_path / "run" / OWNER, "pipe")
    refuse_if_held(tmp_path / "run")
    with RunLock(tmp_path / "run"):
        pass


def test_checkpoints_that_could_not_be_written_are_found_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = tmp_path / "checkpoints"
    for make in (checkpoints.touch, lambda: checkpoints.symlink_to(tmp_path / "gone")):
        make()
        with pytest.raises(RequestError, match="checkpoints is no folder"), RunLock(tmp_path):
            pass
        checkpoints.unlink()
    checkpoints.mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: path != checkpoints)
    with pytest.raises(RequestError, match="checkpoints cannot be written"), RunLock(tmp_path):
        pass


@pytest.mark.parametrize("write", ["mkdir", "open"])
def test_a_run_folder_that_cannot_be_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: str
) -> None:
    def refuse(path: Path, *_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    lock = RunLock(tmp_path)
    monkeypatch.setattr(Path, write, refuse)
    with pytest.raises(RequestError) as caught, lock:
        pass
    assert str(caught.value) == (
        f"run.dir is {tmp_path}, and nothing can be written there (read-only file system): give another run.dir"
    )
