"""Draw a results file: ours and its peers as a ratio to the best peer, a row each, with the floor marked.

python -m kernels.bench.plot FILE        writes FILE with .png for .json; needs matplotlib
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kernels.bench.table import time_of, verdicts

OURS, BORROWED, PEER, FLOOR = "#d1495b", "#e9a5ae", "#8d99ae", "#1d3557"
FURTHEST = 3.0  # ratios beyond this end at an arrow
ROWS_PER_INCH = 2.6


def draw(path: Path) -> Path:
    """The picture's path. Raises ValueError when nothing in the file was measured."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    results = json.loads(path.read_text())
    shown = [each for each in verdicts(results["rows"]) if each["peer_seconds"] and each["ours_seconds"]]
    if not shown:
        raise ValueError(f"{path}: no row has both a time of ours and one of a peer")
    figure, axes = pyplot.subplots(figsize=(11, 1.6 + len(shown) / ROWS_PER_INCH))
    for place, verdict in enumerate(shown):
        _draw_row(axes, place, verdict, _times(results["rows"], verdict))
    _furnish(axes, shown)
    machine = results["machine"]
    title = f"{machine['card']}, {machine['date'][:10]}, torch {machine['torch']}, triton {machine['triton']}"
    axes.set_title(title, loc="left", fontsize=10, pad=30)
    picture = path.with_suffix(".png")
    figure.savefig(picture, dpi=130, bbox_inches="tight")
    pyplot.close(figure)
    return picture


def _times(rows: Sequence[Mapping[str, Any]], verdict: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    keys = ("operation", "case", "pass")
    return [row for row in rows if row["status"] == "ok" and all(row[key] == verdict[key] for key in keys)]


def _draw_row(axes: Any, place: int, verdict: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """A bar for our fastest, a dot for each of the rest that is near, a line for the floor."""
    best = verdict["peer_seconds"]
    ratio = verdict["ratio"]
    color = OURS if verdict["ours_is_own"] else BORROWED
    axes.barh(place, min(ratio, FURTHEST), height=0.55, color=color, zorder=2)
    if ratio > FURTHEST:
        axes.plot(FURTHEST, place, ">", color=color, markersize=11, clip_on=False, zorder=2)
    if aim := verdict["targets"].get(verdict["ours"]):
        axes.plot(aim["target"], place, "D", color="none", markeredgecolor=FLOOR, markersize=6, zorder=5)
    label = f"{ratio:.2f}  {verdict['ours']}, {time_of(verdict['ours_seconds'])}"
    axes.text(FURTHEST * 1.04, place, label, va="center", fontsize=8)
    for row in rows:
        if row["group"] == "kernels" and row["implementation"] == verdict["ours"]:
            continue
        at = row["seconds"] / best
        color = PEER if row["group"] == "peer" else BORROWED
        if at <= FURTHEST:
            axes.plot(at, place, "o", color=color, markersize=5.5, markeredgecolor="white", zorder=3)
    if verdict["floor_seconds"]:
        floor = verdict["floor_seconds"] / best
        axes.plot([floor, floor], [place - 0.38, place + 0.38], color=FLOOR, linewidth=2, zorder=4)


def _furnish(axes: Any, shown: Sequence[Mapping[str, Any]]) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    names = [f"{each['operation']} {each['case']}, {each['pass']}\nbest peer: {each['peer']}" for each in shown]
    axes.set_yticks(range(len(shown)), names, fontsize=7.5)
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.set_xlim(0, FURTHEST)
    axes.axvline(1, color="black", linewidth=0.8, zorder=1)
    axes.set_xlabel("time / time of the best peer (left of the line: ours is faster)", fontsize=9)
    axes.grid(axis="x", color="#dddddd", linewidth=0.6, zorder=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="y", length=0)
    legend = [
        Patch(color=OURS, label="kernels, own code (fastest)"),
        Patch(color=BORROWED, label="kernels, other backends"),
        Line2D([], [], marker="o", color=PEER, linestyle="", label="peers"),
        Line2D([], [], color=FLOOR, linewidth=2, label="floor by the measured ceilings"),
        Line2D([], [], marker="D", color="none", markeredgecolor=FLOOR, label="aim"),
    ]
    axes.legend(handles=legend, loc="lower left", bbox_to_anchor=(0, 1.0), ncols=5, fontsize=8, frameon=False)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m kernels.bench.plot", description="A results file as a picture.")
    parser.add_argument("file", type=Path)
    print(draw(parser.parse_args().file))


if __name__ == "__main__":
    main()
