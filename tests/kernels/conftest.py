"""Makes the helpers that lie in this folder importable by name: `from linear_cross_entropy_calls import draw`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # importlib mode leaves it alone
