"""Decoders on Ray: processes that make batches on any node, and a coordinator that keeps enough of them alive.

    connect("local")                                            # ray_cluster.py
    pool = Pool("weft-1", maker, order, 0, 1, decoders=2)    # on each training rank, under the same name
    decoder = pool.pick(); ref = decoder.actor.make.remote(...)
    pool.leave()                                                # the last rank to leave ends the pool

Design choices:
- Nobody here holds anything that could be lost. A decoder is (maker, order) and open files. The coordinator is in no
  batch's way: it starts decoders, drops dead ones, tells ranks which are there, and adds one when ranks wait for data.
- Ranks send their requests straight to decoders, whole batches at a time; a round trip through Ray takes a millisecond.
- Each actor lives by a lease. Every rank reports once a second, the coordinator asks every decoder as often, and who
  hears nothing for so long ends: a job that is killed leaves no actor in a cluster that goes on.
- A decoder answers whether it is alive beside its work. So one that hangs is told from one that has much to do.
- A coordinator that dies is made again by the next rank that misses it, under the same name, and adopts the decoders.
- Batches lie in Ray's object store: a rank on the decoder's node reads them there, without a copy.
"""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import torch
from ray.exceptions import GetTimeoutError, RayError

from data_pipeline.batch import Batch, BatchMaker, Corrupt, Share
from data_pipeline.errors import DataError
from data_pipeline.order import ReadingOrder
from data_pipeline.ray_cluster import NAMESPACE, before_leaving

PERIOD = 1.0  # seconds between two reports of a rank
ANSWER = 20.0  # seconds that the coordinator has for an answer, before another is made
START = 120.0  # seconds within which a first decoder must have started
BUSY = 0.05  # share of its time that a rank may wait for data before a decoder is added
GROWTH = 3.0  # seconds between two decoders that are added
_remote: Any = ray.remote  # whose types do not know all of its settings


@dataclass(frozen=True)
class Times:
    """Seconds of silence after which an actor ends, and after which a decoder that does not answer is dropped."""

    lease: float = 60.0
    silence: float = 20.0


DEFAULT_TIMES = Times()


@dataclass
class Parcel:
    """A batch on its way. Its images are contiguous [b, H, W, 3], so that Ray stores them as they are."""

    image: np.ndarray
    others: dict[str, np.ndarray]  # the other tensors of the batch, by name
    corrupt: list[Corrupt]

    @classmethod
    def pack(cls, batch: Batch) -> Parcel:
        """In the decoder."""
        others = {name: tensor.numpy() for name, tensor in batch.tensors().items() if name != "image"}
        return cls(batch.image.permute(0, 2, 3, 1).numpy(), others, batch.corrupt)

    def open(self) -> Batch:
        """In the trainer. Images and sounds are those in the object store: they must not be written to."""
        image, audio = _as_tensor(self.image).permute(0, 3, 1, 2), _as_tensor(self.others["audio"])
        small = {name: torch.from_numpy(array.copy()) for name, array in self.others.items() if name != "audio"}
        return Batch(image=image, audio=audio, corrupt=self.corrupt, **small)


def _as_tensor(array: np.ndarray) -> torch.Tensor:
    """The same memory; torch would warn of one that is read-only, which a tensor cannot be."""
    if array.flags.writeable or not array.size:
        return torch.from_numpy(array if array.size else array.copy())
    address, _ = array.__array_interface__["data"]
    interface = {"shape": array.shape, "typestr": array.dtype.str, "data": (address, False), "version": 3}
    return torch.from_numpy(np.asarray(_Lent(array, interface)))


@dataclass
class _Lent:
    """What numpy makes an array of, and keeps for as long as that lives."""

    owner: np.ndarray
    __array_interface__: dict[str, Any]


class Decoder:
    """An actor that makes batches."""

    def __init__(self, maker: BatchMaker, order: ReadingOrder, lease: float) -> None:
        torch.set_num_threads(1)
        self._maker, self._order = maker, order
        self._images = torch.empty(0, dtype=torch.uint8)  # used again: what is sent is copied into the object store
        self._lease = _Lease(lease)

    def make(self, step: int, global_batch: int, rank: int, world: int) -> Parcel | DataError | OSError:
        """The batch of a step for one of `world` ranks; an error about the data as a value."""
        with self._lease.at_work():
            share = Share(self._maker, self._order, global_batch, rank, world)
            if self._images.numel() < share.image_bytes:
                self._images = torch.empty(share.image_bytes, dtype=torch.uint8)
            try:
                return Parcel.pack(share.batch(step, self._images))
            except (DataError, OSError) as error:
                return error.with_traceback(None)

    @ray.method(concurrency_group="beside")
    def ping(self) -> tuple[str, int]:
        """(node, process id) of a decoder that is alive."""
        with self._lease.at_work():
            return ray.get_runtime_context().get_node_id(), os.getpid()


class _Lease:
    """Ends this process when nothing was asked of it for so many seconds."""

    def __init__(self, seconds: float) -> None:
        self._seconds, self._last, self._working = seconds, time.monotonic(), 0
        self._counting = threading.Lock()  # work and pings are on different threads
        threading.Thread(target=self._watch, daemon=True).start()

    def at_work(self) -> _Lease:
        return self

    def __enter__(self) -> None:
        with self._counting:
            self._working += 1

    def __exit__(self, *_: object) -> None:
        with self._counting:
            self._working -= 1
            self._last = time.monotonic()

    def _watch(self) -> None:
        while self._working or time.monotonic() - self._last < self._seconds:
            time.sleep(PERIOD)
        os._exit(0)


class Coordinator:
    """An actor that keeps `least` decoders alive, and up to `most` while ranks wait for data."""

    def __init__(self, pool: str, maker: BatchMaker, order: ReadingOrder, least: int, most: int, times: Times) -> None:
        self._pool, self._source, self._silence = pool, (maker, order, times.lease), times.silence
        self._wanted, self._most = least, max(least, most)
        self._lease = _Lease(times.lease)
        self._grown = time.monotonic()
        self._left: set[int] = set()
        self._pings: dict[str, tuple[Any, Any, float]] = {}  # name -> (actor, ping on its way, when it was sent)
        self._nodes: dict[str, str] = {}  # name -> node, of those that have answered
        for name in ray.util.list_named_actors():  # of a coordinator before this one
            if name.startswith(f"{pool}/decoder-"):
                self._adopt(name)
        self._next = 1 + max((int(name.rpartition("-")[2]) for name in self._pings), default=-1)

    def report(self, process: int, waited: float, lost: list[str]) -> dict[str, str]:
        """What a process tells: the share of its time it waited, decoders that failed it. Returns nodes by decoder."""
        with self._lease.at_work():
            self._left.discard(process)
            for name in lost:
                self._drop(name)
            self._look_after()
            if waited > BUSY and len(self._nodes) == self._wanted < self._most:
                self.want(self._wanted + 1, growth=GROWTH)
            return dict(self._nodes)

    def want(self, decoders: int, growth: float = 0.0) -> None:
        """Have so many decoders from now on, unless one was added less than `growth` seconds ago."""
        if time.monotonic() - self._grown >= growth:
            self._wanted, self._most = decoders, max(decoders, self._most)
            self._grown = time.monotonic()
            self._look_after()

    def leave(self, process: int, processes: int) -> bool:
        """A process needs nothing more; when all have left, the decoders end and True asks the caller to end this."""
        self._left.add(process)
        if len(self._left) < processes:
            return False
        for actor, *_ in self._pings.values():
            ray.kill(actor)
        return True

    def process(self) -> int:
        """This actor's process id."""
        return os.getpid()

    def _look_after(self) -> None:
        for name, (actor, ping, sent) in list(self._pings.items()):
            if not ray.wait([ping], timeout=0)[0]:
                if time.monotonic() - sent > (self._silence if name in self._nodes else START):
                    self._drop(name)
                continue
            try:
                self._nodes[name] = ray.get(ping)[0]
            except RayError:
                self._drop(name)
            else:
                self._ping(name, actor)
        while len(self._pings) < self._wanted:
            name = f"{self._pool}/decoder-{self._next}"
            self._next += 1
            options = {"name": name, "namespace": NAMESPACE, "lifetime": "detached", "scheduling_strategy": "SPREAD"}
            decoder = _remote(num_cpus=1, max_restarts=0, concurrency_groups={"beside": 1})(Decoder)
            self._ping(name, decoder.options(**options).remote(*self._source))

    def _adopt(self, name: str) -> None:
        try:
            actor = ray.get_actor(name, NAMESPACE)
        except ValueError:  # it has gone meanwhile
            return
        self._nodes[name] = ""  # taken for alive until its ping says more
        self._ping(name, actor)

    def _ping(self, name: str, actor: Any) -> None:
        self._pings[name] = (actor, actor.ping.remote(), time.monotonic())

    def _drop(self, name: str) -> None:
        self._nodes.pop(name, None)
        if name in self._pings:
            ray.kill(self._pings.pop(name)[0])  # it may only hang


@dataclass(frozen=True)
class Hand:
    """A decoder as a rank knows it."""

    name: str
    actor: Any


class Pool:
    """What one process knows of the pool `name`; made with the same arguments on each of `processes` processes."""

    def __init__(
        self,
        name: str,
        maker: BatchMaker,
        order: ReadingOrder,
        process: int,
        processes: int,
        decoders: int,
        most: int = 0,
        times: Times = DEFAULT_TIMES,
    ) -> None:
        self._name, self._process, self._processes = name, process, processes
        self._arguments = (name, maker, order, decoders, most, times)
        self._hands: dict[str, Hand] = {}
        self._near: set[str] = set()  # those on this node
        self._asked: Counter[str] = Counter()  # requests on their way, by decoder
        self._lost: list[str] = []
        self._changed = threading.Condition()
        self._ended = threading.Event()
        self.waited = 0.0  # seconds that this rank has waited for data
        self._node = ray.get_runtime_context().get_node_id()
        self._coordinator = self._make_coordinator()
        self._reporter = threading.Thread(target=self._report, name="ray pool", daemon=True)
        self._reporter.start()
        before_leaving.append(self._end_reporter)

    @property
    def size(self) -> int:
        """Decoders that this rank knows."""
        return len(self._hands)

    def pick(self) -> Hand:
        """The decoder with the fewest of this rank's requests, on this node if there is a choice.

        Waits for one to start; DataError when none has within START seconds.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._hands, timeout=START):
                free, all_of = (each().get("CPU", 0) for each in (ray.available_resources, ray.cluster_resources))
                raise DataError(
                    f"no decoder has started within {START:.0f} s: {free:g} of Ray's {all_of:g} processors are free"
                )
            name = min(self._hands, key=lambda each: (self._asked[each], each not in self._near))
            self._asked[name] += 1
            return self._hands[name]

    def has(self, hand: Hand) -> bool:
        """Whether this decoder is still thought to be alive."""
        return hand.name in self._hands

    def done(self, hand: Hand) -> None:
        """A request to this decoder has been answered."""
        self._asked[hand.name] -= 1

    def drop(self, hand: Hand) -> None:
        """This decoder is dead: no more requests to it, and the coordinator starts another."""
        with self._changed:
            if self._hands.pop(hand.name, None):
                self._lost.append(hand.name)

    def want(self, decoders: int) -> None:
        """Have so many decoders from now on."""
        ray.get(self._coordinator.want.remote(decoders), timeout=ANSWER)

    def leave(self) -> None:
        """This rank needs no more batches."""
        self._end_reporter()
        with suppress(ValueError):  # of a Ray that has been left
            before_leaving.remove(self._end_reporter)
        try:
            if ray.get(self._coordinator.leave.remote(self._process, self._processes), timeout=ANSWER):
                ray.kill(self._coordinator)
        except RayError:
            pass  # it is gone, and its decoders' leases will end

    def _end_reporter(self) -> None:
        self._ended.set()
        self._reporter.join()

    def _make_coordinator(self) -> Any:
        options = {"name": f"{self._name}/coordinator", "namespace": NAMESPACE, "lifetime": "detached"}
        actor = _remote(num_cpus=0, max_restarts=0)(Coordinator)
        return actor.options(get_if_exists=True, **options).remote(*self._arguments)

    def _report(self) -> None:
        """In a thread: once a second, so that leases go on while the trainer evaluates or saves."""
        waited_before, then = self.waited, time.monotonic()
        while not self._ended.is_set():
            with self._changed:
                lost, self._lost = self._lost, []
            waited, now = self.waited, time.monotonic()
            share = (waited - waited_before) / max(now - then, 1e-3)
            waited_before, then = waited, now
            try:
                nodes = ray.get(self._coordinator.report.remote(self._process, share, lost), timeout=ANSWER)
            except Exception as error:  # it is dead, or hangs, or Ray itself is in trouble: another is made
                with self._changed:
                    self._lost += lost
                with suppress(Exception):
                    if isinstance(error, GetTimeoutError):
                        ray.kill(self._coordinator)
                self._ended.wait(PERIOD / 4)  # a name is free again a moment after a death
                with suppress(Exception):  # tried as often as it takes
                    self._coordinator = self._make_coordinator()
                continue
            self._learn(nodes)
            self._ended.wait(PERIOD if nodes else PERIOD / 10)

    def _learn(self, nodes: dict[str, str]) -> None:
        with self._changed:
            known = {name: hand for name, hand in self._hands.items() if name in nodes}
            for name in nodes.keys() - known.keys() - set(self._lost):
                try:
                    known[name] = Hand(name, ray.get_actor(name, NAMESPACE))
                except ValueError:  # it died between
                    continue
            self._hands, self._near = known, {name for name, node in nodes.items() if node == self._node}
            self._changed.notify_all()
