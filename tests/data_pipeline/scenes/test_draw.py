"""Pictures: true to the scene (placed, coloured, counted and textured by independent measures), pure, whole."""

from itertools import product

import numpy as np
import pytest

from data_pipeline.scenes.dice import stream
from data_pipeline.scenes.draw import draw, place
from data_pipeline.scenes.world import COLOURS, SHAPES, SIZES, TEXTURES, Kind, Scene, scene

# What a viewer calls by these names, not the palette of the painter.
SEEN_AS = {
    "red": (220, 30, 35),
    "orange": (250, 140, 20),
    "yellow": (250, 220, 40),
    "green": (40, 160, 70),
    "blue": (35, 90, 220),
    "purple": (125, 45, 170),
    "pink": (250, 150, 195),
    "white": (245, 245, 245),
}


def look(index: int) -> np.random.Generator:
    return stream(1, "train look", index)


def nearest_colour(pixel: np.ndarray) -> str:
    return min(SEEN_AS, key=lambda name: float(np.abs(pixel - np.array(SEEN_AS[name])).sum()))


def count_islands(mask: np.ndarray) -> int:
    """Connected areas of more than a few pixels."""
    rest = {(int(y), int(x)) for y, x in zip(*mask.nonzero(), strict=True)}
    islands = 0
    while rest:
        area, front = 0, [rest.pop()]
        while front:
            y, x = front.pop()
            area += 1
            for near in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
                if near in rest:
                    rest.remove(near)
                    front.append(near)
        islands += area > 8
    return islands


def test_drawing_is_pure_and_differs_from_index_to_index() -> None:
    shown = scene(0, 5)
    assert (draw(shown, look(5)) == draw(shown, look(5))).all()
    assert (draw(shown, look(5)) != draw(shown, look(6))).any()


@pytest.mark.parametrize("held_out", [False, True])
def test_places_make_the_words_true(held_out: bool) -> None:
    for index in range(600):
        shown = scene(2, index, held_out)
        groups = place(shown, look(index))
        assert [group.kind for group in groups] == list(shown.kinds)
        for group in groups:
            assert group.centres.shape == (group.kind.count, 2)
            assert (group.centres - group.radii[:, None] >= 0).all()
            assert (group.centres + group.radii[:, None] <= 1).all()
            for a in range(group.kind.count):
                for b in range(a):
                    apart = np.linalg.norm(group.centres[a] - group.centres[b])
                    assert apart > group.radii[a] + group.radii[b]
        if shown.relation == "inside":
            inner, outer = groups
            assert np.linalg.norm(inner.centres - outer.centres) + inner.radii[0] < 0.5 * outer.radii[0]
        elif shown.relation:
            axis = 0 if shown.relation == "left of" else 1
            ends = (groups[0].centres[:, axis] + groups[0].radii).max()
            begins = (groups[1].centres[:, axis] - groups[1].radii).min()
            assert ends < begins
    assert SIZES == ("small", "large")


def test_small_is_well_below_large() -> None:
    kinds = {size: Kind(3, size, "red", "solid", "circle") for size in SIZES}
    radii = {size: [place(Scene((kinds[size],)), look(i))[0].radii for i in range(50)] for size in SIZES}
    assert np.max(radii["small"]) * 1.25 < np.min(radii["large"])


@pytest.mark.parametrize("size", [64, 97])
def test_colours_are_seen_as_named(size: int) -> None:
    whole = ("circle", "square", "triangle", "star", "cross", "heart")  # shapes that cover their own middle
    for number, (colour, shape) in enumerate(product(COLOURS, whole)):
        shown = Scene((Kind(2, SIZES[number % 2], colour, "solid", shape),))
        picture = draw(shown, look(number), size).astype(int)
        (group,) = place(shown, look(number))
        for x, y in (group.centres * size).astype(int):
            assert nearest_colour(picture[y, x]) == colour, (colour, shape)


def test_things_can_be_counted() -> None:
    for number, (shape, texture) in enumerate(product(SHAPES, TEXTURES)):
        count = 1 + number % 5
        shown = Scene((Kind(count, "small", "blue", texture, shape),))
        picture = draw(shown, look(number), 128).astype(int)
        from_corner = np.abs(picture - np.median(picture, axis=(0, 1))).sum(-1)
        assert count_islands(from_corner > 90) == count, (shape, texture)


def test_textures_are_what_they_are_called() -> None:
    for number, (colour, texture) in enumerate(product(COLOURS, TEXTURES)):
        shown = Scene((Kind(1, "large", colour, texture, "square"),))
        picture = draw(shown, look(number), 96).astype(float).mean(-1)
        (group,) = place(shown, look(number))
        x, y = (group.centres[0] * 96).astype(int)
        middle = picture[y - 6 : y + 7, x - 6 : x + 7]
        flatness = middle.mean(1).std() / middle.mean(0).std()  # rows against columns
        assert (np.ptp(middle) < 30) == (texture == "solid")
        assert np.ptp(middle) < 30 or np.ptp(middle) > 70
        if texture == "striped":
            assert flatness > 4  # bands that lie nearly flat
        elif texture != "solid":
            assert 1 / 3 < flatness < 3


def test_no_two_shapes_look_alike() -> None:
    outlines = []
    for shape in SHAPES:
        shown = Scene((Kind(1, "large", "white", "solid", shape),))
        picture = draw(shown, look(3), 64).astype(int)  # the same place, turn and ground for all
        outlines.append(np.abs(picture - np.median(picture, axis=(0, 1))).sum(-1) > 90)
    for a in range(len(SHAPES)):
        for b in range(a):
            union = (outlines[a] | outlines[b]).sum()
            assert (outlines[a] & outlines[b]).sum() < 0.85 * union, (SHAPES[a], SHAPES[b])


@pytest.mark.parametrize("size", [32, 33, 65, 224, 500])
def test_any_size_is_drawn_whole(size: int) -> None:
    for index in range(25):
        picture = draw(scene(0, index, index % 2 == 1), look(index), size)
        assert picture.shape == (size, size, 3)
        assert picture.dtype == np.uint8
        assert picture.flags.c_contiguous


def test_nothing_wraps_around_at_black_or_white() -> None:
    """Dark marks have next to no blue, which must not turn into all of it."""
    for index in range(40):
        shown = Scene((Kind(2, "large", "orange", "checkered", "square"),))
        picture = draw(shown, look(index), 64).astype(int)
        (group,) = place(shown, look(index))
        for x, y in (group.centres * 64).astype(int):
            assert picture[y - 4 : y + 5, x - 4 : x + 5, 2].max() < 100


def test_too_small_a_picture_is_refused() -> None:
    with pytest.raises(ValueError, match="31 pixels"):
        draw(scene(0, 0), look(0), 31)
