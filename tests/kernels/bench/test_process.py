"""Nothing that the suite starts outlives it, whatever ends it; and what does not die does not stop it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from kernels.bench.process import Worker, dying_with_me, interruptible

# the real worker, with a job that gives one row, starts a process of its own and then goes on for ever
WORKER = """
import json, subprocess, sys, time
from kernels.bench import worker
from kernels.bench.process import dying_with_me

def do(job, bench, order, say):
    row = {"operation": "norm", "case": "small", "pass": "forward", "group": "kernels", "own": True, "auto": True}
    yield "rows", {**row, "shape": "1", "implementation": "first", "status": "left out", "message": "a test"}
    child = subprocess.Popen(dying_with_me([sys.executable, "-c", "import time; time.sleep(600)"]))
    yield "rows", {**row, "shape": "1", "implementation": str(child.pid), "status": "left out", "message": "a test"}
    time.sleep(600)

worker.do = do
worker.main(json.loads(sys.argv[1]), int(sys.argv[2]))
"""
SAID = """'{"say": "it"}'"""
SUITE = """
import signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
from kernels.bench import suite
suite.COMMAND = (sys.executable, sys.argv[1])
suite.jobs_of = lambda *_: ["table/norm/a", "table/norm/b"]
sys.argv = ["suite", "--out", sys.argv[2]]
raise SystemExit(suite.main())
"""


def wait_until(holds: Any, seconds: float = 120.0) -> None:
    """As long as a slow machine may need; a test that gives up says so by the assertion behind it."""
    end = time.monotonic() + seconds
    while not holds() and time.monotonic() < end:
        time.sleep(0.05)


def alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


@pytest.mark.skipif(sys.platform != "linux", reason="the death of a parent is told on Linux only")
@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGKILL])
def test_no_process_outlives_the_suite_and_rows_are_kept(tmp_path: Path, sent: signal.Signals) -> None:
    """Also where it ignores INT from its start, as every command of a script in the background does."""
    (tmp_path / "worker.py").write_text(WORKER)
    path = os.pathsep.join([str(Path(__file__).parents[3]), *filter(None, [os.environ.get("PYTHONPATH")])])
    running = subprocess.Popen(
        [sys.executable, "-c", SUITE, str(tmp_path / "worker.py"), str(tmp_path / "out")],
        env=os.environ | {"PYTHONPATH": path},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )

    def rows() -> list[dict[str, Any]]:
        return [row for each in (tmp_path / "out").glob("*.json") for row in json.loads(each.read_text())["rows"]]

    try:
        wait_until(lambda: len(rows()) == 2 or running.poll() is not None)
        children = psutil.Process(running.pid).children(recursive=True)
        assert int(rows()[1]["implementation"]) in {each.pid for each in children}
        running.send_signal(sent)
        running.wait(timeout=120)
    finally:
        running.kill()
    wait_until(lambda: not any(alive(each.pid) for each in children))
    assert [each for each in children if alive(each.pid)] == []
    assert rows()[0]["implementation"] == "first"
    if sent != signal.SIGKILL:
        assert running.returncode == 130
        (results,) = (tmp_path / "out").glob("*.json")
        assert len(json.loads(results.read_text())["not_run"]) == 2


def test_a_process_that_does_not_die_is_left(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    worker = Worker([sys.executable, "-c", "pass"], tmp_path / "log")
    real = worker._process.wait

    def wait(timeout: float | None = None) -> int:
        raise subprocess.TimeoutExpired("it", timeout or 0.0)

    monkeypatch.setattr(worker._process, "wait", wait)
    assert worker.stop() is None
    real()


def test_patience_is_that_of_the_last_message(tmp_path: Path) -> None:
    """Long before the first run of an implementation, short after it."""
    script = "import time; print(SAID, flush=True); print(SAID, flush=True); time.sleep(600)".replace("SAID", SAID)
    worker = Worker([sys.executable, "-c", script], tmp_path / "log")
    messages = worker.messages(300.0, time.time() + 600)
    assert [next(messages), next(messages)] == [{"say": "it"}] * 2
    worker.patience = 0.1
    with pytest.raises(TimeoutError, match="no answer for 0 s"):
        next(messages)
    assert worker.stop() == -signal.SIGKILL


def test_what_a_library_prints_is_no_message(tmp_path: Path) -> None:
    lines = ["a banner", "12", "[]", "null", '{"no": "say"}', '{"say": "it"}', "\\xff", '{"say": "cut o']
    worker = Worker(["printf", "\\n".join(lines)], tmp_path / "log")
    assert list(worker.messages(600.0, time.time() + 1200)) == [{"say": "it"}]
    assert worker.stop() == 0
    assert (tmp_path / "log").read_bytes().split(b"\n")[:5] == [each.encode() for each in lines[:5]]


def test_a_death_is_seen_though_a_child_holds_the_pipe(tmp_path: Path) -> None:
    """As after a fork without exec (pytorch#189290): the end of the pipe never comes."""
    script = "import os, time; print(SAID, flush=True); os.fork() or time.sleep(600)".replace("SAID", SAID)
    worker = Worker([sys.executable, "-c", script], tmp_path / "log")
    assert list(worker.messages(600.0, time.time() + 1200)) == [{"say": "it"}]
    assert worker.stop() == 0


def test_a_command_that_dies_with_me_is_that_command() -> None:
    done = subprocess.run(dying_with_me(["printf", "%s", "all the same"]), capture_output=True, text=True, check=True)
    assert done.stdout == "all the same"


def test_a_hangup_that_is_ignored_stays_so() -> None:
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with interruptible():
            os.kill(os.getpid(), signal.SIGHUP)
            with pytest.raises(KeyboardInterrupt, match="SIGTERM"):
                os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGHUP, before)
