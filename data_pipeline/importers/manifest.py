"""Speech listed in manifests: JSON lines as NeMo has them, or the tables of Common Voice.

Source, one manifest or a folder of them:
  *.jsonl, *.json    a line {"audio_filepath", "text", "duration"?, "offset"?, ...}; paths relative to the manifest
  *.tsv              Common Voice: client_id, path, sentence, ...; paths in clips/

Design choices:
- Of a folder, the manifests whose names begin with train, dev (or val) and test are the sets; a manifest alone is split
  by transcript and, where it names speakers, by speaker.
- "offset" makes a stretch of a longer file, of "duration" seconds, which is cut out and stored as FLAC. Without it a
  file is stored whole, and as it is.
- Absolute paths, which NeMo's scripts write, must lie in the manifest's folder or in the folder given as `media`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple, Unpack

from data_pipeline.importers.annotations import BadRowError, json_lines, need, rows
from data_pipeline.importers.gather import Gathered, Options, part_of, run_import
from data_pipeline.importers.sound import Stretch, read_sound
from data_pipeline.importers.split import Imported

EXTENSIONS = (".jsonl", ".json", ".tsv")
LONGEST = 1e7  # seconds: no recording is four months long
SPEAKERS = ("speaker", "speaker_id", "client_id")  # what manifests call who is heard


class Line(NamedTuple):
    """A line of a manifest: a sound or, with a start, a stretch of one; what is said in it, and by whom."""

    path: str
    text: str
    speaker: str | None = None
    language: str | None = None
    start: float | None = None
    length: float | None = None


def import_manifest(source: Path, out: Path, **options: Unpack[Options]) -> Imported:
    """Write the utterances that the manifests of `source` list into out/train, out/val and out/test.

    `options` and errors: see `gather.Options` and `gather.run_import`.
    """
    return run_import("manifest", source, out, options, gather_manifests, read_sound, "sound")


def gather_manifests(source: Path, found: Gathered) -> None:
    """Every utterance with a transcript."""
    found.source = source.absolute().name
    for path, part in _manifests(source).items():
        table = path.suffix.lower() == ".tsv"
        if found.media is not None:
            folder = found.media
        else:
            folder = path.parent / "clips" if table else path.parent
        if table:
            for _, row in rows(path, ["path", "sentence"], found.skip, delimiter="\t", quoted=False):
                _take(_common_voice(row), part, folder, found)
        else:
            for where, record in json_lines(path, found.skip):
                with found.skipping():
                    _take(_nemo(record, where), part, folder, found)


def _take(line: Line, part: str | None, folder: Path, found: Gathered) -> None:
    file = found.file(line.path, folder)
    if file is None:
        return
    name, place = Path(os.path.relpath(file, os.path.normpath(folder.absolute()))).as_posix(), file
    bonds = [f"speaker {line.speaker}"] if line.speaker else []
    told = {"speaker": line.speaker, "language": line.language}
    if line.start is None:
        found.add(name, place, [line.text], id=name, spoken=True, part=part, bonds=bonds, **told)
        return
    stem, extension = os.path.splitext(name)
    name = f"{stem}-{round(line.start * 1000):08d}{extension}"
    stretch = Stretch(place, line.start, line.length)
    start, seconds = line.start, line.length
    found.add(
        name, stretch, [line.text], id=name, spoken=True, part=part, bonds=bonds, start=start, seconds=seconds, **told
    )


def _manifests(source: Path) -> dict[Path, str | None]:
    """Each manifest and the set it is: `source` itself, which is none, or those in a folder that are one."""
    if source.is_file():
        if source.suffix.lower() not in EXTENSIONS:
            raise ValueError(f"{source} is no manifest by its name: give one that ends in {', '.join(EXTENSIONS)}")
        return {source: None}
    files = sorted(path for path in source.iterdir() if path.suffix.lower() in EXTENSIONS)
    manifests: dict[Path, str | None] = {path: part for path in files if (part := part_of(path.name))}
    if not manifests:
        there = f"; there are {', '.join(path.name for path in files)}: give one of them" if files else ""
        raise FileNotFoundError(f"no train*, dev* or test* of {', '.join(EXTENSIONS)} in {source}{there}")
    return manifests


def _nemo(record: dict[str, Any], where: str) -> Line:
    start = _seconds(record, "offset", where)
    length = _seconds(record, "duration", where) if start is not None else None
    if length == 0:
        raise BadRowError(where, "'duration' is 0, of which nothing can be heard")
    speaker = next((record[name] for name in SPEAKERS if record.get(name) is not None), None)
    language = record.get("lang", record.get("language"))
    return Line(
        need(record, "audio_filepath", str, where),
        need(record, "text", str, where) if "text" in record else "",
        None if speaker is None else str(speaker),
        language if isinstance(language, str) else None,
        start,
        length,
    )


def _seconds(record: dict[str, Any], name: str, where: str) -> float | None:
    """A time in a manifest; None where it says none."""
    if record.get(name) is None:
        return None
    seconds = need(record, name, float, where)
    if not 0 <= seconds < LONGEST:
        raise BadRowError(where, f"{name!r} is {seconds}, which is no time in a sound")
    return seconds


def _common_voice(row: dict[str, str]) -> Line:
    return Line(row["path"], row["sentence"], row.get("client_id") or None, row.get("locale") or None)
