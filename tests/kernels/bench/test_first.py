"""First contact: order, limits, and what is left. The suite is a module of this file here."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

import kernels
from kernels.bench import first
from kernels.bench.first import Part
from pretrain.config import load_recipe

# a suite that takes its time to end, with a worker in a session of its own
SUITE = """
import os, pathlib, subprocess, sys, time
out, name, end = pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3]
(out / f"{name}.rows").write_text(str(os.getpid()))
if end == "hang":
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"], start_new_session=True)
    (out / "draft").write_text(str(child.pid))
    (out / "draft").replace(out / "pid")
    time.sleep(300)
"""


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "suite_of_a_test.py").write_text(SUITE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path / "out"


def part(name: str, seconds: float = 60.0, end: str = "") -> Part:
    return Part(name, seconds, ("suite_of_a_test", "{out}", name, end))


def test_what_has_been_done_is_not_done_again(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts = [part("losses"), part("attention")]
    first.run(out, 10, parts)
    assert {each.name for each in out.iterdir()} == {f"{each.name}.{end}" for each in parts for end in ("rows", "done")}
    assert capsys.readouterr().out.count("exit code 0") == 2
    (out / "losses.done").unlink()
    first.run(out, 10, parts)
    told = capsys.readouterr().out
    assert told.count("done before") == told.count("exit code 0") == 1


def test_a_part_that_hangs_ends_with_all_that_it_started(
    out: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class LimitedWhenItRuns(subprocess.Popen[bytes]):
        def wait(self, timeout: float | None = None) -> int:
            if timeout == 60.0 and part_hangs.command(out, 60.0) == self.args[3:]:  # behind what ends it with us
                wait_for(out / "pid")
                raise subprocess.TimeoutExpired(self.args, timeout)
            return super().wait(timeout)

    part_hangs = part("losses", 60, "hang")
    monkeypatch.setattr(first.subprocess, "Popen", LimitedWhenItRuns)
    first.run(out, 10, [part_hangs, part("attention")])
    told = capsys.readouterr().out
    assert "== losses: not done after 60 s; exit code" in told
    assert "1 process(es) that were left are killed" in told
    assert gone(int((out / "pid").read_text()))
    assert "== attention: exit code 0" in told


def test_what_no_time_is_left_for_is_not_begun(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first.run(out, 0.5, [part("attention", 100), part("losses", 20)])
    told = capsys.readouterr().out
    assert "== attention: not run, no time was left" in told
    assert {each.name for each in out.iterdir()} == {"losses.rows", "losses.done"}


@pytest.mark.parametrize("sent", [[signal.SIGTERM], [signal.SIGTERM, signal.SIGINT], [signal.SIGHUP], [signal.SIGKILL]])
def test_a_signal_ends_the_part(out: Path, sent: list[signal.Signals]) -> None:
    """And a second one, which comes while the part is ended, changes nothing."""
    code = f"""
import pathlib, sys
from kernels.bench import first
words = ("suite_of_a_test", "{{out}}", "losses", "hang")
first.PARTS = [first.Part("losses", 300, words)]
first.run.__defaults__ = (first.PARTS,)
sys.argv = ["first", "--out", {str(out)!r}, "--minutes", "10"]
raise SystemExit(first.main())
"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=Path(kernels.__file__).parents[1])
    wait_for(out / "pid")
    process.send_signal(sent[0])
    while len(sent) > 1 and not gone(int((out / "pid").read_text())) and process.poll() is None:
        process.send_signal(sent[1])
        time.sleep(0.02)
    assert process.wait(120) == (130 if sent[0] != signal.SIGKILL else -signal.SIGKILL)
    end = time.monotonic() + 60
    while not gone(int((out / "losses.rows").read_text())):
        assert time.monotonic() < end
        time.sleep(0.1)
    if sent[0] == signal.SIGKILL:  # which this stand-in for a suite does not tell its own child, as a suite would
        os.kill(int((out / "pid").read_text()), signal.SIGKILL)
    else:
        assert gone(int((out / "pid").read_text()))


def test_the_parts() -> None:
    """What is worth most comes first; one command of ten minutes reaches the step, two do all."""
    names = [each.name for each in first.PARTS]
    assert names.index("losses") < names.index("step") < names.index("gluon") < names.index("sanitizer")
    assert sum(each.seconds for each in first.PARTS[: names.index("train")]) <= 9.5 * 60
    assert sum(each.seconds for each in first.PARTS) <= 13.5 * 60
    command = first.PARTS[0].command(Path("there"), 150)
    assert command[1:3] == ["-m", "kernels.bench.suite"]
    assert command[-4:] == ["--minutes", "2.08", "--out", "there"]


def test_the_trainer_gets_a_recipe_that_it_accepts() -> None:
    words = {each.name: [word for word in each.command(Path("there"), 75)[3:] if "=" in word] for each in first.PARTS}
    for name, recipe in (("train", "quickstart"), ("plain", "vit_l_14")):
        assert load_recipe(recipe, [*words[name], "run.device=cpu"]).train.precision == "bf16"


def test_the_commands_of_the_readme_are_those_of_the_parts() -> None:
    readme = (Path(first.__file__).parent / "README.md").read_text()
    for part in first.PARTS:
        row = next(line for line in readme.splitlines() if line.startswith(f"| {part.name} "))
        assert f"| {part.seconds:.0f} |" in row
        if "kernels.bench.suite" in part.words:
            words = part.command(Path("runs/first"), part.seconds)
            assert " ".join(words[words.index("--only") :]) in row


def wait_for(path: Path) -> None:
    end = time.monotonic() + 120
    while not path.exists():
        assert time.monotonic() < end
        time.sleep(0.1)


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
