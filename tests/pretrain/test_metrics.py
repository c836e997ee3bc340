"""The files a run grows: one object a logged step, cut back on resume, whole after a crash; and the clock."""

from __future__ import annotations

import errno
import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pretrain.metrics import (
    EVALUATION,
    EXAMPLES,
    METRICS,
    Clock,
    ProgressLine,
    RunLog,
    WaitHint,
    duration,
    peak_memory_gib,
    read_lines,
)


def line(step: int, **more: Any) -> dict[str, Any]:
    return {"step": step, "samples": step * 24, "loss": 1 / step, "samples_per_s": 12.5, "data_wait": 0.25, **more}


def write_steps(run: Path, resumed: int, steps: range, loss: float = 0.0) -> None:
    with RunLog(run, resumed) as log:
        for step in steps:
            log.step(line(step, loss=loss + step, mfu=None, time=1e9))
            if step % 4 == 0:
                log.evaluation({"step": step, "retrieval": {"r1": step / 100, "nested": {"deep": 2}}, "note": "words"})


def test_a_line_is_one_object_and_is_on_disk_at_once(tmp_path: Path) -> None:
    with RunLog(tmp_path, 0) as log:
        log.step(line(1))
        log.evaluation({"step": 1, "r1": 0.5})
        assert read_lines(tmp_path / METRICS) == [line(1)]
        assert read_lines(tmp_path / EVALUATION) == [{"step": 1, "r1": 0.5}]
        log.step(line(2, mfu=None))
    text = (tmp_path / METRICS).read_text()
    assert [json.loads(each) for each in text.splitlines()] == [line(1), line(2, mfu=None)]
    assert text.endswith("\n")


def test_a_resumed_run_has_each_step_once(tmp_path: Path) -> None:
    write_steps(tmp_path, 0, range(1, 12))
    write_steps(tmp_path, 6, range(7, 15), loss=1000)
    steps = [(each["step"], each["loss"]) for each in read_lines(tmp_path / METRICS)]
    assert steps == [(step, step) for step in range(1, 7)] + [(step, 1000 + step) for step in range(7, 15)]
    assert [each["step"] for each in read_lines(tmp_path / EVALUATION)] == [4, 8, 12]


def test_a_run_from_the_beginning_keeps_nothing_of_one_that_left_no_checkpoint(tmp_path: Path) -> None:
    write_steps(tmp_path, 0, range(1, 9))
    write_steps(tmp_path, 0, range(1, 3), loss=50)
    assert [each["loss"] for each in read_lines(tmp_path / METRICS)] == [51, 52]
    assert read_lines(tmp_path / EVALUATION) == []


@pytest.mark.parametrize("cut", [1, 2, 10, 40])
def test_a_last_line_cut_short_is_left_out_and_overwritten(tmp_path: Path, cut: int) -> None:
    write_steps(tmp_path, 0, range(1, 6))
    path = tmp_path / METRICS
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    kept = [1, 2, 3, 4, 5] if cut == 1 else [1, 2, 3, 4]  # without its newline alone, a line still is an object
    assert [each["step"] for each in read_lines(path)] == kept
    write_steps(tmp_path, 5, range(6, 8))
    assert [each["step"] for each in read_lines(path)] == [*kept, 6, 7]
    assert all(json.loads(each) for each in path.read_text().splitlines())


def test_examples_go_with_the_evaluation_they_are_of(tmp_path: Path) -> None:
    for resumed, kept in ((11, True), (8, True), (6, False), (0, False)):
        write_steps(tmp_path, 0, range(1, 12))  # evaluations at 4 and 8
        (tmp_path / EXAMPLES).write_text("[]")
        write_steps(tmp_path, resumed, range(0))
        assert (tmp_path / EXAMPLES).exists() == kept, resumed


def test_no_file_is_no_lines(tmp_path: Path) -> None:
    assert read_lines(tmp_path / METRICS) == []
    (tmp_path / METRICS).touch()
    assert read_lines(tmp_path / METRICS) == []


def test_tensorboard_shows_numbers_and_forgets_what_was_cut_back(tmp_path: Path) -> None:
    write_steps(tmp_path, 0, range(1, 10))
    write_steps(tmp_path, 4, range(5, 7), loss=1000)
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    tags = board.Tags()["scalars"]
    assert {"train/loss", "train/data_wait", "evaluation/retrieval/r1", "evaluation/retrieval/nested/deep"} <= set(tags)
    assert not {"train/step", "train/time", "train/mfu", "evaluation/note", "evaluation/step"} & set(tags)
    losses = [(event.step, event.value) for event in board.Scalars("train/loss")]
    assert losses == [(1, 1), (2, 2), (3, 3), (4, 4), (5, 1005), (6, 1006)]
    assert [event.step for event in board.Scalars("evaluation/retrieval/r1")] == [4]


# --- the clock


@pytest.fixture
def clock_at(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that the clock reads; tests set its only element."""
    now = [1000.0]
    monkeypatch.setattr("pretrain.metrics.time.perf_counter", lambda: now[0])
    return now


def test_a_lap_is_seconds_a_step_and_the_share_of_waiting(clock_at: list[float]) -> None:
    clock = Clock()
    for _ in range(4):
        clock.waited(0.5)
        clock.computed(20)
    clock_at[0] += 8
    assert clock.lap() == pytest.approx((2.0, 0.25, 10.0))
    clock.waited(0.0)
    clock_at[0] += 3
    assert clock.lap() == pytest.approx((3.0, 0.0, 0.0)), "nothing of the lap before is left"


def test_what_was_not_training_is_taken_out(clock_at: list[float]) -> None:
    clock = Clock()
    clock.waited(1.0)
    clock_at[0] += 100
    clock.pause(90)  # an evaluation
    assert clock.lap() == pytest.approx((10.0, 0.1, 0.0))
    assert clock.began == 1000.0, "the whole run's time has everything in it"


def test_a_lap_without_time_or_steps_divides_by_nothing(clock_at: list[float]) -> None:
    seconds, *others = Clock().lap()
    assert seconds > 0
    assert others == [0, 0]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (12.4, "12 s"),
        (59.6, "1 min 00 s"),
        (60, "1 min 00 s"),
        (200, "3 min 20 s"),
        (3599.7, "1 h 00 min"),
        (7500, "2 h 05 min"),
        (360_000, "100 h 00 min"),
    ],
)
def test_durations_are_read_at_a_glance(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_the_progress_line_says_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    for live in (False, True):
        stream = io.StringIO()
        stream.isatty = lambda live=live: live  # type: ignore[method-assign, misc]  # a terminal, or none
        monkeypatch.setattr(sys, "stderr", stream)
        progress = ProgressLine(60, 25)
        progress.show(line(10, loss=1.23456))
        progress.say("[red]saved[/red] to [x]")
        shown = stream.getvalue()
        assert "step 10/60  loss 1.2346  12 samples/s  data wait 25%  ETA 1 min 40 s" in shown
        assert "[red]saved[/red] to [x]" in shown, "what a user names is no markup"
        assert ("\r" in shown) == live


def test_a_terminal_that_was_closed_does_not_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(sys, "stderr", Closed())
    progress = ProgressLine(60, 25)
    progress.show(line(10))
    progress.say("saved")


def test_peak_memory_is_at_least_what_is_held() -> None:
    held = torch.ones(40_000_000)
    assert 0.14 < peak_memory_gib(torch.device("cpu")) < 64
    assert held[-1] == 1


@pytest.mark.parametrize(
    ("loader", "workers", "words"),
    [
        ("inprocess", 1, "raise data.workers from 1 to at most 4"),
        ("inprocess", 4, "data.loader=ray"),
        ("ray", 2, "most_workers"),
    ],
)
def test_a_run_that_waits_for_data_is_told_once_what_to_change(loader: str, workers: int, words: str) -> None:
    hint = WaitHint(loader, workers, ranks=2, cores=8)
    assert [hint.look(share) for share in (0.5, 0.1, 0.5, 0.5)] == [""] * 4
    said = hint.look(0.5)
    assert said.startswith("training waits for data 50% of its time: ")
    assert words in said
    assert hint.look(0.5) == ""
