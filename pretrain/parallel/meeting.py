"""Where the ranks of a job meet before they have process groups: nobody waits for long, and everybody learns why.

torch's own rendezvous waits for a collective's timeout and then names nobody. Here each rank signs in at the store that
the job shares, and looks while it waits whether another has failed: a rank that cannot start (its data is missing, its
recipe is wrong) comes too, to say so. What process groups are made of is compared here, before there are any: ranks of
two layouts would wait in their groups for each other, and nobody would watch them.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch.distributed as dist

from data_pipeline.errors import first_line
from pretrain.errors import RequestError, WeftError
from pretrain.job import BY_HAND, Job, difference

# seconds that ranks of one machine may be apart when they begin: they import libraries, on disks and cores they share;
# train.watchdog, which is about steps, may be shorter
SLOWEST_START = 120.0
SPEAKS = 20.0  # seconds that a rank which has failed tries to tell the others
WHY = f"train.watchdog, or {SLOWEST_START:.0f} s where that is less"
LOOKS = 0.1  # seconds between two looks at who is there


def meet(job: Job, patience: float, same: Mapping[str, str] | None = None) -> dist.Store:
    """The store of all ranks, when every one of them is there and has the same.

    `same`: what must not differ, name and value; rank 0 compares. Raises WeftError on every rank when it does, when a
    rank has failed or is not there within `patience` seconds, RequestError when nothing says where the ranks meet.
    """
    end = time.monotonic() + patience
    store = _store(job, patience)
    try:
        store.set(f"rank {job.rank}", json.dumps(dict(same or {})))
        all_here = store.add("here", 1) == job.world
        while not store.check(["met"]):
            if store.check(["failed"]):
                said = store.get("failed").decode()
                _in_background(_heard, store, job, min(patience, SPEAKS))
                raise WeftError(said)
            all_here = all_here or store.add("here", 0) >= job.world
            if all_here and job.rank == 0:
                told = _differs(store, job)
                store.set("failed" if told else "met", told)
                continue
            if time.monotonic() > end + (SPEAKS if all_here else 0):
                missing = [rank for rank in range(job.world) if not store.check([f"rank {rank}"])] or [0]
                raise WeftError(_missing(missing, job, patience))
            time.sleep(LOOKS)
    except dist.DistError as error:
        raise WeftError(
            f"the connection to rank 0 at {job.address}:{job.port} was lost while the ranks met: see why rank 0 ended"
        ) from error
    return store


@contextmanager
def telling_others(job: Job, patience: float) -> Iterator[None]:
    """What fails inside is told to the ranks that wait in `meet`; in the background, so that it can be said at once."""
    try:
        yield
    except Exception as error:
        if job.is_one_of_several:
            said = f"rank {job.rank} on {socket.gethostname()}: {first_line(error)}"
            _in_background(_tell, job, said, min(patience, SPEAKS))
        raise


def _tell(job: Job, said: str, patience: float) -> None:
    with suppress(dist.DistError, WeftError):  # nobody is there to be told
        store = _store(job, patience)
        store.compare_set("failed", "", f"another rank could not start: {said}")
        _heard(store, job, patience)


def _differs(store: dist.Store, job: Job) -> str:
    """The sentence about what is not the same on all ranks, "" when all is."""
    everyone = [json.loads(each) for each in store.multi_get([f"rank {rank}" for rank in range(job.world)])]
    for name in everyone[0]:
        values = [str(each.get(name)) for each in everyone]
        if len(set(values)) > 1:
            return difference(name, values)
    return ""


def _heard(store: dist.Store, job: Job, patience: float) -> None:
    """This rank knows who has failed, and needs the store no more; who keeps it stays until all know."""
    end = time.monotonic() + patience
    with suppress(dist.DistError):
        store.add("heard", 1)
        while _keeps_store(job) and store.add("heard", 0) < job.world and time.monotonic() < end:
            time.sleep(LOOKS)


def _in_background(act: Callable[..., None], *its: object) -> None:
    """So that a failure can be said at once. No daemon: the process stays until the others know."""
    threading.Thread(target=act, args=its, name="tell").start()


def _store(job: Job, patience: float) -> dist.Store:
    if job.address is None or job.port is None:
        name = "MASTER_ADDR" if job.address is None else "MASTER_PORT"
        raise RequestError(f"WORLD_SIZE is {job.world}, but {name} is not set, where the ranks meet: {BY_HAND}")
    keeps = _keeps_store(job)
    if not keeps:
        _wait_for_listener(job.address, job.port, patience)
    try:
        store = dist.TCPStore(
            job.address, job.port, is_master=keeps, wait_for_workers=False, timeout=timedelta(seconds=patience)
        )
    except dist.DistError as error:
        told = first_line(error)
        way_out = "set another MASTER_PORT for all ranks" if keeps else "see why rank 0 ended"
        raise WeftError(
            f"the ranks cannot meet at {job.address}:{job.port}, where rank {job.rank} "
            f"{'cannot listen' if keeps else 'finds no store of rank 0'} ({told}): {way_out}"
        ) from error
    # torchrun's store outlives an attempt
    attempt = f"{os.environ.get('TORCHELASTIC_RUN_ID', '')}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '')}"
    return dist.PrefixStore(f"weft/{attempt}", store)


def _wait_for_listener(address: str, port: int, patience: float) -> None:
    """WeftError when rank 0 does not listen in time. A plain socket asks: torch writes a page about each failure."""
    end = time.monotonic() + patience
    while True:
        try:
            socket.create_connection((address, port), timeout=max(LOOKS, end - time.monotonic())).close()
            return
        except OSError as error:
            if time.monotonic() > end:
                raise WeftError(
                    f"no rank 0 was found at {address}:{port} within {patience:.0f} s ({WHY}; "
                    f"{first_line(error)}): see whether rank 0 was started, and why it ended"
                ) from error
        time.sleep(LOOKS)


def _keeps_store(job: Job) -> bool:
    """Whether this rank is the server; under torchrun its agent is."""
    return job.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"


def _missing(ranks: list[int], job: Job, patience: float) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return (
        f"rank{'s' if len(ranks) > 1 else ''} {shown} of {job.world} did not come within {patience:.0f} s "
        f"({WHY}): see whether every rank was started, and why it ended"
    )
