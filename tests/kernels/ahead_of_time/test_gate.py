"""Every shipped configuration of every Triton kernel compiles for every target it is shipped for, fits into shared
memory, spills no registers (or says why), uses tensor cores and asynchronous copies, and has its golden numbers.

One case of every kernel and target is compiled here, and every other that is not what its golden numbers were made
from (by a Triton without golden numbers, that one case only); `python -m kernels.aot` compiles all (minutes). After a
wanted change: `python -m kernels.aot --update`, by each Triton of golden/, and look at the difference there.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import triton

from kernels import aot

aot.choose_cache_folder()
FILES = {
    f"{case.name} on {target}": (file, case, target)
    for file in aot.shipping()
    for case in aot.collect(file)
    for target in case.targets
}
CASES = {key: (case, target) for key, (_, case, target) in FILES.items()}
UNKNOWN = f"there are no golden numbers of triton {triton.__version__} for %s: %s"
GOLDEN = {file: aot.read_golden(file) for file in aot.shipping()}
SAMPLE = {(case.kernel.__name__, target): key for key, (case, target) in reversed(CASES.items())}.values()
measured: dict[str, aot.Numbers] = {}


def numbers_of(key: str) -> aot.Numbers:
    if key not in measured:
        golden = GOLDEN[FILES[key][0]]
        if key not in SAMPLE and CASES[key][1] not in aot.recorded():
            pytest.skip(UNKNOWN % (CASES[key][1], "a sample only"))
        known = key not in SAMPLE and golden.holds(*CASES[key])
        measured[key] = golden.numbers[key] if known else aot.measure(*CASES[key])
    return measured[key]


@pytest.mark.parametrize("key", CASES)
def test_compiles_within_the_limits(key: str) -> None:
    assert aot.problems(*CASES[key], numbers_of(key)) == []


@pytest.mark.parametrize("key", CASES)
def test_numbers_are_the_golden_ones(key: str) -> None:
    if CASES[key][1] not in aot.recorded():
        pytest.skip(UNKNOWN % (CASES[key][1], "limits only"))
    golden = GOLDEN[FILES[key][0]]
    on_record = {key: golden.numbers[key]} if key in golden.numbers else {}
    assert aot.differences({key: numbers_of(key)}, on_record) == []


def test_no_golden_number_is_left_over() -> None:
    wanted = {key for key, (_, target) in CASES.items() if target in aot.recorded()}
    assert {key for golden in GOLDEN.values() for key in golden.numbers} == wanted
    assert {path.stem for path in aot.golden_folder().glob("*")} <= set(GOLDEN)


def test_every_reason_for_a_spill_is_that_of_a_version_with_golden_numbers() -> None:
    versions = {path.name for path in aot.GOLDEN.iterdir()}
    for case, _ in CASES.values():
        for target, *version in map(str.split, case.spills):
            assert target in case.targets, case.name
            assert {*version} <= versions, case.name


def test_golden_numbers_and_reasons_for_spills_are_those_of_a_version(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    case, target = CASES["contrastive sums bf16 D512 on sm_90"]
    spilling = {"shared": 0, "spill_stores": 4, "HGMMA": 1, "LDGSTS": 1}
    without = spilling | {"spill_stores": 0}
    older = dataclasses.replace(case, spills={f"{target} 3.6.0": "a test"})
    any_version = dataclasses.replace(case, spills={target: "a test"})
    monkeypatch.setattr(aot, "GOLDEN", tmp_path)
    for version in ("3.6.0", "3.7.1"):
        monkeypatch.setattr(triton, "__version__", version)
        assert aot.read_golden("norm") == aot.Golden({}, {})
        assert not any(aot.problems(older, target, numbers) for numbers in (spilling, without))  # nobody knows yet
        mine = aot.Golden({f"{version} on {target}": {"registers": 1}}, {f"{version} on {target}": "print"})
        aot.write_golden("norm", mine)
        assert aot.read_golden("norm") == mine
        assert aot.recorded() == {target}
        assert bool(aot.problems(older, target, without)) == (version == "3.6.0")
        assert bool(aot.problems(older, target, spilling)) == (version != "3.6.0")
        assert not aot.problems(any_version, target, spilling)
        assert aot.problems(any_version, target, without)


def test_an_update_of_one_target_leaves_the_others(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    case, _ = CASES["contrastive sums bf16 D512 on sm_90"]
    case = dataclasses.replace(case, name="a case", targets=("sm_80", "sm_90"))
    measured: list[str] = []
    monkeypatch.setattr(aot, "GOLDEN", tmp_path)
    monkeypatch.setattr(aot, "collect", lambda _: [case])
    monkeypatch.setattr(
        aot, "measure", lambda _, target: measured.append(target) or {"shared": len(measured), "spill_stores": 0}
    )
    monkeypatch.setattr(aot, "problems", lambda *_: [])
    assert aot.check("contrastive", ["sm_80"], update=True) == []
    assert aot.check("contrastive", ["sm_90", "sm_80"], update=True) == []
    assert measured == ["sm_80", "sm_90"]  # each once: known since
    assert aot.check("contrastive", ["sm_90"], update=False) == [
        "a case on sm_90: {'shared': 3, 'spill_stores': 0}, golden {'shared': 2, 'spill_stores': 0}"
    ]


def test_every_kernel_is_shipped_for_every_target() -> None:
    targets: dict[str, set[str]] = {}
    for case, target in CASES.values():
        targets.setdefault(case.kernel.__name__, set()).add(target)
    assert targets.pop("attention_gluon_kernel") == {"sm_90"}  # written for Hopper alone
    assert {name: sorted(aot.TARGETS) for name in targets} == {name: sorted(each) for name, each in targets.items()}
    assert {"sums_kernel", "gradient_kernel", "sigmoid_kernel"} <= set(targets)


def test_the_gate_refuses_what_it_should() -> None:
    """A tile too large for shared memory, one that spills, and numbers without tensor cores."""
    case, target = CASES["contrastive sums bf16 D512 on sm_90"]
    large = dataclasses.replace(case, options={"num_warps": 8, "num_stages": 9})
    problems = aot.problems(large, target, aot.measure(large, target))
    assert any("bytes of shared memory, 232448 are there" in each for each in problems), problems
    case_80, target_80 = CASES["contrastive sums fp32 D512 on sm_80"]
    wide = dataclasses.replace(case_80, constexprs={**case_80.constexprs, "COLUMNS": 128})
    spilling = aot.measure(wide, target_80)
    assert spilling["spill_stores"] > 0
    assert any("name a reason in AotCase.spills" in each for each in aot.problems(wide, target_80, spilling))
    assert aot.problems(dataclasses.replace(wide, spills={target_80: "a test"}), target_80, spilling) == []
    plain = aot.measure(case, target) | {"HGMMA": 0, "LDGSTS": 0}
    assert len(aot.problems(case, target, plain)) == 2


def test_a_case_must_fit_its_kernel() -> None:
    case, target = CASES["contrastive sums bf16 D512 on sm_90"]
    signature = {name: kind for name, kind in case.signature.items() if name != "rows"}
    with pytest.raises(ValueError, match=r"\['rows'\] not once in signature or constexprs"):
        aot.measure(dataclasses.replace(case, signature=signature), target)


def test_the_fingerprint_is_that_of_source_and_configuration() -> None:
    case, target = CASES["contrastive sums bf16 D512 on sm_90"]
    same = aot.fingerprint(case, target)
    assert same == aot.fingerprint(dataclasses.replace(case, name="another"), target)
    others = [
        dataclasses.replace(case, options={"num_warps": 8, "num_stages": 2}),
        dataclasses.replace(case, constexprs={**case.constexprs, "STEP": 32}),
        dataclasses.replace(case, attrs=[]),
        dataclasses.replace(case, kernel=CASES["contrastive gradient bf16 D512 on sm_90"][0].kernel),
    ]
    assert same not in [aot.fingerprint(other, target) for other in others]
    assert same != aot.fingerprint(case, "sm_100")


def test_differences_are_named() -> None:
    assert aot.differences({"a": {"registers": 1}}, {"a": {"registers": 1}}) == []
    found = aot.differences({"a": {"registers": 1}, "b": {}}, {"a": {"registers": 2}, "c": {}})
    assert found == ["a: {'registers': 1}, golden {'registers': 2}", "b: {}, golden lacks it", "c: gone, golden {}"]
