"""What is measured: an operation at one shape, with our backends and its peers; and what is checked.

An implementation is a function of named tensors, and the leaves are those that require a gradient. One that wants its
tensors otherwise laid out (packed, padded, [B, S, H, K]) has a `Layout`; the rearrangement is not timed.

Implementations are measured in rounds, so that a run that is cut off has what matters: first those that start at once,
then what torch.compile makes (tens of seconds each before the first call), last what could hang.
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
FIRST, COMPILED, LAST = "first", "compiled", "last"  # the rounds


@dataclass(frozen=True)
class Layout:
    """Another arrangement of a case's tensors.

    own: a tensor of the case, which is a leaf or has the shape of its output, as the implementation wants it (a copy).
    usual: one of its results as the case has it. extra: what it needs besides, made of the case's tensors.
    """

    own: Callable[[torch.Tensor], torch.Tensor]
    usual: Callable[[torch.Tensor], torch.Tensor]
    extra: Callable[[Tensors], Tensors] = lambda tensors: {}

    def tensors(self, tensors: Tensors) -> Tensors:
        leaves = {name: each for name, each in tensors.items() if each.requires_grad}
        return {name: self.own(each.detach()).requires_grad_() for name, each in leaves.items()} | self.extra(tensors)


@dataclass(frozen=True)
class Implementation:
    """One way to compute an operation. `make()` gives the call, and raises where this machine lacks what it needs."""

    make: Callable[[], Call]
    layout: Layout | None = None
    round: str = FIRST

    def run(self, tensors: Tensors) -> Run:
        """With tensors of its own layout; their gradients are those of fresh leaves."""
        call = self.make()
        if self.layout is not None:
            tensors = self.layout.tensors(tensors)
        return Run(lambda: call(tensors), [each for each in tensors.values() if each.requires_grad])

    def own(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Gradients of the case's outputs, as those of the implementation's."""
        return [self.layout.own(each) if self.layout and each.ndim else each for each in tensors]

    def usual(self, results: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Its results as the case has them."""
        return [self.layout.usual(each) if self.layout and each.ndim else each for each in results]


def plain(call: Call, layout: Layout | None = None) -> Implementation:
    """An implementation that needs nothing special."""
    return Implementation(lambda: call, layout)


def compiled(call: Call) -> Implementation:
    """torch.compile of a plain definition."""
    return Implementation(lambda: torch.compile(call, fullgraph=True, dynamic=False), round=COMPILED)


@dataclass(frozen=True)
class Operation:
    """A public function of kernels, looked up when used: a missing one is a row that says so, not a missing row.

    own: its backends that are code of kernels, and not a library's that it dispatches to. last: those that are
    measured after all else, because a first run could hang.
    """

    module: str
    function: str
    own: frozenset[str] = frozenset({"triton"})
    last: frozenset[str] = frozenset()

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

        return {
            backend: Implementation(maker(backend), round=LAST if backend in self.last else FIRST)
            for backend in self.backends()
        }

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

    passes: which of FORWARD, BACKWARD, BOTH are measured; flops and bytes are what each needs at least. peers: the
    first that runs is what the results of all others are compared with. targets: by pass and backend, the time that is
    aimed at as a part of the best peer's; "" stands for every own backend. same: our backends that do nothing but call
    a peer, which is timed once for both. left_out: by name, why an implementation is not measured at this shape.
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
    same: Mapping[str, str] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)

    @property
    def key(self) -> str:
        return f"{self.operation.function}: {self.name}"

    def own_rounds(self) -> set[str]:
        """Those in which a backend of ours is measured."""
        return {each.round for each in self.operation.implementations(self.call).values()}

    def rounds(self) -> set[str]:
        """Those in which something of it is measured."""
        return self.own_rounds() | {each.round for each in self.peers.values()}


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
