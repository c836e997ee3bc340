"""compute-sanitizer: its command line, its end, and what is read from its report. The tool itself is a script here."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

import kernels
from kernels.bench import sanitize

CLEAN = """
echo "ran attention triton on full"
echo "========= ERROR SUMMARY: 0 errors"
"""


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A compute-sanitizer on PATH that logs how it was called; a test appends what it does then."""
    script = tmp_path / "compute-sanitizer"
    script.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\nenv > {tmp_path}/environment\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    return script


def add(tool: Path, lines: str) -> None:
    tool.write_text(tool.read_text() + lines)


def test_one_process_a_tool(tool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    add(tool, CLEAN)
    found = list(sanitize.rows(60))
    assert [(row["tool"], row["status"], row["errors"]) for row in found] == [
        ("memcheck", "ok", 0),
        ("racecheck", "ok", 0),
    ]
    calls = (tmp_path / "calls").read_text().splitlines()
    assert [call.split()[:2] for call in calls] == [["--tool", "memcheck"], ["--tool", "racecheck"]]
    for call in calls:
        assert "--launch-timeout 0 " in call
        assert "--kernel-name kns=attention_ " in call
        assert call.endswith(f" {sys.executable} -m kernels.bench.sanitize")
    environment = (tmp_path / "environment").read_text()
    assert "PYTORCH_NO_CUDA_MEMORY_CACHING=1" in environment
    assert "expandable_segments" not in environment


def test_a_row_comes_when_its_tool_has_ended(tool: Path, tmp_path: Path) -> None:
    add(tool, CLEAN)
    assert next(sanitize.rows(60))["tool"] == "memcheck"
    assert len((tmp_path / "calls").read_text().splitlines()) == 1


def test_at_the_limit_all_of_it_is_killed(tool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add(tool, f'echo "ran attention triton on full"\nsleep 300 &\necho $! $$ > {tmp_path}/pids\nwait\n')

    class LimitedWhenItRuns(subprocess.Popen[bytes]):
        def wait(self, timeout: float | None = None) -> int:
            if not (tmp_path / "limit").exists():
                wait_for(lambda: (tmp_path / "pids").exists() and (tmp_path / "pids").read_text())
                (tmp_path / "limit").touch()
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            return super().wait(timeout)

    monkeypatch.setattr(sanitize.subprocess, "Popen", LimitedWhenItRuns)
    memory = next(sanitize.rows(60))
    assert memory["message"] == "not done after 60 s"
    assert memory["ran"] == ["attention triton on full"]
    for pid in (tmp_path / "pids").read_text().split():
        wait_for(lambda pid=pid: not running(int(pid)))


def test_the_tool_dies_with_its_caller(tool: Path, tmp_path: Path) -> None:
    add(tool, f"echo $$ > {tmp_path}/pids\nexec sleep 300\n")
    ask = "from kernels.bench import sanitize; list(sanitize.rows(300))"
    caller = subprocess.Popen([sys.executable, "-c", ask], cwd=Path(kernels.__file__).parents[1])
    try:
        written = wait_for(lambda: (tmp_path / "pids").exists() and (tmp_path / "pids").read_text())
    finally:
        caller.kill()
        caller.wait()
    wait_for(lambda: not running(int(written)))


def test_python_leaves_with_the_tool(tmp_path: Path) -> None:
    """Also where the tool has put it into a session of its own, which no signal to the tool's group reaches."""
    inner = "import time; from kernels.bench import sanitize; sanitize.leave_with_parent(); print('up', flush=True)"
    outer = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]], start_new_session=True)"
    command = [sys.executable, "-c", outer, inner + "; time.sleep(300)"]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(kernels.__file__).parents[1])
    assert parent.stdout is not None
    assert parent.stdout.readline() == b"up\n"
    (child,) = psutil.Process(parent.pid).children()
    parent.kill()
    parent.wait()
    wait_for(lambda: not running(child.pid))


def test_where_the_tool_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    script = tmp_path / "cuda" / "extras" / "compute-sanitizer" / "compute-sanitizer"
    script.parent.mkdir(parents=True)
    script.write_text("#!/bin/sh\n")
    script.chmod(0o755)
    assert sanitize.find() == str(script)
    monkeypatch.setattr(sanitize, "find", lambda: None)
    (row,) = sanitize.rows(60)
    assert row["status"] == "missing"


def test_no_time_is_said(tool: Path) -> None:
    assert [row["message"] for row in sanitize.rows(-1.0)] == ["not run: no time was left"] * 2


def test_every_operation_has_a_check_to_run() -> None:
    for module, function in sanitize.OPERATIONS.items():
        checks = importlib.import_module(f"kernels.bench.{module}").checks(torch.device("cuda"))
        assert function in {check.operation.function for check in checks}


def test_the_filters_name_every_kernel_of_the_operations() -> None:
    """A kernel that no filter names would run unseen, and be reported as free of errors."""
    files = [
        path
        for start in ("attention_[fbg]", "contrastive_tiles", "linear_cross_entropy")
        for path in (Path(kernels.__file__).parent / "gpu").glob(f"{start}*.py")
    ]
    names = {name for path in files for name in re.findall(r"^def (\w+_kernel)\(", path.read_text(), re.MULTILINE)}
    names -= {"sigmoid_kernel"}  # of a loss that is not run
    assert len(names) >= 9
    assert all(any(part in name for part in sanitize.KERNELS) for name in names)


@pytest.mark.parametrize(
    ("report", "code", "row"),
    [
        ("ran a on x\n========= ERROR SUMMARY: 0 errors\n", 0, {"status": "ok", "errors": 0, "ran": ["a on x"]}),
        (
            "ran a on x\n========= Invalid __global__ read of size 2 bytes\n========= ERROR SUMMARY: 3 errors\n",
            1,
            {"status": "ok", "errors": 3, "first": "Invalid __global__ read of size 2 bytes", "ran": ["a on x"]},
        ),
        (
            "ran a on x\n========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n",
            0,
            {"status": "ok", "errors": 0, "ran": ["a on x"]},
        ),
        (
            "ran a on x\n========= RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)\n",
            0,
            {"status": "ok", "errors": 2, "ran": ["a on x"]},
        ),
        ("========= ERROR SUMMARY: 0 errors\n", 0, {"status": "error", "message": "it printed nothing", "ran": []}),
        ("", 0, {"status": "error", "message": "it printed nothing", "ran": []}),
        (
            "ran a on x\nRuntimeError: out of luck\n========= ERROR SUMMARY: 0 errors\n",
            1,
            {"status": "error", "message": "RuntimeError: out of luck", "ran": ["a on x"]},
        ),
    ],
    ids=["clean", "errors", "no races", "races", "no kernel ran", "nothing", "the program failed"],
)
def test_reports(report: str, code: int, row: dict[str, object]) -> None:
    assert sanitize.read(report, code) == row


def running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_for(condition: Callable[[], Any]) -> Any:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.1)
    raise AssertionError("it did not happen")
