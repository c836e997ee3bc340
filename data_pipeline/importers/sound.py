"""Name a sound by its bytes, refuse what cannot be read, and make FLAC of what a shard does not hold.

Design choices:
- FLAC, WAV and OGG are stored as they are; the header is read, and `weft data check` decodes it all.
- Anything else that libsndfile reads, such as MP3, is decoded and stored as FLAC, and so is a part of a longer file.
- FLAC holds integers: 16 bits of sound that was lossy or 16 bits deep, else 24, which no microphone fills.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, NamedTuple

from data_pipeline.errors import DataError
from data_pipeline.importers.split import Candidate

FIELD_OF_FORMAT = {"FLAC": "flac", "WAV": "wav", "WAVEX": "wav", "OGG": "ogg"}
SOUND_EXTENSIONS = (".flac", ".wav", ".ogg", ".mp3", ".opus")
DEEP = ("PCM_24", "PCM_32", "FLOAT", "DOUBLE")
NO_SOUND = "not a sound that can be read, or damaged"


class Stretch(NamedTuple):
    """A part of a sound file: from `start`, `length` long (None: to the end), both in seconds."""

    path: Path
    start: float
    length: float | None


def read_sound(candidate: Candidate) -> dict[str, bytes]:
    """The sound at `candidate.place`, a file or a `Stretch` of one, named by what it is."""
    place: Path | Stretch = candidate.place
    if isinstance(place, Stretch):
        return {"flac": _cut(place)}
    return sound_field(place.read_bytes())


def sound_field(data: bytes) -> dict[str, bytes]:
    """{"flac" | "wav" | "ogg": data}, whatever the file was called; {"flac": the same sound} of another format.

    Raises DataError when it is empty or cannot be read.
    """
    if not data:
        raise DataError("the sound file is empty")
    soundfile, errors = _soundfile()
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            if file.frames == 0:
                raise DataError("the sound file holds no sound")
            if file.format in FIELD_OF_FORMAT:
                return {FIELD_OF_FORMAT[file.format]: data}
            return {"flac": _flac(soundfile, file, -1)}
    except errors as error:
        raise DataError(NO_SOUND) from error


def _cut(place: Stretch) -> bytes:
    """A stretch of a sound file as FLAC; DataError when the file ends before it begins."""
    soundfile, errors = _soundfile()
    with place.path.open("rb") as opened:
        try:
            with soundfile.SoundFile(opened) as file:
                start = round(place.start * file.samplerate)
                if start >= file.frames:
                    seconds = file.frames / file.samplerate
                    raise DataError(f"begins at {place.start:g} s of a sound of {seconds:g} s")
                file.seek(start)
                return _flac(soundfile, file, -1 if place.length is None else round(place.length * file.samplerate))
        except errors as error:
            raise DataError(NO_SOUND) from error


def _flac(soundfile: Any, file: Any, frames: int) -> bytes:
    """The next `frames` of an open sound (-1: all) as FLAC."""
    samples = file.read(frames, dtype="int32", always_2d=True)
    if not len(samples):
        raise DataError("the sound is empty there")
    buffer = io.BytesIO()
    kind = "PCM_24" if file.subtype in DEEP else "PCM_16"
    soundfile.write(buffer, samples, file.samplerate, format="FLAC", subtype=kind)
    return buffer.getvalue()


def _soundfile() -> tuple[Any, tuple[type[Exception], ...]]:
    """The module, which loads libsndfile that only sound needs, and what it raises for bad bytes."""
    import soundfile

    return soundfile, (soundfile.LibsndfileError, RuntimeError, TypeError)
