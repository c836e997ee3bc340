"""A Triton cache that travels: compiles here, without a GPU, what the checks and the table launch on one.

    python -m kernels.bench.warm DIR [--target sm_90]
    TRITON_CACHE_DIR=DIR python -m kernels.bench.suite          on the card, with DIR at the same absolute path

It saves the time to compile: half a second to three a kernel. Triton finds a kernel by a hash, and a miss costs no more
than the compilation; it hits where all of this is the same:

- the files of Triton, libtriton.so among them: the same version, from the same wheel, for the same version of Python;
- the assembler: the wheel's own, no TRITON_PTXAS_PATH; and the other variables of Triton that change what it compiles;
- the source of the kernels, the lines they begin at too;
- the path of DIR, which stands in the cache's own lists.

The launchers' C stubs (0.2 s each) are not in it: to make them takes a driver.

How: the operations are called as the benchmark calls them, by their own Triton kernels, on tensors without memory that
pass for a GPU's (`_pretence`); the custom operators run their code, not their fakes (`_Launches`), and each launch is
compiled and not run. What torch's own functions would compute is not known, so a condition on a value counts as true.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch._library.custom_ops import OPDEFS
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import dispatch, linear_cross_entropy_chunks
from kernels.aot import TARGETS
from kernels.bench.case import Case, Check, Tensors
from kernels.bench.jobs import OPERATIONS

PROCESSORS = 132  # of an H100 or H200; no kernel is compiled for their number


def warm(folder: Path, target: str) -> int:
    """Fill a folder with the kernels of every check and row of the table for a target of kernels.aot; their number.

    What a backend refuses is left out, as the benchmark leaves it out.
    """
    jobs = [job for module in OPERATIONS.values() for job in (*_of(module.cases, False), *_of(module.checks))]
    for job in jobs:
        job.operation.load()  # before modules are changed: what is imported later would not be
    kernels: set[str] = set()
    with _pretence(target), launches_compiled(folder, target, kernels):
        for job in jobs:
            for backend in sorted({"triton", "gluon"} & job.operation.own):
                with contextlib.suppress(ValueError):  # it refuses
                    _call(job, backend)
    return len(kernels)


def _of(function: Any, *arguments: Any) -> list[Any]:
    return function(torch.device("cuda"), *arguments)  # type: ignore[no-any-return]


def _call(job: Case | Check, backend: str) -> None:
    """Forward and backward."""
    with mock.patch.object(torch.Tensor, "is_cuda", False), FakeTensorMode():
        drawn = job.draw(torch.device("cpu"))
    tensors: Tensors = {
        name: torch.empty_strided(each.shape, each.stride(), dtype=each.dtype, device="meta").requires_grad_(
            each.requires_grad
        )
        for name, each in drawn.items()
    }
    operation = job.operation.load()
    with _Launches():
        results = job.call(lambda *a, **n: operation(*a, **n, backend=backend), tensors)
        outputs = results if isinstance(results, tuple) else (results,)
        leaves = [each for each in tensors.values() if each.requires_grad]
        torch.autograd.grad(outputs, leaves, [torch.empty_like(each) for each in outputs], allow_unused=True)


class _Launches(TorchDispatchMode):
    """Operators of weft run their code, not their fakes; a condition on a value is true."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "weft":
            with self:
                return OPDEFS[function._schema.name]._init_fn(*args, **(kwargs or {}))
        if function.overloadpacket is torch.ops.aten.is_nonzero:
            return True
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def _pretence(target: str) -> Iterator[None]:
    """Tensors without memory pass for those of a GPU, which every kernel of ours is trusted on."""
    kind = TARGETS[target]
    properties = SimpleNamespace(multi_processor_count=PROCESSORS)
    version = (0, 0) if kind.backend == "hip" else divmod(int(kind.arch), 10)
    chunks = linear_cross_entropy_chunks.CHUNK_BYTES
    with contextlib.ExitStack() as stack:
        for owner, name, value in (
            (torch.Tensor, "is_cuda", True),
            (torch.version, "hip", "0" if kind.backend == "hip" else None),
            (torch.cuda, "get_device_capability", lambda *_: version),
            (torch.cuda, "get_device_properties", lambda *_: properties),
            (torch.cuda, "device_of", lambda _: contextlib.nullcontext()),
            (torch, "autocast", lambda *_, **__: contextlib.nullcontext()),
            (torch, "is_autocast_enabled", lambda *_: False),
            *_taken_by_name({dispatch.trial: lambda *_: "", dispatch.no_triton: lambda *_: ""}),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        stack.enter_context(mock.patch.dict(chunks, meta=chunks["cuda"]))
        yield


def _taken_by_name(replacements: dict[Any, Any]) -> Iterator[tuple[Any, str, Any]]:
    """(module of kernels, name, replacement) wherever one has such a function."""
    modules = [module for name, module in sys.modules.items() if name.split(".")[0] == "kernels"]
    for module in modules:
        for name, value in [*vars(module).items()]:
            for original, replacement in replacements.items():
                if value is original:
                    yield module, name, replacement


@contextlib.contextmanager
def launches_compiled(folder: Path, target: str, kernels: set[str]) -> Iterator[None]:
    """Triton compiles each launch for a target into a folder, adds its hash to `kernels`, and runs nothing."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver

    kind = TARGETS[target]
    before, run, seen = driver._active, triton.JITFunction.run, set()

    def compile_only(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **named: Any) -> Any:
        if kernel not in seen:
            kernel.device_caches.clear()  # by device, whichever GPU it is
            seen.add(kernel)
        compiled = run(kernel, *arguments, grid=grid, warmup=True, **named)
        kernels.add(compiled.hash)
        return compiled

    driver.set_active(_driver(GPUTarget(kind.backend, kind.arch, kind.lanes)))
    try:
        with triton.knobs.cache.scope(), mock.patch.object(triton.JITFunction, "run", compile_only):
            triton.knobs.cache.dir = str(folder.resolve())
            yield
    finally:
        for kernel in seen:
            kernel.device_caches.clear()
        driver._active = before


def _driver(target: Any) -> Any:
    """As far as a compilation asks for one: the GPU is device 0."""
    from triton.backends.driver import DriverBase

    class Absent(DriverBase):
        is_active = classmethod(lambda _: True)
        get_current_target = staticmethod(lambda: target)
        get_current_device = staticmethod(lambda: 0)
        get_current_stream = staticmethod(lambda _: 0)
        get_active_torch_device = map_python_to_cpp_type = get_benchmarker = None

    return Absent()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m kernels.bench.warm", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="DIR", help="where the card will have it too")
    parser.add_argument("--target", default="sm_90", choices=TARGETS)
    arguments = parser.parse_args()
    folder, target = arguments.folder.resolve(), arguments.target
    print(f"{warm(folder, target)} kernels for {target}; on the card: TRITON_CACHE_DIR={folder}")


if __name__ == "__main__":
    main()
