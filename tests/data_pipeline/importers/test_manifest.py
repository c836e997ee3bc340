"""Manifests of NeMo and tables of Common Voice."""

import io
import json

import numpy as np
import pytest
import soundfile

from data_pipeline.errors import DataError
from data_pipeline.importers.manifest import import_manifest

NO_IMAGE = ("has an image", "no image among its fields")


def lines(*records):
    return "".join(json.dumps(record) + "\n" for record in records)


def line(path, text="hello", **more):
    return {"audio_filepath": str(path), "duration": 0.5, "text": text, **more}


def reasons_of(imported):
    return {skip.source: skip.reason for skip in imported.skipped}


def test_a_folder_of_manifests(put, tmp_path, examine, sound_bytes):
    for number in range(4):
        put(f"wavs/{number}.wav", sound_bytes(number, "WAV"))
    put("wavs/broken.wav", b"RIFF but no more")
    put("../secret.wav", sound_bytes(9, "WAV"))
    inside, outside = tmp_path / "source/wavs/1.wav", tmp_path / "secret.wav"
    train = [line("wavs/0.wav", "zero", speaker=7, lang="en"), line(inside, "one"), line(outside), line("gone.wav")]
    train += [line("wavs/broken.wav"), line("wavs/3.wav", " "), line("https://x.org/a.wav")]
    put("train_manifest.json", lines(*train))
    put("dev_manifest.json", lines(line("wavs/2.wav", "two")))
    put("tokenizer.json", "not a manifest")
    imported = import_manifest(tmp_path / "source", tmp_path / "out", processes=2)
    sets = examine(tmp_path / "out", NO_IMAGE)
    assert {name: set(samples) for name, samples in sets.items()} == {
        "train": {"wavs/0.wav", "wavs/1.wav"},
        "val": {"wavs/2.wav"},
    }
    sample = sets["train"]["wavs/0.wav"]
    assert sample.fields["wav"] == sound_bytes(0, "WAV")
    assert sample.metadata() == {
        "captions": ["zero"],
        "id": "wavs/0.wav",
        "speaker": "7",
        "language": "en",
        "provenance": {"source": "source", "licence": None, "id": "wavs/0.wav"},
    }
    reasons = reasons_of(imported)
    assert len(reasons) == len(imported.skipped) == 5
    assert "outside the data set's folder" in reasons[str(outside)]
    assert reasons["gone.wav"] == "the sound file is missing"
    assert reasons["wavs/3.wav"] == "has no caption"
    assert "not a sound" in reasons["wavs/broken.wav"]
    assert "URL" in reasons["https://x.org/a.wav"]


def test_stretches_of_a_longer_file(put, tmp_path, examine):
    sound = np.arange(8000, dtype=np.int16)
    file = io.BytesIO()
    soundfile.write(file, sound, 8000, format="WAV")
    put("talk.wav", file.getvalue())
    listed = [line("talk.wav", "one", offset=0.25), line("talk.wav", "two", offset=0, duration=0.1)]
    listed += [line("talk.wav", "three", offset=0.9, duration=5), line("talk.wav", "late", offset=1.0)]
    path = put("talks.jsonl", lines(*listed))
    imported = import_manifest(path, tmp_path / "out", test_share=0, processes=0)
    samples = examine(tmp_path / "out", NO_IMAGE)["train"]
    found = {
        sample.captions()[0]: soundfile.read(io.BytesIO(sample.fields["flac"]), dtype="int16")
        for sample in samples.values()
    }
    for name, start, end in (("one", 2000, 6000), ("two", 0, 800), ("three", 7200, 8000)):
        assert np.array_equal(found[name][0], sound[start:end])
        assert found[name][1] == 8000
    assert set(found) == {"one", "two", "three"}
    assert reasons_of(imported) == {"talk-00001000.wav": "begins at 1 s of a sound of 1 s"}
    assert samples["talk-00000250.wav"].metadata()["start"] == 0.25


def test_common_voice(put, tmp_path, examine, sound_bytes):
    header = (
        "client_id\tpath\tsentence_id\tsentence\tup_votes\tdown_votes\tage\tgender\taccents\tvariant\tlocale\tsegment\n"
    )
    kind = "MP3" if "MP3" in soundfile.available_formats() else "OGG"
    for part, number in (("train", 1), ("train", 2), ("dev", 3), ("test", 4)):
        path = tmp_path / "source" / f"{part}.tsv"
        text = path.read_text() if path.exists() else header
        name = f"common_voice_en_{number}.mp3"
        put(f"{part}.tsv", text + f'speaker{number}\t{name}\tx\t"Quoted {number}, it says.\t2\t0\t\t\t\t\ten\t\n')
        put(f"clips/{name}", sound_bytes(number, kind))
    put("validated.tsv", "not even read")
    import_manifest(tmp_path / "source", tmp_path / "out", licence="CC0-1.0", processes=2)
    sets = examine(tmp_path / "out", NO_IMAGE)
    assert {name: len(samples) for name, samples in sets.items()} == {"train": 2, "val": 1, "test": 1}
    metadata = sets["test"]["common_voice_en_4.mp3"].metadata()
    assert metadata["captions"] == ['"Quoted 4, it says.']
    assert (metadata["speaker"], metadata["language"]) == ("speaker4", "en")
    assert metadata["provenance"]["licence"] == "CC0-1.0"


def test_a_manifest_alone_is_split_by_speaker(put, tmp_path, examine, sound_bytes):
    for number in range(12):
        put(f"{number}.wav", sound_bytes(number, "WAV"))
    path = put("all.json", lines(*(line(f"{n}.wav", f"text {n}", speaker_id=f"s{n % 4}") for n in range(12))))
    import_manifest(path, tmp_path / "out", test_share=0.25, processes=0)
    sets = examine(tmp_path / "out", NO_IMAGE)
    speakers = {name: {each.metadata()["speaker"] for each in samples.values()} for name, samples in sets.items()}
    assert (len(speakers["train"]), len(speakers["test"])) == (3, 1)
    assert not speakers["train"] & speakers["test"]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ('{"text": "x"}', "'audio_filepath' is not there, where a text should be"),
        (lines(line("a.wav"))[:-5], "line 1: is not JSON, damaged or cut short"),
        (lines(line("a.wav", 5)), "'text' is a number, where a text should be"),
        (lines(line("a.wav", offset=-1)), "'offset' is -1, which is no time in a sound"),
        (lines(line("a.wav", offset=10**400)), "which is no time in a sound"),
        (lines(line("a.wav", offset="x")), "'offset' is a text, where a number should be"),
        ('{"audio_filepath": "a.wav", "text": "x", "offset": NaN}', "'offset' is nan"),
        (lines(line("a.wav", offset=1, duration=0)), "'duration' is 0"),
        ("", "nothing in .* can be used"),
    ],
)
def test_damaged_manifests_are_one_sentence(put, tmp_path, sound_bytes, data, words):
    put("a.wav", sound_bytes(0, "WAV"))
    with pytest.raises(DataError, match=words):
        import_manifest(put("train.jsonl", data), tmp_path / "out")


def test_a_bad_line_costs_itself_and_what_is_said_may_be_a_word_for_nothing(put, tmp_path, sound_bytes, examine):
    said = {"a": "none", "b": "1 2 3 4 5", "c": "nan", "d": "one\u2028two"}
    for number, name in enumerate(said):
        put(f"{name}.wav", sound_bytes(number, "WAV"))
    good = [json.dumps(line(f"{name}.wav", text), ensure_ascii=False) for name, text in said.items()]
    put("train.jsonl", "\n".join([good[0], good[0][:-1], "7", lines(line("a.wav", offset=-1)), *good[1:]]))
    put("clips/b.wav", sound_bytes(9, "WAV"))
    put("test.tsv", "path\tsentence\nb.wav\tx\ty\nb.wav\tNil\n")
    imported = import_manifest(tmp_path / "source", tmp_path / "out", processes=0)
    sets = examine(tmp_path / "out", NO_IMAGE)
    assert {name[0]: sample.captions()[0] for name, sample in sets["train"].items()} == {
        name: text for name, text in said.items() if name != "c"
    }
    assert [sample.captions() for sample in sets["test"].values()] == [("Nil",)]
    reasons = {name.rpartition("/")[2]: reason for name, reason in reasons_of(imported).items()}
    assert reasons["train.jsonl line 2"].startswith("is not JSON, damaged or cut short")
    assert reasons["train.jsonl line 3"].startswith("holds a number")
    assert reasons["train.jsonl line 4"].startswith("'offset' is -1")
    assert reasons["test.tsv line 2"].startswith("has 3 cells")
    assert reasons["c.wav"] == "its caption is 'nan', which stands for none"


def test_what_is_no_manifest(put, tmp_path):
    put("all.jsonl", "")
    with pytest.raises(
        FileNotFoundError, match=r"no train\*, dev\* or test\* .*there are all\.jsonl: give one of them"
    ):
        import_manifest(tmp_path / "source", tmp_path / "out")
    with pytest.raises(ValueError, match="is no manifest by its name"):
        import_manifest(put("x.txt", ""), tmp_path / "out")
