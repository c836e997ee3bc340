"""Tile sizes of the Triton attention kernels, as plain lists by architecture, and the choice among them.

The choice looks at shape, dtype and features alone and times nothing: the same call rounds the same way in every run.
The lists hold what compiles without spilling registers, but for what attention_spills.py names (kernels/aot.py looks);
none has been timed on a GPU yet.
"""

from __future__ import annotations

from typing import NamedTuple


class Tile(NamedTuple):
    """Sizes for heads of up to `bytes` bytes: one row of a tile, both its parts; fp32 counts twice."""

    bytes: int
    own: int  # rows (forward, dq) or keys (dkdv) of a program
    step: int  # keys (forward, dq) or rows (dkdv) of a turn of its loop
    warps: int
    stages: int
    plain: bool = False  # leaves no registers for key lengths, a window, documents, a soft cap or dropout
    full: bool = False  # nor for a causal mask


# where several are for the same bytes, the first; for short sequences, the one that leaves the fewest rows empty
FORWARD = {
    "sm_80": [
        Tile(128, 128, 64, 4, 3, plain=True), Tile(128, 64, 64, 4, 3),
        Tile(192, 128, 32, 4, 2), Tile(192, 64, 32, 4, 2),
        Tile(256, 128, 32, 8, 3), Tile(256, 64, 32, 4, 2),
        Tile(512, 64, 32, 8, 2),
    ],
    "sm_90": [
        Tile(128, 128, 128, 8, 3), Tile(128, 64, 64, 4, 3),
        Tile(192, 128, 64, 8, 3), Tile(192, 64, 64, 4, 3),
        Tile(256, 128, 128, 8, 2, plain=True), Tile(256, 128, 64, 8, 2), Tile(256, 64, 64, 4, 3),
        Tile(512, 64, 32, 8, 2),
    ],
    "sm_100": [
        Tile(128, 128, 128, 8, 3, plain=True), Tile(128, 64, 64, 4, 3),
        Tile(192, 128, 64, 8, 3), Tile(192, 64, 64, 4, 3),
        Tile(256, 128, 64, 8, 2, plain=True), Tile(256, 64, 64, 4, 3, plain=True), Tile(256, 64, 32, 8, 2),
        Tile(512, 64, 32, 8, 2),
    ],
    "gfx942": [
        Tile(128, 128, 64, 4, 1), Tile(128, 64, 64, 4, 1),
        Tile(192, 128, 64, 4, 1), Tile(192, 64, 64, 4, 1),
        Tile(256, 128, 64, 4, 1), Tile(256, 64, 64, 4, 1),
        Tile(512, 64, 32, 4, 1),
    ],
    "interpreter": [Tile(4096, 64, 64, 4, 1)],
}  # fmt: skip
DKDV = {
    "sm_80": [
        Tile(128, 128, 32, 8, 2), Tile(128, 64, 32, 4, 2), Tile(192, 64, 32, 8, 2), Tile(256, 64, 32, 8, 2),
        Tile(512, 32, 16, 8, 2),
    ],
    "sm_90": [
        Tile(128, 128, 64, 8, 2), Tile(128, 64, 64, 4, 2, full=True), Tile(128, 64, 32, 4, 2), Tile(192, 64, 64, 8, 2),
        Tile(256, 128, 32, 8, 2), Tile(256, 64, 32, 8, 2), Tile(512, 32, 32, 8, 2),
    ],
    "sm_100": [
        Tile(128, 128, 64, 8, 2, plain=True), Tile(128, 64, 64, 8, 2), Tile(192, 64, 32, 8, 2), Tile(256, 64, 32, 8, 2),
        Tile(512, 32, 32, 8, 2),
    ],
    "gfx942": [
        Tile(128, 64, 64, 4, 1), Tile(192, 64, 32, 4, 1), Tile(256, 64, 32, 4, 1), Tile(512, 32, 16, 4, 1),
    ],
    "interpreter": [Tile(4096, 64, 64, 4, 1)],
}  # fmt: skip
DQ = {
    "sm_80": [
        Tile(128, 128, 64, 8, 2), Tile(128, 64, 32, 4, 2), Tile(192, 64, 32, 4, 2), Tile(256, 64, 32, 8, 2),
        Tile(512, 32, 32, 8, 2),
    ],
    "sm_90": [
        Tile(128, 128, 64, 8, 2), Tile(128, 64, 64, 4, 2), Tile(192, 128, 64, 8, 2), Tile(192, 64, 64, 4, 2),
        Tile(256, 128, 64, 8, 2), Tile(256, 64, 64, 8, 2), Tile(512, 64, 32, 8, 2),
    ],
    "sm_100": [
        Tile(128, 128, 64, 8, 2), Tile(128, 64, 64, 4, 2), Tile(192, 64, 64, 8, 2),
        Tile(256, 128, 64, 8, 2), Tile(256, 64, 64, 8, 2), Tile(512, 64, 32, 8, 2),
    ],
    "gfx942": [
        Tile(128, 64, 64, 4, 1), Tile(192, 64, 32, 4, 1), Tile(256, 64, 32, 4, 1), Tile(512, 32, 16, 4, 1),
    ],
    "interpreter": [Tile(4096, 64, 64, 4, 1)],
}  # fmt: skip
WIDEST = Tile(4096, 16, 16, 8, 1)  # for wider heads than the list has: fp32 from 65 on
DELTA_ROWS = 32  # of a program that only reads rows
SHORT = 1024  # up to this many rows, empty ones in the last block cost more than a smaller tile


def choose(
    tiles: list[Tile],
    size: int,
    itemsize: int,
    length: int,
    *,
    causal: bool = False,
    masked: bool = False,
    heavy: bool = False,
) -> Tile:
    """The tile for heads of `size` elements where programs share out `length` rows or keys.

    `masked`: key lengths, a window or documents. `heavy`: a soft cap or dropout, which need the registers that the
    tiles for heads of twice the size leave free.
    """
    row_bytes = max(sum(parts(size)) * itemsize, tiles[0].bytes)
    if itemsize > 2:  # nobody trains with such heads: they get no tiles beside that for 64 elements
        row_bytes = max(2 * row_bytes, tiles[-1].bytes)
    if heavy and row_bytes * 2 <= tiles[-1].bytes:
        row_bytes *= 2
    smallest = min((tile.bytes for tile in tiles if tile.bytes >= row_bytes), default=None)
    more = masked or heavy
    fitting = [
        tile
        for tile in tiles
        if tile.bytes == smallest and not (tile.plain and more) and not (tile.full and (more or causal))
    ] or [WIDEST]
    if length > SHORT:
        return fitting[0]
    return min(fitting, key=lambda tile: -(length // -tile.own) * tile.own)


def parts(size: int) -> tuple[int, int]:
    """Widths (left, right) of a tile's two parts: 72 = 64 + 16 (8 of them used), 96 = 64 + 32, 128 = 128 + 0.

    16 is the least that a product of tiles takes.
    """
    left = max(16, 1 << (size.bit_length() - 1))
    return left, max(16, _power_of_two(size - left)) if size > left else 0


def edge(tile: Tile, keys: int, ragged: bool) -> int:
    """Keys of a block with an edge in it; where the only edge is the end of the keys, no more than reach it."""
    return tile.step if ragged else min(tile.step, max(16, _power_of_two(keys % tile.step)))


def _power_of_two(number: int) -> int:
    """The least power of two that is not below a number."""
    return 1 << max(number - 1, 0).bit_length()
