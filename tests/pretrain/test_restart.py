"""A job that loses a rank goes on by itself, on as many ranks or fewer, and is the run it would have been."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from jobs import RECIPE, STEPS, Job

from data_pipeline import Tokenizer
from data_pipeline.scenes.synth import synthesise
from pretrain import launch as launching
from pretrain.cli import main
from pretrain.config import Recipe, load_recipe
from pretrain.launch import SAID, _report, _word, leave_word
from pretrain.restart import NO_PROGRESS, End, Restarts, cause, fits, newest_step, next_ranks


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    synthesise(folder, train=100, test=20, size=32, sound=False, processes=1)
    return folder


# --- what is decided, in plain values

KILLED = End(2, -signal.SIGKILL)
AGAIN: dict[str, Any] = {"restarts_left": 3, "progressed": True, "smaller": [2, 3]}


@pytest.mark.parametrize(
    "end",
    [
        End(0, 2, said="train.lr is 'much'"),
        End(0, 2),  # a command line that is wrong, wherever the sentence went
        End(1, 1, said="x.tar is damaged"),
        End(0, 128 + signal.SIGTERM),
        End(0, 128 + signal.SIGINT),
        End(0, 128 + signal.SIGHUP),
        End(0, -signal.SIGTERM),  # told to stop before it could be clean about it
    ],
)
def test_what_would_end_the_same_way_or_was_wanted_is_not_started_again(end: End) -> None:
    assert next_ranks(end, 4, **AGAIN) is None


@pytest.mark.parametrize(
    "code", [1, NO_PROGRESS, 134, -signal.SIGKILL, -signal.SIGSEGV, -signal.SIGABRT, -signal.SIGBUS]
)
def test_what_may_not_happen_again_is_started_again_with_as_many_ranks(code: int) -> None:
    assert next_ranks(End(1, code), 4, **AGAIN) == 4
    assert next_ranks(End(1, code), 4, **AGAIN | {"restarts_left": 0}) is None


def test_the_last_word_of_a_rank_is_there_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place, write = tmp_path / "error.json", Path.write_text

    def cut_off(path: Path, text: str, **settings: Any) -> int:
        write(path, text[:9], **settings)
        raise OSError("ended while it wrote")

    monkeypatch.setenv(SAID, str(place))
    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", cut_off)
        leave_word("no data set at x", True)
    assert not place.exists(), "torchrun's library fails over half a file"
    leave_word("no data set at x", True)
    assert _word(place) == ("no data set at x", True)


def test_an_attempt_that_got_nowhere_is_followed_by_the_next_smaller_one() -> None:
    stuck = AGAIN | {"progressed": False}
    assert next_ranks(KILLED, 4, **stuck) == 3
    assert next_ranks(KILLED, 4, **stuck | {"smaller": [1, 2]}) == 2
    assert next_ranks(KILLED, 4, **stuck | {"smaller": []}) == 4, "where fewer are not allowed, the same again"


@pytest.mark.parametrize(
    ("ends", "rank"),
    [
        ([End(0, 1, 10), KILLED, End(3, -signal.SIGTERM, 10)], 2),
        ([End(0, 1, 10), End(1, -signal.SIGABRT, 10), End(2, -signal.SIGSEGV, 11)], 2),
        ([End(0, NO_PROGRESS, 10), End(1, 1, 10), End(2, -signal.SIGKILL, 40)], 0),  # the launcher killed 2
        ([End(0, 1, 10), End(1, 1, 10, said="a bad shard"), End(2, -signal.SIGKILL, 40)], 1),
        ([End(0, -signal.SIGTERM, 10), End(1, 1, 10)], 1),
        ([End(0, -signal.SIGTERM, 10, said="a bad shard"), End(1, 1, 10, said="a bad shard")], 1),
        ([End(0, 143, 10), End(1, 143, 10)], 0),
        ([End(3, 1, 10), End(1, 1, 12)], 3),  # who was first
    ],
)
def test_the_end_that_brought_the_others_about_is_found(ends: list[End], rank: int) -> None:
    seen_together = [End(each.rank, each.code, each.seen or 10, each.said) for each in ends]
    assert cause(seen_together).rank == rank


def test_exit_codes_are_those_of_a_shell() -> None:
    assert [End(0, code).exit_code for code in (1, 75, -9, -15)] == [1, 75, 137, 143]


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[..., Recipe]:
    settings = [f"data.train={tmp_path}", f"run.dir={tmp_path / 'run'}", *RECIPE]
    return lambda *more: load_recipe("quickstart", [*settings, *more])


def test_sizes_come_from_the_layout(recipe: Callable[..., Recipe]) -> None:
    assert [ranks for ranks in range(1, 9) if fits(recipe(), ranks)] == [1, 2, 3, 4, 6, 8]
    assert [ranks for ranks in range(1, 9) if fits(recipe("train.global_batch=16"), ranks)] == [1, 2, 4, 8]
    assert [ranks for ranks in range(1, 9) if fits(recipe("layout.tp=2"), ranks)] == [2, 4, 6, 8]


def test_restarts_are_counted_said_and_used_up(
    recipe: Callable[..., Recipe], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = iter([0, 5, 5, 5, 9])  # at the beginning, and when each attempt has ended
    monkeypatch.setattr("pretrain.restart.newest_step", lambda run: next(steps))
    again = Restarts(recipe("train.global_batch=16"), 4, restarts=3, least=1)
    assert [again([KILLED]) for _ in range(4)] == [4, 2, 1, None], "3 ranks do not divide 16"
    said = capsys.readouterr().err.splitlines()
    assert "rank 2 was killed by SIGKILL" in said[0]
    assert "restart 1 of 3 goes on from step 5 with 4 rank(s)" in said[0]
    assert "restart 2 of 3 goes on from step 5 with 2 rank(s)" in said[1]
    assert "restart 3 of 3 goes on from step 5 with 1 rank(s)" in said[2]
    assert "all 3 restart(s) are used up, the newest checkpoint is of step 9" in said[3]
    assert len(said) == 4


def test_never_fewer_ranks_than_allowed(recipe: Callable[..., Recipe], capsys: pytest.CaptureFixture[str]) -> None:
    least_three = Restarts(recipe(), 4, restarts=9, least=3)
    assert [least_three([KILLED]) for _ in range(3)] == [3, 3, 3]
    assert Restarts(recipe(), 4, restarts=9, least=4)([KILLED]) == 4
    assert capsys.readouterr().err.count("from step 0") == 4


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--nproc", "2", "--restarts", "1", "--min-nproc", "3"], "--min-nproc is 3, more than --nproc 2"),
        (["--nproc", "2", "--min-nproc", "1"], "give --restarts too"),
        (["--nproc", "2", "--restarts", "1", "train.resume=never"], "train.resume is never"),
    ],
)
def test_options_that_contradict_each_other(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, options: list[str], words: str
) -> None:
    assert main(["train", "quickstart", f"data.train={tmp_path}", *options]) == 2
    assert words in capsys.readouterr().err


# --- ranks that end with a sentence


@pytest.mark.timeout(2000)
def test_the_launcher_learns_the_sentence_of_a_rank(tmp_path: Path) -> None:
    script = """
import json, sys
from pretrain.launch import launch
code = launch(["report", sys.argv[1]], 2, lambda ends: print(json.dumps([(end.code, end.said) for end in ends])))
sys.exit(code)
"""
    command = [sys.executable, "-c", script, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 2, done.stderr
    ends = [End(rank, code, said=said) for rank, (code, said) in enumerate(json.loads(done.stdout))]
    assert str(tmp_path) in cause(ends).said
    assert {end.code for end in ends} <= {2, -signal.SIGTERM}, "the launcher may have ended the second before it spoke"
    assert len(done.stderr.splitlines()) == 1, "said once, by the first rank or for the other"


def test_a_sentence_that_only_another_rank_knows_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert _report([End(0, 1, 10), End(3, 1, 10, said="x.tar is damaged")]) == 1
    assert capsys.readouterr().err == "weft: rank 3: x.tar is damaged\n"
    # rank 0 spoke too, but only of its lost peer
    ends = [End(0, 1, 10, said="a connection was lost", lasting=False), End(1, 1, 10, said="no data set at x")]
    assert _report(ends) == 1
    assert capsys.readouterr().err == "weft: rank 1: no data set at x\n"
    assert _report([End(0, 1, 10, said="the same"), End(1, 1, 10, said="the same")]) == 1
    assert capsys.readouterr().err == "", "rank 0 has said it"


def test_a_rank_that_was_killed_is_named_unless_restarts_did(capsys: pytest.CaptureFixture[str]) -> None:
    assert _report([KILLED, End(0, 1, 0)]) == 137
    assert "rank 2 was killed by SIGKILL" in capsys.readouterr().err
    assert _report([KILLED], said=True) == 137
    assert capsys.readouterr().err == ""


def test_a_sentence_that_may_not_last_is_tried_again() -> None:
    assert next_ranks(End(1, 1, said="the connection was lost", lasting=False), 4, **AGAIN) == 4


# --- whole jobs


@pytest.fixture(scope="module")
def undisturbed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[int, int, float]]:
    with Job(data, tmp_path_factory.mktemp("undisturbed") / "run", "--nproc", "4") as job:
        assert job.wait() == 0, job.told
    found = job.losses
    assert [(step, samples) for step, samples, _ in found] == [(k, 24 * k) for k in range(1, STEPS + 1)]
    values = sorted(loss for _, _, loss in found)
    gap = min(above - below for below, above in pairwise(values))
    assert gap > 2e-6, "every step's loss is told from every other's by the tolerance below"
    return found


needs_proc = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds ranks by /proc")


@needs_proc
@pytest.mark.timeout(2000)
def test_a_killed_rank_comes_back_and_nothing_has_changed(
    data: Path, tmp_path: Path, undisturbed: list[tuple[int, int, float]]
) -> None:
    with Job(data, tmp_path / "run", "--nproc", "4", "--restarts", "2") as job:
        job.wait_until(lambda: newest_step(job.run) > 0)
        os.kill(job.rank(2), signal.SIGKILL)
        assert job.wait() == 0, job.told
    [step] = re.findall(r"rank 2 was killed by SIGKILL.*goes on from step (\d+) with 4 rank", job.told)
    assert job.starts == [(0, 4), (int(step), 4)]
    assert job.losses == undisturbed


@pytest.mark.slow
@needs_proc
@pytest.mark.timeout(2000)
def test_an_attempt_that_gets_nowhere_is_followed_by_one_on_three_ranks(
    data: Path, tmp_path: Path, undisturbed: list[tuple[int, int, float]]
) -> None:
    with Job(data, tmp_path / "run", "--nproc", "4", "--restarts", "2", "--min-nproc", "2") as job:
        job.wait_until(lambda: newest_step(job.run) > 0)
        os.kill(job.rank(3), signal.SIGKILL)
        job.wait_until(lambda: len(job.starts) == 2)  # it comes back, and dies before it has done anything
        os.kill(job.rank(1), signal.SIGKILL)
        assert job.wait() == 0, job.told
    step = job.starts[1][0]
    assert job.starts == [(0, 4), (step, 4), (step, 3)]
    assert f"restart 2 of 2 goes on from step {step} with 3 rank(s)" in job.told
    again = job.losses
    assert [line[:2] for line in again] == [line[:2] for line in undisturbed]
    assert again[:step] == undisturbed[:step]
    assert [loss for _, _, loss in again] == pytest.approx([loss for _, _, loss in undisturbed], abs=1e-6, rel=0)


@pytest.mark.timeout(2000)
def test_a_mistake_that_only_ranks_can_find_is_not_started_again(data: Path, tmp_path: Path) -> None:
    large = tmp_path / "tokenizer.json"
    Tokenizer.train([f"word{number} and other words" for number in range(500)], 400).save(large)
    options = [f"data.tokenizer={large}", "--nproc", "2", "--restarts", "3"]
    with Job(data, tmp_path / "run", *options) as job:
        assert job.wait() == 2, job.told
    assert "more than model.text.vocab_size=300" in job.told
    assert "restart" not in job.told
    assert job.starts == [(0, 2)]


@needs_proc
@pytest.mark.timeout(2000)
def test_a_rank_that_is_told_to_stop_stops_the_job_for_good(data: Path, tmp_path: Path) -> None:
    with Job(data, tmp_path / "run", "--nproc", "2", "--restarts", "3") as job:
        job.wait_until(lambda: len(job.losses) > 1)
        os.kill(job.rank(1), signal.SIGTERM)
        assert job.wait() == 143, job.told
    assert newest_step(job.run) == job.losses[-1][0]
    assert len(job.starts) == 1
    assert "--nproc 2 --restarts 3" in job.told, "the command that goes on is the one that was given"


@pytest.mark.parametrize("handler", [signal.SIG_IGN, signal.SIG_DFL])
def test_what_nohup_ignores_stays_ignored(monkeypatch: pytest.MonkeyPatch, handler: signal.Handlers) -> None:
    handled: list[bool] = []

    def attempt(*_: object) -> list[End]:
        handled.append("SIGHUP" in os.environ.get("TORCHELASTIC_SIGNALS_TO_HANDLE", "all, SIGHUP too"))
        return []

    monkeypatch.setattr(launching, "_attempt", attempt)
    monkeypatch.setattr(os, "environ", os.environ.copy())
    before = signal.signal(signal.SIGHUP, handler)
    try:
        assert launching.launch(["train"], 2) == 0
    finally:
        signal.signal(signal.SIGHUP, before)
    assert handled == [handler == signal.SIG_DFL]
