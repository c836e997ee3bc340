"""Other implementations that may be on this machine: which are, and why the others are not.

Each is imported only when it is measured. What is missing becomes a row that says so, so a table shows whether a peer
was there. None of the optional ones has been at hand while this was written: they are called as their documentation
says, and one that is called wrongly becomes a row with its message.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

OPTIONAL = {  # package and project
    "Liger": ("liger_kernel", "liger-kernel"),
    "FlashAttention 2": ("flash_attn", "flash-attn"),
    "FlashAttention 3": ("flash_attn_interface", "flash-attn-3"),
    "quack": ("quack", "quack-kernels"),
    "Apex": ("apex", "apex"),
    "open_clip": ("open_clip", "open-clip-torch"),
    "Inf-CL": ("inf_cl", "inf-cl"),
}


class MissingPeerError(Exception):
    """This machine lacks what a peer needs."""


def imported(module: str) -> Any:
    """A module of a peer. Raises MissingPeerError with the reason."""
    try:
        return importlib.import_module(module)
    except Exception as error:  # a peer's own import may fail in any way: on a missing library, on a wrong torch
        raise MissingPeerError(f"cannot import {module}: {_first_line(error)}") from error


def needs_cuda(make: Callable[[], Any]) -> Callable[[], Any]:
    """Refuse a peer without a GPU."""

    def checked() -> Any:
        if not torch.cuda.is_available():
            raise MissingPeerError("needs a GPU")
        return make()

    return checked


def imported_alone(package: str, module: str) -> Any:
    """A module of a peer without what its package imports besides. Raises MissingPeerError with the reason."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise MissingPeerError(f"cannot import {package}: No module named {package!r}")
    try:
        alone = importlib.util.spec_from_file_location(
            f"{package}_{module}_alone", Path(spec.origin).with_name(f"{module}.py")
        )
        loaded = importlib.util.module_from_spec(alone)  # type: ignore[arg-type]
        alone.loader.exec_module(loaded)  # type: ignore[union-attr]
    except Exception as error:
        raise MissingPeerError(f"cannot import {module} of {package}: {_first_line(error)}") from error
    return loaded


def present() -> dict[str, str]:
    """The version of each optional peer, or that it is not there. Nothing is imported: some take a quarter minute."""
    found = {}
    for name, (package, project) in OPTIONAL.items():
        if importlib.util.find_spec(package) is None:
            found[name] = "not installed"
            continue
        try:
            found[name] = importlib.metadata.version(project)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "present"
    return found


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
