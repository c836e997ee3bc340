"""Compiles the Triton kernels for GPUs that are not here: `pytest tests/kernels/ahead_of_time`.

Skipped, with the reason, where Triton is missing or TRITON_INTERPRET=1 has made it an interpreter. Compiled kernels are
kept in a temporary folder that belongs to the version of Triton, so a second run takes seconds.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # importlib mode leaves it alone; for launches.py


class SkippedModule(pytest.Module):
    """Not imported: what it imports is not there, or would not compile."""

    def collect(self) -> Any:
        pytest.skip(why_skip(), allow_module_level=True)


def why_skip() -> str:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "TRITON_INTERPRET=1 is set: needs a process of its own, pytest tests/kernels/ahead_of_time"
    return ""


def pytest_pycollect_makemodule(module_path: Path, parent: Any) -> Any:
    return SkippedModule.from_parent(parent, path=module_path) if why_skip() else None


@pytest.fixture
def record(monkeypatch: pytest.MonkeyPatch) -> Any:
    """record(target, call): what the call launches on that GPU, see launches.py."""
    from launches import recorder

    return recorder(monkeypatch)
