"""Which rank of which job this process is: alone, one of torchrun's or of our own launcher's, or a task of srun.

Design choices
- The environment is read here and nowhere else, once, and what contradicts itself is refused in one sentence: a
  process that takes itself for the only one, while there are others, overwrites what they do.
- torch's variables (RANK, WORLD_SIZE, ...) come first: a launcher inside a SLURM step sets them for its ranks.
- SLURM_NTASKS alone says nothing: it is also set in the shell of sbatch and salloc, where one process may well train
  alone or start ranks of its own. Only a step of several tasks makes ranks (SLURM_STEP_NUM_TASKS, SLURM_STEP_ID), and
  so does a task number above 0, which no such shell has.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pretrain.errors import RequestError

LAUNCHER = "WEFT_LAUNCHER"  # process id of our launcher, in the environment of its ranks
NOT_STEPS = {"4294967290", "4294967291", "4294967292"}  # SLURM's numbers of an interactive, batch and extern "step"
BY_HAND = "start the ranks with `weft train --nproc N`, torchrun or srun"


@dataclass(frozen=True)
class Job:
    """Where this process stands among those that were started with it."""

    rank: int = 0
    world: int = 1
    local_rank: int | None = None  # among those of its machine; None where nobody said
    local_world: int | None = None
    by: str = ""  # who started it, as a user would say it; empty: nobody, it is alone
    address: str | None = None  # where the ranks meet
    port: int | None = None

    @property
    def is_one_of_several(self) -> bool:
        return self.world > 1

    def announce(self) -> None:
        """Set the variables of torch, which DeepSpeed and torch read too, where SLURM's are what there is."""
        if self.by != "srun":
            return
        known = {
            "RANK": self.rank,
            "WORLD_SIZE": self.world,
            "LOCAL_RANK": self.local_rank,
            "LOCAL_WORLD_SIZE": self.local_world,
            "MASTER_ADDR": self.address,
            "MASTER_PORT": self.port,
        }
        os.environ.update({name: str(value) for name, value in known.items() if value is not None})


def this_job(environment: Mapping[str, str] | None = None) -> Job:
    """The job of this process. Raises RequestError for variables that contradict each other or are no numbers."""
    env = os.environ if environment is None else environment
    if "RANK" in env and "WORLD_SIZE" not in env:
        raise RequestError(f"RANK is {env['RANK']!r}, but WORLD_SIZE is not set: {BY_HAND}, or unset RANK")
    tasks = _slurm_tasks(env)
    if "WORLD_SIZE" not in env:
        return _from_slurm(env, tasks) if tasks > 1 else _alone(env)
    world = _number(env, "WORLD_SIZE", least=1)
    if "RANK" not in env:
        if tasks > 1:
            raise RequestError(
                f"WORLD_SIZE is {world} without RANK, and srun started {tasks} tasks: unset WORLD_SIZE in its shell"
            )
        if world > 1:
            raise RequestError(f"WORLD_SIZE is {world}, but RANK is not set: {BY_HAND}, or unset WORLD_SIZE")
        return Job()
    rank = _number(env, "RANK")
    if rank >= world:
        raise RequestError(f"RANK is {rank}, but the ranks of WORLD_SIZE={world} are 0 to {world - 1}: {BY_HAND}")
    local_world = _number(env, "LOCAL_WORLD_SIZE", least=1) if "LOCAL_WORLD_SIZE" in env else None
    local_rank = _number(env, "LOCAL_RANK") if "LOCAL_RANK" in env else None
    if local_world is not None and local_world > world:
        raise RequestError(f"LOCAL_WORLD_SIZE is {local_world}, more than WORLD_SIZE={world}: {BY_HAND}")
    if local_rank is not None and local_rank >= (local_world or world):
        raise RequestError(f"LOCAL_RANK is {local_rank}, but only {local_world or world} ranks are here: {BY_HAND}")
    port = _number(env, "MASTER_PORT", least=1, most=65535) if env.get("MASTER_PORT") else None
    by = "weft" if LAUNCHER in env else "srun" if tasks == world > 1 else "a launcher"
    return Job(rank, world, local_rank, local_world, by, env.get("MASTER_ADDR") or None, port)


def refuse_ranks_of_ranks(job: Job, nproc: int) -> None:
    """RequestError for `--nproc` in a process that is one of several ranks already, or was told that it is the one."""
    if nproc == 1 or job.by == "weft":
        return
    if job.is_one_of_several and nproc != (job.local_world or job.world):
        raise RequestError(
            f"--nproc is {nproc}, but {job.by} has started this process as rank {job.rank} of {job.world}: "
            "leave out --nproc, or let weft start the ranks"
        )
    if not job.is_one_of_several and "WORLD_SIZE" in os.environ:
        raise RequestError(
            f"--nproc is {nproc}, but WORLD_SIZE=1 says that this process is the only one: unset WORLD_SIZE (and RANK)"
        )


def unused_tasks(job: Job, nproc: int, environment: Mapping[str, str] | None = None) -> str:
    """A hint where SLURM granted several tasks and this process trains alone; else an empty string."""
    env = os.environ if environment is None else environment
    tasks = env.get("SLURM_NTASKS", "1")
    if job.by or nproc > 1 or "SLURM_STEP_NUM_TASKS" in env or not tasks.isdecimal() or int(tasks) < 2:
        return ""
    return f"SLURM granted {tasks} tasks, and this process trains alone: start it with srun, or use --nproc {tasks}"


def _slurm_tasks(env: Mapping[str, str]) -> int:
    """How many tasks srun started in this step; 1 outside of one."""
    if "SLURM_STEP_NUM_TASKS" in env:
        return _number(env, "SLURM_STEP_NUM_TASKS", least=1)
    step = env.get("SLURM_STEP_ID", env.get("SLURM_STEPID"))
    in_step = step is not None and step not in NOT_STEPS
    beyond_shell = env.get("SLURM_PROCID", "0") != "0"
    if not (in_step or beyond_shell):
        return 1
    name = next((each for each in ("SLURM_NTASKS", "SLURM_NPROCS") if each in env), None)
    if name is None:
        if in_step and not beyond_shell:
            return 1
        raise RequestError(
            f"SLURM_PROCID is {env['SLURM_PROCID']!r}, but SLURM_NTASKS is not set: start ranks with srun"
        )
    return _number(env, name, least=1)


def _from_slurm(env: Mapping[str, str], tasks: int) -> Job:
    if "SLURM_PROCID" not in env:
        raise RequestError(f"srun started {tasks} tasks, but SLURM_PROCID is not set: start the ranks with srun")
    rank = _number(env, "SLURM_PROCID")
    if rank >= tasks:
        raise RequestError(f"SLURM_PROCID is {rank}, but the tasks of this step are 0 to {tasks - 1}: use srun -n")
    nodes = next(
        (env[name] for name in ("SLURM_STEP_NODELIST", "SLURM_NODELIST", "SLURM_JOB_NODELIST") if env.get(name)), ""
    )
    local_world = _tasks_here(env)
    if env.get("MASTER_ADDR"):
        address = env["MASTER_ADDR"]
    elif local_world == tasks:  # all on this machine
        address = "127.0.0.1"
    elif nodes:
        address = first_node(nodes)
    else:
        raise RequestError(
            f"srun started {tasks} tasks, but neither MASTER_ADDR nor SLURM_STEP_NODELIST says where they meet: "
            "set MASTER_ADDR to the machine of task 0"
        )
    if env.get("MASTER_PORT"):
        port = _number(env, "MASTER_PORT", least=1, most=65535)
    else:  # the same on all tasks, another for another step
        job, step = (re.sub(r"\D", "", env.get(name, "")) or "0" for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
        port = 20000 + (int(job) * 31 + int(step)) % 12000
    local_rank = _number(env, "SLURM_LOCALID") if env.get("SLURM_LOCALID") else None
    return Job(rank, tasks, local_rank, local_world, "srun", address, port)


def first_node(nodes: str) -> str:
    """The first name of SLURM's list of them: "gpu[003-004,9],cpu1" gives "gpu003"."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes.strip())
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first[0] if first else nodes)


def _tasks_here(env: Mapping[str, str]) -> int | None:
    """How many tasks of the step this machine has: entry SLURM_NODEID of a list such as "4(x2),3"."""
    told = env.get("SLURM_STEP_TASKS_PER_NODE", env.get("SLURM_TASKS_PER_NODE", ""))
    counts: list[int] = []
    for part in told.split(","):
        if not (found := re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())):
            return None
        counts += [int(found[1])] * int(found[2] or 1)
    node = env.get("SLURM_NODEID", "0")
    return counts[int(node)] if node.isdecimal() and int(node) < len(counts) else None


def _alone(env: Mapping[str, str]) -> Job:
    for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"):
        if env.get(name, "1").isdecimal() and int(env.get(name, "1")) > 1:
            raise RequestError(
                f"{name} says that mpirun started {env[name]} processes, but weft does not read its variables: "
                f"{BY_HAND}"
            )
    return Job()


def _number(env: Mapping[str, str], name: str, least: int = 0, most: int | None = None) -> int:
    text = env[name]
    allowed = f"a whole number, at least {least}" if most is None else f"a whole number from {least} to {most}"
    if not (text.isascii() and text.isdecimal()) or int(text) < least or (most is not None and int(text) > most):
        raise RequestError(
            f"the environment variable {name} is {text!r}, but it must be {allowed}: set it, or unset it"
        )
    return int(text)


def ranks_in_words(numbers: Sequence[int]) -> str:
    """ "rank 2", "ranks 0, 1, 3", "ranks 4-7": three and more in a row are shortened."""
    rows: list[list[int]] = []
    for number in numbers:
        if rows and number == rows[-1][-1] + 1:
            rows[-1].append(number)
        else:
            rows.append([number])
    parts = [f"{row[0]}-{row[-1]}" if len(row) > 2 else ", ".join(map(str, row)) for row in rows]
    return ("ranks " if len(numbers) > 1 else "rank ") + ", ".join(parts)


def difference(name: str, values: Sequence[str]) -> str:
    """The sentence about ranks that do not have the same; `values`: what each has, rank 0 first."""
    ranks_of: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        ranks_of.setdefault(value, []).append(rank)
    told = ", ".join(f"{value} on {ranks_in_words(ranks)}" for value, ranks in ranks_of.items())
    chosen = ", and the same layout.memory_gib where layout.auto chooses" if "layout" in name else ""
    return f"the ranks differ in {name}: {told}; give every rank the same{chosen}"
