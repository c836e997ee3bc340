"""The source of the Gluon attention kernel, run on a model of what it is written for.

Barriers with phases, a copy engine that finishes when it likes, matrix products that read their operands when they
like, three groups of warps that take turns in an order drawn from a seed. Results are held against fp64; a wait too
few shows as a race, one too many as a standstill.
"""

from __future__ import annotations

import math
import random
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from kernels.gpu import attention_gluon

SOURCE = Path(attention_gluon.__file__).read_text()
KERNEL_SOURCE = SOURCE[SOURCE.index("@gluon.jit") : SOURCE.index("def forward(")]


# --- a model of the machine


class StandstillError(Exception):
    """Everyone waits."""


class RaceError(Exception):
    """Something was read that another was still writing, or used before it was there."""


class Tile(np.ndarray):
    type = SimpleNamespace(layout=None)

    def to(self, dtype: Any) -> Any:
        return self.astype(dtype)


def tile(values: Any) -> Tile:
    return np.array(values).view(Tile)


class Shared:
    """Shared memory, or a view of it; what nobody has written is NaN."""

    def __init__(self, values: np.ndarray) -> None:
        self.values = values
        self.dtype = values.dtype

    def index(self, place: int) -> Any:
        return Shared(self.values[place]) if isinstance(self.values, np.ndarray) else self.values[place]

    def reshape(self, shape: list[int]) -> Shared:
        view = self.values.reshape(shape)
        assert np.shares_memory(view, self.values)
        return Shared(view)

    def permute(self, order: tuple[int, ...]) -> Shared:
        return Shared(self.values.transpose(order))

    def store(self, values: np.ndarray) -> None:
        MACHINE.unfenced = True
        self.values[...] = values


class Barrier:
    """Phase n is over when `count` arrivals and all expected bytes have come."""

    def __init__(self) -> None:
        self.count = self.missing = self.bytes = self.phases = 0

    def arrive(self) -> None:
        if not self.count or not self.missing:
            raise RaceError("an arrival at a barrier that expects none")
        self.missing -= 1
        self.settle()

    def settle(self) -> None:
        if not self.missing and not self.bytes:
            self.phases += 1
            self.missing = self.count


class Barriers:
    dtype = None

    def __init__(self, number: int) -> None:
        self.all = [Barrier() for _ in range(number)]

    def index(self, place: int) -> Barrier:
        return self.all[place]


class Source:
    """A tensor and its block, for the copy engine."""

    layout = None

    def __init__(self, values: np.ndarray, rows: int) -> None:
        self.values, self.block = values, (1, 1, rows, values.shape[3])
        self.dtype = values.dtype
        self.block_type = SimpleNamespace(nbytes=math.prod(self.block) * values.itemsize)

    def inside(self, where: list[int]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        """(the part of the tensor under a block, the part of the block that lies in the tensor)."""
        ends = [min(at + size, limit) for at, size, limit in zip(where, self.block, self.values.shape, strict=True)]
        spans = [max(end - at, 0) for at, end in zip(where, ends, strict=True)]
        return tuple(slice(at, at + n) for at, n in zip(where, spans, strict=True)), tuple(slice(0, n) for n in spans)


class Product:
    """A matrix product in flight: its operands are read once when it starts and once when it is waited for."""

    def __init__(self, left: Any, right: Any, start: Any) -> None:
        self.operands = (left, right)
        self.start = start
        self.early = self.compute()
        self.result: Tile | None = None

    def compute(self) -> np.ndarray:
        left, right = (each.values if isinstance(each, Shared) else each for each in self.operands)
        return self.start + left @ right

    def finish(self) -> None:
        late = self.compute()
        if not np.array_equal(self.early, late) or np.isnan(late).any():
            raise RaceError("an operand changed while a product read it")
        self.result = tile(late)


class Worker:
    def __init__(self, machine: Machine, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        self.go, self.ready, self.done = threading.Semaphore(0), lambda: True, False
        self.products: list[Product] = []
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self.run, args=(machine, function, arguments), daemon=True)
        self.thread.start()

    def run(self, machine: Machine, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        self.go.acquire()
        try:
            if not machine.stopped:
                function(*arguments)
        except BaseException as error:
            self.error = error
        self.done = True
        machine.back.release()


class Machine:
    """One program. Workers run one at a time, up to their next event; who comes next is drawn."""

    def __init__(self, program: int, seed: int) -> None:
        self.program, self.random = program, random.Random(seed)
        self.back, self.stopped, self.unfenced = threading.Semaphore(0), False, False
        self.copies: list[Callable[[], None]] = []
        self.current: Any = None

    def pause(self, ready: Callable[[], bool] = lambda: True) -> None:
        worker = self.current
        worker.ready = ready
        self.back.release()
        worker.go.acquire()
        if self.stopped:
            raise StandstillError
        self.current = worker

    def specialize(self, works: list[tuple[Callable[..., Any], tuple[Any, ...]]], *_: Any) -> None:
        workers = [Worker(self, *work) for work in works]
        try:
            while alive := [worker for worker in workers if not worker.done]:
                choices = [worker for worker in alive if worker.ready()] + self.copies
                if not choices:
                    raise StandstillError(f"{len(alive)} wait for ever")
                chosen = self.random.choice(choices)
                if isinstance(chosen, Worker):
                    self.current = chosen
                    chosen.go.release()
                    self.back.acquire()
                    if chosen.error:
                        raise chosen.error
                else:
                    self.copies.remove(chosen)
                    chosen()
        finally:
            self.stopped = True
            for worker in workers:
                worker.go.release()
                worker.thread.join()
        if self.copies:
            raise RaceError("the program ended before its copies")


MACHINE: Machine  # the one that runs


def init(barrier: Barrier, count: int) -> None:
    MACHINE.unfenced = True
    barrier.count = barrier.missing = count


def expect(barrier: Barrier, size: int) -> None:
    MACHINE.pause()
    barrier.bytes += size
    barrier.arrive()


def arrive(barrier: Barrier) -> None:
    MACHINE.pause()
    barrier.arrive()


def wait(barrier: Barrier, parity: int, pred: bool = True) -> None:
    if pred:
        MACHINE.pause(lambda: barrier.phases & 1 != parity)


def load(source: Source, where: list[int], barrier: Barrier, target: Shared) -> None:
    MACHINE.pause()
    if MACHINE.unfenced:
        raise RaceError("the copy engine may not see what was written")
    assert target.values.shape == source.block
    target.values[...] = np.nan

    def finish() -> None:
        theirs, ours = source.inside(where)
        target.values[...] = 0
        target.values[ours] = source.values[theirs]
        barrier.bytes -= source.block_type.nbytes
        barrier.settle()

    MACHINE.copies.append(finish)


def store(target: Source, where: list[int], source: Shared) -> None:
    if MACHINE.unfenced:
        raise RaceError("the copy engine may not see what was written")
    assert source.values.shape == target.block
    theirs, ours = target.inside(where)
    target.values[theirs] = source.values[ours]


def start_product(left: Any, right: Shared, start: Any, use_acc: bool = True, is_async: bool = False) -> Product:
    assert is_async
    MACHINE.pause()
    product = Product(left, right, start if use_acc else 0)
    MACHINE.current.products.append(product)
    return product


def wait_products(outstanding: int, deps: list[Any]) -> Any:
    MACHINE.pause()
    running = MACHINE.current.products
    while len(running) > outstanding:
        running.pop(0).finish()
    results = [each.result if isinstance(each, Product) else each for each in deps]
    if any(each is None for each in results):
        raise RaceError("a product is used before it is done")
    return results[0] if len(results) == 1 else tuple(results)


class Pointer:
    def __init__(self, values: np.ndarray, at: Any = 0) -> None:
        self.values, self.at = values, at

    def __add__(self, more: Any) -> Pointer:
        return Pointer(self.values, self.at + more)


def write(pointer: Pointer, values: np.ndarray, mask: np.ndarray) -> None:
    pointer.values[pointer.at[mask]] = values[mask]


def fence() -> None:
    MACHINE.unfenced = False


def allocate(dtype: Any, shape: list[int], _: Any) -> Any:
    return Barriers(shape[0]) if dtype is int else Shared(np.full(shape, np.nan, dtype))


def nothing(*_: Any, **__: Any) -> None:
    pass


def build(rows: int, change: tuple[str, str] = ("", "")) -> Callable[..., None]:
    """The kernel's own source as plain Python over the model; `change`: a text in it and what replaces it."""
    assert not change[0] or KERNEL_SOURCE.count(change[0]) >= 1
    language = SimpleNamespace(
        constexpr=None, static_assert=nothing, int64=int, float32=np.float64, static_range=range,
        program_id=lambda _: MACHINE.program, cdiv=lambda a, b: -(a // -b), where=lambda *each: tile(np.where(*each)),
        minimum=np.minimum, maximum=np.maximum, max=lambda x, axis: x.max(axis), sum=lambda x, axis: x.sum(axis),
        exp2=np.exp2, log2=np.log2,
        arange=lambda start, end, layout: tile(np.arange(start, end)), cast=lambda value, dtype: dtype(value),
        full=lambda shape, value, dtype, layout: tile(np.full(shape, value, dtype)),
        zeros=lambda shape, dtype, layout: tile(np.zeros(shape, dtype)), convert_layout=lambda value, layout: value,
        NVMMADistributedLayout=nothing, DotOperandLayout=nothing, SliceLayout=nothing, store=write,
        allocate_shared_memory=allocate, warp_specialize=lambda *each: MACHINE.specialize(*each),
    )  # fmt: skip
    names = dict(
        gluon=SimpleNamespace(jit=lambda function=None, **_: function or (lambda each: each)), gl=language,
        mbarrier=SimpleNamespace(init=init, expect=expect, arrive=arrive, wait=wait, MBarrierLayout=nothing),
        tma=SimpleNamespace(
            async_copy_global_to_shared=load, async_copy_shared_to_global=store, store_wait=nothing,
        ),
        warpgroup_mma=start_product, warpgroup_mma_wait=wait_products, fence_async_shared=fence, SIZES=[],
        ROWS=rows, GROUPS=2,
    )  # fmt: skip
    exec(compile(KERNEL_SOURCE.replace(*change), attention_gluon.__file__, "exec"), names)
    return names["attention_gluon_kernel"]


def run(
    shape: tuple[int, int, int, int, int], causal: bool, seed: int, stages: int = 2, change: tuple[str, str] = ("", "")
) -> None:
    """All programs of a call with tiles of 4 rows and 4 keys, held against fp64."""
    global MACHINE
    batch, heads, kv_heads, queries, keys = shape
    size, rows, step = 8, 4, 4
    numbers = np.random.default_rng(seed)
    q = numbers.normal(size=(batch, heads, queries, size))
    k, v = (numbers.normal(size=(batch, kv_heads, keys, size)) for _ in range(2))
    out, lse = np.full_like(q, np.nan), np.full(batch * heads * queries + 8, np.nan)
    kernel = build(rows, change)
    for program in range(batch * heads * -(queries // -(2 * rows))):
        MACHINE = Machine(program, 1000 * seed + program)
        kernel(
            Source(q, rows), Source(k, step), Source(v, step), Source(out, rows), Pointer(lse),
            heads, heads // kv_heads, queries, keys, 0.3 * math.log2(math.e), size, step, stages, causal,
        )  # fmt: skip
    k, v = (each.repeat(heads // kv_heads, 1) for each in (k, v))
    scores = 0.3 * q @ k.swapaxes(2, 3)
    if causal:
        scores[..., ~np.tri(queries, keys, keys - queries, dtype=bool)] = -np.inf
    with np.errstate(divide="ignore"):
        true_lse = np.log(np.exp(scores).sum(-1))
    true_out = np.exp(scores - np.where(np.isinf(true_lse), 0, true_lse)[..., None]) @ v
    np.testing.assert_allclose(out, true_out, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(lse[:-8].reshape(true_lse.shape), true_lse, rtol=1e-12, atol=1e-12)
    assert np.isnan(lse[-8:]).all()


SHAPES = [  # samples, heads, heads of keys, queries, keys
    (1, 1, 1, 1, 1), (1, 1, 1, 8, 8), (2, 2, 1, 13, 7), (1, 4, 2, 5, 31), (2, 1, 1, 23, 19), (1, 1, 1, 17, 3),
    (1, 2, 2, 3, 12), (1, 1, 1, 16, 64),
]  # fmt: skip


@pytest.mark.parametrize("stages", [2, 3])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_source_is_right_in_any_order_of_events(
    shape: tuple[int, int, int, int, int], causal: bool, stages: int
) -> None:
    for seed in range(4):
        run(shape, causal, seed, stages)


def test_every_number_of_blocks_comes_to_an_end() -> None:
    for keys in range(1, 46, 4):
        for stages in (2, 3, 4):
            run((1, 1, 1, 8, keys), False, keys, stages)


MUTATIONS = {
    "free barriers wait for the wrong phase": ("& 1 ^ 1", "& 1"),
    "values are never given back": ("mbarrier.arrive(v_free.index((turn - 1) % STAGES))", "pass"),
    "keys are given back too early": (
        "scores = warpgroup_mma_wait(1, deps=[scores])\n    mbarrier.arrive(k_free.index(turn % STAGES))",
        "mbarrier.arrive(k_free.index(turn % STAGES))\n    scores = warpgroup_mma_wait(1, deps=[scores])",
    ),
    "one group gives back for both": ("count=GROUPS", "count=1"),
    "values are not awaited": ("mbarrier.wait(v_full.index(stage), (turn // STAGES) & 1)", "pass"),
    "the next keys are not awaited": ("(later // STAGES) & 1, pred=later < blocks", "0, pred=False"),
    "scores are not awaited": ("warpgroup_mma_wait(1,", "warpgroup_mma_wait(2,"),
    "barriers are not fenced": ("    fence_async_shared()  # the copy", "    # the copy"),
    "the output is not fenced": ("    fence_async_shared()\n", ""),
    "one key too many": ("columns < keys", "columns <= keys"),
    "the diagonal one off": ("+ shift >= columns", "+ shift > columns"),
    "an edge block without mask": ("blocks - whole // KEYS", "blocks - whole // KEYS - 1"),
    "blocks of another head": ("batch, kv_head, turn, blocks", "batch, head, turn, blocks"),
    "the last rows first": ("[batch, head, first_row + GROUP * ROWS, 0]", "[batch, head, first_row, 0]"),
}


@pytest.mark.parametrize("change", MUTATIONS.values(), ids=MUTATIONS)
def test_the_model_sees_mistakes(change: tuple[str, str]) -> None:
    def run_some() -> None:
        for seed in range(8):
            run((1, 4, 2, 11, 29), seed % 2 == 0, seed, change=change)

    with pytest.raises((StandstillError, RaceError, AssertionError)):
        run_some()
