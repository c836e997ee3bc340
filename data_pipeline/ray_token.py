"""Who may talk to a Ray that this process starts: it listens on every interface of the machine.

This module imports no Ray, which reads the token when it is imported.
"""

from __future__ import annotations

import os
import sys
import uuid


def guard_own_ray() -> None:
    """Let in only who has a token made now: this process and those that it starts. Call it before Ray is imported."""
    if "ray" not in sys.modules:
        os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=uuid.uuid4().hex)
