"""A run that stands still says which rank waits for whom, with stacks, and ends so that it can be started again."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

import pytest
from jobs import Job
from ranks import RanksError, run_ranks

from data_pipeline.scenes.synth import synthesise
from pretrain.job import ranks_in_words
from pretrain.parallel.groups import TIMEOUT
from pretrain.restart import NO_PROGRESS, newest_step
from pretrain.watchdog import PHASES, SLOW, TABLE, Standing, collective_timeout, table

FORWARD = "forward and backward"
SOURCE = Path(__file__).read_text().splitlines()


# --- the words


def test_the_rank_that_is_behind_is_waited_for() -> None:
    told = [
        Standing(0, FORWARD, 17, 310.2),
        Standing(1, FORWARD, 17, 309.0),
        Standing(2, "data", 17, 312.4),
        Standing(3, FORWARD, 17, 311.0),
    ]
    assert table(told, 4).splitlines() == [
        "weft: no progress for 312 s",
        "  rank 2 has been in `data` of step 17 for 312 s",
        "  ranks 0, 1, 3 wait for it in `forward and backward` of step 17, for 311 s",
    ]


def test_an_earlier_step_is_further_behind_than_an_earlier_phase() -> None:
    told = [Standing(0, "data", 18, 5), Standing(1, "save", 17, 9), Standing(2, FORWARD, 18, 6)]
    assert table(told, 3).splitlines()[1:] == [
        "  rank 1 has been in `save` of step 17 for 9 s",
        "  rank 0 waits for it in `data` of step 18, for 5 s",
        "  rank 2 waits for it in `forward and backward` of step 18, for 6 s",
    ]


def test_several_may_be_behind() -> None:
    told = [Standing(rank, "data" if rank in (1, 2) else "agree", 3, 7) for rank in range(4)]
    assert [line.split()[:2] for line in table(told, 4).splitlines()[2:]] == [["rank", "2"], ["ranks", "0,"]]
    assert "ranks 0, 3 wait for them in `agree`" in table(told, 4)


def test_a_rank_that_left_no_word_is_what_the_others_wait_for() -> None:
    told = [Standing(0, FORWARD, 4, 8), Standing(2, "agree", 3, 9)]
    assert table(told, 4).splitlines()[1:] == [
        "  ranks 1, 3 left no word: gone, stopped, or stuck without the interpreter lock",
        "  rank 2 waits for them in `agree` of step 3, for 9 s",
        "  rank 0 waits for them in `forward and backward` of step 4, for 8 s",
    ]


def test_nobody_is_blamed_when_all_stand_at_the_same_place() -> None:
    told = table([Standing(rank, "evaluate", 5, 20 + rank) for rank in range(8)], 8)
    assert told.splitlines()[0] == "weft: no progress for 27 s"
    assert "all ranks are in `evaluate` of step 5" in told
    assert len(told.splitlines()) == 2
    assert "  rank 0 has been in `data` of step 2 for 30 s" in table([Standing(0, "data", 2, 30)], 1)


def test_many_ranks_are_named_shortly() -> None:
    assert ranks_in_words([3]) == "rank 3"
    assert ranks_in_words([0, 1, 3]) == "ranks 0, 1, 3"
    assert ranks_in_words([0, 1, 2, 3, 6, 8, 9]) == "ranks 0-3, 6, 8, 9"


@pytest.mark.parametrize("phase", PHASES)
def test_a_standing_is_read_back_from_its_line(phase: str) -> None:
    mine = Standing(12, phase, 345, 678.0)
    assert Standing.read(f"{mine}\nmore") == mine
    assert Standing.read("a line of something else") is None


@pytest.mark.parametrize("limit", [0.0, 5.0, 300.0, 3600.0])
def test_a_collective_outlasts_the_watchdog(limit: float) -> None:
    assert collective_timeout(limit).total_seconds() > SLOW * limit
    assert collective_timeout(limit) >= TIMEOUT


# --- ranks that only mark

LIMIT = 3.0


def mark(rank: int, world: int, run: Path, cases: list[str]) -> list[str]:
    """For each case two steps and what it says in rank 1 at step 3, with a limit of three seconds."""
    import torch
    import torch.distributed as dist

    from pretrain.parallel.groups import start_ranks, stop_ranks
    from pretrain.parallel.layout import Layout
    from pretrain.watchdog import Watchdog

    layout = Layout(world=world, dp=world, tp=1, zero=0, share=1, micro_batch=1)
    ranks = start_ranks(layout, torch.device("cpu"), collective_timeout(LIMIT))
    done = []
    for case in cases:
        with Watchdog(run, ranks, start_step=0, limit=0.0 if case == "off" else LIMIT) as watchdog:
            for step in (1, 2, 3):
                watchdog.phase("data", step)
                if step == 3 and case == "marks":  # none of which lasts that long
                    for _ in range(5):
                        time.sleep(LIMIT / 3)
                        watchdog.phase("data", step)
                elif step == 3 and case == "slow":
                    watchdog.phase("evaluate", step)
                    time.sleep(2 * LIMIT)
                elif step == 3 and case == "off":
                    time.sleep(2 * LIMIT)
                elif step == 3 and case == "hang" and rank == 1:
                    time.sleep(1000)
                watchdog.phase("forward and backward", step)
                dist.barrier(group=ranks.control_group)
        done.append(case)
    stop_ranks(ranks)
    return done


@pytest.mark.timeout(600)
def test_a_hang_is_told_apart_from_what_is_slow_and_what_goes_on(tmp_path: Path) -> None:
    (tmp_path / "hang" / "1").mkdir(parents=True)  # of an earlier attempt: it stays
    with pytest.raises(RanksError, match=rf"exit codes \[{NO_PROGRESS}, {NO_PROGRESS}\]") as failed:
        run_ranks(mark, 2, tmp_path, ["marks", "slow", "off", "hang"], timeout=900)
    assert sorted(path.name for path in (tmp_path / "hang").iterdir()) == ["1", "2"]
    folder = tmp_path / "hang" / "2"
    assert sorted(path.name for path in folder.iterdir()) == ["rank-0.txt", "rank-1.txt", TABLE]
    told = (folder / TABLE).read_text()
    assert "rank 1 has been in `data` of step 3 for" in told
    assert "rank 0 waits for it in `forward and backward` of step 3" in told
    assert str(folder) in told
    assert told.strip() in str(failed.value), "on stderr too"
    [slept] = [number for number, line in enumerate(SOURCE, 1) if "time.sleep(1000)" in line and "number" not in line]
    assert f"line {slept} in mark" in (folder / "rank-1.txt").read_text()
    assert "in barrier" in (folder / "rank-0.txt").read_text()


# --- whole jobs


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds ranks by /proc")
@pytest.mark.timeout(600)
def test_a_stuck_loader_and_a_stopped_rank_are_named_and_the_job_starts_again(tmp_path: Path) -> None:
    data = tmp_path / "scenes"
    synthesise(data, train=100, test=2, size=32, sound=False, processes=1)
    options = ["train.watchdog=5", "train.steps=500", "--nproc", "3", "--restarts", "1"]
    with Job(data, tmp_path / "run", *options) as job:
        job.wait_until(lambda: newest_step(job.run) > 0)
        [worker] = job.loader_workers(2)
        os.kill(worker, signal.SIGSTOP)
        job.wait_until(lambda: len(job.starts) == 2)
        told = (job.run / "hang" / "1" / TABLE).read_text()
        assert re.search(r"rank 2 has been in `data` of step \d+ for \d+ s", told), told
        assert "ranks 0, 1 wait for it in `forward and backward` of step" in told
        assert told in job.told
        assert "next(batches)" in _frames(job.run / "hang" / "1" / "rank-2.txt")
        assert "engine.step" in _frames(job.run / "hang" / "1" / "rank-0.txt")
        assert not Path(f"/proc/{worker}").exists(), "the stuck worker is gone with its rank"
        step = job.starts[1][0]
        assert f"rank 0 was ended by its watchdog; restart 1 of 1 goes on from step {step} with 3 rank(s)" in job.told

        job.wait_until(lambda: newest_step(job.run) > step)
        os.kill(job.rank(1), signal.SIGSTOP)
        assert job.wait() == NO_PROGRESS, job.told
    told = (job.run / "hang" / "2" / TABLE).read_text()
    assert "rank 1 left no word" in told
    assert "ranks 0, 2 wait for it" in told
    assert "all 1 restart(s) are used up" in job.told


def _frames(stacks: Path) -> str:
    """The lines of pretrain/train.py that stand in a file of stacks."""
    source = (Path(__file__).parents[2] / "pretrain" / "train.py").read_text().splitlines()
    numbers = re.findall(r'pretrain/train\.py", line (\d+)', stacks.read_text())
    return "\n".join(source[int(number) - 1] for number in numbers)
