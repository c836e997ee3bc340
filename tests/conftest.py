"""Makes the helpers that lie in this folder importable by name: `from ranks import run_ranks`.

pytest runs in importlib mode, which leaves `sys.path` alone: this adds the one folder meant to be shared.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
