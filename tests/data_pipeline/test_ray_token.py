"""A Ray of one's own is started with a token."""

import os
import subprocess
import sys

import pytest

from data_pipeline.ray_token import guard_own_ray


def test_a_token_is_set_before_ray_reads_it(monkeypatch):
    monkeypatch.delitem(sys.modules, "ray", raising=False)
    monkeypatch.setenv("RAY_AUTH_MODE", "none")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "")
    guard_own_ray()
    assert os.environ["RAY_AUTH_MODE"] == "token"
    assert len(os.environ["RAY_AUTH_TOKEN"]) == 32


@pytest.mark.parametrize(
    "module", ["data_pipeline.bench.on_ray", "data_pipeline.bench.peers", "data_pipeline.parallel"]
)
def test_nothing_imports_ray_before(module):
    code = f"import sys, {module}; sys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
