"""Speech in folders by speaker and chapter, as LibriSpeech has it (Panayotov et al. 2015), with transcripts beside it.

Source: the folder LibriSpeech/, or any part of it, or another corpus of the same form:
  train-clean-100/84/121123/84-121123-0000.flac          (or .wav, .ogg, .mp3, .opus)
  train-clean-100/84/121123/84-121123.trans.txt          lines of "84-121123-0000 GO DO YOU HEAR"

Design choices:
- A folder whose name begins with train, dev or test says which set it is: OUT/train, OUT/val (dev) and OUT/test.
- Where no folder does, the split is by transcript and by speaker: nobody is heard on both sides.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Unpack

from data_pipeline.importers.annotations import read_lines
from data_pipeline.importers.gather import Gathered, Options, part_of, run_import
from data_pipeline.importers.sound import SOUND_EXTENSIONS, read_sound
from data_pipeline.importers.split import Imported

TRANSCRIPTS = ".trans.txt"


def import_librispeech(source: Path, out: Path, **options: Unpack[Options]) -> Imported:
    """Write the utterances of `source` into out/train, out/val and out/test.

    `options` and errors: see `gather.Options` and `gather.run_import`.
    """
    return run_import("librispeech", source, out, options, gather_librispeech, read_sound, "sound")


def gather_librispeech(source: Path, found: Gathered) -> None:
    """Every sound with a line in the transcripts beside it."""
    source = source.absolute()
    found.source = source.name
    transcripts = sorted(source.rglob(f"*{TRANSCRIPTS}"))
    if not transcripts:
        raise FileNotFoundError(f"no *{TRANSCRIPTS} below {source}: give a folder with SPEAKER/CHAPTER/*{TRANSCRIPTS}")
    parts = {path: _part(path, source) for path in transcripts}
    for path, part in parts.items():
        if part is None and any(parts.values()):
            name = path.relative_to(source).as_posix()
            found.skip(name, "lies in no folder of train, dev or test, as others here do")
        else:
            _gather_chapter(path, part, source, found)


def _gather_chapter(path: Path, part: str | None, source: Path, found: Gathered) -> None:
    """The utterances of one chapter, and the sounds that nobody wrote down."""
    chapter = path.parent
    below = chapter.relative_to(source).as_posix()
    speaker, number = chapter.parent.name, chapter.name
    heard = {name for name in os.listdir(chapter) if name.lower().endswith(SOUND_EXTENSIONS)}
    for line in read_lines(path):
        utterance, _, text = line.strip().partition(" ")
        if not utterance:
            continue
        names = [utterance + extension for extension in SOUND_EXTENSIONS]
        written = next((name for name in names if name in heard), names[0])
        name = f"{below}/{written}"
        heard.discard(written)
        file = found.file(written, chapter, name)
        if file is not None:
            found.add(
                name, file, [text], id=utterance, spoken=True, part=part, bonds=[f"speaker {speaker}"],
                speaker=speaker, chapter=number,
            )  # fmt: skip
    for name in sorted(heard):
        found.skip(f"{below}/{name}", f"has no line in {path.name}")
        found.named.add(chapter / name)  # told already


def _part(path: Path, source: Path) -> str | None:
    """The set of a transcript, by the outermost folder that names one, `source` itself included."""
    folders = path.relative_to(source.parent).parts[:-1]
    return next((part for part in map(part_of, folders) if part), None)
