"""`weft bench step --layouts`: the same training step on one process and cut in every way, one after the other.

Each layout is a job of its own, started as a user would. Ranks of a job share this machine's cores, so on a laptop the
table tells what cutting costs, not what it gains.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

from pretrain.config import Recipe
from pretrain.errors import WeftError

Row = dict[str, Any]


def layouts(recipe: Recipe, ranks: int) -> dict[str, tuple[int, list[str]]]:
    """(ranks, overrides) by name. Pipelines, and the second row, take four microbatches."""
    quarter = max(1, recipe.train.global_batch // 4)
    small = f"train.micro_batch={quarter}"
    alone: dict[str, tuple[int, list[str]]] = {
        "one process": (1, []),
        "one process, 4 microbatches": (1, [small]),
    }
    if ranks == 1:
        return alone
    return alone | {
        f"DP{ranks}": (ranks, []),
        f"DP{ranks} ZeRO-1": (ranks, ["layout.zero=1"]),
        f"DP{ranks} ZeRO-3": (ranks, ["layout.zero=3"]),
        f"TP{ranks}": (ranks, [f"layout.tp={ranks}"]),
        f"TP{ranks} sequence parallel": (ranks, [f"layout.tp={ranks}", "layout.sequence_parallel=true"]),
        f"PP{ranks}, 4 microbatches": (ranks, [f"layout.pp={ranks}", small]),
        f"CP{ranks}": (ranks, [f"layout.cp={ranks}"]),
    }


def bench_layouts(
    recipe: Recipe, name: str, overrides: Sequence[str], ranks: int, show: Callable[[str], None]
) -> list[Row]:
    """One row a layout, as `weft bench step --json` gives it, with its name. WeftError when a job fails."""
    rows = []
    for label, (count, more) in layouts(recipe, ranks).items():
        command = [sys.executable, "-m", "pretrain.cli", "bench", "step", "--recipe", name, "--json", *overrides, *more]
        ended = subprocess.run([*command, "--nproc", str(count)], capture_output=True, text=True)
        if ended.returncode:
            raise WeftError(f"{label}: {ended.stderr.strip().splitlines()[-1] if ended.stderr.strip() else 'failed'}")
        rows.append({"name": label, "ranks": count, **json.loads(ended.stdout.strip().splitlines()[-1])})
        show(f"{label}: {rows[-1]['weft_seconds']:.4f} s")
    return rows


def markdown(rows: Sequence[Row]) -> str:
    """The rows as a table; the time of one process is 1."""
    alone = rows[0]["weft_seconds"]
    lines = [
        "| layout | ranks x threads | s a step | samples/s | of one process | communication | activations a rank |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        seconds = row["weft_seconds"]
        lines.append(
            f"| {row['name']} | {row['ranks']} x {row['threads']} | {seconds:.4f} "
            f"| {row['global_batch'] / seconds:.0f} | {seconds / alone:.2f} "
            f"| {row['communication']:.0%} | {row['activations'] / (1 << 20):.1f} MiB |"
        )
    return "\n".join(lines)
