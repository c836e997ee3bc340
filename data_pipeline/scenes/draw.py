"""Scenes as pictures: signed distances, anti-aliased, a little different every time.

Design choices:
- A shape is a signed distance (negative inside, unit radius); coverage of a pixel is the distance in pixels, clipped
  to half a pixel on either side. That is anti-aliasing at any image size without drawing larger and shrinking.
- All things of one kind are computed at once, each in a box of its own size: the cost follows the ink, and 64 px
  scenes come at well over a thousand a second and core.
- What a caption says is fixed; what it does not say (place, turn, exact size and tone, background, light, shadow)
  is drawn from the look stream, so two pictures of one scene differ.
- Places keep the words true: nothing overlaps, a relation holds for every pair of things, and no other relation
  can be read off the picture by mistake.

Distances after Inigo Quilez, "2D distance functions" (iquilezles.org/articles/distfunctions2d); those not exact far
from the edge are exact near it, which is all that coverage needs.
Axis suffixes: N things of one kind, H rows, W columns, C colour channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from data_pipeline.scenes.dice import Dice
from data_pipeline.scenes.world import Kind, Scene

Array = np.ndarray
SMALLEST_SIZE = 32  # below, textures are finer than pixels

# Colour of each kind and of the marks of its texture, RGB in 0..1, [2, C, 1, 1].
_TONES = {
    colour: np.array(tones, np.float32)[:, :, None, None]
    for colour, tones in {
        "red": ((0.86, 0.13, 0.15), (1.00, 0.88, 0.84)),
        "orange": ((0.97, 0.53, 0.08), (0.45, 0.17, 0.02)),
        "yellow": ((0.99, 0.86, 0.16), (0.52, 0.36, 0.03)),
        "green": ((0.16, 0.62, 0.27), (0.87, 0.98, 0.82)),
        "blue": ((0.13, 0.36, 0.86), (0.84, 0.92, 1.00)),
        "purple": ((0.49, 0.18, 0.66), (0.94, 0.84, 1.00)),
        "pink": ((0.99, 0.58, 0.77), (0.74, 0.10, 0.42)),
        "white": ((0.97, 0.97, 0.96), (0.42, 0.45, 0.50)),
    }.items()
}
_BACKGROUNDS = np.array(
    [
        (0.80, 0.78, 0.73),  # sand
        (0.70, 0.76, 0.80),  # sky
        (0.75, 0.80, 0.73),  # sage
        (0.77, 0.73, 0.79),  # heather
        (0.26, 0.29, 0.35),  # slate
        (0.21, 0.26, 0.27),  # night
        (0.33, 0.28, 0.27),  # earth
    ]
)
_RADIUS = {"small": 0.118, "large": 0.172}  # of the image's side
_HOLDER_RADIUS = 0.36  # a large thing that holds another
_SPREAD = 0.06  # a thing is up to this much larger or smaller than its size says
_TURN = 0.22  # radians either way: less than what would make a square look like something else
_MARGIN = 0.025
_GAP = 0.05  # of the image's side, between the two kinds
_AIR = 1.12  # centres of two things of one kind are this many times their radii apart, or more
_THROWS = 12  # for a place of one thing; then the whole arrangement is tried again
_TRIES = 30  # of whole arrangements; then things become smaller


@dataclass(frozen=True)
class Placed:
    """Things of one kind with their places: centres [N, 2] as (x, y) and radii [N], in units of the image's side."""

    kind: Kind
    centres: Array
    radii: Array


def place(scene: Scene, generator: np.random.Generator) -> tuple[Placed, ...]:
    """Put the things of a scene where its words are true, in the order of its kinds."""
    if scene.relation == "inside":
        return _place_inside(scene, generator)
    dice = Dice(generator)
    shrink = 1.0
    while True:
        for _ in range(_TRIES):
            groups = _throw(scene, dice, shrink)
            if groups is not None:
                return groups
        shrink *= 0.97  # Rare: a full house of large things. A little smaller leaves more room, so this ends.


def draw(scene: Scene, generator: np.random.Generator, size: int = 64) -> Array:
    """Picture of a scene, uint8 [size, size, 3] RGB; ValueError below 32 px, where textures cannot be seen."""
    if size < SMALLEST_SIZE:
        raise ValueError(f"image size is {size} pixels, but textures need at least {SMALLEST_SIZE}")
    placed = place(scene, generator)
    light = generator.uniform(0, 2 * np.pi)
    towards_light = (float(np.cos(light)), float(np.sin(light)))
    # Centres keep a radius from the border, boxes and shadows reach a little further.
    pad = int(size * (0.17 * max(float(group.radii.max()) for group in placed) + 0.05)) + 4
    canvas = _background(size, pad, towards_light, generator)
    # What is inside another is drawn over it.
    for group in reversed(placed):
        _paint(canvas, group, size, pad, towards_light, generator)
    shown_CHW = canvas[:, pad : pad + size, pad : pad + size] * np.float32(255 * generator.uniform(0.92, 1.04))
    shown_CHW += 0.5
    bytes_CHW = np.clip(shown_CHW, 0, 255, out=shown_CHW).astype(np.uint8)
    picture = np.empty((size, size, 3), dtype=np.uint8)
    for channel, plane in enumerate(bytes_CHW):  # twice as quick as a transposed copy
        picture[..., channel] = plane
    return picture


def _throw(scene: Scene, dice: Dice, shrink: float) -> tuple[Placed, ...] | None:
    """One try to place all things, each in its part of the picture; None when they do not fit or would mislead."""
    largest = shrink * (1 + _SPREAD)
    low, high = [[_MARGIN, _MARGIN] for _ in scene.kinds], [[1 - _MARGIN, 1 - _MARGIN] for _ in scene.kinds]
    axis = 0 if scene.relation == "left of" else 1
    if scene.relation is not None:
        needs = [2 * largest * _RADIUS[kind.size] for kind in scene.kinds]
        slack = 1 - 2 * _MARGIN - _GAP - sum(needs)
        high[0][axis] = _MARGIN + needs[0] + slack * (0.35 + 0.3 * dice.uniform())
        low[1][axis] = high[0][axis] + _GAP
    groups, middles = [], []
    for kind, lowest, highest in zip(scene.kinds, low, high, strict=True):
        things: list[tuple[float, float, float]] = []
        for _ in range(kind.count):
            thing = _find_room(things, _RADIUS[kind.size] * shrink, lowest, highest, dice)
            if thing is None:
                return None
            things.append(thing)
        centres = [(x, y) for x, y, _ in things]
        groups.append(Placed(kind, np.array(centres), np.array([radius for _, _, radius in things])))
        middles.append([sum(along) / kind.count for along in zip(*centres, strict=True)])
    if scene.relation is not None:
        # The groups must lie along the named axis: nobody would say "left of" of what is mostly above.
        between = [abs(first - second) for first, second in zip(*middles, strict=True)]
        if between[1 - axis] > 0.6 * between[axis]:
            return None
    return tuple(groups)


def _find_room(
    things: list[tuple[float, float, float]], radius: float, low: list[float], high: list[float], dice: Dice
) -> tuple[float, float, float] | None:
    """Place (x, y, radius) for one more thing within the bounds, clear of the others; None when none is found."""
    radius *= 1 + _SPREAD * (2 * dice.uniform() - 1)
    for _ in range(_THROWS):
        x = low[0] + radius + (high[0] - low[0] - 2 * radius) * dice.uniform()
        y = low[1] + radius + (high[1] - low[1] - 2 * radius) * dice.uniform()
        if all((x - u) ** 2 + (y - v) ** 2 > (_AIR * (radius + other)) ** 2 for u, v, other in things):
            return x, y, radius
    return None


def _place_inside(scene: Scene, generator: np.random.Generator) -> tuple[Placed, ...]:
    """One thing near the middle of a much larger one."""
    outer = np.array([_HOLDER_RADIUS * generator.uniform(0.92, 1.0)])
    inner = np.array([_RADIUS["small"] * generator.uniform(1 - _SPREAD, 1 + _SPREAD)])
    centre = 0.5 + generator.uniform(-1, 1, 2) * (0.5 - _MARGIN - outer * 1.08)
    within = centre + generator.uniform(-0.06, 0.06, 2) * outer
    return (Placed(scene.kinds[0], within[None], inner), Placed(scene.kinds[1], centre[None], outer))


def _background(size: int, pad: int, towards_light: tuple[float, float], generator: np.random.Generator) -> Array:
    """A plain ground that grows a little lighter to one side, float32 [3, side, side]."""
    tone = _BACKGROUNDS[generator.integers(len(_BACKGROUNDS))] + generator.uniform(-0.035, 0.035, 3)
    across = np.arange(-pad, size + pad, dtype=np.float32) / size - 0.5
    glow = 1 + 0.16 * (towards_light[0] * across[None, :] + towards_light[1] * across[:, None])
    return glow * tone.astype(np.float32)[:, None, None]


def _paint(
    canvas: Array,
    group: Placed,
    size: int,
    pad: int,
    towards_light: tuple[float, float],
    generator: np.random.Generator,
) -> None:
    """Lay shadow, body, texture and edge of the things of one kind over the canvas [3, side, side], in place."""
    kind, count = group.kind, group.kind.count
    radii = (group.radii * size).astype(np.float32)
    centres = (group.centres * size).astype(np.float32)
    half = int(1.17 * radii.max() + 0.02 * size) + 2  # a square's corner and the soft end of a shadow
    corners = np.floor(centres) - half
    steps = np.arange(2 * half + 1, dtype=np.float32) + 0.5
    # Pixels as seen from a thing's middle, in radii: right and down, then the same in the thing's own frame.
    x_NW = (steps + (corners[:, :1] - centres[:, :1])) / radii[:, None]
    y_NH = (steps + (corners[:, 1:] - centres[:, 1:])) / radii[:, None]
    turn = generator.uniform(-_TURN, _TURN, count).astype(np.float32)
    cos, sin = np.cos(turn)[:, None], np.sin(turn)[:, None]
    u_NHW = (cos * x_NW)[:, None, :] + (sin * y_NH)[:, :, None]
    v_NHW = (cos * y_NH)[:, :, None] - (sin * x_NW)[:, None, :]
    scale = radii[:, None, None]
    distance_NHW = _DISTANCES[kind.shape](u_NHW, v_NHW) * scale
    body_NHW = _within(0.5 - distance_NHW, 0, 1)

    base, mark = _TONES[kind.colour]
    colour = base + generator.uniform(-0.04, 0.04, (3, 1, 1)).astype(np.float32)
    light_NHW = (0.10 * towards_light[0] * x_NW)[:, None, :] + (1 + 0.10 * towards_light[1] * y_NH)[:, :, None]
    # A darker rim sets like colours apart.
    rim_NHW = _within(distance_NHW * -0.34 + (0.83 - 0.34 * 0.014 * size), 0.66, 1)
    shade_NHW = light_NHW * rim_NHW * body_NHW
    if kind.texture == "solid":
        painted_NCHW = colour * shade_NHW[:, None]
    else:
        phases = generator.uniform(-0.12, 0.12, 2).tolist()
        marks_NHW = _TEXTURES[kind.texture](u_NHW * scale, v_NHW * scale, size / 64 * 4.1, phases)
        marks_NHW *= _within(-distance_NHW / (size / 64), 0, 1)  # a mark must not bite into the outline
        painted_NCHW = marks_NHW[:, None] * (mark - base)
        painted_NCHW += colour
        painted_NCHW *= shade_NHW[:, None]

    unshadowed_NHW = _within(distance_NHW * (0.30 / (size * 0.03)) + 0.85, 0.70, 1)
    uncovered_NHW = 1 - body_NHW
    away = [round(-size * 0.022 * part) for part in towards_light]
    places = (corners.astype(int) + pad).tolist()
    for number, (left, top) in enumerate(places):
        below = _window(canvas, left + away[0], top + away[1], 2 * half + 1)
        below *= unshadowed_NHW[number]
    for number, (left, top) in enumerate(places):
        under = _window(canvas, left, top, 2 * half + 1)
        under *= uncovered_NHW[number]
        under += painted_NCHW[number]


def _within(values: Array, low: float, high: float) -> Array:
    """The values clipped to low..high."""
    return np.minimum(np.maximum(values, low), high)


def _window(canvas: Array, left: int, top: int, side: int) -> Array:
    """The square of the canvas that a thing's box covers, as a view."""
    return canvas[:, top : top + side, left : left + side]


def _circle(u: Array, v: Array) -> Array:
    return np.sqrt(u * u + v * v) - 0.94


def _square(u: Array, v: Array) -> Array:
    return np.maximum(np.abs(u), np.abs(v)) - 0.82


def _triangle(u: Array, v: Array) -> Array:
    v = v - 0.16  # hung so that its middle looks like the middle
    return np.maximum(0.8660254 * np.abs(u) - 0.5 * v, v) - 0.58


def _star(u: Array, v: Array) -> Array:
    """Five points; the plane is folded into one half of one point (Quilez, sdStar5)."""
    outer, inner = 1.12, 0.47
    u, v = np.abs(u), -(v - 0.06)
    for cos, sin in ((0.809016994, -0.587785252), (-0.809016994, -0.587785252)):
        behind = 2 * np.maximum(cos * u + sin * v, 0)
        u, v = u - behind * cos, v - behind * sin
    u, v = np.abs(u), v - outer
    edge_u, edge_v = inner * 0.587785252, inner * 0.809016994 - outer
    along = np.clip((u * edge_u + v * edge_v) / (edge_u**2 + edge_v**2), 0, 1)
    length = np.sqrt((u - edge_u * along) ** 2 + (v - edge_v * along) ** 2)
    return length * np.sign(v * edge_u - u * edge_v)


def _ring(u: Array, v: Array) -> Array:
    return np.abs(np.sqrt(u * u + v * v) - 0.72) - 0.25


def _cross(u: Array, v: Array) -> Array:
    u, v = np.abs(u), np.abs(v)
    return np.minimum(np.maximum(u - 0.98, v - 0.34), np.maximum(u - 0.34, v - 0.98))


def _heart(u: Array, v: Array) -> Array:
    """Quilez, sdHeart, which stands on its tip at the origin and is about 1.1 high."""
    size = 1.62
    u, v = np.abs(u) / size, 0.57 - v / size
    upper = np.sqrt((u - 0.25) ** 2 + (v - 0.75) ** 2) - 0.35355339
    fold = 0.5 * np.maximum(u + v, 0)
    lower = np.sqrt(np.minimum(u**2 + (v - 1) ** 2, (u - fold) ** 2 + (v - fold) ** 2)) * np.sign(u - v)
    return np.where(u + v > 1, upper, lower) * size


def _moon(u: Array, v: Array) -> Array:
    bite = np.sqrt((u - 0.70) ** 2 + (v + 0.22) ** 2) - 0.80
    return np.maximum(np.sqrt((u - 0.14) ** 2 + v * v) - 0.98, -bite)


_DISTANCES: dict[str, Callable[[Array, Array], Array]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "ring": _ring,
    "cross": _cross,
    "heart": _heart,
    "moon": _moon,
}


def _to_middle(position: Array) -> Array:
    """Distance in periods to the middle of the nearest mark, 0 to 0.5."""
    return np.abs(position - np.floor(position) - 0.5)


def _stripes(u: Array, v: Array, period: float, phases: list[float]) -> Array:
    """Marks of a texture: coverage 0 to 1 at pixels (u, v) of the thing's frame; `period` in pixels."""
    return _within(0.5 + (0.23 - _to_middle(v / period + (0.5 + phases[0]))) * period, 0, 1)


def _dots(u: Array, v: Array, period: float, phases: list[float]) -> Array:
    period = period * 1.2
    across, down = _to_middle(u / period + (0.5 + phases[0])), _to_middle(v / period + (0.5 + phases[1]))
    return _within(0.5 + (0.29 - np.sqrt(across * across + down * down)) * period, 0, 1)


def _checks(u: Array, v: Array, period: float, phases: list[float]) -> Array:
    period = period * 1.5
    across, down = _to_middle(u / period + phases[0]) - 0.25, _to_middle(v / period + phases[1]) - 0.25
    nearest = np.minimum(np.abs(across), np.abs(down)) * np.sign(across * down)
    return _within(0.5 + nearest * period, 0, 1)


_TEXTURES: dict[str, Callable[[Array, Array, float, list[float]], Array]] = {
    "striped": _stripes,
    "dotted": _dots,
    "checkered": _checks,
}
