"""The tune says the scene: no two scenes share one, and a file gives back what was put in."""

import io
from itertools import pairwise, product

import numpy as np
import soundfile

from data_pipeline.scenes.sound import RATE, encode_flac, tune
from data_pipeline.scenes.world import COLOURS, RELATIONS, SHAPES, SIZES, TEXTURES, Kind, Scene, scene

EVERY_KIND = [Kind(1, *parts) for parts in product(SIZES, COLOURS, TEXTURES, SHAPES)]


def motif(relation: str) -> np.ndarray:
    """What a tune has between its two kinds."""
    first, second = Kind(1, "small", "red", "solid", "circle"), Kind(1, "large", "blue", "dotted", "ring")
    whole = tune(Scene((first, second), relation))
    return whole[len(tune(Scene((first,)))) : -len(tune(Scene((second,))))]


def test_the_code_is_uniquely_decodable() -> None:
    """No unit (a note, a motif) begins another, so a row of units is read in one way only."""
    units = [tune(Scene((kind,))) for kind in EVERY_KIND] + [motif(relation) for relation in RELATIONS]
    ordered = sorted(unit.tobytes() for unit in units)
    assert len(ordered) == 515
    assert not any(longer.startswith(shorter) for shorter, longer in pairwise(ordered))


def test_a_tune_is_its_units_in_order() -> None:
    for index in range(400):
        shown = scene(0, index, index % 2 == 1)
        rows = [[tune(Scene((Kind(1, k.size, k.colour, k.texture, k.shape),)))] * k.count for k in shown.kinds]
        units = rows[0] if shown.relation is None else [*rows[0], motif(shown.relation), *rows[1]]
        assert np.array_equal(tune(shown), np.concatenate(units))


def test_units_are_heard_apart() -> None:
    """Not only different bits: between notes of one length, the spectra of any two differ by more than a shade."""
    for size in SIZES:
        notes = [tune(Scene((kind,))).astype(float) for kind in EVERY_KIND if kind.size == size]
        spectra = np.abs(np.fft.rfft(np.stack(notes)))
        spectra /= np.linalg.norm(spectra, axis=1, keepdims=True)
        alike = spectra @ spectra.T - 2 * np.eye(len(notes))
        assert alike.max() < 0.96


def test_sounds_are_short_small_and_survive_the_file() -> None:
    for index in range(200):
        samples = tune(scene(0, index))
        data = encode_flac(samples)
        read, rate = soundfile.read(io.BytesIO(data), dtype="int16")
        assert rate == RATE == 8000
        assert np.array_equal(read, samples)
        assert np.abs(samples).max() > 2000
        assert len(samples) <= RATE
        assert len(data) < 8000
        assert encode_flac(tune(scene(0, index))) == data
