"""Real pictures with captions and speech: the rubber stamps of Tux Paint, from Debian's tuxpaint-stamps-default.

Photographs and drawings of animals, food, plants, vehicles and more, GPL-2 or later; fetched, never bundled (161 MB).

The package, as it is (2022.06.04): under usr/share/tuxpaint/stamps/CATEGORY/.../ a stamp is NAME.png or NAME.svg with
  NAME.txt                    first line English; then "LANGUAGE.utf8=CAPTION" lines, one a language
  NAME_desc.ogg               the caption spoken in English, NAME_desc_LANGUAGE.ogg (a few .wav) in another
  NAME_mirror.png             the same thing seen from its other side: it has the texts and speech of NAME
  NAME.ogg, NAME.dat          a sound effect and drawing hints: not taken

Design choices:
- `apt-get download` and `dpkg-deb` need no root and check what they fetch. The .deb is kept in the user's cache, where
  it appears whole or not at all; unpacked files live beside OUT, on the disk that has room, while importing.
- Captions are those of one language, the plain one first and then its regional variants (en_GB) where they differ.
- One stamp of a name: the PNG where there is one, else the SVG, drawn by `cairosvg` if that is installed.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from data_pipeline.errors import DataError
from data_pipeline.importers.annotations import lines_of
from data_pipeline.importers.image import image_field
from data_pipeline.importers.split import Candidate, Imported, Provenance, Request, refuse_existing, write_split
from data_pipeline.sample import Skipped
from data_pipeline.shards import Progress

PACKAGE = "tuxpaint-stamps-default"
LICENCE = "GPL-2+"
STAMPS = Path("usr/share/tuxpaint/stamps")
SVG_WIDTH = 384  # pixels; about what the PNG stamps have
SPEECH_EXTENSIONS = (".ogg", ".wav")
BY_HAND = f"download {PACKAGE} from a Debian mirror and give the .deb as the package"


def import_tuxpaint(
    out: Path,
    *,
    language: str = "en",
    test_share: float = 0.2,
    seed: int = 0,
    package: Path | None = None,
    sound: bool = True,
    processes: int | None = None,
    on: str | None = None,
    progress: Progress | None = None,
) -> Imported:
    """Write the stamps with captions, and with `sound` speech, in `language` into out/train and out/test.

    `package` is a .deb at hand, to be used instead of downloading one. Raises ValueError when `out` holds a data set or
    no caption is in `language`, FileNotFoundError when a tool or the package is missing, OSError when the download
    fails, DataError when the package holds something else.
    """
    request = Request.of(
        "tuxpaint", package or Path(PACKAGE), language=language, test_share=test_share, seed=seed, sound=sound
    )
    refuse_existing(out, request)
    _require("dpkg-deb")
    if package is None:
        package = _cached_package() or _download_package()
    if not package.is_file():
        raise FileNotFoundError(f"there is no package {package}")
    version = _version(package)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.stamps-", dir=out.parent) as unpacked:
        _run(["dpkg-deb", "--extract", str(package.absolute()), unpacked], DataError, f"{package} cannot be unpacked")
        stamps = Path(unpacked) / STAMPS
        if not stamps.is_dir():
            raise DataError(f"{package} has no {STAMPS}: it is not {PACKAGE}")
        candidates, skipped = _find_stamps(stamps, language, sound, f"{PACKAGE} {version}")
        return write_split(
            out,
            candidates,
            read_stamp,
            skipped=skipped,
            test_share=test_share,
            seed=seed,
            request=request,
            processes=processes,
            on=on,
            reads=[stamps],
            progress=progress,
        )


class Place(NamedTuple):
    """Where a stamp's bytes are."""

    image: Path
    speech: Path | None


def read_stamp(candidate: Candidate) -> dict[str, bytes]:
    """The picture, and the spoken caption where there is one; DataError for what cannot be drawn."""
    place: Place = candidate.place
    data = place.image.read_bytes()
    fields = image_field(_draw_svg(data) if place.image.suffix.lower() == ".svg" else data)
    if place.speech is not None:
        fields[place.speech.suffix[1:].lower()] = place.speech.read_bytes()
    return fields


def read_captions(text: bytes) -> dict[str, str]:
    """language -> caption of a stamp's .txt; "en" is its first line. DataError when it is not UTF-8."""
    try:
        lines = lines_of(text.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError("its .txt is not UTF-8") from error
    captions = {"en": lines[0].strip()} if lines else {}
    for line in lines[1:]:
        language, mark, caption = line.partition(".utf8=")
        if mark and language != "en":
            captions[language.strip()] = caption.strip()
    return {language: caption for language, caption in captions.items() if caption}


def _find_stamps(stamps: Path, language: str, sound: bool, source: str) -> tuple[list[Candidate], list[Skipped]]:
    """Every stamp with a caption in `language`, by path; and what was left out."""
    candidates, skipped = [], []
    languages: set[str] = set()
    pictures = _pictures(stamps)
    for image in pictures:
        name = image.relative_to(stamps).as_posix()
        if image.suffix.lower() == ".svg" and image.with_suffix(".png") in pictures:
            skipped.append(Skipped(name, "an SVG whose PNG is taken"))
            continue
        if image.suffix.lower() == ".svg" and _rasteriser() is None:
            skipped.append(Skipped(name, "an SVG, and cairosvg is not installed to draw it"))
            continue
        stem = image.with_suffix("")
        if not stem.with_suffix(".txt").is_file():
            stem = stem.with_name(stem.name.removesuffix("_mirror"))
        try:
            by_language = read_captions(stem.with_suffix(".txt").read_bytes())
        except FileNotFoundError:
            skipped.append(Skipped(name, "has no .txt"))
            continue
        except DataError as error:
            skipped.append(Skipped(name, str(error)))
            continue
        languages.update(by_language)
        captions = _captions_in(by_language, language)
        if not captions:
            skipped.append(Skipped(name, f"has no caption in the language {language!r}"))
            continue
        metadata = {"language": language, "label": name.split("/")[0]}
        speech = _find_speech(stem, language) if sound else None
        provenance = Provenance(source, LICENCE, name)
        candidates.append(Candidate(name, captions, Place(image, speech), metadata, provenance=provenance))
    if not candidates:
        raise _nothing_found(skipped, languages, language)
    return candidates, skipped


def _pictures(stamps: Path) -> dict[Path, None]:
    """Every PNG and SVG in order of path, as an ordered set; links are not followed out of the package."""
    files = (path for path in stamps.rglob("*") if path.suffix.lower() in (".png", ".svg"))
    return dict.fromkeys(sorted(path for path in files if path.is_file() and not path.is_symlink()))


def _captions_in(by_language: dict[str, str], language: str) -> tuple[str, ...]:
    """The caption in `language`, then its regional variants that differ; () when it has none."""
    if language not in by_language:
        return ()
    variants = (by_language[other] for other in sorted(by_language) if re.match(rf"{re.escape(language)}[_@]", other))
    return tuple(dict.fromkeys([by_language[language], *variants]))


def _find_speech(stem: Path, language: str) -> Path | None:
    """The file in which the caption of a stamp is spoken."""
    name = f"{stem.name}_desc" + ("" if language == "en" else f"_{language}")
    files = (stem.with_name(name + extension) for extension in SPEECH_EXTENSIONS)
    return next((file for file in files if file.is_file() and not file.is_symlink()), None)


def _nothing_found(skipped: list[Skipped], languages: set[str], language: str) -> ValueError:
    if languages:
        return ValueError(
            f"no stamp has a caption in the language {language!r}: there are {', '.join(sorted(languages))}"
        )
    why = f"; the first, {skipped[0].source}: {skipped[0].reason}" if skipped else ""
    return DataError(f"the package holds no stamp with a caption{why}")


def _draw_svg(data: bytes) -> bytes:
    """An SVG as PNG; DataError where it cannot be drawn."""
    rasteriser = _rasteriser()
    assert rasteriser is not None  # else the SVG would not have been listed
    try:
        png: bytes = rasteriser(bytestring=data, output_width=SVG_WIDTH)
    except Exception as error:  # an SVG is a program in XML: anything can be wrong in it
        raise DataError("an SVG that cairosvg cannot draw") from error
    return png


@lru_cache
def _rasteriser() -> Any | None:
    try:
        from cairosvg import svg2png
    except (ImportError, OSError):  # OSError: the package is there and the C library is not
        return None
    return svg2png


def _cache() -> Path:
    """Where downloads are kept, as the XDG base directory specification has it."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "weft"


def _cached_package() -> Path | None:
    """The package downloaded last, if any."""
    kept = sorted(_cache().glob(f"{PACKAGE}_*.deb"), key=lambda path: (path.stat().st_mtime, path.name))
    return kept[-1] if kept else None


def _download_package() -> Path:
    """Fetch the package into the cache; OSError with apt's own words when that fails."""
    if shutil.which("apt-get") is None:
        raise FileNotFoundError(f"apt-get is not on this machine, so {PACKAGE} cannot be fetched: {BY_HAND}")
    cache = _cache()
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".download-", dir=cache) as unfinished:
        _run(
            ["apt-get", "download", "--quiet", "-o", "APT::Sandbox::User=root", PACKAGE],
            OSError,
            f"{PACKAGE} could not be downloaded: refresh the package lists (`apt-get update`, as root), or {BY_HAND}",
            folder=unfinished,
        )
        fetched = next(Path(unfinished).glob("*.deb"), None)
        if fetched is None:
            raise OSError(f"apt-get fetched no {PACKAGE}: {BY_HAND}")
        return fetched.replace(cache / fetched.name)


def _version(package: Path) -> str:
    """The version of a Debian package; DataError when it is none."""
    command = ["dpkg-deb", "--field", str(package.absolute()), "Version"]
    return _run(command, DataError, f"{package} is no Debian package").strip()


def _require(tool: str) -> None:
    if shutil.which(tool) is None:
        raise FileNotFoundError(f"{tool} is not on this machine: Debian packages are read with it, so install dpkg")


def _run(command: list[str], failure: type[Exception], sentence: str, folder: str | None = None) -> str:
    """What a command prints; `failure` with `sentence` and the command's last complaint when it does not exit 0."""
    english = {**os.environ, "LC_ALL": "C.UTF-8"}
    done = subprocess.run(
        command, capture_output=True, text=True, errors="replace", env=english, cwd=folder, check=False
    )
    if done.returncode != 0:
        complaint = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise failure(f"{sentence} ({complaint})")
    return done.stdout
