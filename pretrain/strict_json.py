"""JSON as the standard has it: a number that is not finite is null, where Python would write the bare word NaN."""

from __future__ import annotations

import json
import math
from typing import Any


def strict_json(tree: Any, **options: Any) -> str:
    """`json.dumps` with null for NaN and infinities, at any depth."""
    return json.dumps(_finite(tree), allow_nan=False, **options)


def _finite(tree: Any) -> Any:
    if isinstance(tree, float):
        return tree if math.isfinite(tree) else None
    if isinstance(tree, dict):
        return {key: _finite(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_finite(value) for value in tree]
    return tree
