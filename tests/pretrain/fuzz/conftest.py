"""How many damages, and from which seed: `python -m pytest tests/pretrain/fuzz --damages 2000`."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # as tests/conftest.py does


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--damages", type=int, default=0, help="random damages to try (default: a few)")
    parser.addoption("--first-damage", type=int, default=0, help="seed of the first of them")
    parser.addoption("--fuzz-workers", type=int, default=1, help="processes that try them")
