"""LibriSpeech and corpora of its form."""

import io

import pytest
import soundfile

from data_pipeline.errors import DataError
from data_pipeline.importers.librispeech import import_librispeech


@pytest.fixture
def chapter(put, sound_bytes):
    """chapter("LibriSpeech/dev-clean", 84, 121123, 2) writes that many utterances and their transcripts."""

    def write(folder, speaker, number, count, kind="FLAC", transcripts=None):
        names = [f"{speaker}-{number}-{place:04d}" for place in range(count)]
        for place, name in enumerate(names):
            extension = kind.lower()
            put(f"{folder}/{speaker}/{number}/{name}.{extension}", sound_bytes(1000 * speaker + place, kind))
        lines = [f"{name} SPEAKER {speaker} SAYS {place}" for place, name in enumerate(names)]
        text = "\n".join(lines) + "\n" if transcripts is None else transcripts
        put(f"{folder}/{speaker}/{number}/{speaker}-{number}.trans.txt", text)

    return write


def test_published_sets(chapter, put, tmp_path, examine, sound_bytes):
    put("LibriSpeech/SPEAKERS.TXT", ";ID |SEX\n84 | F | dev-clean | 25.03 | X\n")
    chapter("LibriSpeech/train-clean-100", 84, 121123, 2)
    chapter("LibriSpeech/train-other-500", 85, 7, 1)
    chapter("LibriSpeech/dev-clean", 86, 8, 1)
    chapter("LibriSpeech/test-other", 87, 9, 1)
    imported = import_librispeech(tmp_path / "source/LibriSpeech", tmp_path / "out", licence="CC BY 4.0", processes=2)
    assert not imported.skipped
    sets = examine_sound(examine, tmp_path / "out")
    assert {name: set(samples) for name, samples in sets.items()} == {
        "train": {"84-121123-0000", "84-121123-0001", "85-7-0000"},
        "val": {"86-8-0000"},
        "test": {"87-9-0000"},
    }
    sample = sets["train"]["84-121123-0001"]
    assert sample.key == "train-clean-100/84/121123/84-121123-0001"
    assert sample.captions() == ("SPEAKER 84 SAYS 1",)
    assert sample.fields["flac"] == sound_bytes(84001)
    assert sample.metadata() == {
        "captions": ["SPEAKER 84 SAYS 1"],
        "id": "train-clean-100/84/121123/84-121123-0001.flac",
        "speaker": "84",
        "chapter": "121123",
        "provenance": {"source": "LibriSpeech", "licence": "CC BY 4.0", "id": "84-121123-0001"},
    }


def examine_sound(examine, out):
    """`examine`, for sets without images: that each shard has none is all that `check` has to say."""
    return examine(out, ("has an image", "no image among its fields"))


def test_one_set_alone(chapter, tmp_path, examine):
    chapter("test-clean", 84, 1, 2)
    chapter("test-clean", 85, 1, 1)
    import_librispeech(tmp_path / "source/test-clean", tmp_path / "out", processes=0)
    assert len(examine_sound(examine, tmp_path / "out")["test"]) == 3


@pytest.mark.parametrize("seed", range(3))
def test_without_sets_nobody_is_heard_on_both_sides(chapter, tmp_path, examine, seed):
    for speaker in range(6):
        chapter("corpus", speaker, 1, 3, "WAV")
    import_librispeech(tmp_path / "source/corpus", tmp_path / "out", test_share=0.34, seed=seed, processes=0)
    sets = examine_sound(examine, tmp_path / "out")
    speakers = [{sample.metadata()["speaker"] for sample in samples.values()} for samples in sets.values()]
    assert sorted(map(len, speakers)) == [2, 4]
    assert not speakers[0] & speakers[1]


def test_what_cannot_be_used_is_told(chapter, put, tmp_path, examine, sound_bytes):
    lines = "84-1-0000 FINE\n84-1-0001 GONE\n../../../secret OUTSIDE\n\n84-1-0002 BROKEN\n84-1-0003\n84-1-0004 EMPTY\n"
    chapter("train", 84, 1, 4, transcripts=lines)
    put("train/84/1/84-1-0001.flac", b"").unlink()
    put("train/84/1/84-1-0002.flac", b"fLaC but no more")
    put("train/84/1/84-1-0004.flac", sound_bytes(0, "WAV", seconds=0))
    put("train/84/1/84-1-0009.flac", sound_bytes(9))
    put("secret.flac", sound_bytes(99))
    chapter("elsewhere", 85, 1, 1)
    imported = import_librispeech(tmp_path / "source", tmp_path / "out", processes=0)
    assert set(examine_sound(examine, tmp_path / "out")["train"]) == {"84-1-0000"}
    reasons = {skip.source: skip.reason for skip in imported.skipped}
    assert len(reasons) == len(imported.skipped) == 7
    assert reasons["train/84/1/84-1-0001.flac"] == "the sound file is missing"
    assert reasons["train/84/1/84-1-0003.flac"] == "has no caption"
    assert "not a sound" in reasons["train/84/1/84-1-0002.flac"]
    assert "no sound" in reasons["train/84/1/84-1-0004.flac"]
    assert "outside the data set's folder" in reasons["train/84/1/../../../secret.flac"]
    assert "no line in 84-1.trans.txt" in reasons["train/84/1/84-1-0009.flac"]
    assert "no folder of train" in reasons["elsewhere/85/1/85-1.trans.txt"]


def test_what_is_said_may_be_a_word_for_nothing_and_hold_a_line_separator(chapter, tmp_path, examine):
    chapter("train", 84, 1, 2, transcripts="84-1-0000 NONE\n84-1-0001 ONE\u2028TWO\n")
    imported = import_librispeech(tmp_path / "source", tmp_path / "out", processes=0)
    assert not imported.skipped
    samples = examine_sound(examine, tmp_path / "out")["train"]
    assert [samples[f"84-1-000{n}"].captions() for n in range(2)] == [("NONE",), ("ONE\u2028TWO",)]


def test_mp3_becomes_flac(chapter, tmp_path, examine):
    if "MP3" not in soundfile.available_formats():
        pytest.skip("this libsndfile writes no MP3")
    chapter("train", 84, 1, 1, "MP3")
    import_librispeech(tmp_path / "source", tmp_path / "out", processes=0)
    (sample,) = examine_sound(examine, tmp_path / "out")["train"].values()
    assert sample.audio_field == "flac"
    sound, rate = soundfile.read(io.BytesIO(sample.fields["flac"]))
    assert rate == 8000
    assert len(sound) >= 4000
    assert sound.std() > 0.05


def test_what_is_no_such_corpus(tmp_path, put):
    put("readme.txt", "nothing")
    with pytest.raises(FileNotFoundError, match=r"no \*\.trans\.txt below"):
        import_librispeech(tmp_path / "source", tmp_path / "out")
    put("train/1/2/1-2.trans.txt", b"1-2-0000 \xff\n")
    with pytest.raises(DataError, match=r"1-2\.trans\.txt is not UTF-8"):
        import_librispeech(tmp_path / "source", tmp_path / "out")
    put("train/1/2/1-2.trans.txt", "1-2-0000 HELLO\n")
    with pytest.raises(DataError, match=r"1-2-0000\.flac: the sound file is missing"):
        import_librispeech(tmp_path / "source", tmp_path / "out")
