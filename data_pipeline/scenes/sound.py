"""The same scene as a tune: a code from scenes to short sounds, different for every scene.

The code. Each thing is one note; a kind is its notes; two kinds have the relation's motif between them, the first
kind first.
    count    how many notes
    colour   pitch: eight steps of the minor pentatonic scale from A3 (red) up to D5 (white)
    shape    timbre: the strength of the first six harmonics
    size     small = short and soft, large = long and loud
    texture  solid = steady, striped = trembling, dotted = chopped, checkered = every other beat an octave lower
    relation left of = two high clicks, above = a glide down, inside = a low hum

Design choices:
- A sound is a pure function of the scene, and no two scenes share one: notes differ in length or wave, are set apart by
  silence, and no motif is a note.
- There are 512 different notes, so each is made once a process and a tune is a concatenation. What is left is the
  cost of FLAC, which its least effort level keeps low.
- 8 kHz mono, under a second, and nine bits deep in a file of sixteen: FLAC drops the empty bits, which halves
  the size, and every player reads it.
"""

from __future__ import annotations

import io
from functools import cache

import numpy as np
import soundfile

from data_pipeline.scenes.world import COLOURS, SHAPES, Kind, Scene

Array = np.ndarray
RATE = 8000  # samples a second

_STEPS = (0, 3, 5, 7, 10, 12, 15, 17)  # semitones over A3, one a colour
_HARMONICS = (  # strengths of harmonics 1 to 6, one row a shape; the first is never missing, so pitch stays pitch
    (1.0, 0.0, 0.0, 0.0, 0.0, 0.0),  # circle: pure
    (1.0, 0.0, 0.8, 0.0, 0.6, 0.0),  # square: odd
    (1.0, 0.9, 0.0, 0.0, 0.0, 0.0),  # triangle
    (0.5, 0.3, 0.3, 0.4, 0.6, 0.9),  # star: bright
    (0.6, 0.0, 0.0, 1.0, 0.0, 0.0),  # ring: hollow
    (1.0, 0.8, 0.7, 0.6, 0.5, 0.4),  # cross: buzzing
    (0.8, 1.0, 0.6, 0.0, 0.0, 0.0),  # heart: warm
    (0.7, 0.0, 0.0, 0.0, 0.8, 0.8),  # moon: glassy
)
_SECONDS = {"small": 0.08, "large": 0.13}
_LOUDNESS = {"small": 0.35, "large": 0.8}
_GAP = np.zeros(int(0.02 * RATE), dtype=np.int16)
_BEAT = 25.0  # of the textures, per second
_STEP = 128  # of loudness


def tune(scene: Scene) -> Array:
    """The sound of a scene, int16 [samples] at `RATE`."""
    parts = list(_notes(scene.kinds[0]))
    for kind in scene.kinds[1:]:
        parts += [_motif(scene.relation or ""), _GAP, *_notes(kind)]
    return np.concatenate(parts)


def encode_flac(samples: Array) -> bytes:
    """int16 [samples] at `RATE` -> FLAC."""
    buffer = io.BytesIO()
    with soundfile.SoundFile(buffer, "w", RATE, 1, "PCM_16", format="FLAC", compression_level=0.0) as file:
        file.buffer_write(samples, "int16")
    return buffer.getvalue()


def _notes(kind: Kind) -> list[Array]:
    """A note and a rest for each thing."""
    return [_note(kind.colour, kind.shape, kind.texture, kind.size), _GAP] * kind.count


@cache
def _note(colour: str, shape: str, texture: str, size: str) -> Array:
    """One thing, int16."""
    time = _times(_SECONDS[size])
    pitch = 220.0 * 2 ** (_STEPS[COLOURS.index(colour)] / 12)
    strengths = np.array(_HARMONICS[SHAPES.index(shape)])
    strengths /= strengths.sum()
    beat = time * _BEAT % 1
    if texture == "checkered":
        phase = 2 * np.pi * np.cumsum(np.where(beat < 0.5, pitch, pitch / 2)) / RATE
    else:
        phase = 2 * np.pi * pitch * time
    wave = strengths @ np.sin(np.arange(1, 7)[:, None] * phase)
    if texture == "striped":
        wave = wave * (0.55 - 0.45 * np.cos(2 * np.pi * beat))
    elif texture == "dotted":
        wave = wave * (time * 2 * _BEAT % 1 < 0.5)
    return _as_int16(_LOUDNESS[size] * wave)


@cache
def _motif(relation: str) -> Array:
    """What stands between the two kinds, int16."""
    time = _times(0.1)
    if relation == "left of":
        wave = np.sin(2 * np.pi * 3000 * time) * (time % 0.05 < 0.012)
    elif relation == "above":
        wave = np.sin(2 * np.pi * np.cumsum(3000 - 24000 * time) / RATE)
    else:
        wave = np.sin(2 * np.pi * 90 * time)
    return _as_int16(0.5 * wave)


def _times(seconds: float) -> Array:
    return np.arange(round(seconds * RATE)) / RATE


def _as_int16(wave: Array) -> Array:
    """Fade both ends, so that no note clicks, and scale to 16 bits of which the low ones are zero."""
    ramp = np.arange(len(wave))
    fade = np.minimum(1, np.minimum(ramp, ramp[::-1]) / 40)
    return (np.round(wave * fade * 32000 / _STEP) * _STEP).astype(np.int16)
