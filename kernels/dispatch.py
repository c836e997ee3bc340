"""Which implementation of an operation runs, and why.

    attention(q, k, v, backend="triton")     this one, or ValueError with the reason why not
    kernels.why(attention, q, k, v)          what these arguments would run, and what refused
    kernels.why()                            what has run in this process so far, one line an operation and reason

Design choices:
- "auto" is the first backend in an operation's order of preference that can do the call. The order depends on device,
  dtype and shape, never on the clock: the same run rounds the same way every time, on every rank.
- A backend that was named is never replaced by another: it does the call or the call raises.
- A Triton kernel has to prove itself on the card first: once a process and device, an operation compares it with plain
  torch on a small input (`trial`). One that fails to compile, or disagrees, is left out of "auto" with a warning.
- torch.use_deterministic_algorithms(True) is the deterministic mode: backends that add in no fixed order refuse.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

AUTO = "auto"
Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class Choice:
    """A backend, why it, and why those that were preferred to it could not ("name: reason")."""

    operation: str
    backend: str
    reason: str
    refusals: tuple[str, ...] = ()

    def __str__(self) -> str:
        refused = f" ({'; '.join(self.refusals)})" if self.refusals else ""
        return f"{self.operation}: {self.backend}, {self.reason}{refused}"


def choose(operation: str, backend: str, order: Sequence[str], refusal: Callable[[str], str]) -> Choice:
    """Take the named backend, or with "auto" the first of `order` that can. `refusal(name)`: why it cannot, or "".

    Raises ValueError for a name that is not in `order`, for a named backend that refuses, and when all refuse.
    """
    if backend != AUTO:
        if backend not in order:
            raise ValueError(f"{operation}: backend {backend!r} is none of {', '.join((AUTO, *sorted(order)))}")
        if why_not := refusal(backend):
            raise ValueError(f"{operation}: backend {backend!r} cannot do this: {why_not}")
        return Choice(operation, backend, "as asked")
    refusals: list[str] = []
    for name in order:
        why_not = refusal(name)
        if not why_not:
            return Choice(operation, name, "the first that can" if refusals else "the preferred one", tuple(refusals))
        refusals.append(f"{name}: {why_not}")
    raise ValueError(f"{operation}: nothing here can do this: {'; '.join(refusals)}")


# --- what ran

_ran: dict[Choice, None] = {}  # an ordered set
_choosers: dict[Callable[..., Any], Callable[..., Choice]] = {}


def record(choice: Choice) -> str:
    """Remember a choice for `why()`; its backend."""
    if not torch.compiler.is_compiling():
        _ran.setdefault(choice)
    return choice.backend


def chosen_by(chooser: Callable[..., Choice]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate an operation with the function that chooses for it from the same arguments, so that `why` finds it."""

    def register(operation: Callable[..., Any]) -> Callable[..., Any]:
        _choosers[operation] = chooser
        return operation

    return register


def why(operation: Callable[..., Any] | None = None, *arguments: Any, **named: Any) -> str:
    """What an operation would run for these arguments; without any, what has run so far (empty: nothing has).

    Raises ValueError for a function that is no operation of kernels, and as the operation itself would.
    """
    if operation is None:
        return "\n".join(map(str, _ran))
    if operation not in _choosers:
        known = ", ".join(sorted(each.__name__ for each in _choosers))
        raise ValueError(f"{getattr(operation, '__name__', operation)!r} chooses among no backends; these do: {known}")
    return str(_choosers[operation](*arguments, **named))


# --- trust

# relative errors (norm) allowed to kernels without products of matrices: several times the rounding of the dtype, and
# less than a wrong factor of 1% makes
LIMITS = {torch.bfloat16: 9e-3, torch.float16: 5e-3, torch.float32: 1e-4}
TRIAL_FAILED = "its trial on"  # so begins the reason of a kernel that is wrong, and not one that refuses
_trials: dict[tuple[str, str], str] = {}


def trial(operation: str, device: torch.device, compare: Callable[[], None]) -> str:
    """Why a kernel is not trusted on this device, or "". `compare` runs it on a small input and raises if it is wrong.

    Once a process, device and name, which says the dtype too: one dtype that fails must not put the others out.
    Every failure counts, a compiler's too, for the caller has another way to do the work; but not on a device that the
    kernel has killed (an illegal memory access): there nothing works any more, and RuntimeError says which it was.
    """
    key = (operation, str(device))
    if key not in _trials:
        try:
            with torch.autocast(device.type, enabled=False):  # a caller's would round what is compared
                compare()
            _trials[key] = ""
        except Exception as error:
            _raise_if_lost(operation, device, error)
            _trials[key] = f"{TRIAL_FAILED} {device} failed: {_in_a_line(error)}"
            warnings.warn(f"{operation}: {_trials[key]}; plain torch is used instead", stacklevel=2)
    return _trials[key]


def _raise_if_lost(operation: str, device: torch.device, error: Exception) -> None:
    if device.type != "cuda":
        return
    try:
        torch.cuda.synchronize(device)
    except Exception as lost:
        raise RuntimeError(
            f"{operation}: its trial has left {device} unusable ({_in_a_line(lost)}); start again and name another "
            "backend"
        ) from error


def _in_a_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


def has_triton() -> bool:
    """Whether Triton can be imported; it is not before a kernel of it is wanted."""
    import importlib.util

    return importlib.util.find_spec("triton") is not None


def constant_when_compiled(function: Function) -> Function:
    """torch.compile asks once and keeps the answer, as with torch.compiler.assume_constant_result.

    That one imports all of torch.compile, two seconds, to set this mark; the fullgraph tests see that it works.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant_when_compiled
def no_triton(device_type: str, dtype: torch.dtype) -> str:
    """Why Triton kernels cannot run on such tensors, or "". fp64 is for the interpreter: no GPU trains in it."""
    if not has_triton():
        return "triton is not installed"
    if device_type == "cuda":
        return f"{dtype} on a GPU: the Triton kernels were compiled for up to 32 bits there" * (dtype == torch.float64)
    from kernels.gpu.target import INTERPRETED

    needs = f"the tensors are on {device_type}: Triton needs a GPU (or, for tests, TRITON_INTERPRET=1)"
    return "" if INTERPRETED else needs


def must_agree(
    mine: Callable[..., Sequence[torch.Tensor]],
    plain: Callable[..., Sequence[torch.Tensor]],
    tensors: Sequence[torch.Tensor],
    limit: float,
) -> None:
    """For `trial`: raise ArithmeticError unless both give the same values and gradients, up to a relative error (norm).

    `mine` gets the tensors, `plain` gets them in fp32. Autocast, no_grad or inference_mode around it change nothing.
    """
    results: list[list[torch.Tensor]] = []
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(tensors[0].device.type, enabled=False):
        for function, dtypes in ((mine, [each.dtype for each in tensors]), (plain, [torch.float32] * len(tensors))):
            pairs = zip(tensors, dtypes, strict=True)
            leaves = [each.detach().clone().to(dtype).requires_grad_() for each, dtype in pairs]
            values = function(*leaves)
            above = [torch.linspace(-1, 2, each.numel()).to(each).view_as(each) for each in values]
            results.append([*values, *torch.autograd.grad(values, leaves, above)])
    own, truth = ([each.detach().float() for each in result] for result in results)
    refuse_difference(own, truth, limit)


def refuse_difference(
    mine: Sequence[torch.Tensor], truth: Sequence[torch.Tensor], limit: float, what: str = ""
) -> None:
    """Raise ArithmeticError, which says `what`, where the relative error (norm) of a result is above the limit."""
    for place, (own, right) in enumerate(zip(mine, truth, strict=True)):
        error = float((own - right).norm() / right.norm().clamp(min=1e-6))
        if not error <= limit:
            raise ArithmeticError(f"{what}result {place} is off by {error:.1e}, {limit:.1e} is allowed")
