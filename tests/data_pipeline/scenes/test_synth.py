"""Both splits on disk: the same bytes however made, complete for `webdataset`, both or neither."""

import hashlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile
import webdataset

from data_pipeline import decode_image, load_index, open_dataset
from data_pipeline.scenes.synth import SceneMaker, synthesise
from data_pipeline.scenes.world import HELD_OUT, held_out_scenes

TRAIN, TEST = 1031, 7  # more than one shard, and odd


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("made") / "new" / "scenes"
    synthesise(out, train=TRAIN, test=TEST, processes=2)
    return out


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def read_with_webdataset(folder: Path) -> list[dict]:
    shards = sorted(str(path) for path in folder.glob("*.tar"))
    return list(webdataset.WebDataset(shards, shardshuffle=False, empty_check=False))


def test_the_bytes_do_not_depend_on_the_number_of_processes(made: Path, tmp_path: Path) -> None:
    synthesise(tmp_path, train=TRAIN, test=TEST, processes=1)
    assert digests(tmp_path) == digests(made)
    assert len(list((tmp_path / "train").glob("*.tar"))) == 2


def test_the_bytes_do_not_depend_on_the_process() -> None:
    program = (
        "import hashlib; from data_pipeline.scenes.synth import SceneMaker;"
        "print(hashlib.sha256(repr([SceneMaker(3, 64, True)(i).fields for i in (40, 2)]).encode()).hexdigest())"
    )
    run = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONHASHSEED": "77"},
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        check=True,
    )
    here = [SceneMaker(3, 64, True)(index).fields for index in (40, 2)]
    assert run.stdout.strip() == hashlib.sha256(repr(here).encode()).hexdigest()


def test_a_smaller_set_is_the_beginning_of_a_larger_one(made: Path, tmp_path: Path) -> None:
    synthesise(tmp_path, train=7, test=1, processes=1)
    for split, count in (("train", 7), ("test", 1)):
        small, large = read_with_webdataset(tmp_path / split), read_with_webdataset(made / split)
        assert len(small) == count
        for a, b in zip(small, large, strict=False):
            assert {name: a[name] for name in ("__key__", "jpg", "txt", "json", "flac")} == {
                name: b[name] for name in ("__key__", "jpg", "txt", "json", "flac")
            }


def test_plain_webdataset_reads_every_field(made: Path) -> None:
    for split, count in (("train", TRAIN), ("test", TEST)):
        samples = read_with_webdataset(made / split)
        assert len(samples) == len({sample["__key__"] for sample in samples}) == count
        for sample in samples:
            metadata = json.loads(sample["json"])
            assert {name for name in sample if not name.startswith("__")} == {"jpg", "txt", "json", "flac"}
            assert set(metadata) == {"captions", "label", "qa", "choice", "scene", "source", "licence"}
            assert metadata["captions"][0] == sample["txt"].decode()
            assert decode_image(sample["jpg"]).shape == (64, 64, 3)
        sound, rate = soundfile.read(io.BytesIO(samples[-1]["flac"]))
        assert rate == 8000
        assert len(sound) > 0


def test_our_reader_agrees(made: Path) -> None:
    index = load_index(made / "train")
    assert index.samples == TRAIN
    dataset = open_dataset(made / "train")
    assert len(dataset) == TRAIN


def test_splits_share_no_combination_caption_or_picture(made: Path) -> None:
    train, test = read_with_webdataset(made / "train"), read_with_webdataset(made / "test")
    seen: dict[str, set] = {}
    for name, samples in (("train", train), ("test", test)):
        kinds = [[(k["colour"], k["shape"]) for k in json.loads(s["json"])["scene"]["kinds"]] for s in samples]
        assert all(bool(HELD_OUT & set(pairs)) == (name == "test") for pairs in kinds)
        seen[name] = {sample["jpg"] for sample in samples} | {sample["txt"] for sample in samples}
    assert not seen["train"] & seen["test"]


def test_first_captions_of_the_test_split_are_all_different() -> None:
    maker = SceneMaker(0, 64, False, held_out_scenes(0, 401))
    assert len({maker(index).fields["txt"] for index in range(401)}) == 401


def test_another_seed_is_another_set() -> None:
    for index in range(5):
        one, other = SceneMaker(0, 64, True)(index), SceneMaker(1, 64, True)(index)
        assert one.key == other.key
        assert all(one.fields[name] != other.fields[name] for name in one.fields)


def test_without_sound_and_in_another_size(tmp_path: Path) -> None:
    train, test = synthesise(tmp_path, train=3, test=2, seed=5, size=97, sound=False, processes=0)
    assert (train.index.samples, test.index.samples) == (3, 2)
    for sample in read_with_webdataset(tmp_path / "train"):
        assert "flac" not in sample
        assert decode_image(sample["jpg"]).shape == (97, 97, 3)
    loud, mute = SceneMaker(5, 97, True)(2), SceneMaker(5, 97, False)(2)
    assert all(loud.fields[name] == data for name, data in mute.fields.items())


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_full_folder_is_refused_before_work_starts(tmp_path: Path, split: str) -> None:
    (tmp_path / split).mkdir()
    (tmp_path / split / "mine").write_text("keep")
    with pytest.raises(ValueError, match=f"{split} is there already"):
        synthesise(tmp_path, train=1, test=1)
    assert list(digests(tmp_path)) == [f"{split}/mine"]


@pytest.mark.parametrize(
    ("wrong", "word"),
    [({"train": 0}, "0 train"), ({"test": -1}, "-1 test"), ({"size": 31}, "31 pixels"), ({"seed": -2}, "seed is -2")],
)
def test_impossible_requests_are_refused(tmp_path: Path, wrong: dict[str, int], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        synthesise(tmp_path / "out", **{"train": 1, "test": 1, **wrong})
    assert not (tmp_path / "out").exists()


def test_a_file_as_goal_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        synthesise(tmp_path / "out", train=1, test=1)


def test_progress_counts_both_and_a_failure_leaves_neither(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []

    def stop_in_train(done: int, total: int) -> None:
        calls.append((done, total))
        if done == total:
            raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        synthesise(tmp_path / "out", train=5, test=3, progress=stop_in_train, processes=1)
    assert calls == [(3, 8), (8, 8)]
    assert list(tmp_path.iterdir()) == []


def test_pictures_alone_need_no_sound_library(tmp_path: Path) -> None:
    program = (
        "import sys; sys.modules['soundfile'] = None\n"
        "from pathlib import Path; from data_pipeline.scenes.synth import synthesise\n"
        "synthesise(Path(sys.argv[1]), train=2, test=2, sound=False, processes=1)"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True)
    assert len(open_dataset(tmp_path / "train")) == 2
