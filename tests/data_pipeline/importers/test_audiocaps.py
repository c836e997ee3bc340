"""AudioCaps, on small tables in the published form and files as different downloaders name them."""

import pytest

from data_pipeline.errors import DataError
from data_pipeline.importers.audiocaps import import_audiocaps

HEADER = "audiocap_id,youtube_id,start_time,caption\n"
NO_IMAGE = ("has an image", "no image among its fields")


@pytest.fixture
def captions(put, tmp_path):
    train = [f'{91139 + number},{video},130,"A {video}, running"' for number, video in enumerate("ABCDEFGH")]
    put("train.csv", HEADER + "\n".join(train) + "\n")
    test = [f"{103549 + number},r1nicOVtvkQ,{start},Said {number}" for number, start in enumerate([130, 130, 140])]
    put("test.csv", HEADER + "\n".join(test) + "\n")
    return tmp_path / "source"


def test_files_by_any_name(captions, put, tmp_path, examine, sound_bytes):
    names = ["A.wav", "YB.flac", "C_130.wav", "D_130000_140000.flac", "YE_130_140.ogg", "91144.wav"]
    for number, name in enumerate(names):
        put(f"audio/train/{name}", sound_bytes(number, name.rpartition(".")[2].upper()))
    put("audio/train/G.wav", b"")
    put("audio/test/r1nicOVtvkQ_130.wav", sound_bytes(11, "WAV"))
    put("audio/test/r1nicOVtvkQ_140.wav", sound_bytes(12, "WAV"))
    imported = import_audiocaps(captions, tmp_path / "out", licence="MIT", processes=2)
    sets = examine(tmp_path / "out", NO_IMAGE)
    assert set(sets["train"]) == {str(91139 + number) for number in range(6)}
    assert sets["train"]["91141"].captions() == ("A C, running",)
    assert sets["train"]["91141"].fields["wav"] == sound_bytes(2, "WAV")
    assert sets["train"]["91144"].fields["wav"] == sound_bytes(5, "WAV")
    test = sets["test"]
    assert [test[name].captions() for name in ("103549", "103551")] == [("Said 0", "Said 1"), ("Said 2",)]
    assert test["103551"].fields["wav"] == sound_bytes(12, "WAV")
    metadata = test["103549"].metadata()
    assert (metadata["video"], metadata["start"]) == ("r1nicOVtvkQ", "130")
    assert metadata["provenance"] == {"source": "AudioCaps", "licence": "MIT", "id": "103549"}
    assert {skip.source: skip.reason for skip in imported.skipped} == {
        "audio/train/G.wav": "the sound file is empty",
        "train: H at 130 s": "the sound file is missing",
    }


def test_names_reach_nothing_outside(captions, put, tmp_path, sound_bytes):
    put("../secret.wav", sound_bytes(0, "WAV"))
    put("train.csv", HEADER + f"1,../secret,0,x\n2,{tmp_path}/secret,0,x\n../../secret,x,²,x\n")
    put("test.csv", HEADER)
    with pytest.raises(DataError, match=r"of 3; the first, train: \.\./secret at 0 s: the sound file is missing"):
        import_audiocaps(captions, tmp_path / "out")


def test_a_cut_row_and_a_caption_that_is_none_cost_themselves(captions, put, tmp_path, examine, sound_bytes):
    put("train.csv", HEADER + "1,A,130,a cat\n2,B,130,a dog, asleep\n3,C,130,NaN\n")
    put("test.csv", HEADER)
    for number, name in enumerate("ABC"):
        put(f"audio/train/{name}.wav", sound_bytes(number, "WAV"))
    imported = import_audiocaps(captions, tmp_path / "out", processes=0)
    assert set(examine(tmp_path / "out", NO_IMAGE)["train"]) == {"1"}
    reasons = {skip.source.rpartition("/")[2]: skip.reason for skip in imported.skipped}
    assert reasons["train.csv line 3"].startswith("has 5 cells, where the header has 4")
    assert reasons["C.wav"] == "its caption is 'NaN', which stands for none"


def test_other_tables(captions, put, tmp_path):
    put("train.csv", "id,caption\n1,x\n")
    with pytest.raises(DataError, match="lacks 'audiocap_id', 'youtube_id', 'start_time'"):
        import_audiocaps(captions, tmp_path / "out")
