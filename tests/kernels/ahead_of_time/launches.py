"""What the launchers of kernels/gpu would launch, recorded and not run, beside what the gate compiles.

A launch is all that makes Triton compile another kernel: types, constants, options, and which pointers and numbers are
multiples of 16. The calls are made on tensors without memory (meta), so for any GPU.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton

from kernels import aot
from kernels.gpu import attention, contrastive

TYPES = {
    torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64", torch.int8: "i8",
    torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip
DEFAULTS = {"num_warps": 4, "num_stages": 3}  # of Triton
Items = frozenset[tuple[str, str]]


@dataclasses.dataclass(frozen=True)
class Launch:
    """A compiled kernel: whose, for which GPU, types of pointers, constants (pointers that are None and numbers that
    are 1 too), options; unaligned: pointers and numbers that the compiler is not told to be multiples of 16."""

    kernel: str
    target: str
    types: Items
    constants: Items
    options: Items
    unaligned: frozenset[str]

    def covered_by(self, case: Launch) -> bool:
        return dataclasses.replace(self, unaligned=case.unaligned) == case and self.unaligned <= case.unaligned


def items(values: dict[str, Any]) -> Items:
    return frozenset((name, str(value)) for name, value in values.items())


def launch_of_case(case: aot.AotCase, target: str) -> Launch:
    types = {name: kind.removeprefix("*") for name, kind in case.signature.items() if kind.startswith("*")}
    numbers = [name for name, kind in case.signature.items() if kind.startswith("i")]
    return Launch(
        kernel=case.kernel.__name__,
        target=target,
        types=items(types),
        constants=items(dict(case.constexprs)),
        options=items(DEFAULTS | dict(case.options)),
        unaligned=frozenset({*types, *numbers} - {*case.attrs}),
    )


def launch_of_call(kernel: Any, target: str, arguments: tuple[Any, ...], named: dict[str, Any]) -> Launch:
    options = {name: named.pop(name) for name in ("num_warps", "num_stages", "maxnreg") if name in named}
    values = dict(zip(kernel.arg_names, arguments, strict=False)) | named
    assert set(values) == set(kernel.arg_names)
    parameters = {parameter.name: parameter for parameter in kernel.params}
    types, constants, unaligned = {}, {}, set()
    for name, value in values.items():
        parameter = parameters[name]
        if parameter.is_constexpr or value is None:
            constants[name] = value
            continue
        if isinstance(value, torch.Tensor):
            types[name] = TYPES[value.dtype]
            multiple = value.data_ptr()  # where there is no memory, how far from the start of it
        elif isinstance(value, int):
            multiple = value
            if value == 1 and not parameter.do_not_specialize:
                constants[name] = value
                continue
        else:
            continue
        if parameter.do_not_specialize or parameter.do_not_specialize_on_alignment or multiple % 16:
            unaligned.add(name)
    return Launch(
        kernel.__name__, target, items(types), items(constants), items(DEFAULTS | options), frozenset(unaligned)
    )


Record = Callable[[str, Callable[[], object]], list[Launch]]


def recorder(monkeypatch: pytest.MonkeyPatch) -> Record:
    """record(target, call): what the call launches on that GPU."""
    launches: list[Launch] = []
    targets = [""]

    def run(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **named: Any) -> None:
        assert not warmup
        assert min(grid) > 0
        launches.append(launch_of_call(kernel, targets[0], arguments, named))

    monkeypatch.setattr(triton.JITFunction, "run", run)
    for module in (attention, contrastive):
        monkeypatch.setattr(module, "target_of", lambda _: targets[0])

    def recorded(target: str, call: Callable[[], object]) -> list[Launch]:
        launches.clear()
        targets[0] = target
        call()
        assert launches
        return [*launches]

    return recorded


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def cases_of(file: str) -> list[Launch]:
    return [launch_of_case(case, target) for case in aot.collect(file) for target in case.targets]


def assert_compiled(launches: list[Launch], cases: list[Launch]) -> None:
    """Each launch is a case, but for alignment that it has beyond it."""
    for launch in launches:
        alike = [case for case in cases if (case.kernel, case.target) == (launch.kernel, launch.target)]
        assert any(launch.covered_by(case) for case in alike), f"the gate compiles no such thing: {launch}"
