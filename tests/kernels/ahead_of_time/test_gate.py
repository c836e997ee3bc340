"""Every shipped configuration of every Triton kernel compiles for every target it is shipped for, fits into shared
memory, spills no registers (or says why), uses tensor cores and asynchronous copies, and has its golden numbers.

One case of every kernel and target is compiled here, and every other that is not what its golden numbers were made
from (with another version of Triton than theirs, that one case only); `python -m kernels.aot` compiles all (minutes).
After a wanted change: `python -m kernels.aot --update`, and look at the difference of golden/.
"""

from __future__ import annotations

import dataclasses

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
GOLDEN = {file: aot.read_golden(file) for file in aot.shipping()}
SAMPLE = {(case.kernel.__name__, target): key for key, (case, target) in reversed(CASES.items())}.values()
measured: dict[str, aot.Numbers] = {}


def numbers_of(key: str) -> aot.Numbers:
    if key not in measured:
        golden = GOLDEN[FILES[key][0]]
        if key not in SAMPLE and golden.triton != triton.__version__:
            pytest.skip(
                f"golden numbers are those of triton {golden.triton}, this is {triton.__version__}: a sample only"
            )
        known = key not in SAMPLE and golden.holds(*CASES[key], triton.__version__)
        measured[key] = golden.numbers[key] if known else aot.measure(*CASES[key])
    return measured[key]


@pytest.mark.parametrize("key", CASES)
def test_compiles_within_the_limits(key: str) -> None:
    assert aot.problems(*CASES[key], numbers_of(key)) == []


@pytest.mark.parametrize("key", CASES)
def test_numbers_are_the_golden_ones(key: str) -> None:
    golden = GOLDEN[FILES[key][0]]
    if golden.triton != triton.__version__:
        pytest.skip(f"golden numbers are those of triton {golden.triton}, this is {triton.__version__}: limits only")
    on_record = {key: golden.numbers[key]} if key in golden.numbers else {}
    assert aot.differences({key: numbers_of(key)}, on_record) == []


def test_no_golden_number_is_left_over() -> None:
    assert {key for golden in GOLDEN.values() for key in golden.numbers} == set(CASES)
    assert {path.stem for path in aot.GOLDEN.iterdir()} == set(GOLDEN)


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
