"""Other implementations that may be on this machine: which are, and why the others are not.

Each is imported only when it is measured. What is missing becomes a row that says so, so a table shows whether a peer
was there. None of the optional ones has been at hand while this was written: they are called as their documentation
says, and one that is called wrongly becomes a row with its message.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

OPTIONAL = {
    "Liger": "liger_kernel",
    "FlashAttention 2": "flash_attn",
    "FlashAttention 3": "flash_attn_interface",
    "quack": "quack",
    "Apex": "apex.normalization.fused_layer_norm",
    "open_clip": "open_clip",
    "Inf-CL": "inf_cl",
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


def present() -> dict[str, str]:
    """The version of each optional peer, or why it is not there."""
    found = {}
    for name, module in OPTIONAL.items():
        try:
            found[name] = str(getattr(imported(module), "__version__", "present"))
        except MissingPeerError as error:
            found[name] = str(error)
    return found


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
