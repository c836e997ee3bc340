"""A wrong backend is found, one that raises becomes a row, and every row has its fields.

All with an operation that is not in kernels, whose backends are right, wrong in several ways, or broken.
"""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from kernels.bench import measure
from kernels.bench import rows as rows_module
from kernels.bench.case import COMPILED, Case, Check, Implementation, Layout, Operation, Tensors, normal_draw, plain
from kernels.bench.measure import BACKWARD, FORWARD, Clock
from kernels.bench.rows import Bench, DeviceLostError, case_rows, check_rows, failure
from kernels.dispatch import AUTO, Choice, choose, chosen_by

MODULE = "operation_for_bench_tests"


class _OffInGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, w)
        return x @ w

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, w = ctx.saved_tensors
        return gradients[0] @ w.T, 1.01 * (x.T @ gradients[0])


def _broken(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("the kernel does not compile\nand a long trace")


WAYS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "good": lambda x, w: x @ w,
    "off": lambda x, w: 1.01 * (x @ w),
    "off_in_gradient": _OffInGradient.apply,
    "nan": lambda x, w: (x @ w) * float("nan"),
    "broken": _broken,
}


def install(monkeypatch: pytest.MonkeyPatch, backends: Sequence[str]) -> Operation:
    """x @ w with these backends; "refusing" refuses. Small cold caches, so that tests are quick."""
    monkeypatch.setitem(measure.COLD_BYTES, "cpu", 1 << 20)

    def choice(x: torch.Tensor, w: torch.Tensor, backend: str = AUTO) -> Choice:
        return choose("product", backend, backends, lambda name: "it never does" if name == "refusing" else "")

    @chosen_by(choice)
    def product(x: torch.Tensor, w: torch.Tensor, backend: str = AUTO) -> torch.Tensor:
        return WAYS[choice(x, w, backend).backend](x, w)

    module = types.ModuleType(MODULE)
    module.__dict__.update(BACKENDS=tuple(backends), product=product)
    monkeypatch.setitem(sys.modules, MODULE, module)
    return Operation(MODULE, "product", frozenset({"good"}))


def _call(function: Callable[..., Any], tensors: Tensors) -> torch.Tensor:
    return function(tensors["x"], tensors["w"])  # type: ignore[no-any-return]


def _product(tensors: Tensors) -> torch.Tensor:
    return tensors["x"] @ tensors["w"]


def _missing(tensors: Tensors) -> torch.Tensor:
    raise RuntimeError("No available kernel. Aborting execution.")


def check(operation: Operation, dtype: torch.dtype = torch.float32) -> Check:
    draw = normal_draw({"x": (37, 16), "w": (16, 11)}, dtype)
    return Check(operation, "small", dtype, draw, _call, _product, _product)


def case(operation: Operation, **more: Any) -> Case:
    return Case(
        operation,
        "small",
        "37 x 16 x 11",
        (FORWARD, BACKWARD),
        normal_draw({"x": (37, 16), "w": (16, 11)}, torch.float32),
        _call,
        {"torch": plain(_product), "unable": plain(_missing)},
        {FORWARD: 2.0 * 37 * 16 * 11, BACKWARD: 4.0 * 37 * 16 * 11},
        {FORWARD: 4.0 * (37 * 16 + 16 * 11 + 37 * 11), BACKWARD: 8.0 * (37 * 16 + 16 * 11 + 37 * 11)},
        {FORWARD: {"good": 1e9}, BACKWARD: {"": 1e-9}},
        **more,
    )


def bench() -> Bench:
    limits = {"bytes_per_second": 1e10, "flops_per_second": 1e11}
    return Bench(Clock(torch.device("cpu")), quick=True, ceilings=limits)


FIGURES = {"seconds", "low", "high", "n", "extra_bytes", "flops_per_second", "bytes_per_second", "bound", "fraction"}
NAMES = {"operation", "case", "shape", "pass", "implementation", "group", "own", "auto", "status"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_wrong_by_one_percent_is_found_in_values_and_in_gradients(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    operation = install(monkeypatch, ["good", "off", "off_in_gradient", "nan"])
    rows = {row["implementation"]: row for row in check_rows(check(operation, dtype), bench())}
    assert {name: row["passed"] for name, row in rows.items()} == {
        "good": True,
        "off": False,
        "off_in_gradient": False,
        "nan": False,
    }
    assert rows["off_in_gradient"]["worst"]["quantity"] == "gradient of w"
    assert [each["passed"] for each in rows["off_in_gradient"]["quantities"]] == [True, True, False]


def test_a_check_that_raises_or_refuses_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    operation = install(monkeypatch, ["broken", "refusing", "good"])
    rows = list(check_rows(check(operation), bench()))
    assert [(row["implementation"], row["status"], row["passed"]) for row in rows] == [
        ("broken", "error", False),
        ("refusing", "refused", False),
        ("good", "ok", True),
    ]
    assert rows[0]["message"] == "RuntimeError: the kernel does not compile"
    assert "it never does" in rows[1]["message"]


def test_rows_of_a_case_have_all_fields(monkeypatch: pytest.MonkeyPatch) -> None:
    operation = install(monkeypatch, ["refusing", "good", "off", "broken"])
    rows = list(case_rows(case(operation), bench()))
    json.dumps(rows)
    assert all(row.keys() >= NAMES for row in rows)
    status = {(row["group"], row["implementation"], row["pass"]): row["status"] for row in rows}
    told = {"good": "ok", "off": "wrong", "broken": "error", "refusing": "refused"}
    expected = {("kernels", name, which): each for name, each in told.items() for which in (FORWARD, BACKWARD)}
    expected |= {("peer", "torch", which): "ok" for which in (FORWARD, BACKWARD)}
    expected |= {("peer", "unable", which): "refused" for which in (FORWARD, BACKWARD)}
    assert status == expected
    timed = [row for row in rows if row["status"] == "ok"]
    assert all(row.keys() >= FIGURES and row["seconds"] > 0 and row["n"] == 5 for row in timed)
    assert {row["implementation"] for row in rows if row["auto"]} == {"good"}
    assert {row["implementation"] for row in rows if row["own"]} == {"good"}
    aims = {row["pass"]: row["target"] for row in timed if row["own"]}
    assert aims == {FORWARD: 1e9, BACKWARD: 1e-9}


def test_memory_and_fractions_are_of_the_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    operation = install(monkeypatch, ["good"])
    rows = {row["pass"]: row for row in case_rows(case(operation), bench()) if row["implementation"] == "good"}
    output, gradients = 4 * 37 * 11, 4 * (37 * 16 + 16 * 11)
    assert rows[FORWARD]["extra_bytes"] == output
    assert rows[BACKWARD]["extra_bytes"] >= output + gradients  # the forward's output is alive in the backward
    for row in rows.values():
        assert row["fraction"] == pytest.approx(row["floor_seconds"] / row["seconds"])
        assert row["bound"] == "memory"


@pytest.mark.parametrize("module", ["kernels.no_such_operation", "kernels.norm"])
def test_an_operation_that_is_not_there_is_a_row(monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    install(monkeypatch, [])
    operation = Operation(module, "no_such_function")
    rows = [row for row in case_rows(case(operation), bench()) if row["group"] == "kernels"]
    assert [(row["implementation"], row["pass"], row["status"]) for row in rows] == [
        ("auto", FORWARD, "error"),
        ("auto", BACKWARD, "error"),
    ]
    assert [row["status"] for row in check_rows(check(operation), bench())] == ["error"]


def test_one_that_ended_a_process_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    operation = install(monkeypatch, ["good", "nan"])
    careful = bench()
    careful.skip = {"product": {"kernels nan": "it hung"}}
    told: list[str] = []
    careful.started = lambda section, row, first: told.append(f"{section} {row['implementation']} {first}")
    rows = list(case_rows(case(operation), careful))
    left_out = [(row["implementation"], row["pass"], row["message"]) for row in rows if row["status"] == "left out"]
    assert left_out == [("nan", FORWARD, "it hung"), ("nan", BACKWARD, "it hung")]
    assert told[:4] == ["rows choice of auto True", "rows torch True", "rows unable True", "rows good True"]
    assert set(told[4:]) == {"rows torch False", "rows good False"}
    assert [row["implementation"] for row in check_rows(check(operation), careful)] == ["good"]


@pytest.mark.parametrize("name", ["off", "off_in_gradient", "nan"])
def test_what_differs_from_the_first_peer_is_wrong_and_not_timed(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    operation = install(monkeypatch, ["good", name])
    rows = list(case_rows(case(operation), bench()))
    wrong = [row for row in rows if row["status"] == "wrong"]
    assert [(row["implementation"], row["pass"]) for row in wrong] == [(name, FORWARD), (name, BACKWARD)]
    assert all("seconds" not in row for row in wrong)
    assert "not finite" in wrong[0]["message"] or "off by 1.0e-02 from that of torch" in wrong[0]["message"]


def test_a_gradient_that_is_one_number_is_left_to_the_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sum that cancels is off in the dtype of a peer; the loss itself is compared."""
    operation = install(monkeypatch, ["good"])
    monkeypatch.setitem(WAYS, "good", lambda x, w: (x * w.detach() + w).sum())
    draw = normal_draw({"x": (37, 16), "w": ()}, torch.float32)
    peers = {"torch": plain(lambda tensors: (tensors["x"] * tensors["w"].detach()).sum() + 592 * tensors["w"].detach())}
    of_case = replace(case(operation), peers=peers, draw=draw)
    assert {row["status"] for row in case_rows(of_case, bench())} == {"ok"}
    monkeypatch.setitem(WAYS, "good", lambda x, w: 1.01 * (x * w).sum() + 592 * w)
    assert {row["status"] for row in case_rows(of_case, bench()) if row["group"] == "kernels"} == {"wrong"}


def test_a_first_peer_that_is_nan_is_no_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    operation = install(monkeypatch, ["good"])
    peers = {"broken torch": plain(lambda tensors: WAYS["nan"](tensors["x"], tensors["w"])), "torch": plain(_product)}
    of_case = case(operation)
    told = {row["implementation"]: row["status"] for row in case_rows(replace(of_case, peers=peers), bench())}
    assert told == {"broken torch": "wrong", "torch": "ok", "good": "ok"}


def test_another_layout_is_compared_as_the_case_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both matrices, the gradient of the output and all results are transposed."""
    operation = install(monkeypatch, ["good"])
    turned = Layout(lambda each: each.T.contiguous(), lambda each: each.T)
    right = Implementation(lambda: lambda tensors: tensors["w"] @ tensors["x"], turned)
    off = Implementation(lambda: lambda tensors: 1.01 * (tensors["w"] @ tensors["x"]), turned)
    peers = {"torch": plain(_product), "turned": right, "turned, off": off}
    told = {row["implementation"]: row["status"] for row in case_rows(replace(case(operation), peers=peers), bench())}
    assert told == {"torch": "ok", "turned": "ok", "turned, off": "wrong", "good": "ok"}


def test_each_round_has_its_implementations_and_a_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    operation = replace(install(monkeypatch, ["good", "off"]), last=frozenset({"off"}))
    peers = {"torch": plain(_product), "late": Implementation(lambda: _product, round=COMPILED)}
    of_case = replace(case(operation), operation=operation, peers=peers)
    assert of_case.rounds() == {"first", "compiled", "last"}
    for which, expected in (
        ("first", {"torch": "ok", "good": "ok"}),
        ("compiled", {"late": "ok"}),
        ("last", {"off": "wrong"}),
    ):
        rows = list(case_rows(of_case, replace(bench(), round=which)))
        assert {row["implementation"]: row["status"] for row in rows} == expected
    checked = [row["implementation"] for row in check_rows(check(operation), replace(bench(), round="last"))]
    assert checked == ["off"]


def test_a_backend_that_calls_a_peer_has_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    operation = install(monkeypatch, ["good"])
    timed: list[str] = []
    ours = bench()
    ours.started = lambda section, row, first: None if first else timed.append(row["implementation"])
    rows = {row["implementation"]: row for row in case_rows(case(operation, same={"good": "torch"}), ours)}
    assert set(timed) == {"torch"}
    assert rows["good"]["seconds"] == rows["torch"]["seconds"]
    assert rows["good"]["measured_as"] == "peer torch"


def test_what_is_left_out_says_why_and_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    operation = install(monkeypatch, ["good", "broken"])
    left_out = {"broken": "it takes minutes", "torch": "it fills the memory"}
    rows = list(case_rows(case(operation, left_out=left_out), bench()))
    told = {(row["implementation"], row["message"]) for row in rows if row["status"] == "left out"}
    assert told == set(left_out.items())
    assert [row["status"] for row in rows if row["implementation"] == "good"] == ["ok", "ok"]


class _LosingClock(Clock):
    """The device is lost in the third repetition of all."""

    repetitions = 0

    def seconds(self, action: Callable[[], Any]) -> float:
        self.repetitions += 1
        if self.repetitions == 3:
            raise RuntimeError("an illegal memory access was encountered")
        return super().seconds(action)


def test_a_device_that_is_lost_while_timing_is_blamed_on_the_one_that_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    operation = install(monkeypatch, ["good", "good again"])
    monkeypatch.setitem(WAYS, "good again", WAYS["good"])
    losing = bench()
    losing.clock = _LosingClock(torch.device("cpu"))
    told: list[str] = []
    losing.started = lambda section, row, first: told.append(row["implementation"])

    def lost(device: torch.device, error: Exception) -> None:
        if "illegal" in str(error):
            raise DeviceLostError(str(error))

    monkeypatch.setattr(rows_module, "raise_if_lost", lost)
    with pytest.raises(DeviceLostError):
        list(case_rows(case(operation), losing))
    assert told[-1] == "good again"  # the third in turn, of torch, good and itself


def test_a_trial_that_failed_is_an_error_and_no_refusal() -> None:
    text = "contrastive_loss: backend 'triton' cannot do this: "
    assert failure(ValueError(text + "the tensors are on cpu"))["status"] == "refused"
    assert failure(ValueError(text + "its trial on cuda:0 failed: ArithmeticError: off by 3e-2"))["status"] == "error"
