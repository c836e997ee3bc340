"""Makes the helpers that lie in this folder importable by name: `from ranks import run_ranks`.

pytest runs in importlib mode, which leaves `sys.path` alone: this adds the one folder meant to be shared.
"""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--recipes 300`: how many random recipes tests/pretrain/test_random_recipes.py tries; few in CI."""
    parser.addoption("--recipes", type=int, default=12, help="number of random recipes to train")
    parser.addoption("--first-recipe", type=int, default=0, help="number of the first of them, to try one again")
