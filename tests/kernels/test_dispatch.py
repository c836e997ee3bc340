"""What holds for every operation that chooses among backends."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import kernels
from kernels import dispatch

OPERATIONS = tuple(dispatch._choosers)  # now, for tests register their own


def arguments_of(name: str, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Tensors that say they are on a GPU; inside FakeTensorMode."""

    def made(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="cuda")

    rows, vector, heads, number = made(6, 16), made(16), made(1, 2, 6, 16), made(dtype=torch.float32)
    table = made(6, 8, dtype=torch.float32)
    return {
        "attention": (heads, heads, heads),
        "bias_gelu": (rows, vector),
        "contrastive_loss": (rows, rows, number),
        "layer_norm": (rows, vector, vector),
        "linear_cross_entropy": (rows, rows, made(6, dtype=torch.int64)),
        "rms_norm": (rows, vector),
        "rotary": (heads, table, table),
        "sigmoid_loss": (rows, rows, number, number),
        "swiglu": (rows, rows),
    }[name]


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda each: each.__name__)
def test_fp64_on_a_gpu_is_not_for_triton(monkeypatch: pytest.MonkeyPatch, operation: Callable[..., Any]) -> None:
    """None of them is compiled for it (kernels/aot.py); the same call in fp32 may have it."""
    monkeypatch.setattr(dispatch, "has_triton", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    for trial in ("norm", *(each.__name__ for each in OPERATIONS)):
        monkeypatch.setitem(dispatch._trials, (f"{trial} in {torch.float32}", "cuda:0"), "")
    if operation is kernels.attention:
        pytest.importorskip("triton")
    with FakeTensorMode():
        single, double = (arguments_of(operation.__name__, dtype) for dtype in (torch.float32, torch.float64))
        assert ": triton, as asked" in dispatch.why(operation, *single, backend="triton")
        with pytest.raises(ValueError, match=r"cannot do this: torch\.float64 on a GPU: the Triton"):
            dispatch.why(operation, *double, backend="triton")
        assert ": triton" not in dispatch.why(operation, *double)[:40]


def test_every_operation_that_has_a_triton_kernel_is_among_them() -> None:
    without = {"patch_dropout", "why"}
    assert {each.__name__ for each in OPERATIONS} == {*kernels.__all__} - without


# --- trials


@pytest.fixture
def untried(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A Hopper GPU that nothing has been tried on; to be used inside FakeTensorMode."""
    monkeypatch.setattr(dispatch, "has_triton", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    monkeypatch.setattr(dispatch, "_trials", {})
    return monkeypatch


def fail(*_: Any) -> None:
    raise ArithmeticError("result 0 is off by 1")


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda each: each.__name__)
def test_who_names_triton_gets_it_without_a_trial(untried: pytest.MonkeyPatch, operation: Callable[..., Any]) -> None:
    pytest.importorskip("triton")
    with FakeTensorMode():
        arguments = arguments_of(operation.__name__, torch.float32)
        assert ": triton, as asked" in dispatch.why(operation, *arguments, backend="triton")
    assert dispatch._trials == {}


def test_a_dtype_that_fails_its_trial_does_not_put_the_other_out(untried: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    module = importlib.import_module("kernels.contrastive")
    untried.setattr(module, "_try", lambda operation, device, dtype: fail() if dtype == torch.float32 else None)
    with FakeTensorMode():
        single = arguments_of("contrastive_loss", torch.float32)
        with pytest.warns(UserWarning, match=r"contrastive_loss in torch\.float32: its trial on cuda:0 failed"):
            line = dispatch.why(kernels.contrastive_loss, *single)
        assert line.startswith("contrastive_loss: torch, the first that can (triton: its trial on cuda:0 failed: Arith")
        line = dispatch.why(kernels.contrastive_loss, *single, products=torch.bfloat16)
        assert line == "contrastive_loss: triton, the preferred one"


def test_a_trial_that_kills_the_device_raises_and_names_the_operation(untried: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda:0")

    def lost(device: torch.device | None = None) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be")

    with pytest.warns(UserWarning, match=r"an operation: its trial on cuda:0 failed: AssertionError: ; plain torch"):
        assert dispatch.trial("an operation", device, lambda: _raise(AssertionError())).startswith("its trial on cuda")
    untried.setattr(torch.cuda, "synchronize", lost)
    with pytest.raises(RuntimeError, match=r"another: its trial has left cuda:0 unusable \(RuntimeError: CUDA .*ed\);"):
        dispatch.trial("another", device, fail)
    assert ("another", "cuda:0") not in dispatch._trials


def _raise(error: Exception) -> None:
    raise error


def test_a_trial_runs_without_the_callers_autocast(untried: pytest.MonkeyPatch) -> None:
    found: list[torch.dtype] = []
    one = torch.ones(1, 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        dispatch.trial("an operation", torch.device("cpu"), lambda: found.append((one @ one).dtype))
    assert found == [torch.float32]


@pytest.mark.parametrize(("asked", "allowed"), [("tf32", True), ("ieee", False)])
def test_the_newer_switch_for_tf32_is_read_as_well(asked: str, allowed: bool) -> None:
    """For which the older function only raises, and every fp32 kernel with it."""
    from kernels.contrastive import limit_of
    from kernels.gpu.attention import _numerics
    from kernels.precision import tf32_is_allowed

    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = asked
    try:
        assert limit_of(torch.float32) == (5e-3 if allowed else 5e-5)
        assert _numerics(torch.float32)["PRECISION"] in ("ieee", "tf32")
        assert tf32_is_allowed() == allowed
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
