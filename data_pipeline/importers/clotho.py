"""Clotho (Drossos et al. 2020, "Clotho: an Audio Captioning Dataset"): sounds of 15 to 30 seconds, five captions each.

Source, as zenodo.org/records/4783391 has it (the tables and the folders here, or in clotho_csv_files/ and
clotho_audio_files/; a folder may be called clotho_audio_development too):
  clotho_captions_development.csv    file_name,caption_1,...,caption_5
  clotho_metadata_development.csv    file_name,keywords,...,license: where it is there, it tells the licences
  development/*.wav                  and the same for validation and evaluation

Design choices:
- development is OUT/train, validation OUT/val and evaluation OUT/test.
- The metadata tables are not UTF-8 throughout, so they are read as Latin-1: only names and licences are taken.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Unpack

from data_pipeline.importers.annotations import rows
from data_pipeline.importers.gather import Gathered, Options, find_annotations, run_import
from data_pipeline.importers.sound import read_sound
from data_pipeline.importers.split import Imported

PARTS = {"development": "train", "validation": "val", "evaluation": "test"}
FILES = "clotho_captions_*.csv"
CAPTIONS = [f"caption_{number}" for number in range(1, 6)]


def import_clotho(source: Path, out: Path, **options: Unpack[Options]) -> Imported:
    """Write the captioned sounds of `source` into out/train, out/val and out/test.

    `options` and errors: see `gather.Options` and `gather.run_import`.
    """
    return run_import("clotho", source, out, options, gather_clotho, read_sound, "sound")


def gather_clotho(source: Path, found: Gathered) -> None:
    """Every sound with captions."""
    found.source = "Clotho"
    files = find_annotations(source, [FILES], [".", "clotho_csv_files"], f"{FILES} and the sounds")
    root = source.parent if source.is_file() else source
    for path in files:
        match = re.fullmatch(r"clotho_captions_([a-z]+)\.csv", path.name)
        if not match or match[1] not in PARTS:
            found.skip(path.name, f"is of none of the sets {', '.join(PARTS)}")
            continue
        name = match[1]
        folder = found.folder(*(
            parent / called
            for parent in (root, root / "clotho_audio_files")
            for called in (name, f"clotho_audio_{name}", f"clotho_audio_{name}/{name}")
            if any((parent / called).glob("*.wav"))
        ), root / name)  # fmt: skip
        licences = _licences(path.with_name(f"clotho_metadata_{name}.csv"), found)
        for _, row in rows(path, ["file_name", *CAPTIONS], found.skip):
            sound = row["file_name"]
            file = found.file(sound, folder, f"{name}/{sound}")
            if file is not None:
                captions = [row[column] for column in CAPTIONS]
                licence = licences.get(sound)
                found.add(f"{name}/{sound}", file, captions, id=sound, part=PARTS[name], licence=licence)


def _licences(path: Path, found: Gathered) -> dict[str, str]:
    """The licence of each sound, where there is a table that tells."""
    if not path.is_file():
        return {}
    table = rows(path, ["file_name", "license"], found.skip, encoding="latin-1")
    return {row["file_name"]: row["license"] for _, row in table}
