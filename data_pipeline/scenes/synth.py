"""The scene world as a data set: OUT/train and OUT/test, from a seed.

Design choices:
- Sample i is a pure function of (seed, i), so any number of processes writes the same bytes.
- The test split holds only scenes with a combination of colour and shape that training never shows, chosen so
  that the description of one is not true of another.
- Fields: jpg (4:4:4, so that small coloured things keep their colours), txt (the first caption), json, and flac with
  sound. The json object: captions, label, qa, choice, scene (what is in the picture, as data), source, licence.
- Both splits or neither: a failure in the second takes the first away again.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import simplejpeg

from data_pipeline.sample import Sample
from data_pipeline.scenes.dice import Dice, stream
from data_pipeline.scenes.draw import SMALLEST_SIZE, draw
from data_pipeline.scenes.questions import multiple_choice, questions
from data_pipeline.scenes.words import captions
from data_pipeline.scenes.world import Scene, held_out_scenes, scene
from data_pipeline.shards import Progress, Written, write_shards

SOURCE = "weft scenes"
LICENCE = "CC0-1.0"
_JPEG_QUALITY = 95


@dataclass(frozen=True)
class SceneMaker:
    """Makes sample `index` of one split; picklable and pure, as `write_shards` asks.

    `chosen`: the scenes of the test split; None for the train split, whose scenes follow from seed and index.
    """

    seed: int
    size: int
    sound: bool
    chosen: tuple[Scene, ...] | None = None

    def __call__(self, index: int) -> Sample:
        """Picture, words and sound of one scene."""
        split = "train" if self.chosen is None else "test"
        shown = scene(self.seed, index) if self.chosen is None else self.chosen[index]
        picture = draw(shown, stream(self.seed, f"{split} look", index), self.size)
        dice = Dice(stream(self.seed, f"{split} words", index))
        told = captions(shown, dice)
        metadata = {
            "captions": told,
            "label": shown.label,
            "qa": questions(shown, dice),
            "choice": [multiple_choice(shown, dice)],
            "scene": {"kinds": [vars(kind) for kind in shown.kinds], "relation": shown.relation},
            "source": SOURCE,
            "licence": LICENCE,
        }
        fields = {
            "jpg": simplejpeg.encode_jpeg(picture, quality=_JPEG_QUALITY, colorsubsampling="444"),
            "txt": told[0].encode(),
            "json": json.dumps(metadata).encode(),
        }
        if self.sound:
            from data_pipeline.scenes.sound import encode_flac, tune  # loads libsndfile

            fields["flac"] = encode_flac(tune(shown))
        return Sample(f"scene-{split}-{index:08d}", fields)


def synthesise(
    out: Path,
    *,
    train: int = 16384,
    test: int = 1024,
    seed: int = 0,
    size: int = 64,
    sound: bool = True,
    processes: int | None = None,
    progress: Progress | None = None,
) -> tuple[Written, Written]:
    """Write `train` and `test` scenes of `size` x `size` pixels to OUT/train and OUT/test.

    `progress(done, total)` counts samples of both. Raises ValueError, before any work, when a folder holds something or
    a number cannot be right; OSError when the disk is full. Nothing stays behind then.
    """
    out = Path(out)
    folders = {name: out / name for name in ("train", "test")}
    _refuse_impossible(out, folders, train, test, seed, size)
    makers = {
        "train": SceneMaker(seed, size, sound),
        "test": SceneMaker(seed, size, sound, held_out_scenes(seed, test)),
    }
    written: dict[str, Written] = {}
    was_there = out.exists()
    before = 0
    for name, count in (("test", test), ("train", train)):
        report = None if progress is None else _Shifted(progress, before, train + test)
        try:
            written[name] = write_shards(count, makers[name], folders[name], processes=processes, progress=report)
        except BaseException:
            for finished in written:
                shutil.rmtree(folders[finished], ignore_errors=True)
            if not was_there:
                shutil.rmtree(out, ignore_errors=True)
            raise
        before += count
    return written["train"], written["test"]


@dataclass(frozen=True)
class _Shifted:
    """Progress of one split as progress of both."""

    progress: Progress
    before: int
    total: int

    def __call__(self, done: int, _: int) -> None:
        self.progress(self.before + done, self.total)


def _refuse_impossible(out: Path, folders: dict[str, Path], train: int, test: int, seed: int, size: int) -> None:
    """ValueError for a request that cannot be met."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: give a folder, new or without train and test")
    for name, folder in folders.items():
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ValueError(f"{folder} is there already and holds the {name} split of something: give a new folder")
    for name, count in (("train", train), ("test", test)):
        if count < 1:
            raise ValueError(f"{count} {name} samples were asked for: give 1 or more")
    if seed < 0:
        raise ValueError(f"seed is {seed}: give 0 or more")
    if size < SMALLEST_SIZE:
        raise ValueError(f"size is {size} pixels, but textures need at least {SMALLEST_SIZE}")
