"""Who waits for whom, said when a run stands still, instead of a collective's timeout that names nobody.

- The training loop marks where it is: `watchdog.phase("data", 17)`, one assignment in memory. A thread of each rank
  looks at the mark now and then. When it has not changed for train.watchdog seconds, the rank writes the stacks of all
  its threads to hang/<n>/rank-<N>.txt in the run folder (<n> counts the hangs of a run); the others see the folder and
  do the same, wherever they are.
- A moment later the first rank that wrote one says on stderr which ranks are behind all others, in who-waits.txt too.
  A rank that wrote none is gone, stopped, or stuck in a library that holds Python's interpreter lock, and is what the
  others wait for.
- Then every rank ends with exit code NO_PROGRESS, so that a launcher can start the job again.
- What may take long is given SLOW times as long: the start, the first step (kernels are compiled), an evaluation, a
  save. Collectives must be patient enough to let this speak first: `collective_timeout`.
"""

from __future__ import annotations

import faulthandler
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Literal, get_args

import torch

from data_pipeline.index import written_whole
from pretrain.job import ranks_in_words
from pretrain.parallel.groups import TIMEOUT, Ranks
from pretrain.restart import NO_PROGRESS

Phase = Literal["start", "data", "forward and backward", "agree", "log", "evaluate", "save", "finish"]
PHASES: tuple[Phase, ...] = get_args(Phase)  # in the order of a step
SLOW = 4
SLOW_PHASES: tuple[Phase, ...] = ("start", "evaluate", "save", "finish")
TABLE = "who-waits.txt"


@dataclass(frozen=True)
class Standing:
    """Where a rank stands, and since when."""

    rank: int
    phase: str
    step: int
    seconds: float

    def __str__(self) -> str:
        return f"rank {self.rank} has been in `{self.phase}` of step {self.step} for {self.seconds:.0f} s"

    @classmethod
    def read(cls, line: str) -> Standing | None:
        """Back from `str`; None when it is none."""
        if not (found := re.match(r"rank (\d+) has been in `(.+)` of step (\d+) for (\d+) s", line)):
            return None
        return cls(int(found[1]), found[2], int(found[3]), float(found[4]))

    @property
    def place(self) -> tuple[int, int]:
        """Smaller is further behind."""
        return self.step, PHASES.index(self.phase)  # type: ignore[arg-type]  # a ValueError is a line not of ours


class Watchdog:
    """Watches the training loop of this rank while the `with` lasts. All ranks make theirs together.

    `start_step`: how many steps were done before; `limit`: seconds, 0 never says anything.
    """

    def __init__(self, run: Path, ranks: Ranks, start_step: int, limit: float) -> None:
        self._rank, self._world, self._limit = ranks.rank, ranks.world, limit
        self._slow_until = start_step + 1
        # the ranks agree on a folder that is not there yet: it appears when one of them finds that nothing moves
        number = 1
        while ranks.is_first and (run / "hang" / str(number)).exists():
            number += 1
        self._folder = run / "hang" / str(int(ranks.agree(torch.tensor([number if ranks.is_first else 0]))))
        self._over, self._ending = threading.Event(), False
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self.phase("start", start_step)

    def phase(self, name: Phase, step: int) -> None:
        """Mark that this rank now begins `name` of `step` (counted from 1)."""
        self._mark = (name, step, time.monotonic())

    @property
    def place(self) -> tuple[Phase, int]:
        """The phase and the step that were marked last."""
        return self._mark[:2]

    def __enter__(self) -> Watchdog:
        if self._limit:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        if self._ending:  # a peer that has ended already is why we are here: not the thing to speak of
            self._thread.join()

    # --- the thread

    def _watch(self) -> None:
        tick = min(5.0, self._limit / 20)
        seen, still, before = self._mark, 0.0, time.monotonic()
        while not self._over.wait(tick):
            now = time.monotonic()
            if self._mark is not seen:
                seen, still = self._mark, 0.0
            else:
                still += min(now - before, 2 * tick)  # a process that was stopped and goes on has not stood still
            before = now
            phase, step, _ = seen
            slow = phase in SLOW_PHASES or step <= self._slow_until
            if still >= self._limit * (SLOW if slow else 1) or self._folder.exists():
                self._end(patience=min(15.0, max(3.0, self._limit / 4)))

    def _end(self, patience: float) -> None:
        """Write down where this rank is, wait for the others to do so, say who waits for whom, and leave."""
        self._ending = True
        phase, step, since = self._mark
        mine = Standing(self._rank, phase, step, time.monotonic() - since)
        try:
            self._write_stacks(mine)
            _wait(patience, lambda: len(self._standings()) == self._world)
            found = self._standings()
            if found[0].rank == self._rank:
                told = table(found, self._world) + f"\nstacks of all threads: {self._folder}/rank-N.txt\n"
                with written_whole(self._folder / TABLE) as unfinished:
                    unfinished.write_text(told, encoding="utf-8")
                _say(told)
            else:
                _wait(patience, (self._folder / TABLE).exists)
        except OSError as error:
            _say(f"weft: {mine}; the stacks could not be written: {error}\n")
        finally:
            os._exit(NO_PROGRESS)  # loader workers, even stuck ones, end with this process

    def _write_stacks(self, mine: Standing) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        with written_whole(self._folder / f"rank-{self._rank}.txt") as unfinished, unfinished.open("w") as file:
            file.write(f"{mine}\nprocess {os.getpid()} on {socket.gethostname()}: {' '.join(sys.argv)}\n\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)

    def _standings(self) -> list[Standing]:
        """What the ranks have written so far, in order of their numbers."""
        lines = (path.read_text(encoding="utf-8").partition("\n")[0] for path in self._folder.glob("rank-*.txt"))
        return sorted(filter(None, map(Standing.read, lines)), key=lambda each: each.rank)


def collective_timeout(limit: float) -> timedelta:
    """How long a collective waits for its peers when the watchdog's limit is `limit` seconds: longer than that."""
    return max(TIMEOUT, timedelta(seconds=(SLOW + 1) * limit + 60))


def table(standings: Sequence[Standing], world: int) -> str:
    """Which of `world` ranks is waited for, where, and who waits; a line each. `standings`: of the ranks that told."""
    silent = sorted(set(range(world)) - {each.rank for each in standings})
    last = min(each.place for each in standings)
    behind = [each for each in standings if each.place == last and not silent]
    waiting = [each for each in standings if each not in behind]
    lines = [f"weft: no progress for {max(each.seconds for each in standings):.0f} s"]
    if silent:
        lines.append(f"  {ranks_in_words(silent)} left no word: gone, stopped, or stuck without the interpreter lock")
    elif not waiting and world > 1:
        phase, step = behind[0].phase, behind[0].step
        lines.append(f"  all ranks are in `{phase}` of step {step}: they wait for each other, or for the network")
    else:
        lines += [f"  {each}" for each in behind]
    them = "it" if len(silent or behind) == 1 else "them"
    for place in sorted({each.place for each in waiting}):
        there = [each for each in waiting if each.place == place]
        lines.append(
            f"  {ranks_in_words([each.rank for each in there])} {'wait' if len(there) > 1 else 'waits'} for {them} "
            f"in `{there[0].phase}` of step {there[0].step}, for {max(each.seconds for each in there):.0f} s"
        )
    return "\n".join(lines)


def _wait(seconds: float, until: Callable[[], bool]) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and not until():
        time.sleep(0.1)


def _say(text: str) -> None:
    """On stderr, past Python's locks, which a stuck thread may hold; not for ever when nobody reads it."""
    writer = threading.Thread(target=os.write, args=(2, text.encode()), daemon=True)
    writer.start()
    writer.join(2.0)
