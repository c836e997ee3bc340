"""NVIDIA's compute-sanitizer on the smallest checks of the Triton kernels: stray accesses, then races.

    compute-sanitizer --tool memcheck python -m kernels.bench.sanitize

Design choices:
- One process a tool does forward and backward of all three operations: most of its time is the import of torch.
- Only our kernels are instrumented: `--kernel-name kns=` is a part of a kernel's name, and given several times it
  stands for any of them (until CUDA 12.2 the option was `--kernel-regex`). cuBLAS runs at full speed.
- torch's caching allocator would hide an access beyond a tensor, and expandable segments report some that are none
  (pytorch issue 196209): neither is used here.
- `--launch-timeout 0` waits without limit for the first CUDA call, which comes after a long import; the limit is that
  of `rows`. At the limit the tool and what runs under it are killed, and so they are when the caller dies.
"""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from kernels.bench.process import dying_with_me, end_group

TOOLS = ("memcheck", "racecheck")
OPERATIONS = {  # by file, the function
    "attention": "attention",
    "contrastive": "contrastive_loss",
    "linear_cross_entropy": "linear_cross_entropy",
}
KERNELS = ("attention_", "sums_kernel", "gradient_kernel", "chunk_kernel", "numbers_kernel")  # parts of their names
BACKENDS = ("triton", "gluon")  # in this order: what may hang comes last
LEAST = 10.0  # seconds; a tool that has less is not started
FOLDERS = ("bin", "compute-sanitizer", "extras/compute-sanitizer")  # of a CUDA toolkit


def rows(seconds: float) -> Iterator[dict[str, Any]]:
    """One a tool, when it has ended: how many errors it counted, or why it did not. Takes about `seconds` at most."""
    end = time.monotonic() + seconds
    of = {"operation": ", ".join(OPERATIONS.values())}
    program = find()
    if program is None:
        yield {**of, "status": "missing", "message": "compute-sanitizer is not on PATH, nor where CUDA usually is"}
        return
    for tool in TOOLS:
        left = end - time.monotonic()
        if left < min(LEAST, seconds / 2):
            yield {**of, "tool": tool, "status": "error", "message": "not run: no time was left"}
        else:
            yield {**of, "tool": tool, **_one(program, tool, left)}


def find() -> str | None:
    """The tool on PATH, or in the newest CUDA toolkit of those that are where one usually is."""
    if on_path := shutil.which("compute-sanitizer"):
        return on_path
    named = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    versions = sorted(Path("/usr/local").glob("cuda-*"), key=lambda each: _numbers(each.name), reverse=True)
    for toolkit in (*named, Path("/usr/local/cuda"), *versions, Path("/opt/cuda")):
        for folder in FOLDERS:
            if found := shutil.which("compute-sanitizer", path=str(toolkit / folder)):
                return found
    return None


def _numbers(text: str) -> list[int]:
    return [int(each) for each in re.findall(r"\d+", text)]


def _one(program: str, tool: str, seconds: float) -> dict[str, Any]:
    # application-only: the compilers that Triton starts are nothing to look at
    options = ["--tool", tool, "--target-processes", "application-only", "--launch-timeout", "0", "--print-limit", "20"]
    filters = [word for name in KERNELS for word in ("--kernel-name", f"kns={name}")]
    command = [program, *options, *filters, sys.executable, "-m", "kernels.bench.sanitize"]
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_ALLOC_CONF")}
    environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    # a file and not a pipe: nobody waits for its end when a process under the tool still holds it
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        process = subprocess.Popen(
            dying_with_me(command), stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        late = False
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            late = True
        finally:
            if end_group(process) is None:
                print(f"process {process.pid} cannot be killed", file=sys.stderr)
        output.seek(0)
        report = output.read()
    print(report, file=sys.stderr, flush=True)  # whole, in the suite's log
    if late:
        return {**read(report, 1), "status": "error", "message": f"not done after {seconds:.0f} s"}
    return read(report, process.returncode)


def read(report: str, code: int = 0) -> dict[str, Any]:
    """The counts in what the tool printed, the first error, and which kernels ran under it; `code`: its exit code."""
    ran = re.findall(r"^ran (.+)$", report, re.MULTILINE)
    memory = re.search(r"ERROR SUMMARY: (\d+) error", report)
    races = re.search(r"RACECHECK SUMMARY: (\d+) hazard", report)
    found = memory or races
    first = re.search(r"^=+ ((?:Invalid|Error: (?!Target)|Program hit|Race|Potential|Warp).*)$", report, re.MULTILINE)
    detail = {"first": first[1][:300]} if first else {}
    if found is not None and int(found[1]):
        return {"status": "ok", "errors": int(found[1]), **detail, "ran": ran}
    if found is None or not ran or code:
        own = [line for line in report.strip().splitlines() if line.strip("= ") and "SUMMARY" not in line]
        return {"status": "error", "message": (own or ["it printed nothing"])[-1][:300], **detail, "ran": ran}
    return {"status": "ok", "errors": 0, "ran": ran}


def run_smallest() -> None:
    """Forward and backward of the smallest check of each operation, on each backend that is written in Triton."""
    from kernels.bench.check import numbers

    device = torch.device("cuda")
    checks = [
        check
        for module, function in OPERATIONS.items()
        for check in importlib.import_module(f"kernels.bench.{module}").checks(device)
        if check.operation.function == function
    ]
    # bf16 first: it is what trains, and Gluon's only dtype
    sizes = {check.key: sum(each.numel() for each in check.draw(torch.device("cpu")).values()) for check in checks}
    checks.sort(key=lambda check: (check.dtype.itemsize, sizes[check.key]))
    for backend in BACKENDS:
        done = set()
        for check in checks:
            function = check.operation.function
            implementation = check.operation.implementations(check.call).get(backend)
            if implementation is None or function in done:
                continue
            try:
                numbers(implementation.make(), check.draw(device))
            except ValueError as error:  # it refuses this dtype or shape; another check may do
                print(f"{function} {backend} refused: {error}")
                continue
            torch.cuda.synchronize()
            done.add(function)
            print(f"ran {function} {backend} on {check.name}", flush=True)


def leave_with_parent() -> None:
    """End this process within a second of its parent's end, in whatever group the parent has put it."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    leave_with_parent()
    run_smallest()
