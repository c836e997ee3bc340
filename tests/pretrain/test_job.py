"""Which rank a process is: the variables of torch, SLURM and mpirun, those that contradict each other among them."""

from __future__ import annotations

import pytest

from pretrain.cli import main
from pretrain.errors import RequestError
from pretrain.job import Job, first_node, refuse_ranks_of_ranks, this_job, unused_tasks

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
STEP = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "1",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_STEP_NODELIST": "gpu[007-008]",
}
SHELL = {"SLURM_JOB_ID": "77", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}


def without(environment: dict[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name not in names}


@pytest.mark.parametrize(
    ("environment", "job"),
    [
        ({}, Job()),
        ({"WORLD_SIZE": "1"}, Job()),
        ({"WORLD_SIZE": "1", "RANK": "0"}, Job(by="a launcher")),
        (TORCHRUN, Job(3, 4, 1, 2, "a launcher")),
        (TORCHRUN | {"MASTER_ADDR": "a", "MASTER_PORT": "5"}, Job(3, 4, 1, 2, "a launcher", "a", 5)),
        (TORCHRUN | {"WEFT_LAUNCHER": "9"}, Job(3, 4, 1, 2, "weft")),
        (STEP | TORCHRUN | {"WORLD_SIZE": "8"}, Job(3, 8, 1, 2, "a launcher")),  # torchrun in a step of SLURM
        (STEP, Job(3, 4, 1, 2, "srun", "gpu007", 20000 + 77 * 31 + 1)),
        (STEP | {"MASTER_ADDR": "head", "MASTER_PORT": "5"}, Job(3, 4, 1, 2, "srun", "head", 5)),
        (without(STEP, "SLURM_STEP_NUM_TASKS"), Job(3, 4, 1, 2, "srun", "gpu007", 22388)),
        (without(STEP, "SLURM_STEP_NUM_TASKS", "SLURM_STEP_ID"), Job(3, 4, 1, 2, "srun", "gpu007", 22387)),
        (STEP | {"SLURM_STEP_TASKS_PER_NODE": "4", "SLURM_NODEID": "0"}, Job(3, 4, 1, 4, "srun", "127.0.0.1", 22388)),
        (SHELL, Job()),  # the shell of sbatch -n 4
        (SHELL | {"SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1"}, Job()),  # that of salloc -n 4
        (SHELL | {"SLURM_STEPID": "4294967291"}, Job()),
        (without(SHELL, "SLURM_PROCID"), Job()),
        (STEP | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, Job()),  # srun -n 1
    ],
)
def test_the_place_of_a_process(environment: dict[str, str], job: Job) -> None:
    assert this_job(environment) == job


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"WORLD_SIZE": ""}, ["WORLD_SIZE is ''", "whole number, at least 1"]),
        ({"WORLD_SIZE": "two"}, ["WORLD_SIZE is 'two'"]),
        ({"WORLD_SIZE": "0"}, ["WORLD_SIZE is '0'"]),
        ({"WORLD_SIZE": "²"}, ["WORLD_SIZE"]),
        ({"WORLD_SIZE": "2"}, ["WORLD_SIZE is 2", "RANK is not set"]),
        ({"RANK": "1"}, ["RANK is '1'", "WORLD_SIZE is not set"]),
        ({"RANK": "", "WORLD_SIZE": "2"}, ["RANK is ''"]),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, ["RANK is '-1'"]),
        ({"RANK": "2", "WORLD_SIZE": "2"}, ["RANK is 2", "0 to 1"]),
        (TORCHRUN | {"LOCAL_RANK": "2"}, ["LOCAL_RANK is 2"]),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "5"}, ["LOCAL_WORLD_SIZE is 5"]),
        (TORCHRUN | {"MASTER_PORT": "x"}, ["MASTER_PORT is 'x'"]),
        (TORCHRUN | {"MASTER_PORT": "70000"}, ["MASTER_PORT", "65535"]),
        (STEP | {"WORLD_SIZE": "1"}, ["WORLD_SIZE is 1 without RANK", "srun started 4 tasks"]),
        (STEP | {"SLURM_PROCID": "4"}, ["SLURM_PROCID is 4"]),
        (STEP | {"SLURM_PROCID": "x"}, ["SLURM_PROCID is 'x'"]),
        (without(STEP, "SLURM_PROCID"), ["SLURM_PROCID is not set"]),
        (without(STEP, "SLURM_STEP_NODELIST"), ["MASTER_ADDR"]),
        ({"SLURM_PROCID": "1"}, ["SLURM_NTASKS is not set"]),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, ["mpirun started 4 processes"]),
    ],
)
def test_what_contradicts_itself_is_one_sentence(environment: dict[str, str], words: list[str]) -> None:
    with pytest.raises(RequestError) as caught:
        this_job(environment)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("gpu[003-004,9],cpu1", "gpu003"),
        ("gpu[3,9]", "gpu3"),
        ("r[1-2]n[05-08]", "r1n05"),
        ("a[1-2]-ib,b", "a1-ib"),
    ],
)
def test_the_first_node_of_a_list(nodes: str, first: str) -> None:
    assert first_node(nodes) == first


def test_ranks_of_ranks_are_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    refuse_ranks_of_ranks(Job(), 2)
    refuse_ranks_of_ranks(Job(0, 2, 0, 2, "a launcher"), 2)
    refuse_ranks_of_ranks(Job(0, 3, 0, 3, "weft"), 4)  # a restart on fewer ranks
    with pytest.raises(RequestError, match="as rank 1 of 4"):
        refuse_ranks_of_ranks(Job(1, 4, 1, 4, "srun"), 2)
    for environment in ({"WORLD_SIZE": "1"}, {"WORLD_SIZE": "1", "RANK": "0"}):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        assert main(["train", "quickstart", "--nproc", "2"]) == 2
        assert "--nproc is 2, but WORLD_SIZE=1" in capsys.readouterr().err


def test_tasks_that_nobody_uses_are_named() -> None:
    assert "SLURM granted 4 tasks" in unused_tasks(this_job(SHELL), 1, SHELL)
    assert unused_tasks(this_job(SHELL), 4, SHELL) == ""
    assert unused_tasks(Job(), 1, {}) == ""
    assert unused_tasks(this_job(STEP), 1, STEP) == ""
