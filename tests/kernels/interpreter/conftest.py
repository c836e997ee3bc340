"""Runs the Triton kernels in Triton's interpreter, on the CPU: `pytest tests/kernels/interpreter`, alone.

Triton is a compiler or an interpreter from the moment it is imported, and the ahead-of-time tests need the compiler. So
this folder sets TRITON_INTERPRET=1 only where it is all that pytest was asked for; else, and without Triton, its tests
are skipped and say why. An interpreted step of a kernel's loop takes 1 to 2 ms: large tiles, small grids.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))  # importlib mode leaves it alone; for attention_calls.py
why_skip = ""


def pytest_configure(config: pytest.Config) -> None:
    global why_skip
    asked = [Path(config.invocation_params.dir, argument.split("::")[0]).resolve() for argument in config.args]
    alone = all(path == HERE or HERE in path.parents for path in asked)
    if importlib.util.find_spec("triton") is None:
        why_skip = "triton is not installed"
    elif not alone and os.environ.get("TRITON_INTERPRET") != "1":
        why_skip = "needs a process of its own: pytest tests/kernels/interpreter"
    else:
        os.environ["TRITON_INTERPRET"] = "1"
        multiply_bf16_as_numbers()
        round_to_bf16()


def multiply_bf16_as_numbers() -> None:
    """The interpreter keeps bf16 as uint16, and its tl.dot multiplies these integers (triton 3.7, issue 11584)."""
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    original = InterpreterBuilder.create_dot

    def create_dot(self: Any, a: Any, b: Any, c: Any, *rest: Any) -> Any:
        def widened(handle: Any) -> Any:
            if handle.dtype.scalar != tl.bfloat16:
                return handle
            return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

        return original(self, widened(a), widened(b), c, *rest)

    InterpreterBuilder.create_dot = create_dot


def round_to_bf16() -> None:
    """To the nearest, as the hardware does; the interpreter cuts the lower bits off, twice the error (triton 3.7)."""
    import numpy as np
    import torch
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    original = InterpreterBuilder.cast_impl

    def cast(self: Any, source: Any, kind: Any) -> Any:
        if source.dtype.scalar != tl.float32 or kind.scalar != tl.bfloat16:
            return original(self, source, kind)
        rounded = torch.from_numpy(np.array(source.data)).bfloat16().view(torch.uint16)
        return TensorHandle(rounded.numpy(), tl.bfloat16)

    InterpreterBuilder.cast_impl = cast


class SkippedModule(pytest.Module):
    """Not imported: its imports would fail, or bring in a Triton that compiles."""

    def collect(self) -> Any:
        pytest.skip(why_skip, allow_module_level=True)


def pytest_pycollect_makemodule(module_path: Path, parent: Any) -> Any:
    return SkippedModule.from_parent(parent, path=module_path) if why_skip else None
