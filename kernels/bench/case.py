"""What is measured: an operation at one shape, with our backends and its peers; and what is checked.

An implementation is a function of named tensors, and the leaves are those that require a gradient. One that wants its
tensors otherwise laid out (packed, padded, [B, S, H, K]) has a `prepare`, which is not timed.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from kernels.bench.measure import Run

Tensors = dict[str, torch.Tensor]
Outputs = torch.Tensor | Sequence[torch.Tensor]
Call = Callable[[Tensors], Outputs]
Draw = Callable[[torch.device], Tensors]

AUTO = "auto"


@dataclass(frozen=True)
class Implementation:
    """One way to compute an operation. `make()` gives the call, and raises where this machine lacks what it needs."""

    make: Callable[[], Call]
    prepare: Callable[[Tensors], Tensors] | None = None

    def run(self, tensors: Tensors) -> Run:
        """With tensors of its own layout; their gradients are those of fresh leaves."""
        call = self.make()
        if self.prepare is not None:
            tensors = self.prepare(tensors)
        return Run(lambda: call(tensors), [each for each in tensors.values() if each.requires_grad])


def plain(call: Call, prepare: Callable[[Tensors], Tensors] | None = None) -> Implementation:
    """An implementation that needs nothing special."""
    return Implementation(lambda: call, prepare)


def compiled(call: Call) -> Implementation:
    """torch.compile of a plain definition."""
    return Implementation(lambda: torch.compile(call, fullgraph=True, dynamic=False))


@dataclass(frozen=True)
class Operation:
    """A public function of kernels, looked up when used: a missing one is a row that says so, not a missing row.

    own: its backends that are code of kernels, and not a library's that it dispatches to.
    """

    module: str
    function: str
    own: frozenset[str] = frozenset({"triton"})

    def load(self) -> Callable[..., Any]:
        return getattr(importlib.import_module(self.module), self.function)  # type: ignore[no-any-return]

    def backends(self) -> tuple[str, ...]:
        """Those it lists; ("auto",) for a function without a choice, or one that does not load."""
        try:
            if "backend" not in inspect.signature(self.load()).parameters:
                return (AUTO,)
            return tuple(importlib.import_module(self.module).BACKENDS)
        except (ImportError, AttributeError):
            return (AUTO,)

    def implementations(self, call: Callable[[Callable[..., Any], Tensors], Outputs]) -> dict[str, Implementation]:
        """One for each backend. `call(function, tensors)` calls the operation; the backend is filled in here."""

        def maker(backend: str) -> Callable[[], Call]:
            def make() -> Call:
                function = self.load()
                named = {} if self.backends() == (AUTO,) else {"backend": backend}
                return lambda tensors: call(lambda *a, **n: function(*a, **n, **named), tensors)

            return make

        return {backend: Implementation(maker(backend)) for backend in self.backends()}

    def chosen(self, call: Callable[[Callable[..., Any], Tensors], Outputs], tensors: Tensors) -> str:
        """The backend that "auto" takes for a call."""
        from kernels.dispatch import why

        if self.backends() == (AUTO,):
            return AUTO
        function = self.load()
        told: list[str] = []
        call(lambda *a, **n: told.append(why(function, *a, **n)), tensors)
        return told[0].split(": ", 1)[1].split(",", 1)[0]  # "operation: backend, reason"


@dataclass(frozen=True)
class Case:
    """An operation at one shape.

    passes: which of FORWARD, BACKWARD, BOTH are measured; flops and bytes are what each needs at least. targets: by
    pass and backend, the time that is aimed at as a part of the best peer's; "" stands for every own backend.
    """

    operation: Operation
    name: str
    shape: str
    passes: tuple[str, ...]
    draw: Draw
    call: Callable[[Callable[..., Any], Tensors], Outputs]
    peers: Mapping[str, Implementation]
    flops: Mapping[str, float]
    bytes: Mapping[str, float]
    targets: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    @property
    def key(self) -> str:
        return f"{self.operation.function}: {self.name}"


@dataclass(frozen=True)
class Check:
    """An operation on small random inputs, to be compared with the truth.

    truth: the definition, called with everything in fp64. plain: the same in torch with the inputs' own dtype, whose
    error is the measure of ours.
    """

    operation: Operation
    name: str
    dtype: torch.dtype
    draw: Draw
    call: Callable[[Callable[..., Any], Tensors], Outputs]
    plain: Call
    truth: Call

    @property
    def key(self) -> str:
        return f"{self.operation.function}: {self.name}, {short(self.dtype)}"


def short(dtype: torch.dtype) -> str:
    """bf16 for torch.bfloat16."""
    return {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64"}[dtype]


def normal_draw(shapes: Mapping[str, Sequence[int]], dtype: torch.dtype, seed: int = 0) -> Draw:
    """Standard normal tensors that require a gradient."""

    def draw(device: torch.device) -> Tensors:
        generator = torch.Generator(device).manual_seed(seed)
        return {
            name: torch.randn(tuple(shape), device=device, generator=generator).to(dtype).requires_grad_()
            for name, shape in shapes.items()
        }

    return draw
