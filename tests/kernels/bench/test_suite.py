"""The suite with a worker that is told what to do: a death, a hang, an interruption; and once for real."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kernels.bench import process, suite
from pretrain.cli import main

WORKER = """
import json, os, sys, time
order = json.loads(sys.argv[1])
def say(**message): print(json.dumps(message), flush=True)
def row(name, **more):
    return {{"operation": "norm", "case": "small", "pass": "forward", "implementation": name, "group": "kernels",
            "own": True, "auto": True, "shape": "1", "target": None, **more}}
times = {{"seconds": 1e-3, "low": 1e-3, "high": 1e-3, "n": 5, "extra_bytes": 4}}
for job in order["jobs"]:
    say(say="begin", job=job)
    if job == "ceilings":
        rates = {{"bytes_per_second": 1e10, "flops_per_second": 1e11, "product": "p"}}
        say(say="facts", section="ceilings", facts=rates)
    elif job.startswith("table"):
        assert order["ceilings"] or order["jobs"][0] == "ceilings", "a second process knows them too"
        say(say="row", job=job, section="rows", row=row("first", status="ok", **times))
        if "kernels second" not in order["skip"].get("norm", {{}}):
            say(say="started", job=job, section="rows", row=row("second", status="error"), first=True)
            print("what the library said", file=sys.stderr, flush=True)
            {end}
        else:
            why = order["skip"]["norm"]["kernels second"]
            say(say="row", job=job, section="rows", row=row("second", status="left out", message=why))
        say(say="row", job=job, section="rows", row=row("third", status="ok", **times))
    say(say="end", job=job)
"""
JOBS = ["ceilings", "table/norm/a", "table/norm/b", "table/norm/c"]


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(suite, "jobs_of", lambda *_: list(JOBS))
    return tmp_path


def use_worker(monkeypatch: pytest.MonkeyPatch, folder: Path, end: str) -> None:
    script = folder / "worker.py"
    script.write_text(WORKER.format(end=end))
    monkeypatch.setattr(suite, "COMMAND", (sys.executable, str(script)))


@pytest.mark.parametrize(
    ("end", "why"), [("os._exit(3)", "the process died (exit code 3)"), ("time.sleep(60)", "no answer for 15 s")]
)
def test_a_death_or_a_hang_costs_one_row_and_one_silence(
    monkeypatch: pytest.MonkeyPatch, told: Path, end: str, why: str
) -> None:
    use_worker(monkeypatch, told, end)
    lines: list[str] = []
    path = suite.run(told / "out", silence=15.0, show=lines.append)
    results = json.loads(path.read_text())
    found = [(row["job"], row["implementation"], row["status"]) for row in results["rows"]]
    expected = {(job, "second"): "left out" for job in JOBS[2:]} | {("table/norm/a", "second"): "error"}
    expected |= {(job, name): "ok" for job in JOBS[1:] for name in ("first", "third")}
    assert {(job, name): status for job, name, status in found} == expected
    assert len(found) == len(expected)  # what a killed process had told of its job is not there twice
    assert all(why in row["message"] for row in results["rows"] if row["status"] == "error")
    told = {row["message"] for row in results["rows"] if row["status"] == "left out"}
    assert told == {"it ended the process of table/norm/a"}
    assert not suite.holds(results)
    assert results["ceilings"]["product"] == "p"
    assert results["verdicts"][0]["ours"] in ("first", "third")
    assert path.with_suffix(".log").read_text().count("what the library said") == 1
    assert any(why in line for line in lines)


def test_a_run_that_is_cut_off_leaves_what_it_has(monkeypatch: pytest.MonkeyPatch, told: Path) -> None:
    use_worker(monkeypatch, told, "pass")

    def interrupt(line: str) -> None:
        if " third " in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        suite.run(told / "out", show=interrupt)
    results = json.loads(next((told / "out").glob("*.json")).read_text())
    assert [row["implementation"] for row in results["rows"]] == ["first", "third"]
    assert {row["job"]: row["why"] for row in results["not_run"]} == dict.fromkeys(JOBS[1:], "interrupted")


def interrupt_at(text: str) -> Callable[[str], None]:
    def show(line: str) -> None:
        if text in line:
            raise KeyboardInterrupt

    return show


def named(path: Path, section: str = "rows") -> list[tuple[str, str]]:
    return sorted((row["job"], row.get("implementation", "")) for row in json.loads(path.read_text())[section])


def test_what_is_not_measured_again_is_kept(monkeypatch: pytest.MonkeyPatch, told: Path) -> None:
    """A second run that is cut off at once, or has no time, takes nothing from the first."""
    use_worker(monkeypatch, told, "pass")
    path = suite.run(told / "out", show=lambda line: None)
    before = named(path)
    with pytest.raises(KeyboardInterrupt):
        suite.run(told / "out", show=interrupt_at(" first "))
    assert named(path) == before
    assert named(path, "not_run") == [("table/norm/a", "")]  # which it was in
    (told / "worker.py").write_text((told / "worker.py").read_text().replace('row("', 'row("new '))
    suite.run(told / "out", show=lambda line: None)
    assert named(path) == sorted((job, f"new {name}") for job in JOBS[1:] for name in ("first", "third"))
    assert named(path, "not_run") == []


def test_a_second_try_keeps_the_rows_of_the_first(monkeypatch: pytest.MonkeyPatch, told: Path) -> None:
    use_worker(monkeypatch, told, "os._exit(3)")
    with pytest.raises(KeyboardInterrupt):
        suite.run(told / "out", show=interrupt_at("died (exit code 3)"))
    (path,) = (told / "out").glob("*.json")
    assert named(path) == [("table/norm/a", "first"), ("table/norm/a", "second")]


@pytest.mark.parametrize("before", ['{"machine": {"ca', "[1]", '{"machine": {}}', "", "another"])
def test_a_file_that_cannot_be_added_to_is_kept(monkeypatch: pytest.MonkeyPatch, told: Path, before: str) -> None:
    use_worker(monkeypatch, told, "pass")
    path = suite.run(told / "out", show=lambda line: None)
    if before == "another":
        before = path.read_text().replace(f'"torch": "{torch.__version__}"', '"torch": "another"')
        assert '"torch": "another"' in before
    lines: list[str] = []
    for number in (1, 2):
        path.write_text(before)
        assert suite.run(told / "out", show=lines.append) == path
        kept = path.with_name(f"{path.name}.{number}")
        assert kept.read_text() == before
        assert any(f"{kept} is kept" in line for line in lines)
        assert len(named(path)) == 6


def test_results_of_before_a_section_was_are_added_to(monkeypatch: pytest.MonkeyPatch, told: Path) -> None:
    use_worker(monkeypatch, told, "pass")
    path = suite.run(told / "out", show=lambda line: None)
    older = json.loads(path.read_text())
    del older["failures"], older["not_run"], older["step"]
    path.write_text(json.dumps(older))
    monkeypatch.setattr(suite, "jobs_of", lambda *_: ["ceilings", "table/norm/d"])
    results = json.loads(suite.run(told / "out", show=lambda line: None).read_text())
    assert len(results["rows"]) == 8
    assert suite.holds(results)


def test_two_runs_do_not_write_one_file(monkeypatch: pytest.MonkeyPatch, told: Path) -> None:
    use_worker(monkeypatch, told, "pass")
    refused: list[str] = []

    def show(line: str) -> None:
        if " first " in line and not refused:
            with pytest.raises(ValueError, match="is being written by another run"):
                suite.run(told / "out", show=lambda line: None)
            refused.append(line)

    path = suite.run(told / "out", show=show)
    assert refused
    assert suite.run(told / "out", show=lambda line: None) == path
    assert len(named(path)) == 6


def test_a_second_signal_does_not_cut_off_the_last_write(monkeypatch: pytest.MonkeyPatch, told: Path) -> None:
    use_worker(monkeypatch, told, "pass")
    not_run = suite.Record.not_run

    def signalled(record: suite.Record, jobs: list[str], why: str) -> None:
        for each in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            os.kill(os.getpid(), each)
        not_run(record, jobs, why)

    monkeypatch.setattr(suite.Record, "not_run", signalled)
    with pytest.raises(KeyboardInterrupt, match="SIGHUP"):
        suite.run(told / "out", show=lambda line: os.kill(os.getpid(), signal.SIGHUP) if " first " in line else None)
    (path,) = (told / "out").glob("*.json")
    assert named(path, "not_run") == [(job, "") for job in JOBS[1:]]


@pytest.mark.parametrize("minutes", ["0", "-1", "nan"])
def test_minutes_that_are_none_are_a_wrong_request(
    monkeypatch: pytest.MonkeyPatch, told: Path, capsys: pytest.CaptureFixture[str], minutes: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["suite", "--out", str(told), f"--minutes={minutes}"])
    with pytest.raises(SystemExit) as ended:
        suite.main()
    assert ended.value.code == 2
    assert f"--minutes {minutes}: must be above 0" in capsys.readouterr().err
    assert main(["bench", "kernels", f"--minutes={minutes}", "--out", str(told)]) == 2
    assert not list(told.glob("*.json"))


def test_a_folder_that_is_a_file_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, told: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (told / "out").touch()
    monkeypatch.setattr(sys, "argv", ["suite", "--out", str(told / "out")])
    assert suite.main() == 1
    assert "the results cannot be written" in capsys.readouterr().err


def test_a_worker_that_does_not_start_is_an_error(monkeypatch: pytest.MonkeyPatch, told: Path) -> None:
    monkeypatch.setattr(suite, "COMMAND", (sys.executable, "-c", "raise SystemExit(5)"))
    with pytest.raises(RuntimeError, match="exit code 5"):
        suite.run(told, show=lambda line: None)
    (path,) = told.glob("*.json")
    assert named(path, "not_run") == sorted((job, "") for job in JOBS)


def test_the_command_prints_json(
    monkeypatch: pytest.MonkeyPatch, told: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    use_worker(monkeypatch, told, "pass")
    assert main(["bench", "kernels", "--json", "--quick", "--out", str(told / "out")]) == 0
    printed = capsys.readouterr()
    assert [row["implementation"] for row in json.loads(printed.out)["rows"]] == ["first", "third"] * 3
    assert "results in" in printed.err
    assert main(["bench", "kernels", "--quick", "--out", str(told / "out")]) == 0
    assert "| norm: small |" in capsys.readouterr().out


def test_an_unknown_operation_is_a_wrong_request(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["bench", "kernels", "--only", "norms", "--out", str(tmp_path)]) == 2
    assert "--only norms: choose among contrastive, attention" in capsys.readouterr().err


def test_the_real_worker(tmp_path: Path) -> None:
    """All of one operation on CPU: nothing fails, and what is measured has figures."""
    path = suite.run(tmp_path, ["activation"], quick=True, show=lambda line: None)
    results = json.loads(path.read_text())
    assert not results["failures"]
    assert not results["not_run"]
    assert suite.holds(results)
    assert {row["status"] for row in results["checks"]} <= {"ok", "refused"}
    assert {row["operation"] for row in results["rows"] if row["status"] == "ok"} == {"bias_gelu", "swiglu", "rotary"}
    assert results["ceilings"]["bytes_per_second"] > 0
    assert results["machine"]["quick"] is True
    assert list(tmp_path.glob("*.part")) == []


def test_a_later_run_of_the_day_adds_its_rows(monkeypatch: pytest.MonkeyPatch, told: Path) -> None:
    use_worker(monkeypatch, told, "pass")
    first = json.loads(suite.run(told / "out", ["norm"], show=lambda line: None).read_text())
    monkeypatch.setattr(suite, "jobs_of", lambda *_: ["ceilings", "table/norm/b", "table/norm/d"])
    path = suite.run(told / "out", ["activation"], show=lambda line: None)
    results = json.loads(path.read_text())
    jobs = [row["job"] for row in results["rows"]]
    assert {job: jobs.count(job) for job in jobs} == {f"table/norm/{each}": 2 for each in "abcd"}
    assert results["machine"]["command"].count("--only") == 2
    assert results["seconds"] >= first["seconds"]
    assert results["machine"]["date"] == first["machine"]["date"]
    monkeypatch.setattr(suite, "describe", lambda *_: {**first["machine"], "torch": "another"})
    alone = json.loads(suite.run(told / "out", show=lambda line: None).read_text())
    assert {row["job"] for row in alone["rows"]} == {"table/norm/b", "table/norm/d"}


def test_numbers_of_ours_that_are_wrong_are_an_error() -> None:
    blank = {"checks": [], "rows": [], "step": [], "sanitizer": [], "failures": []}
    assert suite.holds(blank)
    for section, row in (
        ("rows", {"group": "kernels", "status": "wrong"}),
        ("rows", {"group": "kernels", "status": "error"}),
        ("step", {"status": "wrong"}),
        ("checks", {"status": "error", "passed": False}),
        ("sanitizer", {"status": "ok", "errors": 3}),
        ("failures", {}),
    ):
        assert not suite.holds({**blank, section: [row]})
    for row in ({"group": "peer", "status": "wrong"}, {"group": "kernels", "status": "left out"}):
        assert suite.holds({**blank, "rows": [row]})


def test_the_time_of_the_whole_run_ends_it(monkeypatch: pytest.MonkeyPatch, told: Path) -> None:
    """A job that takes for ever, and says so, is ended with its rows kept."""
    use_worker(
        monkeypatch,
        told,
        'say(say="row", job=job, section="rows", row=row("x", status="ok", **times)); time.sleep(600)',
    )
    monkeypatch.setattr(suite, "GRACE", 0.0)
    lines: list[str] = []

    def show(line: str) -> None:
        lines.append(line)
        if " x " in line:
            ended.append(True)

    ended: list[bool] = []
    real = time.time
    monkeypatch.setattr(process.time, "time", lambda: real() + 1e6 * bool(ended))  # from that row on it is over
    results = json.loads(suite.run(told / "out", show=show).read_text())
    assert [row["implementation"] for row in results["rows"]] == ["first", "x"]
    assert {row["job"]: row["why"] for row in results["not_run"]} == dict.fromkeys(JOBS[1:], "the time was over")
    assert "the time is over" in lines
