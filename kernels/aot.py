"""Ahead-of-time gate: what the Triton kernels become on GPUs that need not be here.

    python -m kernels.aot [FILE ...]            compile all that the files (of kernels/gpu) ship, print and check it
    python -m kernels.aot [FILE ...] --update   compile what changed since the golden numbers of the Triton that runs
                                                were made, write them anew
    PYTHONPATH=.venv/triton-3.6.0 python -m kernels.aot [...]   the same by another Triton (make installs this one)

A kernels/gpu/*.py says which configurations it ships with `aot_cases() -> list[AotCase]`. A case is compiled from
an explicit signature (triton.compiler.ASTSource, or Gluon's) for a `TARGETS` entry, and read with the ptxas and
cuobjdump of the Triton wheel (for AMD: from the assembly). This proves that a kernel compiles, fits, keeps its values
in registers and uses the tensor cores and asynchronous copies; it says nothing of speed, and correctness is the
interpreter tests'.

Design choices:
- The compiler takes a kernel that needs more shared memory than there is, so the limit is checked here.
- Golden numbers are exact and belong to one version of Triton: golden/VERSION/FILE.json for each file of kernels/gpu.
  There are those of the oldest and the newest version that pyproject.toml admits, which compile the same kernel
  differently; under any other, and for targets of which they have none (`recorded`), only the limits are checked.
  `make test-triton` runs the tests under both.
- They carry a fingerprint of what was compiled, so that the tests need not compile it all again (minutes): those whose
  fingerprint is still the same are taken as they are, but for one case of every kernel and target.
- A spill is accepted where the case names its reason, for all versions of Triton or for one.
"""

from __future__ import annotations

import argparse
import collections
import functools
import hashlib
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

GOLDEN = Path(__file__).parents[1] / "tests/kernels/ahead_of_time/golden"
INSTRUCTIONS = ("HGMMA", "HMMA", "UTCHMMA", "UTMALDG", "LDGSTS", "USETMAXREG", "MUFU")
COLUMNS = ("registers", "shared", "spill_stores", "tensor_memory", *INSTRUCTIONS, "MFMA")  # of the table


@dataclass(frozen=True)
class Target:
    """A GPU to compile for; shared memory in bytes, the most that one block can have."""

    backend: str
    arch: int | str
    lanes: int
    shared: int


TARGETS = {
    "sm_80": Target("cuda", 80, 32, 166912),
    "sm_90": Target("cuda", 90, 32, 232448),
    "sm_100": Target("cuda", 100, 32, 232448),
    "gfx942": Target("hip", "gfx942", 64, 65536),
}


@dataclass(frozen=True)
class AotCase:
    """One shipped configuration of a kernel.

    signature: type of every argument that is not a constexpr: "*bf16", "fp32", "i32", "tensordesc<bf16[128, 64]>", in
    Gluon "tensordesc<bf16[128, 64],LAYOUT>" with the layout's repr.
    attrs: names of the arguments that are divisible by 16 (pointers: aligned to 16 bytes).
    options: num_warps, num_stages and the like. targets: names in TARGETS that the configuration is shipped for.
    spills: why its register spills are accepted, by target ("sm_90") or, where only one version of Triton spills, by
    target and version ("sm_90 3.6.0"). matrix: whether it must use the tensor cores.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    attrs: Collection[str]
    options: Mapping[str, Any]
    targets: Collection[str] = tuple(TARGETS)
    spills: Mapping[str, str] = field(default_factory=dict)
    matrix: bool = True


Numbers = dict[str, int]


def fingerprint(case: AotCase, target_name: str) -> str:
    """Changes with the source of the kernel or of any kernel function its file sees, and with the configuration."""
    sources: dict[str, str] = {}

    def see(function: Any) -> None:
        if function.__name__ not in sources:
            sources[function.__name__] = function.src
            for name, value in function.fn.__globals__.items():
                if hasattr(value, "src") and hasattr(value, "arg_names"):
                    see(value)
                elif type(value).__name__ == "constexpr":
                    sources[name] = repr(value)

    see(case.kernel)
    configuration = (case.signature, case.constexprs, case.options)
    settings = [sorted((name, str(value)) for name, value in each.items()) for each in configuration]
    text = repr((case.kernel.__name__, sorted(sources.items()), settings, sorted(case.attrs), TARGETS[target_name]))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def shipping() -> list[str]:
    """The files of kernels/gpu that ship kernels, without their ending."""
    files = sorted(Path(__file__).parent.glob("gpu/[!_]*.py"))
    return [file.stem for file in files if "def aot_cases(" in file.read_text()]


def collect(file: str) -> list[AotCase]:
    """The cases of one file. Raises ValueError when a case and target come twice."""
    cases: list[AotCase] = importlib.import_module(f"kernels.gpu.{file}").aot_cases()
    keys = collections.Counter(f"{case.name} on {target}" for case in cases for target in case.targets)
    repeated = [key for key, count in keys.items() if count > 1]
    if repeated:
        raise ValueError(f"{file}: ahead-of-time cases of one name: {', '.join(repeated)}")
    return cases


def measure(case: AotCase, target_name: str) -> Numbers:
    """Compile a case for a target and count: registers a thread, bytes of shared memory, spills, instructions."""
    compiled = compile_case(case, target_name)
    numbers = {"shared": compiled.metadata.shared}
    if TARGETS[target_name].backend == "hip":
        return numbers | _read_amd(compiled.asm["amdgcn"])
    if tensor_memory := getattr(compiled.metadata, "tmem_size", 0):
        numbers["tensor_memory"] = tensor_memory
    return numbers | _read_nvidia(compiled.asm["cubin"])


def compile_case(case: AotCase, target_name: str) -> Any:
    """The compiled kernel, as triton.compile gives it.

    Raises RuntimeError under TRITON_INTERPRET, which replaces the compiler.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("TRITON_INTERPRET=1 is set: the interpreter compiles nothing; unset it")
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    target = TARGETS[target_name]
    names = case.kernel.arg_names
    unknown = (set(case.signature) | set(case.constexprs)) ^ set(names)
    if unknown or set(case.signature) & set(case.constexprs):
        raise ValueError(f"case {case.name}: {sorted(unknown)} not once in signature or constexprs and the kernel")
    source_of: Any = ASTSource
    if case.kernel.is_gluon():
        from triton.experimental.gluon._runtime import GluonASTSource

        source_of = GluonASTSource
    source = source_of(
        fn=case.kernel,
        signature={name: case.signature.get(name, "constexpr") for name in names},
        constexprs=dict(case.constexprs),
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in case.attrs},
    )
    gpu = GPUTarget(target.backend, target.arch, target.lanes)
    return triton.compile(source, target=gpu, options=dict(case.options))


def _read_nvidia(cubin: bytes) -> Numbers:
    """Spills are bytes a thread, by the instructions that store and load local memory.

    The assembler is not asked: Triton calls it with options that differ from version to version.
    """
    code = machine_code(cubin)
    counts = collections.Counter(re.findall(r"\b[A-Z][A-Z0-9]+\b", code))
    if "EXIT" not in counts:
        raise RuntimeError("cuobjdump shows no instructions")

    def local(instruction: str) -> int:
        return sum(int(bits or 32) // 8 for bits in re.findall(rf"\b{instruction}(?:\.(64|128)\b)?", code))

    return {
        "registers": int(re.findall(r"\bREG:(\d+)", code)[0]),
        "spill_stores": local("STL"),
        "spill_loads": local("LDL"),
        **{name: counts[name] for name in INSTRUCTIONS if counts[name]},
    }


def assembler_report(ptx: str) -> str:
    """What ptxas says of a kernel: registers, spills, warnings."""
    chip = re.findall(r"^\.target (\w+)", ptx, re.MULTILINE)[0]
    assembler = "ptxas-blackwell" if int(re.sub(r"\D", "", chip)) >= 100 else "ptxas"
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        return _output(_tools() / assembler, "-v", f"--gpu-name={chip}", file.name, "-o", "/dev/null")


def machine_code(cubin: bytes) -> str:
    """The instructions (SASS) of a compiled kernel, behind a line of the resources it takes."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return _output(_tools() / "cuobjdump", "-res-usage", "-sass", file.name)


def _tools() -> Path:
    import triton

    return Path(triton.__file__).parent / "backends/nvidia/bin"


def _read_amd(assembly: str) -> Numbers:
    """Spills are registers."""

    def largest(name: str) -> int:
        return max(map(int, re.findall(rf"\.{name}:\s+(\d+)", assembly)))

    return {
        "registers": largest("vgpr_count"),  # accumulation registers included
        "spill_stores": largest("vgpr_spill_count"),  # those of scalar registers go to lanes of vector ones
        "MFMA": len(re.findall(r"\bv_mfma\w+", assembly)),
    }


def _output(*command: str | Path) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{Path(command[0]).name} failed: {done.stdout.strip()}")
    return done.stdout


def problems(case: AotCase, target_name: str, numbers: Numbers) -> list[str]:
    """What of a compiled case is over a limit, in words; empty when all is well."""
    found = []
    limit = TARGETS[target_name].shared
    if numbers["shared"] > limit:
        found.append(f"{numbers['shared']} bytes of shared memory, {limit} are there")
    accepted = spills_accepted(case, target_name)
    if numbers["spill_stores"] and not accepted:
        found.append(f"spills {numbers['spill_stores']}; name a reason in AotCase.spills or choose smaller tiles")
    if not numbers["spill_stores"] and accepted and target_name in recorded():
        found.append("spills nothing although AotCase.spills gives a reason; remove it")
    if case.matrix:
        wanted = {"sm_80": ["HMMA"], "sm_90": ["HGMMA"], "sm_100": ["UTCHMMA"], "gfx942": ["MFMA"]}[target_name]
        copies = [] if target_name == "gfx942" else ["LDGSTS", "UTMALDG"]
        found += [f"no {'/'.join(names)}" for names in (wanted, copies) if names and not any(map(numbers.get, names))]
    return [f"{case.name} on {target_name}: {each}" for each in found]


def spills_accepted(case: AotCase, target_name: str) -> bool:
    """Whether there is a reason under the Triton that runs; where it has no golden numbers, any version's will do."""
    if target_name not in recorded():
        return any(key.split()[0] == target_name for key in case.spills)
    return target_name in case.spills or f"{target_name} {golden_folder().name}" in case.spills


def golden_folder() -> Path:
    """The golden numbers of the Triton that runs; it need not exist."""
    import triton

    return GOLDEN / triton.__version__


def recorded() -> set[str]:
    """The targets of which the Triton that runs has golden numbers."""
    return _targets_in(golden_folder())


@functools.cache
def _targets_in(folder: Path) -> set[str]:
    return {key.rsplit(" ", 1)[1] for path in folder.glob("*.json") for key in json.loads(path.read_text())}


@dataclass(frozen=True)
class Golden:
    """The numbers on record, by "case on target", and what they were made from."""

    numbers: dict[str, Numbers]
    fingerprints: dict[str, str]

    def holds(self, case: AotCase, target_name: str) -> bool:
        """Whether compiling anew could only give what is on record."""
        return self.fingerprints.get(f"{case.name} on {target_name}") == fingerprint(case, target_name)

    def only(self, keys: Collection[str]) -> Golden:
        there = [key for key in keys if key in self.numbers]
        return Golden({key: self.numbers[key] for key in there}, {key: self.fingerprints[key] for key in there})

    def with_those_of(self, other: Golden) -> Golden:
        return Golden(self.numbers | other.numbers, self.fingerprints | other.fingerprints)


def read_golden(file: str) -> Golden:
    """Those of one file of kernels/gpu under the Triton that runs; empty when there are none yet."""
    path = golden_folder() / f"{file}.json"
    cases: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    prints = {key: case.pop("fingerprint") for key, case in cases.items()}
    return Golden(cases, prints)


def write_golden(file: str, golden: Golden) -> None:
    """One line a case."""
    cases = {key: numbers | {"fingerprint": golden.fingerprints[key]} for key, numbers in golden.numbers.items()}
    body = ",\n".join(sorted(f"{json.dumps(key)}: {json.dumps(case)}" for key, case in cases.items()))
    golden_folder().mkdir(parents=True, exist_ok=True)
    (golden_folder() / f"{file}.json").write_text(f"{{\n{body}\n}}\n")
    _targets_in.cache_clear()


def differences(mine: Mapping[str, Numbers], golden: Mapping[str, Numbers]) -> list[str]:
    """Every number that is not the golden one, in words."""
    return [
        f"{key}: {mine.get(key, 'gone')}, golden {golden.get(key, 'lacks it')}"
        for key in sorted({*mine, *golden})
        if mine.get(key) != golden.get(key)
    ]


def choose_cache_folder() -> None:
    """Keep compiled kernels of this Triton in a folder of their own, unless TRITON_CACHE_DIR names one."""
    from importlib.metadata import version

    folder = Path(tempfile.gettempdir(), f"weft-ahead-of-time-{os.getuid()}-triton-{version('triton')}")
    os.environ.setdefault("TRITON_CACHE_DIR", str(folder))


def check(file: str, targets: Collection[str], update: bool) -> list[str]:
    """Compile and print the cases of a file for some targets; what is wrong with them, in words."""
    golden, mine = read_golden(file), Golden({}, {})
    others = [key for key in golden.numbers if key.rsplit(" ", 1)[1] not in targets]
    wrong = []
    for case in collect(file):
        for target in filter(targets.__contains__, case.targets):
            key = f"{case.name} on {target}"
            known = update and golden.holds(case, target)
            mine.numbers[key] = numbers = golden.numbers[key] if known else measure(case, target)
            mine.fingerprints[key] = fingerprint(case, target)
            print(f"{key:66}", *(f"{numbers.get(name, '-'):>9}" for name in COLUMNS), flush=True)
            wrong += problems(case, target, numbers)
            if update and not known:  # an interrupted run goes on where it stood
                write_golden(file, golden.with_those_of(mine))
    if update:
        write_golden(file, golden.only(others).with_those_of(mine))
    else:
        compared = [key for key in (*mine.numbers, *golden.numbers) if key.rsplit(" ", 1)[1] in recorded() & {*targets}]
        wrong += differences(mine.only(compared).numbers, golden.only(compared).numbers)
        if unknown := {*targets} - recorded():
            where = f"triton {golden_folder().name} for {', '.join(sorted(unknown))}"
            print(f"{file}: no golden numbers of {where}, only the limits are checked")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m kernels.aot", description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", metavar="FILE", help=f"of kernels/gpu; all of them are {shipping()}")
    parser.add_argument("--update", action="store_true", help="write the golden numbers anew")
    parser.add_argument("--target", choices=TARGETS, help="this one alone")
    arguments = parser.parse_args()
    files = arguments.files or shipping()
    if unknown := set(files) - set(shipping()):
        parser.error(f"{', '.join(sorted(unknown))}: no file of kernels/gpu that ships kernels")
    choose_cache_folder()
    print(f"{'':66}", *(f"{name.removesuffix('_stores'):>9}"[:9] for name in COLUMNS))
    targets = [arguments.target] if arguments.target else [*TARGETS]
    wrong = [each for file in files for each in check(file, targets, arguments.update)]
    print(*wrong, sep="\n", end="\n" if wrong else "")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
