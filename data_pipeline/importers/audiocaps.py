"""AudioCaps (Kim et al. 2019): captions of ten-second sounds of YouTube videos.

Source, as github.com/cdjkim/audiocaps has the tables, with the sounds that somebody downloaded:
  train.csv, val.csv, test.csv    audiocap_id,youtube_id,start_time,caption; here or in dataset/
  the sounds                      in train/, val/, test/, or together, in SOURCE or its audio/, audios/, wav/ or wavs/

Design choices:
- The tables name no files, and downloaders name them differently. Known are, with any extension of a sound: the YouTube
  id alone, with a "Y" before it, with the start time behind it, or with start and end, in seconds or, as AudioSet has
  them, in milliseconds; and the id of the caption.
- Rows about the same ten seconds are one sample with several captions: val and test have five each.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Unpack

from data_pipeline.importers.annotations import rows
from data_pipeline.importers.gather import Gathered, Options, find_annotations, part_of, run_import
from data_pipeline.importers.sound import SOUND_EXTENSIONS, read_sound
from data_pipeline.importers.split import Imported

COLUMNS = ["audiocap_id", "youtube_id", "start_time", "caption"]
TOGETHER = ("", "audio", "audios", "wav", "wavs")
SECONDS = 10  # the length of a clip


def import_audiocaps(source: Path, out: Path, **options: Unpack[Options]) -> Imported:
    """Write the captioned sounds of `source` into out/train, out/val and out/test.

    `options` and errors: see `gather.Options` and `gather.run_import`.
    """
    return run_import("audiocaps", source, out, options, gather_audiocaps, read_sound, "sound")


def gather_audiocaps(source: Path, found: Gathered) -> None:
    """Every sound with a caption."""
    found.source = "AudioCaps"
    names = ["train.csv", "val.csv", "test.csv"]
    files = find_annotations(source, names, [".", "dataset", "dataset2.0"], "train.csv, val.csv and test.csv")
    root = source.parent if source.is_file() else source
    for path in files:
        _gather_set(path, root if found.media is None else found.media, found)


def _gather_set(path: Path, root: Path, found: Gathered) -> None:
    """The sounds of one table."""
    part = part_of(path.name)
    sounds = _sounds(root, path.stem)
    clips: dict[tuple[str, str], list[tuple[str, str]]] = {}  # (video, start) -> (id, caption) of its rows
    for _, row in rows(path, COLUMNS, found.skip):
        clip = (row["youtube_id"].strip(), row["start_time"].strip())
        clips.setdefault(clip, []).append((row["audiocap_id"].strip(), row["caption"]))
    for (video, start), said in clips.items():
        stem = next((stem for stem in _stems(video, start, [each for each, _ in said]) if stem in sounds), None)
        if stem is None:
            found.skip(f"{path.stem}: {video} at {start} s", "the sound file is missing")
        else:
            name = sounds[stem].relative_to(root).as_posix()
            captions = [caption for _, caption in said]
            found.add(name, sounds[stem], captions, id=said[0][0], part=part, video=video, start=start)


def _sounds(root: Path, part: str) -> dict[str, Path]:
    """The sound files of a set by their names without extension; those in a folder of the set's own go first."""
    sounds: dict[str, Path] = {}
    folders = [root / parent / part for parent in TOGETHER] + [root / parent for parent in TOGETHER]
    for folder in filter(Path.is_dir, folders):
        for name in sorted(os.listdir(folder)):
            if name.lower().endswith(SOUND_EXTENSIONS):
                sounds.setdefault(os.path.splitext(name)[0], folder / name)
    return sounds


def _stems(video: str, start: str, ids: list[str]) -> Iterator[str]:
    """What the file of a clip may be called, without its extension, the most exact first."""
    ends = []
    if re.fullmatch("[0-9]{1,9}", start):
        first, last = int(start), int(start) + SECONDS
        ends = [f"_{first * 1000}_{last * 1000}", f"_{first}_{last}", f"_{first}.000_{last}.000"]
    for end in (*ends, f"_{start}", ""):
        yield video + end
        yield f"Y{video}{end}"
    yield from ids
