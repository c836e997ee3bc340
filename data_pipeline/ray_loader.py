"""The loader's contract on Ray: the same batches in the same sequence, made by decoders on any number of nodes.

Design choices:
- A request is (step, rank): which decoder answers does not matter, since a batch is a pure function of its positions.
  One whose decoder dies or hangs, or whose answer is lost with a node, is asked of another. So nothing is lost, nothing
  comes twice, and nothing has to be remembered.
- Requests on their way or answered are at most three a decoder, and at most what `memory` bytes hold: a trainer that
  falls behind stops asking. A request goes to the decoder with the fewest that it has not answered yet.
- A request that ends several decoders one after the other is not tried for ever: it is named.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Generator, Iterable
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError

from data_pipeline.batch import Batch, BatchMaker, Share
from data_pipeline.errors import DataError, first_line
from data_pipeline.order import ReadingOrder
from data_pipeline.ray_pool import DEFAULT_TIMES, Hand, Parcel, Pool, Times

AHEAD = 3  # batches for each decoder that are asked for and not yet taken: one at work, one behind it, one ready
LOOK = 1.0  # seconds between two looks whether the decoder that is waited for is still there
ATTEMPTS = 8  # of one request; kills of decoders at random do not come so often to the same one
MEMORY = 1 << 30


@dataclass
class _Request:
    """A batch that is being made: by whom, and how often that has failed."""

    step: int
    hand: Hand | None = None
    answer: Any = None
    answered: bool = False  # as far as has been looked
    failures: list[str] = field(default_factory=list)


class RayLoader:
    """The batches of one rank, for steps start_step .. stop_step - 1, as `Loader` gives them.

    `pool` names the decoders; all ranks of a job give the same name and settings, and no other job gives it. This
    process must be connected to Ray (ray_cluster.connect). `decoders` are kept alive, up to `most_decoders` while ranks
    wait for data; `memory` bounds the bytes of images that are made in advance, a rank. Where several processes read
    the same share, `process` of `processes` says which this is; default: rank of world.
    Raises ValueError as `Loader` does; iterating raises DataError when data is bad or no decoder can be had.
    """

    def __init__(
        self,
        maker: BatchMaker,
        order: ReadingOrder,
        *,
        pool: str,
        global_batch: int,
        rank: int = 0,
        world: int = 1,
        process: int | None = None,
        processes: int | None = None,
        decoders: int = 1,
        most_decoders: int = 0,
        memory: int = MEMORY,
        times: Times = DEFAULT_TIMES,
        start_step: int = 0,
        stop_step: int,
        pin: bool = False,
    ) -> None:
        if decoders < 1:
            raise ValueError(f"decoders is {decoders}: give 1 or more")
        self.steps = range(start_step, stop_step)
        self._share = Share(maker, order, global_batch, rank, world)
        self._pool_settings = (
            pool,
            maker,
            order,
            rank if process is None else process,
            processes or world,
            decoders,
            most_decoders,
            times,
        )
        self._most_ahead = max(1, memory // max(1, self._share.image_bytes))
        self._pin = pin
        self.pool: Pool | None = None  # while it is being iterated

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Generator[Batch, None, None]:
        pool = self.pool = Pool(*self._pool_settings)
        requests: deque[_Request] = deque()
        try:
            ahead = iter(self.steps)
            for _ in self.steps:
                while len(requests) < max(1, min(AHEAD * pool.size, self._most_ahead)):
                    step = next(ahead, None)
                    if step is None:
                        break
                    self._look(pool, requests)
                    requests.append(_Request(step))
                    self._ask(pool, requests[-1])
                began = time.monotonic()
                batch = self._receive(pool, requests[0])
                pool.waited += time.monotonic() - began
                requests.popleft()
                yield batch.pin_memory() if self._pin else batch
        finally:
            self.pool = None
            pool.leave()

    @staticmethod
    def _look(pool: Pool, requests: Iterable[_Request]) -> None:
        """Note which requests have been answered: their decoders are free for others."""
        open_ones = {request.answer: request for request in requests if not request.answered}
        if open_ones:
            for answer in ray.wait(list(open_ones), num_returns=len(open_ones), timeout=0)[0]:
                request = open_ones[answer]
                assert request.hand is not None
                request.answered = True
                pool.done(request.hand)

    def _ask(self, pool: Pool, request: _Request) -> None:
        """Send a request to a decoder; DataError when it has failed too often."""
        share = self._share
        if len(request.failures) == ATTEMPTS:
            first = request.step * share.global_batch + share.rank * share.rows
            raise DataError(
                f"step {request.step}, positions {first} to {first + share.rows - 1} of {share.maker.dataset.folder}: "
                f"{ATTEMPTS} decoders in a row could not make it; the last: {request.failures[-1]}"
            )
        request.hand, request.answered = pool.pick(), False
        make = request.hand.actor.make
        request.answer = make.remote(request.step, share.global_batch, share.rank, share.world)
        ray.wait([request.answer], timeout=0, fetch_local=True)  # begins to bring it here as soon as it is made

    def _receive(self, pool: Pool, request: _Request) -> Batch:
        """The batch of a request, from this decoder or another."""
        while True:
            assert request.hand is not None
            failure = ""
            try:
                parcel: Parcel | DataError | OSError = ray.get(request.answer, timeout=LOOK)
            except GetTimeoutError:
                if pool.has(request.hand):
                    continue
                failure = "it hangs, or its node is gone"
            except RayTaskError:
                raise  # a mistake of ours, not of a machine
            except RayError as error:
                failure = first_line(error)
            if not request.answered:
                pool.done(request.hand)
            if failure:
                request.failures.append(failure)
                pool.drop(request.hand)
                self._ask(pool, request)
            elif isinstance(parcel, Exception):
                raise parcel
            else:
                return parcel.open()
