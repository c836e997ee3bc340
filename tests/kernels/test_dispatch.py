"""What holds for every operation that chooses among backends."""

from __future__ import annotations

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
    for trial in ("layer_norm", "rms_norm", "norm", *(each.__name__ for each in OPERATIONS)):
        monkeypatch.setitem(dispatch._trials, (trial, "cuda:0"), "")
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
