"""What the launchers of norms, activations, rotary and losses would launch was compiled by the gate.

Widths, dtypes and options of the kernels that go over rows make more kernels than can be compiled. They are told apart
by parts (`Parts`), each of which must be that of some case. test_attention_launchers.py has attention.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
import triton
from launches import Items, Launch, Record, assert_compiled, cases_of, empty

from kernels import aot
from kernels.gpu import activation, contrastive, linear_cross_entropy, norm, rotary

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = ((BF16, BF16), (FP16, FP16), (FP32, FP32), (BF16, FP32), (FP16, FP32))  # of rows, of weights or bias
Tensors = tuple[torch.Tensor, torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Parts:
    """A launch or a case of a kernel that goes over rows, in parts that have nothing to do with each other in its code.

    types: of the tensors. options: which tensors are there, and other switches. shape: unit of the strides, and numbers
    that are 1; elements: of a tile, for each thread; unaligned: what may be no multiple of 16.
    """

    types: Items
    options: Items
    shape: Items
    elements: int
    unaligned: frozenset[str]

    @classmethod
    def of(cls, launch: Launch) -> Parts:
        constants = dict(launch.constants)
        width = int(constants.get("WIDTH") or constants["BLOCK"])
        warps = int(dict(launch.options)["num_warps"])
        sizes = ("WIDTH", "ROWS", "BLOCK", "COLUMNS", "SIZE", "PAIRS", "REST", "HEADS")
        shape = {name for name in constants if name == "UNIT" or name.islower()}
        options = {name: each for name, each in constants.items() if name not in {*sizes, *shape}}
        options |= {name: str(float(options[name]) > 0) for name in linear_cross_entropy.PLAIN if name in options}
        if "SIZE" in constants:
            options["REST"] = str(int(constants["SIZE"]) > 2 * int(constants["PAIRS"]))
        return cls(
            types=launch.types,
            options=frozenset(options.items()),
            shape=frozenset((name, constants[name]) for name in shape),
            elements=-(-int(constants.get("ROWS", 1)) * width // (32 * warps)),
            unaligned=launch.unaligned,
        )

    def lacking(self, cases: set[Parts]) -> str:
        """The part that no case has, or ""."""
        if not any(self.types <= case.types for case in cases):
            return f"types {sorted(self.types)}"
        if not any(self.options == case.options for case in cases):
            return f"options {sorted(self.options)}"
        alike = [case for case in cases if case.shape == self.shape and case.elements >= self.elements]
        if not any(self.unaligned <= case.unaligned for case in alike):
            return f"shape {sorted(self.shape)}, {self.elements} elements a thread, unaligned {sorted(self.unaligned)}"
        return ""


def assert_parts_compiled(record: Record, file: str, calls: Iterator[Callable[[], object]]) -> None:
    cases: dict[tuple[str, str], set[Parts]] = {}
    for case in cases_of(file):
        cases.setdefault((case.kernel, case.target), set()).add(Parts.of(case))
    launches = {(launch.kernel, Parts.of(launch)) for call in calls for launch in record("any GPU", call)}
    for (kernel, parts), target in itertools.product(launches, aot.TARGETS):
        lacking = parts.lacking(cases[kernel, target])
        assert not lacking, f"the gate compiles {kernel} for {target} with no such {lacking}"


def rows_of(rows: int, columns: int, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """[rows, columns]: dense; at strides of another sort; not from the start of their memory."""
    yield empty(rows, columns, dtype=dtype)
    for more in (1, 8):
        yield empty(rows, columns + more, dtype=dtype)[:, :columns]
        yield empty(rows, columns + 8, dtype=dtype)[:, more : columns + more]


def inputs_of(rows: int, columns: int, dtype: torch.dtype, of_vector: torch.dtype) -> Iterator[Tensors]:
    """Rows as above, and a vector of its own; or one from the middle of a larger, as sharding may lay a parameter."""
    for x in rows_of(rows, columns, dtype):
        yield x, empty(columns, dtype=of_vector)
    yield empty(rows, columns, dtype=dtype), empty(columns + 1, dtype=of_vector)[1:]


# --- norms, activations, rotary


def norm_calls(centred: bool) -> Iterator[Callable[[], object]]:
    widths = (1, 8, 64, 72, 768, 1000, 1023, 1152, 4096, norm.WIDEST - 1, norm.WIDEST)
    for columns, (dtype, of_weights), rows in itertools.product(widths, DTYPES, (1, 10)):
        statistics, out = empty(1 + centred, rows), empty(rows, columns, dtype=dtype)
        for x, weight in inputs_of(rows, columns, dtype, of_weights):
            bias = weight if centred else None
            yield partial(norm.forward, x, None, weight, bias, out, None, statistics, 1e-5)
            yield partial(norm.forward, x, x, weight, bias, out, out, statistics, 1e-5)
            yield partial(norm.backward, x, None, x, weight, statistics, out, centred)
            yield partial(norm.backward, x, x, x, weight, statistics, out, centred)


@pytest.mark.parametrize("centred", [False, True], ids=["RMS norm", "layer norm"])
def test_norms(record: Record, centred: bool) -> None:
    assert_parts_compiled(record, "norm", norm_calls(centred))


def gelu_calls(tanh: bool) -> Iterator[Callable[[], object]]:
    for columns, (dtype, of_bias), rows in itertools.product((1, 3, 384, 1000, 1023, 4096), DTYPES, (1, 10)):
        out = empty(rows, columns, dtype=dtype)
        for x, bias in inputs_of(rows, columns, dtype, of_bias):
            yield partial(activation.bias_gelu_forward, x, bias, out, tanh)
            yield partial(activation.bias_gelu_backward, x, x, bias, out, tanh)


@pytest.mark.parametrize("tanh", [False, True], ids=["erf", "tanh"])
def test_gelu(record: Record, tanh: bool) -> None:
    assert_parts_compiled(record, "activation", gelu_calls(tanh))


def swiglu_calls() -> Iterator[Callable[[], object]]:
    for columns, dtype, rows in itertools.product((1, 3, 384, 1000, 1023, 4096), (BF16, FP16, FP32), (1, 10)):
        out = empty(rows, columns, dtype=dtype)
        halves = empty(rows, 2 * columns, dtype=dtype).chunk(2, -1)  # of one product
        for gate, up in (halves, *((each, each) for each in rows_of(rows, columns, dtype))):
            yield partial(activation.swiglu_forward, gate, up, out)
            yield partial(activation.swiglu_backward, out, gate, up, out, out)


def test_swiglu(record: Record) -> None:
    assert_parts_compiled(record, "activation", swiglu_calls())


def rotary_calls(interleaved: bool) -> Iterator[Callable[[], object]]:
    heads = ((2, 1), (64, 32), (72, 36), (80, 20), (128, 64), (65, 32), (512, 256))
    for (size, pairs), dtype, heads_there in itertools.product(heads, (BF16, FP16, FP32), (1, 3)):
        dense, odd = empty(2, heads_there, 10, size, dtype=dtype), empty(2, heads_there, 10, size + 1, dtype=dtype)
        for x in (dense, empty(2, 10, heads_there, size, dtype=dtype).transpose(1, 2), odd[..., :size], odd[..., 1:]):
            for table in (empty(10, pairs), empty(2, 10, pairs), empty(11, pairs)[1:], empty(10, pairs, dtype=BF16)):
                for inverse in (False, True):
                    yield partial(rotary.rotate, x, table, table, torch.empty_like(x), interleaved, inverse)


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
def test_rotary(record: Record, interleaved: bool) -> None:
    assert_parts_compiled(record, "rotary", rotary_calls(interleaved))


# --- losses


def cross_entropy_calls() -> Iterator[Callable[[], object]]:
    """Chunks of rows start anywhere in the vectors. Any two options are as all three."""
    everything = linear_cross_entropy.EVERYTHING
    options = [linear_cross_entropy.PLAIN | dict([each]) for each in everything.items()]
    for dtype, columns, first in itertools.product((BF16, FP32), (1, 7, 1000, 50257, 128256), (0, 3)):
        stride = triton.cdiv(columns, 64) * 64  # as linear_cross_entropy_chunks.py lays the logits out
        logits = empty(10, stride, dtype=dtype)[:, :columns]
        places, factors = empty(10 + first, dtype=torch.int64)[first:], empty(10 + first)[first:]
        for settings in (linear_cross_entropy.PLAIN, everything, *options):
            values = settings.values()
            yield partial(linear_cross_entropy.chunk_, logits, places, factors, *values, gradient=True)
            if settings not in options:  # the losses of an option alone are a part of those with their gradients
                yield partial(linear_cross_entropy.chunk_, logits, places, factors, *values, gradient=False)
        for cap in (0.0, 30.0):
            yield partial(linear_cross_entropy.numbers, logits, places, cap)
            yield partial(linear_cross_entropy.gradient_, logits, places, empty(10), empty(3, 10), cap)


def test_linear_cross_entropy(record: Record) -> None:
    assert_parts_compiled(record, "linear_cross_entropy", cross_entropy_calls())


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("size", [16, 32, 48, 64, 96, 512, 1152])
def test_contrastive(record: Record, size: int, dtype: torch.dtype) -> None:
    cases = cases_of("contrastive")
    number = empty()
    for target in aot.TARGETS:
        for n, c in ((300, 40), (1, 1)):
            x, y = empty(n, size, dtype=dtype), empty(c, size, dtype=dtype)
            rows, columns, dx, dy = empty(n), empty(c), empty(n, size), empty(c, size)
            calls = [
                partial(contrastive.sums, x, y, number, number, 7, rows, columns),
                partial(contrastive.gradients, x, y, number, number, rows, columns, rows, 7, dx, dy),
                partial(contrastive.sigmoid, x, y, number, number, 7, dx, dy),
                partial(contrastive.sigmoid, x, y, number, number, 7, None, None),
            ]
            if dtype == BF16 and size == 512:
                calls.append(partial(contrastive.sums, x, y, number, number, 7, rows, columns, atomic=True))
            for call in calls:
                assert_compiled(record(target, call), cases)


# --- the recorder itself


def test_what_was_not_compiled_is_found(record: Record) -> None:
    x, wide = empty(2, 3, 10, 64, dtype=torch.float64), empty(4, 2 * norm.WIDEST, dtype=BF16)
    logits, places, number = empty(4, 64, dtype=BF16), empty(4, dtype=torch.int64), empty()
    table = empty(10, 32)
    for file, call, part in (
        ("rotary", partial(rotary.rotate, x, table, table, x, False, False), "types"),
        ("norm", partial(norm.forward, wide, None, wide[0], None, wide, None, empty(1, 4), 1e-5), "elements a thread"),
        (
            "linear_cross_entropy",
            partial(linear_cross_entropy.chunk_, logits, places, empty(4), 0.1, 0.1, 0.0, gradient=True),
            "options",
        ),
    ):
        with pytest.raises(AssertionError, match=f"with no such .*{part}"):
            assert_parts_compiled(record, file, iter([call]))
    narrow = empty(4, 24, dtype=BF16)  # steps of 8
    call = partial(contrastive.sums, narrow, narrow, number, number, 0, empty(4), empty(4))
    with pytest.raises(AssertionError, match="compiles no such thing"):
        assert_compiled(record("sm_90", call), cases_of("contrastive"))
