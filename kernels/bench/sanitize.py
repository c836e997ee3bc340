"""NVIDIA's compute-sanitizer on the smallest check of each Triton operation: stray accesses and races.

compute-sanitizer --tool memcheck python -m kernels.bench.sanitize attention
"""

from __future__ import annotations

import importlib
import re
import shutil
import subprocess
import sys
from typing import Any

import torch

TOOLS = ("memcheck", "racecheck")
SECONDS = 50  # of one tool on one operation
BACKENDS = ("triton", "gluon")


def rows(name: str) -> list[dict[str, Any]]:
    """One a tool: how many errors it counted, or why it did not."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return [{"operation": name, "status": "missing", "message": "compute-sanitizer is not on PATH"}]
    return [{"operation": name, "tool": each, **_one(tool, each, name)} for each in TOOLS]


def _one(program: str, tool: str, name: str) -> dict[str, Any]:
    command = [program, "--tool", tool, sys.executable, "-m", "kernels.bench.sanitize", name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return {"status": "error", "message": f"not done after {SECONDS} s"}
    return read(done.stdout + done.stderr)


def read(report: str) -> dict[str, Any]:
    """The counts in what the tool printed, and which kernels ran under it."""
    ran = re.findall(r"^ran (.+)$", report, re.MULTILINE)
    memory = re.search(r"ERROR SUMMARY: (\d+) error", report)
    races = re.search(r"RACECHECK SUMMARY: (\d+) hazard", report)
    found = memory or races
    if found is None or not ran:
        last = (report.strip().splitlines() or ["it printed nothing"])[-1]
        return {"status": "error", "message": last[:300], "ran": ran}
    return {"status": "ok", "errors": int(found[1]), "ran": ran}


def run_smallest(name: str) -> None:
    """Forward and backward of the smallest check on each backend that is written in Triton."""
    from kernels.bench.check import numbers

    device = torch.device("cuda")
    checks = importlib.import_module(f"kernels.bench.{name}").checks(device)
    seen = set()
    for check in sorted(checks, key=lambda each: sum(t.numel() for t in each.draw(torch.device("cpu")).values())):
        for backend, implementation in check.operation.implementations(check.call).items():
            key = (check.operation.function, backend)
            if backend not in BACKENDS or key in seen:
                continue
            try:
                numbers(implementation.make(), check.draw(device))
            except ValueError as error:  # it refuses this dtype or shape; another check may do
                print(f"{' '.join(key)} refused: {error}")
                continue
            torch.cuda.synchronize()
            seen.add(key)
            print(f"ran {' '.join(key)} on {check.name}", flush=True)


if __name__ == "__main__":
    run_smallest(sys.argv[1])
