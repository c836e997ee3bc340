"""What travels to a machine without a network: requirements followed for its Python, tags that fit it, refusals."""

from __future__ import annotations

import io
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from kernels.bench import carry
from kernels.bench.carry import CannotCarryError, Pip, Target, Wheel, plan

PURE = "py3-none-any"


def wheel(folder: Path, name: str, version: str, tag: str = PURE, requires: tuple[str, ...] = ()) -> Path:
    path = folder / f"{name.replace('-', '_')}-{version}-{tag}.whl"
    metadata = [f"Name: {name}", f"Version: {version}", *(f"Requires-Dist: {each}" for each in requires)]
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name}-{version}.dist-info/METADATA", "\n".join(metadata) + "\n\ntext\n")
    return path


class Registry:
    """Wheels by name, newest last; a request for one is kept."""

    def __init__(self, *wheels: Path) -> None:
        self._wheels, self.asked = wheels, []

    def __call__(self, requirement: str) -> Path:
        self.asked.append(requirement)
        wanted = Requirement(requirement)
        fit = [
            each
            for each in self._wheels
            if Wheel(each, "").name == wanted.name and wanted.specifier.contains(Wheel(each, "").version)
        ]
        if not fit:
            raise CannotCarryError(f"{requirement} cannot travel")
        return fit[-1]


def names(wheels: list[Wheel]) -> list[str]:
    return [f"{each.name} {each.version}" for each in wheels]


def test_what_is_needed_minus_what_is_there(tmp_path: Path) -> None:
    weft = wheel(tmp_path, "weft", "1", requires=("torch>=2", "Web.Dataset>=1", "scipy", "pytest; extra == 'dev'"))
    registry = Registry(
        wheel(tmp_path, "web-dataset", "1.0", requires=("numpy", "braceexpand", "tomli; python_version < '3.12'")),
        wheel(tmp_path, "braceexpand", "2.0"),
        wheel(tmp_path, "tomli", "3.0"),
    )
    target = Target((3, 12), dict.fromkeys(("torch", "numpy")), {"scipy": "only sound needs it"})
    found = plan(Wheel(weft, "weft itself"), target, registry)
    assert names(found) == ["weft 1", "web-dataset 1.0", "braceexpand 2.0"]
    assert [each.why for each in found] == ["weft itself", "for weft", "for web-dataset"]
    older = plan(Wheel(weft, ""), Target((3, 11), target.has, target.without), registry)
    assert names(older)[-1] == "tomli 3.0"  # whatever Python runs this


def test_what_is_there_in_too_old_a_version_travels(tmp_path: Path) -> None:
    weft = wheel(tmp_path, "weft", "1", requires=("a>=2", "b>=2"))
    target = Target((3, 12), {"a": "1.9", "b": "2.0"})
    assert names(plan(Wheel(weft, ""), target, Registry(wheel(tmp_path, "a", "2.5")))) == ["weft 1", "a 2.5"]


def test_a_later_requirement_narrows_an_earlier_one(tmp_path: Path) -> None:
    weft = wheel(tmp_path, "weft", "1", requires=("a", "b"))
    registry = Registry(
        wheel(tmp_path, "a", "1"), wheel(tmp_path, "a", "2"), wheel(tmp_path, "b", "1", requires=("a<2",))
    )
    assert names(plan(Wheel(weft, ""), Target((3, 12)), registry)) == ["weft 1", "a 1", "b 1"]
    assert registry.asked == ["a", "b", "a<2"]


@pytest.mark.parametrize(
    ("tag", "fits"),
    [
        (PURE, True),
        ("py2.py3-none-any", True),
        ("cp312-cp312-manylinux2014_x86_64.manylinux_2_17_x86_64", True),
        ("cp310-abi3-manylinux_2_28_x86_64", True),
        ("cp311-cp311-manylinux_2_17_x86_64", False),
        ("cp311-none-any", False),
        ("cp312-cp312-linux_x86_64", False),  # built here, for no other machine's libraries
        ("cp312-cp312-manylinux_2_34_x86_64", False),
        ("cp312-cp312-manylinux_2_17_aarch64", False),
    ],
)
def test_a_wheel_that_does_not_fit_is_refused(tmp_path: Path, tag: str, fits: bool) -> None:
    target = Target((3, 12))
    path = wheel(tmp_path, "deepspeed", "0.19.8", tag)
    assert Wheel(path, "").tag == tag
    if fits:
        target.refuse_unfit(path)
        return
    with pytest.raises(CannotCarryError, match=r"deepspeed 0.19.8 cannot travel: .* leave it out: --without deepspeed"):
        target.refuse_unfit(path)


def test_the_list_ends_with_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheels = [Wheel(wheel(tmp_path, "weft", "1"), "weft itself"), Wheel(wheel(tmp_path, "a-b", "2"), "for weft")]
    lines = carry.listing(wheels, Target((3, 12), without={"scipy": "only sound needs it"}), tmp_path).splitlines()
    assert "left out: scipy (only sound needs it)" in lines
    assert lines[-1].startswith(f"python -m pip install --no-index --no-deps --find-links {tmp_path} ")
    assert set(lines[-1].split()[-2:]) == {"weft==1", "a-b==2"}
    monkeypatch.setattr(carry, "CHANNEL", 10)
    assert "over 64 MiB" in carry.listing(wheels, Target((3, 12)), tmp_path)


def test_a_folder_with_wheels_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wheel(tmp_path, "weft", "0.9")
    monkeypatch.setattr(sys, "argv", ["carry", str(tmp_path)])
    assert carry.main() == 1
    assert "holds wheels already (weft-0.9-py3-none-any.whl)" in capsys.readouterr().err


def test_neither_found_nor_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pip, "_run", lambda self, verb, *words: f"no {verb}")
    with pytest.raises(CannotCarryError, match=r"^a>=1 cannot travel: no download; and to build it here: no wheel$"):
        Pip(tmp_path, Target((3, 12))).fetch("a>=1")


def test_weft_itself(tmp_path: Path) -> None:
    """A wheel of this checkout, with its recipes, from a copy: nothing is left in the checkout."""
    path = Pip(tmp_path, Target((3, 12))).build(carry.ROOT)
    assert path.name == "weft-0.1.0-py3-none-any.whl"
    inside = zipfile.ZipFile(path).namelist()
    assert "pretrain/recipes/quickstart.yaml" in inside
    assert "kernels/bench/carry.py" in inside
    assert {each.parent for each in tmp_path.iterdir()} == {tmp_path}
    asked = {each.name for each in Wheel(path, "").requires()}
    assert {"torch", "deepspeed", "megatron-core"} <= asked


SETUP = """
import os
from setuptools import Extension, setup
operations = [] if os.environ.get("DS_BUILD_OPS") == "0" else [Extension("speed", ["speed.c"])]
setup(name="speed", version="1.0", packages=[], ext_modules=operations)
"""


def test_a_source_archive_is_built_without_operations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As DeepSpeed's is: with them it would be a wheel of this Python."""
    links, folder = tmp_path / "links", tmp_path / "wheels"
    links.mkdir()
    folder.mkdir()
    with tarfile.open(links / "speed-1.0.tar.gz", "w:gz") as archive:
        for name, text in (("setup.py", SETUP), ("PKG-INFO", "Metadata-Version: 2.1\nName: speed\nVersion: 1.0\n")):
            entry = tarfile.TarInfo(f"speed-1.0/{name}")
            entry.size = len(text)
            archive.addfile(entry, io.BytesIO(text.encode()))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    path = Pip(folder, Target((3, 12))).fetch("speed>=1")
    assert path == folder / f"speed-1.0-{PURE}.whl"
    assert list(folder.iterdir()) == [path]
