"""A wrong backend is found, one that raises becomes a row, and every row has its fields.

All with an operation that is not in kernels, whose backends are right, wrong in several ways, or broken.
"""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from kernels.bench import measure
from kernels.bench.case import Case, Check, Operation, Tensors, normal_draw, plain
from kernels.bench.measure import BACKWARD, FORWARD, Clock
from kernels.bench.rows import Bench, case_rows, check_rows
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


def case(operation: Operation) -> Case:
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
    rows = check_rows(check(operation), bench())
    assert [(row["implementation"], row["status"], row["passed"]) for row in rows] == [
        ("broken", "error", False),
        ("refusing", "refused", False),
        ("good", "ok", True),
    ]
    assert rows[0]["message"] == "RuntimeError: the kernel does not compile"
    assert "it never does" in rows[1]["message"]


def test_rows_of_a_case_have_all_fields(monkeypatch: pytest.MonkeyPatch) -> None:
    operation = install(monkeypatch, ["refusing", "good", "off", "broken"])
    rows = case_rows(case(operation), bench())
    json.dumps(rows)
    assert all(row.keys() >= NAMES for row in rows)
    status = {(row["group"], row["implementation"], row["pass"]): row["status"] for row in rows}
    told = {"good": "ok", "off": "ok", "broken": "error", "refusing": "refused"}
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


def test_one_that_killed_a_process_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    operation = install(monkeypatch, ["good", "off"])
    careful = bench()
    careful.skip = ["off"]
    told: list[str] = []
    careful.started = lambda section, row: told.append(f"{section} {row['implementation']}")
    assert {row["implementation"] for row in case_rows(case(operation), careful)} == {"good", "torch", "unable"}
    assert [row["implementation"] for row in check_rows(check(operation), careful)] == ["good"]
    assert told == ["rows choice of auto", "rows good", "rows torch", "rows unable", "checks good"]
