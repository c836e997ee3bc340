"""JSON as the standard has it: a number that is not finite is null, where Python would write the bare word NaN.

What weft writes for itself (indexes, manifests, metrics, checkpoints) it reads with `read_json`, which knows one error:
what a damaged file can hold must not end a command in an OverflowError or a RecursionError further on.
"""

from __future__ import annotations

import json
import math
from typing import Any

LARGEST = 1 << 64


def strict_json(tree: Any, **options: Any) -> str:
    """`json.dumps` with null for NaN and infinities, at any depth."""
    return json.dumps(_finite(tree), allow_nan=False, **options)


def read_json(text: str | bytes) -> Any:
    """`json.loads` with None for numbers that are not finite.

    Raises ValueError for all that is not JSON, for integers beyond 64 bits, and for what is nested too deep to be read.
    """
    try:
        return json.loads(text, parse_constant=lambda _: None, parse_float=_finite_float, parse_int=_integer)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error


def _finite_float(digits: str) -> float | None:
    value = float(digits)
    return value if math.isfinite(value) else None


def _integer(digits: str) -> int:
    value = int(digits)
    if abs(value) >= LARGEST:
        raise ValueError(f"it holds the number {digits[:20]}..., which needs more than 64 bits")
    return value


def _finite(tree: Any) -> Any:
    if isinstance(tree, float):
        return tree if math.isfinite(tree) else None
    if isinstance(tree, dict):
        return {key: _finite(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_finite(value) for value in tree]
    return tree
