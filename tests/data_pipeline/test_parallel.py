"""Jobs in this process, in others and on Ray: the same results and bytes, whatever is killed, and nothing left."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from private_network import MARK, in_private_network, marked
from tars import picture

import data_pipeline.filters.look as look_module
import data_pipeline.parallel as parallel_module
from data_pipeline.errors import DataError
from data_pipeline.filters import parse_steps, run_filters
from data_pipeline.filters.step import Drop, SampleStep
from data_pipeline.importers.folder import import_folder
from data_pipeline.parallel import run_jobs, stopping
from data_pipeline.sample import Sample, Skipped
from data_pipeline.shards import Origin, write_shards

pytestmark = pytest.mark.timeout(600)


def eventually(holds: Callable[[], bool], seconds: float = 400) -> None:
    """Wait until it holds."""
    ends = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < ends, "it never came"
        time.sleep(0.05)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def square(number: int) -> int:
    return number * number


@pytest.mark.parametrize("processes", [0, 1, 2, 9])
def test_every_job_gives_its_result(processes: int) -> None:
    with run_jobs(square, [(number,) for number in range(7)], processes=processes) as results:
        assert sorted(results) == [(number, number * number) for number in range(7)]


def test_no_jobs_give_no_results() -> None:
    with run_jobs(square, []) as results:
        assert list(results) == []


def wait_for(path: Path, wanted: bool, made: Path) -> str:
    """Wait for a file if it is wanted, then make another."""
    if wanted:
        eventually(path.exists)
    made.touch()
    return made.name


def test_results_come_as_they_complete(tmp_path: Path) -> None:
    """The first job ends only when the result of the second has been seen."""
    jobs = [(tmp_path / "go", True, tmp_path / "a"), (tmp_path / "go", False, tmp_path / "b")]
    with run_jobs(wait_for, jobs, processes=2) as results:
        assert next(results) == (1, "b")
        (tmp_path / "go").touch()
        assert list(results) == [(0, "a")]


@dataclass(frozen=True)
class Heavy:
    """A function that notes each time that it is unpacked."""

    log: Path

    def __call__(self, number: int) -> int:
        return number

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        with self.log.open("a") as file:
            file.write("unpacked\n")


def test_the_function_goes_to_each_worker_once(tmp_path: Path) -> None:
    with run_jobs(Heavy(tmp_path / "log"), [(number,) for number in range(30)], processes=2) as results:
        assert len(list(results)) == 30
    assert 1 <= len((tmp_path / "log").read_text().split()) <= 2


def fail_at(bad: int, folder: Path, number: int) -> None:
    (folder / str(number)).touch()
    if number == bad:
        raise FileNotFoundError(2, "no such thing", "a-file")
    if number > bad:  # on Ray it is interrupted
        eventually(stopping)


@pytest.mark.parametrize("processes", [1, 2])
def test_an_error_in_a_job_is_raised_and_ends_the_others(tmp_path: Path, processes: int) -> None:
    jobs = [(3, tmp_path, number) for number in range(500)]
    with (
        pytest.raises(FileNotFoundError, match="no such thing: 'a-file'"),
        run_jobs(fail_at, jobs, processes=processes) as results,
    ):
        list(results)
    begun = {path.name for path in tmp_path.iterdir()}
    assert "3" in begun
    assert len(begun) < 500
    if processes == 1:  # of two, one may not have come to its first job yet
        assert begun == {"0", "1", "2", "3"}


def die_at(bad: int, number: int) -> int:
    if number == bad:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def test_a_killed_worker_is_one_sentence() -> None:
    with (
        pytest.raises(DataError, match="one of 2 worker processes was killed or crashed"),
        run_jobs(die_at, [(5, number) for number in range(20)], processes=2) as results,
    ):
        list(results)


def test_a_killed_worker_leaves_no_shard(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="worker processes was killed or crashed"):
        write_shards(20, Deadly(7), tmp_path / "out", samples_per_shard=2, processes=2)
    assert list(tmp_path.iterdir()) == []


def linger(folder: Path, number: int) -> int:
    """End when nobody wants the result any more."""
    (folder / f"{number}-began").touch()
    eventually(stopping)
    (folder / f"{number}-ended").touch()
    return number


def test_who_leaves_early_leaves_nothing_at_work(tmp_path: Path) -> None:
    with run_jobs(linger, [(tmp_path, number) for number in range(50)], processes=2) as results:
        jobs = iter(results)
        with pytest.raises(TimeoutError):
            raise_when(lambda: len(list(tmp_path.glob("*-began"))) >= 2, lambda: next(jobs))
    began, ended = (
        sorted(path.name.split("-")[0] for path in tmp_path.glob(f"*-{what}")) for what in ("began", "ended")
    )
    assert began == ended
    assert len(began) < 50


def raise_when(holds: Callable[[], bool], function: Callable[[], Any]) -> None:
    """Call a function, and raise TimeoutError in it once something holds, as a Ctrl-C would."""

    def ring(*_: Any) -> None:
        if holds():
            raise TimeoutError

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, 0.1, 0.1)
    try:
        function()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_ray_that_is_not_installed_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"needs Ray, which is not installed: pip install 'weft\[ray\]'"):
        write_shards(3, make, tmp_path / "out", on="10.0.0.1:6379")
    assert list(tmp_path.iterdir()) == []


# --- samples


def make(number: int) -> Sample | Skipped:
    """Some are skipped; of the third shard of two, both."""
    if number in (4, 5, 9):
        return Skipped(f"file-{number}", "too dark")
    return Sample(f"s{number}", {"png": picture(number), "txt": f"caption {number}".encode()})


@dataclass(frozen=True)
class Deadly:
    """make, but that one sample ends whatever process makes it."""

    bad: int

    def __call__(self, number: int) -> Sample | Skipped:
        if number == self.bad:
            os.kill(os.getpid(), signal.SIGKILL)
        return make(number)


def make_slowly(number: int) -> Sample | Skipped:
    time.sleep(0.25)
    return make(number)


@dataclass(frozen=True)
class SlowStep(SampleStep):
    """Takes its time, and drops each third sample."""

    name = "slow"

    def look(self, sample: Sample) -> Drop | None:
        time.sleep(0.25)
        return Drop("a third") if int(sample.key[1:]) % 3 == 0 else None


def pictures(folder: Path) -> Path:
    """A folder to import: captions, classes, and some that cannot be used."""
    for number in range(12):
        folder.mkdir(exist_ok=True)
        (folder / f"{number}.png").write_bytes(picture(number) if number != 3 else b"no picture")
        if number != 5:
            (folder / f"{number}.txt").write_text(f"caption {number % 7}, as it is", encoding="utf-8")
    (folder / "sea_lion").mkdir()
    for number in range(20, 24):
        (folder / "sea_lion" / f"{number}.png").write_bytes(picture(number))
    return folder


# --- on Ray


@contextmanager
def cluster_of(nodes: int) -> Iterator[tuple[str, list[Any], Callable[[], None]]]:
    """(address, raylets beside the head's, a function that adds one) of a cluster; the head runs no task."""
    import ray
    from ray.cluster_utils import Cluster

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test
    os.environ.update(RAY_health_check_period_ms="1000", RAY_health_check_failure_threshold="3")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": 80 << 20})
    added: list[Any] = []

    def add() -> None:
        added.append(cluster.add_node(num_cpus=2, object_store_memory=80 << 20))

    for _ in range(nodes):
        add()
    try:
        yield cluster.address, added, add
    finally:
        ray.shutdown()
        cluster.shutdown()


def at_work() -> list[int]:
    """Processes of Ray workers that have a task of ours."""
    found = []
    for pid in marked(os.environ[MARK]):
        try:
            if b"ray::_run_task" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
        except OSError:
            continue
    return found


def where(number: int) -> tuple[int, str]:
    import ray

    time.sleep(0.2)
    return number, ray.get_runtime_context().get_node_id()


def same_bytes(folder: Path) -> None:
    """An import and a filter, from relative paths; errors; what a node must see."""
    source = pictures(folder / "pictures")
    os.chdir(folder)
    steps = parse_steps(["duplicates", "captions:min_words=2"])
    captions = {"test_share": 0.25, "licence": "terms"}
    with cluster_of(2) as (address, _, _):
        for on, out in ((None, Path("here")), (address, Path("there"))):
            with parallel_module.connected(on):
                imported = import_folder(Path("pictures"), out, processes=2, on=on, **captions)
                assert imported.train is not None
                assert imported.train.skipped
                run_filters(Path("here/train"), out / "kept", steps, against=source.parent / "here/test", on=on)
                written = write_shards(15, make, out / "odd", samples_per_shard=2, on=on)
                assert len(written.skipped) == 3
        here, there = contents(folder / "here"), contents(folder / "there")
        assert sorted(here) == sorted(there)
        assert here == there
        assert not list(folder.glob(".*"))

        with parallel_module.connected(address):
            with run_jobs(where, [(number,) for number in range(24)], on=address) as results:
                found = list(results)
            assert sorted(number for number, _ in found) == list(range(24))
            assert [number for number, (same, _) in found] == [same for _, (same, _) in found]
            assert len({node for _, (_, node) in found}) == 2
            with (
                pytest.raises(FileNotFoundError, match="no such thing: 'a-file'") as caught,
                run_jobs(fail_at, [(3, folder, number) for number in range(50)], on=address) as results,
            ):
                list(results)
            assert caught.value.errno == 2
            for absent in (folder / "absent", Path("absent"), folder / "empty"):
                (folder / "empty").mkdir(exist_ok=True)
                sentence = rf"the node [\d.]+ of the Ray at {address} does not see {absent.absolute()}: what is read"
                with (
                    pytest.raises(DataError, match=sentence),
                    run_jobs(square, [(1,)], on=address, needs=[source, absent]) as results,
                ):
                    list(results)
            parallel_module.ATTEMPTS = 3
            with pytest.raises(DataError, match=r"job 4 of 10 was lost 3 times on the Ray at .* \(.*\): it ends"):
                write_shards(20, Deadly(7), folder / "deadly", samples_per_shard=2, on=address)
            eventually(lambda: not at_work())
            assert not list(folder.glob("*deadly*"))
        with pytest.raises(DataError, match=r"there is no Ray cluster at 127\.0\.0\.1:1 "):
            write_shards(3, make, folder / "nowhere", on="127.0.0.1:1")
    assert not list(folder.glob("*nowhere*"))


@pytest.mark.slow
def test_an_import_and_a_filter_on_ray_write_the_same_bytes(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    in_private_network(same_bytes, tmp_path)


def kills(folder: Path) -> dict[str, int]:
    """A worker and then a raylet are killed while shards are written, and again while samples are looked at."""
    done = {"worker": 0, "raylet": 0}
    write_shards(60, make, folder / "whole", samples_per_shard=2, processes=1)
    run_filters(folder / "whole", folder / "kept", [SlowStep()], processes=1, samples_per_shard=5)
    look_module.CHUNK = 4
    with cluster_of(2) as (address, raylets, add):

        def strike(now: int, _: int) -> None:
            if now >= 6 and not plan["worker"]:
                plan["worker"] = True
                while not (workers := at_work()):
                    time.sleep(0.05)
                os.kill(workers[0], signal.SIGKILL)
                done["worker"] += 1
            if now >= 16 and not plan["raylet"]:
                plan["raylet"] = True
                os.kill(raylets[-1].all_processes["raylet"][0].process.pid, signal.SIGKILL)
                done["raylet"] += 1

        plan = dict.fromkeys(done, False)
        write_shards(60, make_slowly, folder / "written", samples_per_shard=2, on=address, progress=strike)
        add()
        plan = dict.fromkeys(done, False)
        run_filters(
            folder / "whole", folder / "filtered", [SlowStep()], samples_per_shard=5, on=address, progress=strike
        )
    assert contents(folder / "written") == contents(folder / "whole")
    assert contents(folder / "filtered") == contents(folder / "kept")
    assert sorted(path.name for path in folder.iterdir()) == ["filtered", "kept", "whole", "written"]
    return done


@pytest.mark.slow
def test_killed_workers_and_lost_nodes_change_nothing(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    assert in_private_network(kills, tmp_path) == {"worker": 2, "raylet": 2}


ORIGIN = Origin({"importer": "slow"}, "a" * 64)


def _write_on(address: str, out: str) -> None:
    import ray

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    write_shards(
        60,
        make_slowly,
        Path(out),
        samples_per_shard=2,
        on=address,
        origin=ORIGIN,
        progress=lambda done, _: print(done, flush=True),
    )


@contextmanager
def writer(address: str, out: Path, until: int) -> Iterator[subprocess.Popen[bytes]]:
    """A process of its own that writes, once it has written so many samples."""
    process = subprocess.Popen(
        [sys.executable, __file__, address, str(out)], stdout=subprocess.PIPE, start_new_session=True
    )
    try:
        assert process.stdout is not None
        while int(process.stdout.readline()) < until:
            pass
        yield process
    finally:
        process.kill()
        process.wait()


def ray_folders() -> set[Path]:
    """Where the Rays of this test, that processes have started of their own, keep their files."""
    found: set[Path] = set()
    for pid in marked(os.environ[MARK]):
        try:
            command_line = Path(f"/proc/{pid}/cmdline").read_text()
        except OSError:
            continue
        found |= {Path(name) for name in re.findall(r"/tmp/weft-ray-\w+", command_line)}
    return found


def endings(folder: Path) -> None:
    """What a killed process, and one that gets a Ctrl-C, leave on a cluster and in a Ray of their own."""
    write_shards(60, make, folder / "whole", samples_per_shard=2, processes=1, origin=ORIGIN)
    with cluster_of(1) as (address, _, _):
        with writer(address, folder / "out", 10) as process:
            process.kill()
        (unfinished,) = folder.glob(".out.*.unfinished")
        kept = {path.stem: path.stat().st_mtime_ns for path in unfinished.glob("*.tar")}
        assert len(kept) >= 4
        eventually(lambda: not at_work())
        write_shards(60, make_slowly, folder / "out", samples_per_shard=2, on=address, origin=ORIGIN)
        assert contents(folder / "out") == contents(folder / "whole")
        times = {path.stat().st_mtime_ns for path in (folder / "out").glob("*.tar")}
        assert set(kept.values()) <= times  # those were not made again

        with writer(address, folder / "stopped", 10) as process:
            os.killpg(process.pid, signal.SIGINT)
            assert process.wait(400) != 0
        assert not list(folder.glob("*stopped*"))
        eventually(lambda: not at_work())
    others = set(marked(os.environ[MARK]))
    with writer("local", folder / "stopped", 10) as process:
        folders = ray_folders()
        assert folders
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(400) != 0
    assert not list(folder.glob("*stopped*"))
    eventually(lambda: set(marked(os.environ[MARK])) <= others)
    assert not [path for path in folders if path.exists()]
    assert sorted(path.name for path in folder.iterdir()) == ["out", "whole"]


@pytest.mark.slow
def test_what_ends_in_the_middle_leaves_nothing_at_work(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    in_private_network(endings, tmp_path)


def command(folder: Path) -> dict[str, Any]:
    """`weft data import` and `weft data filter` with a Ray of their own."""
    pictures(folder / "pictures")
    trees = {}
    for name, words in {
        "import": ["import", "folder", folder / "pictures", folder / "out", "--test-share", "0"],
        "filter": ["filter", folder / "out" / "train", folder / "kept", "--steps", "captions"],
    }.items():
        line = [sys.executable, "-m", "pretrain.cli", "data", *map(str, words), "--ray", "local", "--json"]
        ended = subprocess.run(line, capture_output=True, text=True, timeout=900)
        assert ended.returncode == 0, ended.stderr
        assert "Traceback" not in ended.stderr
        trees[name] = json.loads(ended.stdout)
    line = [
        sys.executable,
        "-m",
        "pretrain.cli",
        "data",
        *map(str, words[:2]),
        str(folder / "no"),
        "--ray",
        "127.0.0.1:1",
    ]
    ended = subprocess.run([*line, "--steps", "captions"], capture_output=True, text=True, timeout=900)
    assert ended.returncode == 1
    assert ended.stderr.count("\n") == 1, ended.stderr
    assert "there is no Ray cluster at 127.0.0.1:1" in ended.stderr
    return trees


@pytest.mark.slow
def test_the_commands_take_a_ray(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    trees = in_private_network(command, tmp_path)
    assert trees["import"]["train"]["samples"] == trees["filter"]["seen"] == 10
    assert trees["filter"]["kept"] > 0


if __name__ == "__main__":
    _write_on(*sys.argv[1:])
