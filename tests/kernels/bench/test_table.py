"""Verdicts and the Markdown that is made of them."""

from __future__ import annotations

from typing import Any

from kernels.bench.table import bytes_of, live, markdown, time_of, verdicts


def row(implementation: str, seconds: float | None, group: str = "kernels", **more: Any) -> dict[str, Any]:
    base = {"operation": "attention", "case": "full", "shape": "B1", "pass": "forward", "group": group}
    base |= {"implementation": implementation, "own": False, "auto": False, "target": None}
    if seconds is None:
        return {**base, "status": "error", "message": "it broke", **more}
    figures = {
        "seconds": seconds,
        "extra_bytes": 1 << 20,
        "fraction": 0.5,
        "bound": "matrix",
        "floor_seconds": 1e-3,
        "n": 30,
    }
    return {**base, "status": "ok", **figures, **more}


ROWS = [
    row("triton", 4e-3, own=True, target=1.45),
    row("gluon", 2.4e-3, own=True, target=1.1),
    row("blocked", None, own=True),
    row("cudnn", 2e-3, auto=True),
    row("SDPA cuDNN", 2e-3, "peer"),
    row("SDPA math", 9e-3, "peer"),
]


def test_ours_is_own_code_against_the_best_peer() -> None:
    (verdict,) = verdicts(ROWS)
    assert (verdict["ours"], verdict["peer"], verdict["ours_is_own"]) == ("gluon", "SDPA cuDNN", True)
    assert abs(verdict["ratio"] - 1.2) < 1e-9
    assert {name: goal["met"] for name, goal in verdict["targets"].items()} == {"triton": False, "gluon": False}
    assert (verdict["auto"], verdict["auto_is_fastest"]) == ("cudnn", True)


def test_auto_that_is_not_the_fastest_is_named() -> None:
    rows = [row("triton", 1e-3, own=True, target=0.9), row("flash", 2e-3, auto=True), row("SDPA", 2e-3, "peer")]
    (verdict,) = verdicts(rows)
    assert (verdict["auto_is_fastest"], verdict["fastest_backend"]) == (False, "triton")
    assert verdict["targets"]["triton"]["met"]
    assert "flash, triton is faster" in markdown(results(rows))


def test_without_own_code_what_kernels_calls_counts_and_is_in_brackets() -> None:
    rows = [row("torch", 3e-3, auto=True), row("torch", 2e-3, "peer")]
    (verdict,) = verdicts(rows)
    assert (verdict["ours"], verdict["ours_is_own"], round(verdict["ratio"], 3)) == ("torch", False, 1.5)
    assert "| (torch) |" in markdown(results(rows))


def test_nothing_ran() -> None:
    (verdict,) = verdicts([row("triton", None, own=True)])
    assert (verdict["ours"], verdict["peer"], verdict["ratio"], verdict["auto_is_fastest"]) == (None, None, None, None)
    text = markdown(results([row("triton", None, own=True)]))
    assert "none ran" in text
    assert "Failed: attention full forward kernels triton: it broke" in text


def results(rows: list[dict[str, Any]]) -> dict[str, Any]:
    told = (("gluon", "ok", False), ("triton", "ok", True), ("flash", "refused", False))
    checks = [
        {"operation": "attention", "case": "full, bf16", "implementation": name, "status": status, "passed": passed}
        for name, status, passed in told
    ]
    step = [
        {"operation": "train step", "case": "ViT-L/14", "batch": 8, "implementation": "kernels", "status": "ok",
         "seconds": 0.5, "n": 3, "samples_per_second": 16.0, "mfu": 0.41, "fraction": 0.5, "flops_per_sample": 1e12,
         "extra_bytes": 1 << 30, "first_loss": 2.0794},
        {"operation": "train step", "case": "ViT-L/14", "batch": 8, "implementation": "torch", "status": "error",
         "message": "out of memory"},
    ]  # fmt: skip
    return {
        "machine": {
            "card": "a card",
            "date": "2026-01-02T03:04:05Z",
            "torch": "2.11",
            "triton": "3.6",
            "command": "it",
        },
        "ceilings": {"bytes_per_second": 4.3e12, "flops_per_second": 7.9e14, "product": "8192^3 bfloat16"},
        "checks": checks,
        "rows": rows,
        "step": step,
        "sanitizer": [{"operation": "norm", "tool": "memcheck", "status": "ok", "errors": 0}],
        "failures": [{"job": "ranks", "message": "no answer"}],
        "not_run": [{"job": "table/norm/x", "why": "no time was left"}],
    }


def test_wrong_and_left_out_rows_are_told_and_not_compared() -> None:
    rows = [*ROWS[:1], row("gluon", None, own=True, status="wrong", message="result 0 is off by 3.0e-01"), *ROWS[4:]]
    rows.append(row("SDPA math", None, "peer", status="left out", message="it stores all scores in fp32"))
    text = markdown(results(rows))
    assert "Wrong: attention full forward kernels gluon: result 0 is off by 3.0e-01" in text
    assert "stores all scores" not in text
    assert verdicts(rows)[0]["ours"] == "triton"
    assert "left out: it stores all scores" in live(rows[-1])


def test_markdown_has_all_parts() -> None:
    text = markdown(results(ROWS))
    assert "copy 4300 GB/s, 8192^3 bfloat16 790 TFLOP/s" in text
    assert "1 of 2 that ran; not: attention full, bf16 gluon." in text
    line = next(each for each in text.splitlines() if each.startswith("| attention: full"))
    assert line.split(" | ")[3:] == ["gluon", "2.4 ms", "1.0 MiB", "50% matrix", "SDPA cuDNN", "2 ms", "1.20",
                                     "triton 1.45 missed, 1.1 missed", "cudnn |"]  # fmt: skip
    assert "| kernels | 8 | 16.0 | 500 ms | 41.0% | 50.0% | 1.00 GiB | 2.0794 |" in text
    assert "| torch | 8 | error: out of memory |" in text
    assert "compute-sanitizer memcheck norm: 0 errors" in text
    assert "Failed: ranks: no answer" in text
    assert "table/norm/x (no time was left)" in text
    table = [each for each in text.splitlines() if each.startswith(("| attention", "| operation", "|---" * 12))]
    widths = {each.count("|") for each in table}
    assert widths == {13}


def test_units() -> None:
    assert [time_of(each) for each in (2.5, 0.9999, 0.0123, 4.56e-5, None)] == [
        "2.5 s",
        "1000 ms",
        "12.3 ms",
        "45.6 us",
        "-",
    ]
    assert [bytes_of(each) for each in (3 << 30, 1 << 19, None)] == ["3.00 GiB", "0.5 MiB", "-"]


def test_a_live_row_says_what_failed() -> None:
    assert "error: it broke" in live(row("triton", None))
    assert "50% of matrix  <- auto" in live(row("cudnn", 1e-3, auto=True))
