"""Curves as inline SVG: axes with round ticks, a legend, and a tooltip (<title>) at each point; no scripts.

Design choices:
- A value that is not known (None) is a gap in the line, never a guess between its neighbours.
- A long run is drawn by the lowest and the highest value of each stretch of steps, so no spike is lost and a page
  stays small however long the run was.
- Curves differ in dash as well as in colour, and colours are those of the page, light or dark.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import pairwise

WIDTH, HEIGHT = 400, 190  # of the drawing, in its own units; it scales to the page
LEFT, RIGHT, TOP, BOTTOM = 46, 16, 10, 24
BUCKETS = 300  # stretches of steps that a line is drawn by
TOOLTIPS = 120  # at most, of one figure
DOTTED = 32  # lines of at most so many points show each of them

Point = tuple[float, float | None]


@dataclass(frozen=True)
class Curve:
    """A line: (step, value) by ascending step. `look` is a CSS class: first, second, third or faint."""

    name: str
    points: Sequence[Point]
    look: str = "first"

    @property
    def known(self) -> list[tuple[float, float]]:
        """The points that have a value."""
        return [(x, y) for x, y in self.points if y is not None]


@dataclass(frozen=True)
class Axis:
    """Maps values to a share of the axis, 0 to 1, between round ends."""

    low: float
    high: float
    ticks: list[float]
    log: bool = False

    def share(self, value: float) -> float:
        """Where a value lies; outside the ends it sticks to the nearer one."""
        if self.log:
            share = math.log(value / self.low) / math.log(self.high / self.low) if value > 0 else 0.0
        else:
            share = (value - self.low) / (self.high - self.low)
        return min(max(share, 0.0), 1.0)


@dataclass(frozen=True)
class Figure:
    """What to draw. `level` is a value worth comparing with and its name; `marks` name steps worth a vertical line."""

    title: str
    curves: Sequence[Curve]
    percent: bool = False
    from_zero: bool = False
    log: bool = False
    level: tuple[float, str] | None = None
    marks: Mapping[float, str] = field(default_factory=dict)

    def svg(self) -> str:
        """The figure as an HTML <figure>; a sentence in place of the drawing when no curve has a value."""
        title = f"<b>{escape(self.title)}</b>"
        known = [point for curve in self.curves for point in curve.known]
        if not known:
            return f'<figure><figcaption>{title}</figcaption><p class="none">not logged</p></figure>'
        steps = [x for x, _ in known]
        across = step_axis(max(steps))
        values = [y for _, y in known] + ([self.level[0]] if self.level else [])
        up = log_axis(values) if self.log and min(values) > 0 else value_axis(values, self.from_zero)
        parts = [
            self._grid(across, up),
            *(self._mark(across, step, name) for step, name in self.marks.items() if 0 < step <= across.high),
            *(_line(curve, across, up) for curve in self.curves),
            self._level(up),
            self._tooltips(across, up),
        ]
        named = [("curve " + curve.look, curve.name) for curve in self.curves]
        named += [("level", self.level[1])] if self.level else []
        legend = "".join(f"<span>{_swatch(look)}{escape(name)}</span>" for look, name in named)
        first, last = self.curves[0].known[:1] or known[:1], self.curves[0].known[-1:] or known[-1:]
        label = (
            f"{self.title}: {self._text(first[0][1])} at step {first[0][0]:,.0f}, "
            f"{self._text(last[0][1])} at step {last[0][0]:,.0f}"
        )
        return (
            f'<figure><figcaption>{title}<output title="last">{self._text(last[0][1])}</output>'
            + (f'<span class="legend">{legend}</span>' if len(named) > 1 else "")
            + f'</figcaption><svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">'
            + "".join(parts)
            + "</svg></figure>"
        )

    def _text(self, value: float) -> str:
        return f"{value:.1%}" if self.percent else number_text(value)

    def _grid(self, across: Axis, up: Axis) -> str:
        parts = []
        for tick, text in zip(up.ticks, tick_texts(up, self.percent), strict=True):
            y = _y(up, tick)
            parts.append(f'<path class="grid" d="M{LEFT} {y}H{WIDTH - RIGHT}"/>')
            parts.append(f'<text x="{LEFT - 6}" y="{y}" dy="3.5" text-anchor="end">{text}</text>')
        bottom = HEIGHT - BOTTOM
        for tick, text in zip(across.ticks, tick_texts(across), strict=True):
            x = _x(across, tick)
            parts.append(f'<path class="axis" d="M{x} {bottom}v4"/>')
            parts.append(f'<text x="{x}" y="{bottom + 16}" text-anchor="middle">{text}</text>')
        return "".join(parts) + f'<path class="axis" d="M{LEFT} {bottom}H{WIDTH - RIGHT}"/>'

    def _mark(self, across: Axis, step: float, name: str) -> str:
        x = _x(across, step)
        return f'<path class="mark" d="M{x} {TOP}V{HEIGHT - BOTTOM}"><title>{escape(name)}</title></path>'

    def _level(self, up: Axis) -> str:
        if not self.level:
            return ""
        return f'<path class="level" d="M{LEFT} {_y(up, self.level[0])}H{WIDTH - RIGHT}"/>'

    def _tooltips(self, across: Axis, up: Axis) -> str:
        """Columns over the whole height: the one under the pointer shows its step, its values and a dot at each."""
        table: dict[float, list[tuple[str, float]]] = {}
        for curve in self.curves:
            for x, y in curve.known:
                table.setdefault(x, []).append((curve.name, y))
        steps = sorted(table)
        steps = [steps[i] for i in sorted({round(k * (len(steps) - 1) / (TOOLTIPS - 1)) for k in range(TOOLTIPS)})]
        places = [_x(across, step) for step in steps]
        edges = [float(LEFT), *((a + b) / 2 for a, b in pairwise(places)), float(WIDTH - RIGHT)]
        parts = []
        for step, x, left, right in zip(steps, places, edges[:-1], edges[1:], strict=True):
            text = "\n".join(
                [f"step {step:,.0f}", *(f"{name} {self._text(y)}" for name, y in table[step])]
                if len(self.curves) > 1
                else [f"step {step:,.0f}: {self._text(table[step][0][1])}"]
            )
            dots = "".join(f'<circle cx="{x}" cy="{_y(up, y)}" r="3"/>' for _, y in table[step])
            parts.append(
                f'<g class="hit"><rect x="{left:.1f}" y="{TOP}" width="{max(right - left, 0.5):.1f}" '
                f'height="{HEIGHT - BOTTOM - TOP}"/><path d="M{x} {TOP}V{HEIGHT - BOTTOM}"/>{dots}'
                f"<title>{escape(text)}</title></g>"
            )
        return "".join(parts)


def smoothed(points: Sequence[Point]) -> tuple[list[Point], int]:
    """(points, width): the mean of `width` neighbouring known values, centred, of fewer near the ends; gaps stay."""
    known = [y for _, y in points if y is not None]
    radius = len(known) // 40 or (1 if len(known) >= 20 else 0)
    sums = [0.0]
    for value in known:
        sums.append(sums[-1] + value)
    means: list[float] = []
    for i in range(len(known)):
        begin, end = max(i - radius, 0), min(i + radius + 1, len(known))
        means.append((sums[end] - sums[begin]) / (end - begin))
    mean = iter(means)
    return [(x, None if y is None else next(mean)) for x, y in points], 2 * radius + 1


def thinned(points: Sequence[Point]) -> list[Point]:
    """At most 2 * BUCKETS points: the lowest and the highest of each stretch; a gap where a stretch has no value."""
    if len(points) <= 2 * BUCKETS:
        return list(points)
    kept: list[Point] = []
    for k in range(BUCKETS):
        stretch = points[k * len(points) // BUCKETS : (k + 1) * len(points) // BUCKETS]
        known = [(y, x) for x, y in stretch if y is not None]
        if known:
            kept += [(x, y) for x, y in sorted({min(known)[::-1], max(known)[::-1]})]
        else:
            kept.append((stretch[0][0], None))
    return kept


def value_axis(values: Sequence[float], from_zero: bool = False, most: int = 5) -> Axis:
    """A linear axis that holds all values, ends on ticks of 1, 2 or 5 times a power of ten."""
    low, high = min(values), max(values)
    if from_zero:
        low, high = min(low, 0.0), max(high, 0.0)
    if high - low <= 1e-6 * max(abs(low), abs(high)):  # flat: as if it varied by a little
        high = low + (abs(low) * 0.1 or 1.0)
        low = low - abs(low) * 0.1 if low and not from_zero else low
    step = _round_step((high - low) / most)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = [k * step for k in range(first, last + 1)]
    return Axis(ticks[0], ticks[-1], ticks)


def log_axis(values: Sequence[float]) -> Axis:
    """A logarithmic axis over whole powers of ten; all values above 0."""
    first, last = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    last = max(last, first + 1)
    every = -(-(last - first) // 6)
    return Axis(10.0**first, 10.0**last, [10.0**k for k in range(first, last + 1, every)], log=True)


def step_axis(last: float) -> Axis:
    """From step 0 to the last one, ticks at whole steps."""
    step = max(_round_step(last / 5), 1.0)
    ticks = [k * step for k in range(math.floor(last / step + 1e-9) + 1)]
    return Axis(0.0, max(last, 1.0), ticks)


def tick_texts(axis: Axis, percent: bool = False) -> list[str]:
    """All ticks of an axis, written with equally many decimals."""
    if axis.log:
        return [f"{tick:g}" for tick in axis.ticks]
    largest = max(abs(tick) for tick in axis.ticks)
    if percent:
        scale, unit = 100.0, "%"
    elif largest >= 10_000:
        scale, unit = (1e-6, "M") if largest >= 1e6 else (1e-3, "k")
    else:
        scale, unit = 1.0, ""
    step = (axis.ticks[1] - axis.ticks[0]) * scale if len(axis.ticks) > 1 else 1.0
    if largest * scale < 1e-3:
        return [_scientific(tick * scale) + unit for tick in axis.ticks]
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return [f"{tick * scale:.{decimals}f}{unit}" if round(tick, 12) else "0" for tick in axis.ticks]


def number_text(value: float) -> str:
    """Four significant digits, or all of a whole number above a thousand."""
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return _scientific(value) if 0 < abs(value) < 1e-3 else f"{value:.4g}"


def _scientific(value: float) -> str:
    """Three significant digits: 2e-4, 6.18e-7, 0."""
    mantissa, _, power = f"{value:.2e}".partition("e")
    return f"{float(mantissa):g}e{int(power)}" if value else "0"


def _round_step(rough: float) -> float:
    """The smallest of 1, 2, 5 times a power of ten that is not below `rough`."""
    power = 10.0 ** math.floor(math.log10(rough)) if rough > 0 else 1.0
    return next(k * power for k in (1, 2, 5, 10) if k * power >= rough * (1 - 1e-9))


def _line(curve: Curve, across: Axis, up: Axis) -> str:
    """The line, broken at gaps, and dots where there are few points or one stands alone."""
    points = thinned(curve.points)
    path, dots, pen_down = [], [], False
    for i, (x, y) in enumerate(points):
        if y is None:
            pen_down = False
            continue
        place = f"{_x(across, x)} {_y(up, y)}"
        path.append(("L" if pen_down else "M") + place)
        alone = not pen_down and (i + 1 == len(points) or points[i + 1][1] is None)
        if alone or (len(points) <= DOTTED and curve.look != "faint"):
            dots.append(f'<circle class="{curve.look}" cx="{_x(across, x)}" cy="{_y(up, y)}" r="2.2"/>')
        pen_down = True
    return f'<path class="curve {curve.look}" d="{"".join(path)}"/>' + "".join(dots)


def _swatch(look: str) -> str:
    return f'<svg class="swatch" viewBox="0 0 24 8" aria-hidden="true"><path class="{look}" d="M0 4H24"/></svg>'


def _x(axis: Axis, value: float) -> float:
    return round(LEFT + axis.share(value) * (WIDTH - LEFT - RIGHT), 1)


def _y(axis: Axis, value: float) -> float:
    return round(HEIGHT - BOTTOM - axis.share(value) * (HEIGHT - BOTTOM - TOP), 1)


STYLE = """
figure { display: flex; flex-direction: column; margin: 0; min-width: 0; }
figcaption { display: flex; flex-wrap: wrap; align-items: baseline; gap: 0 14px; margin-bottom: 4px; }
figcaption b { font-weight: 600; }
figcaption output { margin-left: auto; font-weight: 600; font-variant-numeric: tabular-nums; }
.legend { order: 1; width: 100%; display: flex; flex-wrap: wrap; gap: 0 14px; color: var(--soft); font-size: 12px; }
.legend span { display: inline-flex; align-items: center; gap: 6px; }
.swatch { width: 24px; height: 8px; }
.plot { display: block; margin-top: auto; width: 100%; max-width: 660px; height: auto; overflow: visible; }
.plot text { fill: var(--soft); font: 10.5px system-ui, sans-serif; font-variant-numeric: tabular-nums; }
.plot path, .swatch path { fill: none; vector-effect: non-scaling-stroke; }
.grid { stroke: var(--line); }
.axis { stroke: var(--soft); }
.mark { stroke: var(--soft); stroke-dasharray: 2 4; }
.level { stroke: var(--warm); stroke-dasharray: 7 4; }
.curve { stroke-width: 1.8; stroke-linejoin: round; stroke-linecap: round; }
.curve.first { stroke: var(--label); }
.curve.second { stroke: var(--good); stroke-dasharray: 6 4; }
.curve.third { stroke: var(--bad); stroke-dasharray: 1 4; }
.curve.faint { stroke: var(--label); stroke-width: 1; opacity: .45; }
circle.first, circle.faint { fill: var(--label); }
circle.second { fill: var(--good); }
circle.third { fill: var(--bad); }
.hit rect { fill: transparent; }
.hit path { stroke: var(--soft); }
.hit circle { fill: var(--card); stroke: var(--ink); stroke-width: 1.5; }
.hit path, .hit circle { opacity: 0; }
.hit:hover path, .hit:hover circle { opacity: 1; }
"""
