"""Clotho, on a small set in the published form."""

import pytest

from data_pipeline.errors import DataError
from data_pipeline.importers.clotho import import_clotho

HEADER = "file_name,caption_1,caption_2,caption_3,caption_4,caption_5"
NO_IMAGE = ("has an image", "no image among its fields")


def table(*names):
    lines = [f'{name},"A bell, {name}, rings",' + ",".join(f"Ringing {place}" for place in range(4)) for name in names]
    return "\n".join([HEADER, *lines]) + "\n"


@pytest.fixture
def clotho(put, sound_bytes, tmp_path):
    put("clotho_captions_development.csv", table("Bell (1).wav", "gone.wav", "../secret.wav", "broken.wav"))
    put("clotho_captions_validation.csv", table("Bell (1).wav"))
    put("clotho_captions_evaluation.csv", table("rain.wav"))
    metadata = "file_name,keywords,sound_id,sound_link,start_end_samples,manufacturer,license\n"
    metadata += "Bell (1).wav,bell;café,1,https://freesound.org/1,[0 1],x,http://creativecommons.org/licenses/by/3.0/\n"
    put("clotho_metadata_development.csv", metadata.encode("latin-1"))
    for number, name in enumerate(["development/Bell (1).wav", "validation/Bell (1).wav", "evaluation/rain.wav"]):
        put(name, sound_bytes(number, "WAV"))
    put("development/broken.wav", b"RIFF")
    put("secret.wav", sound_bytes(9, "WAV"))
    return tmp_path / "source"


def test_sets_captions_licences_and_what_is_left_out(clotho, tmp_path, examine, sound_bytes):
    imported = import_clotho(clotho, tmp_path / "out", licence="Tampere University", processes=2)
    sets = examine(tmp_path / "out", NO_IMAGE)
    assert {name: set(samples) for name, samples in sets.items()} == {
        "train": {"Bell (1).wav"},
        "val": {"Bell (1).wav"},
        "test": {"rain.wav"},
    }
    sample = sets["train"]["Bell (1).wav"]
    assert sample.captions() == ("A bell, Bell (1).wav, rings", *(f"Ringing {place}" for place in range(4)))
    assert sample.fields["wav"] == sound_bytes(0, "WAV")
    assert sample.metadata()["provenance"] == {
        "source": "Clotho",
        "licence": "http://creativecommons.org/licenses/by/3.0/",
        "id": "Bell (1).wav",
    }
    assert sets["test"]["rain.wav"].metadata()["provenance"]["licence"] == "Tampere University"
    reasons = {skip.source: skip.reason for skip in imported.skipped}
    assert reasons["development/gone.wav"] == "the sound file is missing"
    assert "outside" in reasons["development/../secret.wav"]
    assert "not a sound" in reasons["development/broken.wav"]
    assert len(imported.skipped) == 3


def test_another_table(clotho, put, tmp_path):
    put("clotho_captions_development.csv", "file_name,caption_1\n")
    with pytest.raises(DataError, match="lacks 'caption_2', 'caption_3'"):
        import_clotho(clotho, tmp_path / "out")


def test_folders_as_they_unpack(put, sound_bytes, tmp_path, examine):
    put("clotho_csv_files/clotho_captions_evaluation.csv", table("rain.wav"))
    put("clotho_audio_files/clotho_audio_evaluation/rain.wav", sound_bytes(0, "WAV"))
    import_clotho(tmp_path / "source", tmp_path / "out", processes=0)
    assert set(examine(tmp_path / "out", NO_IMAGE)["test"]) == {"rain.wav"}
