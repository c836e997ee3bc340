"""The Tux Paint importer, on a small package in the true layout, and on the true one where it is in the cache."""

import io
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import soundfile

from data_pipeline.decode import decode_image
from data_pipeline.errors import DataError
from data_pipeline.importers import tuxpaint
from data_pipeline.importers.tuxpaint import import_tuxpaint, read_captions

needs_dpkg = pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="dpkg-deb is not installed")
SVG = b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>'
FROG = "A frog.\nde.utf8=Ein Frosch.\nen_AU.utf8=A frog.\nen_GB.utf8=A British frog.\nfr.utf8=Une grenouille.\n"


def build_package(folder: Path, files: dict[str, bytes], name: str = "tuxpaint-stamps-default") -> Path:
    """A .deb whose usr/share/tuxpaint/stamps holds `files`."""
    for path, data in files.items():
        (folder / "root" / tuxpaint.STAMPS / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / "root" / tuxpaint.STAMPS / path).write_bytes(data)
    control = f"Package: {name}\nVersion: 1.2-3\nArchitecture: all\nMaintainer: Nobody <nobody@example.org>\n"
    (folder / "root/DEBIAN").mkdir(parents=True)
    (folder / "root/DEBIAN/control").write_text(control + "Description: a small one\n")
    package = folder / f"{name}_1.2-3_all.deb"
    command = ["dpkg-deb", "--root-owner-group", "-Znone", "--build", str(folder / "root"), str(package)]
    subprocess.run(command, check=True, capture_output=True)
    return package


@pytest.fixture
def stamps(image_bytes) -> dict[str, bytes]:
    return {
        "animals/amphibians/frog.png": image_bytes(1),
        "animals/amphibians/frog.txt": FROG.encode(),
        "animals/amphibians/frog.dat": b"tinter vector\n",
        "animals/amphibians/frog.ogg": b"OggS croak",
        "animals/amphibians/frog_desc.ogg": b"OggS a frog",
        "animals/amphibians/frog_desc_de.wav": b"RIFF ein Frosch",
        "animals/amphibians/frog_mirror.png": image_bytes(2),
        "animals/amphibians/frog.svg": SVG,  # as well: the PNG goes first
        "animals/birds/tux.png": image_bytes(3),
        "animals/birds/tux.txt": "Tux—the Linux mascot!\nde.utf8=Tux, das Maskottchen\nfr.utf8=\n".encode(),
        "animals/birds/wrong.png": b"\x89PNG but no more",
        "animals/birds/wrong.txt": b"A bird.\n",
        "food/apple.svg": SVG,
        "food/apple.txt": b"An apple.\nde.utf8=Ein Apfel.\n",
        "food/nameless.png": image_bytes(4),
        "food/latin.png": image_bytes(5),
        "food/latin.txt": b"A caf\xe9.\n",
        "food/bread.PNG": image_bytes(6),
        "food/bread.txt": b"\nde.utf8=Brot\n",
        "town/lamp.png": image_bytes(7),
        "town/lamp.txt": b"a FROG\n",  # the caption of the frog, but for case and punctuation
        **{f"town/house{number}.png": image_bytes(10 + number) for number in range(8)},
        **{f"town/house{number}.txt": f"House {number}.".encode() for number in range(8)},
    }


@pytest.fixture
def package(tmp_path, stamps, monkeypatch) -> Path:
    monkeypatch.setattr(tuxpaint, "_rasteriser", lambda: None)  # the same result wherever the tests run
    return build_package(tmp_path / "package", stamps)


def by_id(samples):
    return {sample.metadata()["id"]: sample for sample in samples}


@needs_dpkg
def test_stamps_captions_speech_and_what_is_left_out(tmp_path, package, stamps, read_all):
    imported = import_tuxpaint(tmp_path / "out", package=package, test_share=0, processes=0)
    samples = by_id(read_all(tmp_path / "out/train"))
    houses = {f"town/house{number}.png" for number in range(8)}
    frogs = {"animals/amphibians/frog.png", "animals/amphibians/frog_mirror.png"}
    assert samples.keys() == {*frogs, "animals/birds/tux.png", "town/lamp.png", *houses}
    for name, sample in samples.items():
        assert sample.fields["png"] == stamps[name]
    frog = samples["animals/amphibians/frog.png"]
    assert frog.key == "animals/amphibians/frog"
    assert frog.captions() == ("A frog.", "A British frog.")
    assert frog.fields["ogg"] == b"OggS a frog"
    assert frog.label() == "animals"
    assert frog.metadata() == {
        "captions": ["A frog.", "A British frog."],
        "id": "animals/amphibians/frog.png",
        "language": "en",
        "label": "animals",
        "provenance": {
            "source": "tuxpaint-stamps-default 1.2-3",
            "licence": "GPL-2+",
            "id": "animals/amphibians/frog.png",
        },
    }
    mirror = samples["animals/amphibians/frog_mirror.png"]
    assert (mirror.captions(), mirror.fields["ogg"]) == (frog.captions(), frog.fields["ogg"])
    assert samples["animals/birds/tux.png"].captions() == ("Tux—the Linux mascot!",)
    assert samples["animals/birds/tux.png"].audio_field is None
    reasons = {skip.source: skip.reason for skip in imported.skipped}
    assert reasons == {
        "animals/amphibians/frog.svg": "an SVG whose PNG is taken",
        "animals/birds/wrong.png": "not a JPEG, PNG or WebP image, or damaged",
        "food/apple.svg": "an SVG, and cairosvg is not installed to draw it",
        "food/nameless.png": "has no .txt",
        "food/latin.png": "its .txt is not UTF-8",
        "food/bread.PNG": "has no caption in the language 'en'",
    }
    assert os.listdir(tmp_path / "out") == ["train"]
    assert sorted(os.listdir(tmp_path)) == ["out", "package"]  # nothing unpacked is left


@needs_dpkg
def test_another_language_and_no_sound(tmp_path, package, read_all):
    import_tuxpaint(tmp_path / "out", language="de", package=package, test_share=0, processes=0)
    samples = by_id(read_all(tmp_path / "out/train"))
    assert {name: sample.captions() for name, sample in samples.items()} == {
        "animals/amphibians/frog.png": ("Ein Frosch.",),
        "animals/amphibians/frog_mirror.png": ("Ein Frosch.",),
        "animals/birds/tux.png": ("Tux, das Maskottchen",),
        "food/bread.PNG": ("Brot",),
    }
    assert samples["animals/amphibians/frog.png"].fields["wav"] == b"RIFF ein Frosch"
    import_tuxpaint(tmp_path / "quiet", language="de", package=package, sound=False, test_share=0, processes=0)
    assert all(sample.audio_field is None for sample in read_all(tmp_path / "quiet/train"))
    with pytest.raises(ValueError, match=r"'xx'.*de, en, en_AU, en_GB, fr"):
        import_tuxpaint(tmp_path / "none", language="xx", package=package)
    assert not (tmp_path / "none").exists()


@needs_dpkg
@pytest.mark.parametrize("seed", range(4))
def test_test_has_no_caption_of_train(tmp_path, package, read_all, seed):
    import_tuxpaint(tmp_path / "out", package=package, test_share=0.4, seed=seed, processes=0)
    parts = [by_id(read_all(tmp_path / "out" / part)) for part in ("train", "test")]
    said = [
        {re.sub(r"\W", "", caption.casefold()) for sample in part.values() for caption in sample.captions()}
        for part in parts
    ]
    assert not said[0] & said[1]
    assert 3 <= len(parts[1]) <= 5
    frogs = {"animals/amphibians/frog.png", "animals/amphibians/frog_mirror.png", "town/lamp.png"}
    assert any(frogs <= part.keys() for part in parts)


@needs_dpkg
def test_the_same_import_twice_is_the_same_bytes(tmp_path, package):
    first, second = (import_tuxpaint(tmp_path / name, package=package, processes=0) for name in ("a", "b"))
    assert first.train.index.fingerprint == second.train.index.fingerprint
    assert first.test.index.fingerprint == second.test.index.fingerprint
    with pytest.raises(ValueError, match="there already"):
        import_tuxpaint(tmp_path / "a", package=Path("not even looked at"))


@needs_dpkg
def test_an_svg_is_drawn_where_there_is_a_rasteriser(tmp_path, package, monkeypatch, image_bytes, read_all):
    drawn = []

    def svg2png(*, bytestring, output_width):
        drawn.append((bytestring, output_width))
        return image_bytes(42)

    monkeypatch.setattr(tuxpaint, "_rasteriser", lambda: svg2png)
    import_tuxpaint(tmp_path / "out", package=package, test_share=0, processes=0)
    samples = by_id(read_all(tmp_path / "out/train"))
    assert samples["food/apple.svg"].fields["png"] == image_bytes(42)
    assert drawn == [(SVG, tuxpaint.SVG_WIDTH)]


def test_a_real_rasteriser_draws(monkeypatch):
    pytest.importorskip("cairosvg", exc_type=ImportError)
    tuxpaint._rasteriser.cache_clear()
    shape = (
        b'<svg xmlns="http://www.w3.org/2000/svg" width="8" height="4"><rect width="4" height="4" fill="red"/></svg>'
    )
    image = decode_image(tuxpaint._draw_svg(shape))
    assert image.shape == (tuxpaint.SVG_WIDTH // 2, tuxpaint.SVG_WIDTH, 3)
    assert image[10, 10].tolist() == [255, 0, 0]
    assert image[10, -10].tolist() == [255, 255, 255]
    with pytest.raises(DataError, match="cannot draw"):
        tuxpaint._draw_svg(b"<svg")


@needs_dpkg
def test_what_is_no_such_package(tmp_path, image_bytes):
    with pytest.raises(FileNotFoundError, match="no package"):
        import_tuxpaint(tmp_path / "out", package=tmp_path / "none.deb")
    (tmp_path / "text.deb").write_text("no archive")
    with pytest.raises(DataError, match="is no Debian package"):
        import_tuxpaint(tmp_path / "out", package=tmp_path / "text.deb")
    other = build_package(tmp_path / "other", {}, "other")
    with pytest.raises(DataError, match=r"has no usr/share/tuxpaint/stamps"):
        import_tuxpaint(tmp_path / "out", package=other)
    whole = build_package(tmp_path / "cut", {"a/b.png": image_bytes() * 100, "a/b.txt": b"B"})
    whole.write_bytes(whole.read_bytes()[:-3000])
    with pytest.raises(DataError, match="cannot be unpacked"):
        import_tuxpaint(tmp_path / "out", package=whole)
    assert not (tmp_path / "out").exists()
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


def put_command(folder: Path, name: str, script: str) -> None:
    """A shell script of that name in `folder`, for PATH."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


@needs_dpkg
def test_the_package_is_fetched_once_into_the_cache(tmp_path, package, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    commands = tmp_path / "commands"
    put_command(commands, "apt-get", f'echo "$@" >> "{tmp_path}/called"; cp "{package}" .')
    monkeypatch.setenv("PATH", f"{commands}:{os.environ['PATH']}")
    import_tuxpaint(tmp_path / "a", processes=0)
    import_tuxpaint(tmp_path / "b", processes=0)
    called = (tmp_path / "called").read_text().splitlines()
    assert len(called) == 1
    assert called[0].startswith("download ")
    assert called[0].endswith(" tuxpaint-stamps-default")
    assert os.listdir(tmp_path / "cache/weft") == [package.name]


@needs_dpkg
def test_a_download_that_fails_leaves_nothing_and_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    commands = tmp_path / "commands"
    put_command(commands, "apt-get", "echo half > half.deb; echo 'E: Unable to locate package' >&2; exit 100")
    monkeypatch.setenv("PATH", f"{commands}:{os.environ['PATH']}")
    with pytest.raises(OSError, match=r"apt-get update.*\.deb.*Unable to locate package"):
        import_tuxpaint(tmp_path / "out")
    assert os.listdir(tmp_path / "cache/weft") == []
    put_command(commands, "apt-get", "exit 0")
    with pytest.raises(OSError, match="fetched no"):
        import_tuxpaint(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_missing_tools_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    commands = tmp_path / "commands"
    commands.mkdir()
    monkeypatch.setenv("PATH", str(commands))
    with pytest.raises(FileNotFoundError, match="dpkg-deb is not on this machine"):
        import_tuxpaint(tmp_path / "out")
    put_command(commands, "dpkg-deb", "exit 0")
    with pytest.raises(FileNotFoundError, match="apt-get is not on this machine"):
        import_tuxpaint(tmp_path / "out")


def test_captions_of_a_stamp():
    text = "\ufeffA frog.  \n\naf.utf8='n Padda = een.\nzz.utf8=\nnonsense\nen.utf8=no\nsr@latin.utf8=Žaba.\n"
    assert read_captions(text.encode()) == {"en": "A frog.", "af": "'n Padda = een.", "sr@latin": "Žaba."}
    assert read_captions("A\u2028frog.\r\naf.utf8=n\x85Padda\n".encode()) == {"en": "A\u2028frog.", "af": "n\x85Padda"}
    assert read_captions(b"") == {}
    with pytest.raises(DataError):
        read_captions(b"\xff")


@needs_dpkg
def test_the_real_package(tmp_path, read_all):
    package = tuxpaint._cached_package()
    if package is None:
        pytest.skip(f"{tuxpaint.PACKAGE} is not in the cache, and the tests do not download 161 MB")
    imported = import_tuxpaint(tmp_path / "out", package=package, processes=0)
    train, test = read_all(tmp_path / "out/train"), read_all(tmp_path / "out/test")
    assert len(train) + len(test) > 700
    assert 0.19 < len(test) / (len(train) + len(test)) < 0.21
    assert len({sample.captions()[0] for sample in train + test}) > 600
    speech = [sample for sample in train + test if sample.audio_field]
    assert len(speech) > 50
    sound, rate = soundfile.read(io.BytesIO(speech[0].fields["ogg"]))
    assert 0.2 < len(sound) / rate < 20
    for sample in (train + test)[::25]:
        assert decode_image(sample.fields["png"]).ndim == 3
    assert all("SVG" in reason for reason in imported.reasons())
