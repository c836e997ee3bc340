"""Wheels for a machine with a GPU and no network: find, build and list what weft needs and that machine lacks.

    python -m kernels.bench.carry DIR [--python 3.12] [--has NAME[==VERSION],...] [--without NAME,...] [--peers]

DIR then holds a wheel of weft and of everything that training on images and text needs beyond what the machine has.
The last line that is printed installs them there. Runs where pip has a registry, in an environment with weft.

Design choices:
- Requirements are followed here, one `pip download --no-deps` each: pip would judge their markers by the Python that
  runs, not by the target's (pip issue 11664), and would fetch torch's CUDA libraries.
- A project that has a source archive only (DeepSpeed) is built here without its compiled operations. A wheel whose tag
  names another Python or platform than the target's is refused.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from email.parser import HeaderParser
from pathlib import Path

from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.tags import Tag, compatible_tags, cpython_tags
from packaging.utils import canonicalize_name, parse_wheel_filename

ROOT = Path(__file__).parents[2]
PACKAGES = ("kernels", "data_pipeline", "cluster", "pretrain")
MACHINE, GLIBC = "x86_64", 28  # torch's own wheels ask for glibc 2.28
# typing-extensions is torch's too, but in an older version than pydantic asks for: it always travels
HAS = (
    *("torch", "triton", "numpy", "setuptools", "sympy", "mpmath"),
    *("networkx", "jinja2", "markupsafe", "filelock", "fsspec"),
)
WITHOUT = {
    "soundfile": "only sound needs it",
    "scipy": "only sound needs it",
    "huggingface-hub": "tokenizers loads it to download, which weft does not do",
    "ninja": "no operation of DeepSpeed is compiled",
}
PEERS = ("liger-kernel==0.8.5", "open-clip-torch", "ftfy", "wcwidth")  # open_clip's losses need no timm
CHANNEL = 64 * 2**20  # bytes that a channel to such a machine may take


class CannotCarryError(Exception):
    """What is needed cannot travel."""


@dataclass
class Target:
    """The machine that the wheels are for. has: what is there, by name, with its version where it is known."""

    python: tuple[int, int]
    has: Mapping[str, str | None] = field(default_factory=dict)
    without: Mapping[str, str] = field(default_factory=dict)

    @property
    def platforms(self) -> list[str]:
        """Newest first, as pip and `packaging` want them."""
        return [*(f"manylinux_2_{minor}_{MACHINE}" for minor in range(GLIBC, 4, -1)), f"manylinux2014_{MACHINE}"]

    def tags(self) -> set[Tag]:
        interpreter = f"cp{self.python[0]}{self.python[1]}"
        return {
            *cpython_tags(self.python, platforms=self.platforms),
            *compatible_tags(self.python, interpreter, self.platforms),
        }

    def wants(self, requirement: Requirement) -> bool:
        """Whether a requirement applies there and is not met by what is there."""
        name = canonicalize_name(requirement.name)
        told = ".".join(map(str, self.python))
        environment = {key: str(value) for key, value in default_environment().items()}
        environment |= {"python_version": told, "python_full_version": f"{told}.0", "extra": ""}
        environment |= {"sys_platform": "linux", "platform_system": "Linux", "platform_machine": MACHINE}
        if name in self.without or (requirement.marker and not requirement.marker.evaluate(environment)):
            return False
        if name not in self.has:
            return True
        version = self.has[name]
        return version is not None and not requirement.specifier.contains(version, prereleases=True)

    def refuse_unfit(self, wheel: Path) -> None:
        """Raises CannotCarryError for a wheel that the machine could not install."""
        name, version, _, tags = parse_wheel_filename(wheel.name)
        if not tags & self.tags():
            told = f"{self.python[0]}.{self.python[1]}"
            raise CannotCarryError(
                f"{name} {version} cannot travel: {wheel.name} is not for Python {told} on {MACHINE} with glibc "
                f"2.{GLIBC}; build it with python{told} on such a machine, or leave it out: --without {name}"
            )


@dataclass
class Wheel:
    """A wheel that travels."""

    path: Path
    why: str

    @property
    def name(self) -> str:
        return parse_wheel_filename(self.path.name)[0]

    @property
    def version(self) -> str:
        return str(parse_wheel_filename(self.path.name)[1])

    @property
    def tag(self) -> str:
        return "-".join(self.path.stem.rsplit("-", 3)[1:])

    def requires(self) -> list[Requirement]:
        with zipfile.ZipFile(self.path) as archive:
            inside = next(each for each in archive.namelist() if each.endswith(".dist-info/METADATA"))
            headers = HeaderParser().parsestr(archive.read(inside).decode())
        return [Requirement(each) for each in headers.get_all("Requires-Dist") or []]


Fetch = Callable[[str], Path]


def plan(first: Wheel, target: Target, fetch: Fetch) -> list[Wheel]:
    """A wheel, and all that it needs and the target lacks. `fetch(requirement)` gives a wheel that meets it.

    Raises CannotCarryError where two requirements exclude each other, or a wheel does not fit.
    """
    wheels = {first.name: first}
    asked: dict[str, SpecifierSet] = {}
    waiting = [(first, each) for each in first.requires()]
    while waiting:
        parent, requirement = waiting.pop(0)
        name = canonicalize_name(requirement.name)
        if not target.wants(requirement):
            continue
        asked[name] = asked.get(name, SpecifierSet()) & requirement.specifier
        if name in wheels and asked[name].contains(wheels[name].version, prereleases=True):
            continue
        wheel = Wheel(fetch(f"{name}{asked[name]}"), f"for {parent.name}")
        target.refuse_unfit(wheel.path)
        wheels[name] = wheel
        waiting += [(wheel, each) for each in wheel.requires()]
    return list(wheels.values())


class Pip:
    """Wheels from the registry that pip is configured for, into a folder."""

    def __init__(self, folder: Path, target: Target) -> None:
        self._folder, self._target = folder, target

    def fetch(self, requirement: str) -> Path:
        """A wheel for the target, built here where the registry has none for any Python."""
        platforms = [word for each in self._target.platforms for word in ("--platform", each)]
        version = ".".join(map(str, self._target.python))
        with tempfile.TemporaryDirectory(dir=self._folder) as draft:
            found = self._run(
                "download", requirement, "--only-binary=:all:", "--python-version", version, *platforms, "--dest", draft
            )
            if found:
                built = self._run("wheel", requirement, "--no-build-isolation", "--wheel-dir", draft)
                if built:
                    raise CannotCarryError(f"{requirement} cannot travel: {found}; and to build it here: {built}")
            return self._keep(draft)

    def build(self, source: Path) -> Path:
        """A wheel of a checkout, from a copy of it: a `build` folder in it may hold modules that are long gone."""
        with tempfile.TemporaryDirectory(dir=self._folder) as draft:
            copy = Path(draft) / "source"
            copy.mkdir()
            for name in ("pyproject.toml", "README.md", "LICENSE"):
                shutil.copy(source / name, copy)
            for name in PACKAGES:
                shutil.copytree(source / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
            if failed := self._run("wheel", str(copy), "--no-build-isolation", "--wheel-dir", draft):
                raise CannotCarryError(f"{source} cannot be built: {failed}")
            return self._keep(draft)

    def _run(self, verb: str, *words: str) -> str:
        """ "" or the last line of its errors."""
        command = [sys.executable, "-m", "pip", verb, "--no-deps", "--quiet", "--disable-pip-version-check", *words]
        environment = os.environ | {"DS_BUILD_OPS": "0"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        told = [line for line in done.stderr.splitlines() if line.startswith("ERROR: ")]
        return "" if done.returncode == 0 else (told or ["pip failed"])[-1].removeprefix("ERROR: ")

    def _keep(self, draft: str) -> Path:
        (wheel,) = Path(draft).glob("*.whl")
        return Path(shutil.move(wheel, self._folder / wheel.name))


def carry(folder: Path, target: Target, peers: Iterable[str] = ()) -> list[Wheel]:
    """Fill a folder with the wheels of weft, of what it needs, and of peers of the benchmarks."""
    folder.mkdir(parents=True, exist_ok=True)
    if old := sorted(folder.glob("*.whl")):
        raise CannotCarryError(f"{folder} holds wheels already ({old[0].name}); name an empty folder")
    pip = Pip(folder, target)
    wheels = plan(Wheel(pip.build(ROOT), "weft itself"), target, pip.fetch)
    for requirement in peers:
        if target.wants(Requirement(requirement)):
            wheels.append(Wheel(pip.fetch(requirement), "a peer of the benchmarks"))
            target.refuse_unfit(wheels[-1].path)
    for stale in set(folder.glob("*.whl")) - {each.path for each in wheels}:
        stale.unlink()  # a later requirement asked for another version
    return wheels


def listing(wheels: Iterable[Wheel], target: Target, folder: Path) -> str:
    """What travels, how much it is, what stays, and the command that installs it."""
    rows = sorted(wheels, key=lambda each: each.path.stat().st_size, reverse=True)
    lines = [
        f"{each.name:<20} {each.version:<10} {each.path.stat().st_size / 2**20:6.2f} MiB  {each.tag:<60} {each.why}"
        for each in rows
    ]
    total = sum(each.path.stat().st_size for each in rows)
    lines.append(f"{len(rows)} wheels, {total / 2**20:.1f} MiB" + (", over 64 MiB" if total > CHANNEL else ""))
    lines += [f"left out: {name} ({why})" for name, why in target.without.items()]
    command = ["python", "-m", "pip", "install", "--no-index", "--no-deps", "--find-links", str(folder)]
    lines += ["", shlex.join([*command, *(f"{each.name}=={each.version}" for each in rows)])]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m kernels.bench.carry", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="DIR", help="where the wheels go; empty or new")
    parser.add_argument("--python", default="3.12", metavar="X.Y", help="of the target; default 3.12")
    parser.add_argument("--has", default="", metavar="NAME[==VERSION],...", help=f"there beside {', '.join(HAS)}")
    parser.add_argument("--without", default="", metavar="NAME,...", help=f"stays here, as do {', '.join(WITHOUT)}")
    parser.add_argument("--peers", action="store_true", help=f"also {', '.join(PEERS)}")
    arguments = parser.parse_args()
    major, _, minor = arguments.python.partition(".")
    if not (major == "3" and minor.isdigit()):
        parser.error(f"--python {arguments.python}: a version such as 3.12")
    there = [each.partition("==") for each in filter(None, arguments.has.split(","))]
    has: dict[str, str | None] = {name: None for name in HAS}
    has |= {canonicalize_name(name): version or None for name, _, version in there}
    without: dict[str, str] = {
        canonicalize_name(name): "as asked" for name in filter(None, arguments.without.split(","))
    }
    target = Target((3, int(minor)), has, WITHOUT | without)
    try:
        wheels = carry(arguments.folder, target, PEERS if arguments.peers else ())
    except CannotCarryError as error:
        print(error, file=sys.stderr)
        return 1
    print(listing(wheels, target, arguments.folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
