"""What the launcher of attention would launch was compiled by the gate.

Options, dtypes, strides and sizes make more kernels than can be compiled; kernels/gpu/attention_cases.py says what is
left out. `Attention.covered_by` says which case may stand for which launch.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from launches import Items, Launch, Record, assert_compiled, cases_of, empty, items

from kernels import aot
from kernels.attention_spec import Spec
from kernels.gpu import attention
from kernels.gpu.attention_cases import SIZES

OPTIONS = ("CAUSAL", "WINDOW", "CAP", "DROP", "LENGTHS", "QUERY_STARTS", "KEY_STARTS", "SEED")
LENGTHS = (4096, 257, 128)  # of queries and keys: long ones, short ones that prefer a small tile, and a large one


@dataclasses.dataclass(frozen=True)
class Attention:
    """A launch or a case, as far as one may stand for another."""

    kernel: str
    target: str
    types: Items
    constants: Items
    size: int
    scores: int  # a warp
    features: frozenset[str]
    unaligned: frozenset[str]  # pointers

    @classmethod
    def of(cls, launch: Launch) -> Attention:
        """Documents are as lengths with more numbers to keep; fp16 is as bf16; an edge block as any other. In fp32 a
        window to both sides is as one behind."""
        constants, types, options = (dict(each) for each in (launch.constants, launch.types, launch.options))
        features = {name for name in OPTIONS if name in types or constants.get(name) == "True"}
        if "LENGTHS" in features:
            features |= {"QUERY_STARTS", "KEY_STARTS"}
        if "WINDOW" in features and "CAUSAL" not in features:
            features.add("CAUSAL" if "fp32" in (types.get("Q"), types.get("OUT")) else "TWO-SIDED")
        left_out = {*OPTIONS, "EDGE", "HEAD", "LEFT", "RIGHT", "WIDTH", "ROWS", "KEYS"}
        return cls(
            kernel=launch.kernel,
            target=launch.target,
            types=items({name: each.replace("fp16", "bf16") for name, each in types.items() if name not in OPTIONS}),
            constants=items({name: each for name, each in constants.items() if name not in left_out}),
            size=int(constants["HEAD"]),
            scores=int(constants["ROWS"]) * int(constants.get("KEYS", 1)) // int(options["num_warps"]),
            features=frozenset(features - {"LENGTHS"}),
            unaligned=launch.unaligned & {*types},
        )

    def covered_by(self, case: Attention) -> bool:
        """The case has all of these options or more, as many scores a warp or more, a head as large or larger, and as
        little alignment or less."""
        alike = (self.kernel, self.target, self.types, self.constants) == (
            case.kernel, case.target, case.types, case.constants,
        )  # fmt: skip
        larger = self.size <= case.size and self.scores <= case.scores
        return alike and larger and self.features <= case.features and self.unaligned <= case.unaligned


def tile_of(launch: Launch) -> tuple[str, ...]:
    numbers = [f"{name} {value}" for name, value in launch.constants if name in ("ROWS", "KEYS")]
    return (launch.kernel, *sorted(numbers), *(" ".join(each) for each in sorted(launch.options)))


def calls(size: int, dtype: torch.dtype, length: int, strides: str = "dense") -> Iterator[Callable[[], object]]:
    """Forward and backward, by every set of options that the public function takes."""
    more = {"dense": 0, "odd": 1, "odd starts": 8}[strides]
    q = empty(1, 4, length, size + more, dtype=dtype)[..., :size]
    k = empty(1, 2, length, size + more, dtype=dtype)[..., :size]
    if strides == "odd starts":
        k = empty(1, 2, length, size + more, dtype=dtype)[..., 1 : size + 1]
    lse = empty(1, 4, length)
    numbers = empty(4, dtype=torch.int32)
    starts = {"query_starts": numbers[:3], "key_starts": numbers[1:]}  # the second not from 16 bytes on
    for where in ({}, {"key_lengths_B": numbers[1:2]}, starts):
        for causal, window, soft_cap, dropout in itertools.product((False, True), (0, 100), (0.0, 5.0), (0.0, 0.1)):
            spec = Spec(0.1, causal=causal, window=window, soft_cap=soft_cap, dropout=dropout)
            there = where | ({"seed": empty(2, dtype=torch.int64)[1]} if dropout else {})
            yield partial(attention.forward, q, k, k, spec, **there)
            yield partial(attention.backward, q, q, k, k, q, lse, spec, **there)


def every_call() -> Iterator[Callable[[], object]]:
    """Heads that fill a tile and some that do not, in every dtype; fp32 up to the size that is not refused."""
    half, single = (torch.bfloat16, torch.float16), torch.float32
    for size, length in itertools.product((*SIZES, 24), LENGTHS):
        yield from calls(size, half[0], length)
    yield from calls(64, half[1], LENGTHS[0])
    for size in (16, 64, 72, attention.LARGEST_WIDE_HEAD):
        yield from calls(size, single, LENGTHS[0])
    for dtype, strides in itertools.product((half[0], single), ("odd", "odd starts")):
        yield from calls(64, dtype, LENGTHS[0], strides)


def lacking(launches: set[Attention], cases: list[Launch]) -> list[Attention]:
    by_kernel: dict[str, set[Attention]] = {}
    for case in cases:
        by_kernel.setdefault(case.kernel, set()).add(Attention.of(case))
    return [each for each in launches if not any(each.covered_by(case) for case in by_kernel[each.kernel])]


def compiled_for(target: str) -> list[Launch]:
    return [each for each in cases_of("attention") if each.target == target and each.kernel != "dropout_keep_kernel"]


@pytest.mark.parametrize("precision", ["highest", "high"])
@pytest.mark.parametrize("target", aot.TARGETS)
def test_attention(record: Record, target: str, precision: str) -> None:
    """By exact products of fp32, and by TF32, which torch's own switch asks for."""
    cases = compiled_for(target)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        wide = [call for call in every_call() if precision == "highest" or call.args[0].dtype == torch.float32]
        launches = {Attention.of(launch): launch for call in wide for launch in record(target, call)}
    finally:
        torch.set_float32_matmul_precision(before)
    assert {tile_of(launch) for launch in launches.values()} <= {tile_of(case) for case in cases}
    missing = lacking({*launches}, cases)
    assert not missing, f"{len(missing)} of {len(launches)}, as {[launches[each] for each in missing[:3]]}"


def test_what_was_not_compiled_is_found(record: Record) -> None:
    """Without the cases of one sort, the calls that need it stand out."""
    cases = compiled_for("sm_90")
    q, wide = empty(1, 1, 64, 64, dtype=torch.bfloat16), empty(1, 1, 64, 64)
    for tensor, spec, constant in (
        (q, Spec(0.1, window=7), ("CAUSAL", "False")),
        (q, Spec(0.1, causal=True, window=7), ("CAUSAL", "True")),
        (wide, Spec(0.1, soft_cap=1.0), ("CAP", "True")),
        (wide, Spec(0.1), ("PRECISION", "ieee")),
    ):
        launches = record("sm_90", partial(attention.forward, tensor, tensor, tensor, spec))
        mine = {Attention.of(launch) for launch in launches}
        assert not lacking(mine, cases)
        assert lacking(
            mine, [case for case in cases if constant not in case.constants or "OUT" not in dict(case.types)]
        )
    large, uneven = empty(1, 1, 64, 256), empty(1, 1, 64, 20)  # of fp32, which `refusal` refuses
    for tensor in (large, uneven):
        launches = record("sm_90", partial(attention.forward, tensor, tensor, tensor, Spec(0.1)))
        assert lacking({Attention.of(launch) for launch in launches}, cases)


def test_the_mask_of_dropout(record: Record) -> None:
    cases = cases_of("attention")
    for target in aot.TARGETS:
        call = partial(attention.dropout_keep, (1, 2, 70, 70), 0.1, empty(dtype=torch.int64))
        assert_compiled(record(target, call), cases)
