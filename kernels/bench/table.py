"""Read results: verdicts, and the table in Markdown.

python -m kernels.bench.table FILE
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

SAME = 1.05  # two times within 5% of each other count as equal
Row = Mapping[str, Any]


def verdicts(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """One a case and pass: our fastest own backend against the fastest peer, and whether "auto" took the fastest.

    ratio: time of ours over time of the best peer, below 1 is faster; None where one of them has no time. A backend of
    kernels that only calls a library's kernel (own: false) does not count as ours, where there is one that does.
    met: by own backend, whether it reached what it aims at.
    """
    grouped: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        grouped.setdefault((row["operation"], row["case"], row["pass"]), []).append(row)
    return [_verdict(key, group) for key, group in grouped.items()]


def _verdict(key: tuple[str, str, str], rows: Sequence[Row]) -> dict[str, Any]:
    timed = [row for row in rows if row["status"] == "ok"]
    kernels = [row for row in timed if row["group"] == "kernels"]
    own = [row for row in kernels if row["own"]]
    ours, peer = _fastest(own or kernels), _fastest([row for row in timed if row["group"] == "peer"])
    auto, fastest = _fastest([row for row in kernels if row["auto"]]), _fastest(kernels)
    against = peer["seconds"] if peer else None
    aims = {
        row["implementation"]: {"target": row["target"], "ratio": row["seconds"] / against}
        for row in own
        if row.get("target") and against
    }
    met = {name: {**aim, "met": aim["ratio"] <= aim["target"]} for name, aim in aims.items()}
    best = min((row["seconds"] for row in timed), default=None)
    return {
        "operation": key[0],
        "case": key[1],
        "pass": key[2],
        "shape": rows[0]["shape"],
        "ours": ours and ours["implementation"],
        "ours_seconds": ours and ours["seconds"],
        "ours_is_own": bool(own),
        "peer": peer and peer["implementation"],
        "peer_seconds": against,
        "ratio": ours["seconds"] / against if ours and against else None,
        "floor_seconds": next((row["floor_seconds"] for row in timed if "floor_seconds" in row), None),
        "targets": met,
        "auto": auto and auto["implementation"],
        "auto_ratio": auto["seconds"] / best if auto and best else None,
        "auto_is_fastest": auto["seconds"] <= SAME * fastest["seconds"] if auto and fastest else None,
        "fastest_backend": fastest and fastest["implementation"],
    }


def _fastest(rows: Sequence[Row]) -> Row | None:
    return min(rows, key=lambda row: row["seconds"], default=None)


def time_of(seconds: float | None) -> str:
    """With a unit that fits."""
    if seconds is None:
        return "-"
    scale, unit = (1.0, "s") if seconds >= 1 else (1e3, "ms") if seconds >= 1e-3 else (1e6, "us")
    value = seconds * scale
    return f"{value:.3g} {unit}" if value < 999.5 else f"{value:.0f} {unit}"


def bytes_of(count: float | None) -> str:
    """In MiB or GiB."""
    if count is None:
        return "-"
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def live(row: Row) -> str:
    """One row of the table, for a terminal."""
    name = f"{row.get('group', '')} {row['implementation']}".strip()
    head = f"{row['operation']:<22} {row['case']:<22} {row.get('pass', ''):<8} {name:<30}"
    if row["status"] != "ok":
        return f"{head} {row['status']}: {row.get('message', '')}"
    fraction = f"{row['fraction']:>5.0%} of {row['bound']}" if "bound" in row else ""
    marks = "  <- auto" if row.get("auto") else ""
    return (
        f"{head} {time_of(row['seconds']):>9} n={row['n']:<3} {bytes_of(row.get('extra_bytes')):>10} {fraction}{marks}"
    )


def markdown(results: Mapping[str, Any]) -> str:
    """The whole of a results file for a README."""
    machine, ceilings = results["machine"], results.get("ceilings", {})
    lines = [f"{machine['card']}, {machine['date']}, torch {machine['torch']}, triton {machine['triton']}"]
    lines[0] += f"; `{machine['command']}`"
    if ceilings:
        copy, product = ceilings["bytes_per_second"] / 1e9, ceilings["flops_per_second"] / 1e12
        lines.append(f"Measured ceilings: copy {copy:.0f} GB/s, {ceilings['product']} {product:.3g} TFLOP/s.")
    lines += ["", _checks_line(results.get("checks", [])), "", *_table(results.get("rows", [])), ""]
    lines += _step_table(results.get("step", [])) + _sanitizer_lines(results.get("sanitizer", []))
    lines += _failure_lines(results)
    if missing := results.get("not_run"):
        lines += [f"Not run: {', '.join(each['job'] + ' (' + each['why'] + ')' for each in missing)}."]
    return "\n".join(lines).rstrip() + "\n"


def _checks_line(checks: Sequence[Row]) -> str:
    ran = [row for row in checks if row["status"] == "ok"]
    if not checks:
        return "Nothing was checked against fp64."
    wrong = [row for row in checks if not row["passed"] and row["status"] not in ("refused", "missing")]
    told = f"Correct against fp64: {sum(row['passed'] for row in ran)} of {len(ran)} that ran"
    names = (f"{row['operation']} {row['case']} {row['implementation']}" for row in wrong)
    return told + (f"; not: {', '.join(names)}." if wrong else ".")


def _table(rows: Sequence[Row]) -> list[str]:
    if not rows:
        return []
    names = ["operation", "shape", "pass", "ours", "time", "extra memory", "of ceiling"]
    names += ["best peer", "its time", "ratio", "target", "auto"]
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for each in verdicts(rows):
        mine = next(
            (
                row
                for row in rows
                if all(row[key] == each[key] for key in ("operation", "case", "pass"))
                and row["group"] == "kernels"
                and row["implementation"] == each["ours"]
            ),
            {},
        )
        goals = ", ".join(
            f"{name + ' ' if name != each['ours'] else ''}{goal['target']:g} {'met' if goal['met'] else 'missed'}"
            for name, goal in each["targets"].items()
        )
        ours = each["ours"] or "none ran"
        cells = [
            f"{each['operation']}: {each['case']}",
            each["shape"],
            each["pass"],
            ours if each["ours_is_own"] or not each["ours"] else f"({ours})",
            time_of(each["ours_seconds"]),
            bytes_of(mine.get("extra_bytes")),
            f"{mine['fraction']:.0%} {mine['bound']}" if "bound" in mine else "-",
            each["peer"] or "none ran",
            time_of(each["peer_seconds"]),
            f"{each['ratio']:.2f}" if each["ratio"] else "-",
            goals or "-",
            _auto_cell(each),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _failure_lines(results: Mapping[str, Any]) -> list[str]:
    """What raised, or gave other numbers: a backend that refuses, and a peer that is not there, are no failures."""
    words = {"error": "Failed", "wrong": "Wrong"}
    failed = [
        f"{words[row['status']]}: {row['operation']} {row['case']} {row.get('pass', '')} {row.get('group', '')} "
        f"{row['implementation']}: {row['message']}"
        for row in (*results.get("rows", []), *results.get("checks", []))
        if row["status"] in words
    ]
    return [*failed, *(f"Failed: {row['job']}: {row['message']}" for row in results.get("failures", []))]


def _auto_cell(verdict: Row) -> str:
    if not verdict["auto"]:
        return "-"
    slower = "" if verdict["auto_is_fastest"] else f", {verdict['fastest_backend']} is faster"
    return verdict["auto"] + slower


def _step_table(rows: Sequence[Row]) -> list[str]:
    if not rows:
        return []
    names = ("train step", "batch", "samples/s", "step", "MFU", "of measured rate", "peak memory", "first loss")
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for row in rows:
        head = f"| {row['implementation']} | {row['batch']} | "
        if row["status"] != "ok":
            lines.append(f"{head}{row['status']}: {row.get('message', '')} | | | | | |")
            continue
        used = [f"{row[key]:.1%}" if row.get(key) else "-" for key in ("mfu", "fraction")]
        cells = [f"{row['samples_per_second']:.1f}", time_of(row["seconds"]), *used, bytes_of(row["extra_bytes"])]
        lines.append(head + " | ".join([*cells, f"{row['first_loss']:.4f}"]) + " |")
    example = next((row for row in rows if row["status"] == "ok"), None)
    if example:
        told = f"{example['case']}, {example['flops_per_sample'] / 1e9:.1f} GFLOP a pair"
        lines += ["", f"{told} (forward and backward; step.py says how they are counted)."]
    return [*lines, ""]


def _sanitizer_lines(rows: Sequence[Row]) -> list[str]:
    return [
        f"compute-sanitizer {row.get('tool', '')} {row['operation']}: "
        + (f"{row['errors']} errors" if row["status"] == "ok" else row["message"])
        for row in rows
    ]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m kernels.bench.table", description="A results file as Markdown.")
    parser.add_argument("file", type=Path)
    print(markdown(json.loads(parser.parse_args().file.read_text())), end="")


if __name__ == "__main__":
    main()
