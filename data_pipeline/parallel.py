"""Run one function over many jobs: in this process, in processes of this machine, or as tasks on a Ray cluster.

    with run_jobs(function, jobs, processes=4) as results:      # or on="10.0.0.1:6379", or on="local"
        for number, result in results:                          # as they complete; `number` counts in `jobs`
            ...

Design choices:
- The function goes to each worker once, and stays there with all it has opened; a job is a small tuple of arguments.
- A function is pure, so a job may run twice: one that is lost with its worker or node is given to another, and one that
  ends every worker it meets is named.
- Whoever leaves the `with` block early, by a break, an error or a Ctrl-C, leaves nothing at work: jobs that have not
  begun never do, and those that run are told so (`stopping`) or interrupted, and waited for.
- Workers end with the process that they work for, even if it is killed (crew.py); on Ray their job ends.
- Nobody says what a cluster's nodes have in common, and a folder that a node lacks may look like one that is empty. So
  a node is asked for the `needs` of the function before its first job.
"""

from __future__ import annotations

import math
import os
import signal
import sys
import threading
import time
import uuid
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from data_pipeline import crew
from data_pipeline.crew import Crew, LostError, Patience
from data_pipeline.errors import DataError, first_line
from data_pipeline.ray_token import guard_own_ray

Result = TypeVar("Result")
Job = tuple[Any, ...]

ATTEMPTS = 8  # of one job on Ray; losses at random do not meet the same one so often
AHEAD = 2  # jobs for each processor of a Ray: one at work, one behind it
LOOK = 1.0  # seconds between two looks how many processors a Ray has
START = 120.0  # seconds that a Ray may be without any
GRACE = 20.0  # seconds for a job to end after it was told to
PATIENCE = Patience(silence=60.0, standstill=math.inf)  # seconds; a job may keep the interpreter to itself for long
STORE = 256 << 20  # bytes for objects in a Ray of our own: results are small


@contextmanager
def run_jobs(
    function: Callable[..., Result],
    jobs: Sequence[Job],
    *,
    processes: int | None = None,
    on: str | None = None,
    needs: Sequence[Path] = (),
) -> Iterator[Iterator[tuple[int, Result]]]:
    """(number, function(*jobs[number])) of every job, in the order in which they complete.

    processes: at work at a time; default all cores, 0 or 1 = this one. `on`: a Ray instead, HOST:PORT of a cluster's or
    "local" for one that ends with this process; there `function` and jobs run on any node, which must have the same
    packages, and `processes` bounds the tasks at a time. `needs`: files and folders, none of them empty, that must be
    on a file system which all nodes share; a relative path is one from this process's folder.
    What `function` raises is raised here. Raises DataError when a job ended several workers (on Ray: when it was lost
    ATTEMPTS times), when there is no Ray at `on` or it has no processor, or when a node does not see one of the
    `needs`; ValueError when Ray is not installed.
    """
    if on is not None:
        with _on_ray(function, jobs, processes, on, needs) as results:
            yield results
        return
    processes = min(os.cpu_count() or 1 if processes is None else processes, len(jobs))
    if processes <= 1:
        yield ((number, function(*job)) for number, job in enumerate(jobs))
        return
    with _in_processes(function, jobs, processes) as results:
        yield results


# --- on this machine


def stopping() -> bool:
    """In a job: whether nobody wants its result any more, so that it may end with any. On Ray it is interrupted."""
    return crew.stopping()


@contextmanager
def _in_processes(
    function: Callable[..., Result], jobs: Sequence[Job], processes: int
) -> Iterator[Iterator[tuple[int, Result]]]:
    team = Crew(function, processes, ahead=1, patience=PATIENCE, told=_tell)
    try:
        yield _completed(team, jobs, processes)
    finally:  # after a Ctrl-C too: nobody should go on with what will be thrown away
        team.close(patience=GRACE)


def _completed(team: Crew, jobs: Sequence[Job], processes: int) -> Iterator[tuple[int, Any]]:
    ahead, given = iter(enumerate(jobs)), 0
    while given < len(jobs) or team.open_jobs:
        for number, job in islice(ahead, team.room):
            team.give(number, job)
            given += 1
        try:
            yield from team.wait()
        except LostError as lost:
            which = "" if lost.job is None else f" at job {lost.job + 1} of {len(jobs)}"
            raise DataError(
                f"one of {processes} worker processes was killed or crashed {crew.ATTEMPTS} times in a row{which}, and "
                f"the work was stopped: the last {lost.how}; if memory is short, give fewer processes"
            ) from None


def _tell(how: str, _: int) -> None:
    print(f"weft: a worker process {how}: another takes its place", file=sys.stderr)


# --- on Ray


@contextmanager
def connected(on: str | None, processes: int | None = None) -> Iterator[None]:
    """Within, this process is connected to the Ray at `on`, for any number of `run_jobs`; None: to none.

    One that is connected already stays so, whatever `on` is. Raises as `run_jobs` does.
    """
    if on is None:
        yield
        return
    if on == "local":
        guard_own_ray()
    try:
        import ray

        from data_pipeline.ray_cluster import connect, disconnect
    except ImportError as error:
        raise ValueError("work on a Ray needs Ray, which is not installed: pip install 'weft[ray]'") from error
    if ray.is_initialized():
        yield
        return
    connect(on, max(1, os.cpu_count() or 1 if processes is None else processes), STORE)
    try:
        yield
    finally:
        disconnect()


@contextmanager
def _on_ray(
    function: Callable[..., Result], jobs: Sequence[Job], most: int | None, on: str, needs: Sequence[Path]
) -> Iterator[Iterator[tuple[int, Result]]]:
    with connected(on, most), _interrupts_noted() as raise_noted:
        running: dict[Any, int] = {}  # answer that is waited for -> job
        try:
            yield _answers(function, jobs, most, on, needs, running, raise_noted)
        finally:
            _interrupt(list(running))


@contextmanager
def _interrupts_noted() -> Iterator[Callable[[], None]]:
    """Within, a Ctrl-C is noted, and raised when the function that is given is called, or at the end.

    Raised inside of Ray, where it may come at any moment, it is now and then lost, or ends this process on the spot.
    """
    if threading.current_thread() is not threading.main_thread():  # only there are signals handled
        yield lambda: None
        return
    noted: list[int] = []

    def raise_noted() -> None:
        if noted:
            noted.clear()
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, lambda number, _: noted.append(number))
    try:
        yield raise_noted
    finally:
        signal.signal(signal.SIGINT, before)
    raise_noted()


def _answers(
    function: Callable[..., Result],
    jobs: Sequence[Job],
    most: int | None,
    on: str,
    needs: Sequence[Path],
    running: dict[Any, int],
    raise_noted: Callable[[], None],
) -> Iterator[tuple[int, Result]]:
    """As many jobs at a time as the cluster has processors for, however many that are at the moment."""
    import ray
    from ray.exceptions import RayError, RayTaskError

    remote: Any = ray.remote  # whose types do not know all of its settings
    task = remote(num_cpus=1, max_retries=0, scheduling_strategy="SPREAD")(_run_task)
    source = _Source(uuid.uuid4().hex, [ray.put(function)], os.getcwd(), _places(needs), on)
    waiting = deque(range(len(jobs)))
    failures: Counter[int] = Counter()
    room, looked, had_room = 0, -LOOK, time.monotonic()
    while waiting or running:
        raise_noted()
        now = time.monotonic()
        if now - looked >= LOOK:
            room, looked = AHEAD * int(ray.cluster_resources().get("CPU", 0)), now
            had_room = now if room else had_room
        if now - had_room > START:
            raise DataError(f"the Ray at {on} has had no processor for {START:.0f} s: add a node to it")
        while waiting and len(running) < min(room, max(1, room if most is None else most)):
            number = waiting.popleft()
            running[task.remote(source, jobs[number])] = number
        if not running:
            time.sleep(LOOK)
            continue
        for answer in ray.wait(list(running), timeout=LOOK)[0]:
            number = running.pop(answer)
            try:
                result: Result = ray.get(answer)
            except RayError as error:
                cause = error.cause if isinstance(error, RayTaskError) else error
                if isinstance(cause, Exception) and not isinstance(cause, RayError):
                    raise cause from error  # the function's own
                failures[number] += 1  # a worker or a node was lost, or with it the result
                if failures[number] == ATTEMPTS:
                    why = first_line(cause)
                    raise DataError(
                        f"job {number + 1} of {len(jobs)} was lost {ATTEMPTS} times on the Ray at {on} ({why}): it "
                        "ends its workers, or they lack what it needs, such as this version of weft"
                    ) from error
                waiting.appendleft(number)
                continue
            yield number, result


def _interrupt(answers: list[Any]) -> None:
    """End the tasks that are to give these answers, and wait until they have ended."""
    import ray
    from ray.exceptions import RayError

    for force in (False, True):
        if not answers:
            return
        with suppress(RayError):
            for answer in answers:
                ray.cancel(answer, force=force)
            _, answers = ray.wait(answers, num_returns=len(answers), timeout=GRACE, fetch_local=False)


def _places(needs: Sequence[Path]) -> list[str]:
    """As absolute paths; with this process's folder where one is relative, since the function has it so."""
    here = [] if all(path.is_absolute() for path in needs) else [os.getcwd()]
    return here + [os.path.abspath(path) for path in needs]


@dataclass(frozen=True)
class _Source:
    """What a worker of a Ray needs to know of a run, once."""

    run: str
    function: list[Any]  # one object; in a list it is sent as a reference, and fetched when it is asked for
    folder: str
    needs: list[str]
    on: str

    def fetch(self) -> Callable[..., Any]:
        """The function; DataError when this node does not see what it needs."""
        import ray

        for place in self.needs:
            if not os.path.exists(place) or (os.path.isdir(place) and not os.listdir(place)):
                node = ray.util.get_node_ip_address()
                raise DataError(
                    f"the node {node} of the Ray at {self.on} does not see {place}: what is read and what is written "
                    "must lie on a file system that all nodes share"
                )
        with suppress(OSError):  # else no path is relative
            os.chdir(self.folder)
        function: Callable[..., Any] = ray.get(self.function[0])
        return function


_held: dict[str, Callable[..., Any]] = {}  # in a worker of a Ray: the function of its latest run


def _run_task(source: _Source, job: Job) -> Any:
    if source.run not in _held:
        function = source.fetch()
        _held.clear()
        _held[source.run] = function
    return _held[source.run](*job)
