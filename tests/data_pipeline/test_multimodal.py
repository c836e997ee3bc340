"""Batches of pictures, captions, sounds and questions: what a row holds, what it may lack, and the same from anyone."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from data_pipeline.batch import Batch, BatchMaker
from data_pipeline.errors import DataError
from data_pipeline.loader import Loader, sequential_batches
from data_pipeline.order import Order
from data_pipeline.reader import Dataset, open_dataset
from data_pipeline.sample import Sample
from data_pipeline.scenes.synth import synthesise
from data_pipeline.shards import write_shards
from data_pipeline.sound import AudioTransform
from data_pipeline.tokenizer import Tokenizer
from data_pipeline.transforms import (
    ImageTransform,
    QuestionTransform,
    TextTransform,
    sample_generator,
)

SAMPLES, SEED, STEPS = 40, 3, 12
EVERYTHING = frozenset({"image", "text", "audio", "question"})
HEARD = AudioTransform(frames=25, mels=20)
# number % 10 -> what its sample lacks
LACKS = {1: ("jpg",), 2: ("flac",), 3: ("json",), 4: ("txt",), 5: ("jpg", "flac", "json")}
# number -> (a field that is there and damaged, what the reason says)
DAMAGED = {11: ("flac", "not a FLAC"), 20: ("json", "qa that is no list of questions"), 26: ("jpg", "not a JPEG")}
EMPTY = 30  # a sample with none of them


class Letters:
    """Text -> its code points."""

    def encode(self, text: str, context: int) -> np.ndarray:
        return np.array([ord(letter) for letter in text.ljust(context)[:context]], np.int32)


def picture(number: int) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(number).integers(1, 255, (18, 20, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


def sound(number: int) -> bytes:
    """0.1 s to 0.5 s, of which a batch keeps 0.25 s."""
    file = io.BytesIO()
    wave = np.random.default_rng(number).normal(0, 0.1, 1600 * (1 + number % 5))
    soundfile.write(file, wave, 16_000, format="FLAC")
    return file.getvalue()


def pairs(number: int) -> list[tuple[str, str]]:
    return [(f"{part} of {number}?", f"{part}.{number}") for part in "abc"]


def whole(number: int) -> Sample:
    asked = [{"question": question, "answer": answer, "id": number} for question, answer in pairs(number)]
    fields = {"jpg": picture(number), "txt": f"caption {number}".encode(), "flac": sound(number)}
    return Sample(f"s{number:03d}", fields | {"json": json.dumps({"qa": asked}).encode()})


def partly(number: int) -> Sample:
    sample = whole(number)
    if number == EMPTY:
        return Sample(sample.key, {"cls": b"7"})
    for field in LACKS.get(number % 10, ()):
        del sample.fields[field]
    if number in DAMAGED:
        sample.fields[DAMAGED[number][0]] = b'{"qa": 5}'
    return sample


def written(folder: Path, make: Any) -> Dataset:
    write_shards(SAMPLES, make, folder, samples_per_shard=15, processes=0)
    return open_dataset(folder)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return written(tmp_path_factory.mktemp("data") / "whole", whole)


@pytest.fixture(scope="module")
def lacking(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return written(tmp_path_factory.mktemp("data") / "partly", partly)


def maker_of(dataset: Dataset, optional: frozenset[str] = frozenset(), training: bool = True) -> BatchMaker:
    image, text = ImageTransform(16, crop_scale=(0.4, 1.0)), TextTransform(Letters(), 12)
    question = QuestionTransform(Letters(), 10, 6)
    return BatchMaker(dataset, image, text, SEED, training, audio=HEARD, question=question, optional=optional)


def read_of(row: torch.Tensor) -> str:
    return "".join(map(chr, row.tolist())).rstrip(" \0")


def assert_same(one: list[Batch], other: list[Batch]) -> None:
    assert len(one) == len(other)
    for ours, theirs in zip(one, other, strict=True):
        assert ours.corrupt == theirs.corrupt
        for name, tensor in ours.tensors().items():
            assert torch.equal(tensor, getattr(theirs, name)), name
            assert tensor.stride() == getattr(theirs, name).stride(), name


def in_one(batches: list[Batch]) -> Batch:
    tensors = {name: torch.cat([getattr(batch, name) for batch in batches]) for name in batches[0].tensors()}
    return Batch(**tensors, corrupt=[corrupt for batch in batches for corrupt in batch.corrupt])


# --- what is in a row


def test_a_row_holds_all_of_its_sample(dataset: Dataset) -> None:
    batch = next(sequential_batches(maker_of(dataset, training=False), SAMPLES, SAMPLES))
    assert batch.audio.shape == (SAMPLES, 25, 20)
    assert (batch.audio.dtype, batch.has_image.dtype) == (torch.float32, torch.bool)
    assert (batch.audio_frames.dtype, batch.question.dtype, batch.answer.dtype) == (torch.int64,) * 3
    assert batch.has_image.all()
    assert batch.corrupt == []
    for row in range(SAMPLES):
        frames, valid = HEARD(sound(row), None)
        assert torch.equal(batch.audio[row], torch.from_numpy(frames))
        assert batch.audio_frames[row] == valid == min(25, 10 * (1 + row % 5))
        assert read_of(batch.text[row]) == f"caption {row}"
        assert (read_of(batch.question[row]), read_of(batch.answer[row])) == pairs(row)[0]


def test_questions_and_stretches_of_sound_are_drawn_by_seed_and_epoch(dataset: Dataset) -> None:
    maker, sample = maker_of(dataset), np.array([4])  # 0.5 s of sound
    rows = [maker(np.array([epoch * SAMPLES]), sample) for epoch in range(30)]
    asked = Counter((read_of(row.question[0]), read_of(row.answer[0])) for row in rows)
    assert set(asked) == set(pairs(4))  # each question with its own answer, and all of them
    assert min(asked.values()) >= 3
    drawn = [int(sample_generator(SEED, epoch, 4, "question").integers(3)) for epoch in range(30)]
    assert [read_of(row.question[0]) for row in rows] == [pairs(4)[part][0] for part in drawn]
    sounds = {row.audio.numpy().tobytes() for row in rows}
    assert len(sounds) == 30
    assert_same(
        [maker(np.array([5 * SAMPLES + 7]), sample)], [dataclasses.replace(rows[5], position=torch.tensor([207]))]
    )


@pytest.mark.parametrize("training", [True, False])
def test_a_draw_for_one_modality_moves_no_other(dataset: Dataset, training: bool) -> None:
    every = maker_of(dataset, training=training)
    together = every(np.arange(8), np.arange(8))
    image = BatchMaker(dataset, every.image, None, SEED, training)(np.arange(8), np.arange(8))
    audio = BatchMaker(dataset, None, None, SEED, training, audio=HEARD)(np.arange(8), np.arange(8))
    asked = BatchMaker(dataset, None, None, SEED, training, question=every.question)(np.arange(8), np.arange(8))
    assert torch.equal(together.image, image.image)
    assert torch.equal(together.audio, audio.audio)
    assert torch.equal(together.question, asked.question)
    assert image.audio.shape == (8, 0, 0)
    assert image.question.shape == image.answer.shape == asked.text.shape == (8, 0)
    assert image.audio_frames.tolist() == [0] * 8
    assert audio.image.shape == (8, 3, 0, 0)
    assert not audio.has_image.any()


def test_the_scene_world_is_heard_and_asked_about(tmp_path: Path) -> None:
    synthesise(tmp_path, train=24, test=4, size=32, processes=0)
    dataset = open_dataset(tmp_path / "train")
    told = [caption for sample in range(24) for caption in dataset.read(sample).captions()]
    tokenizer = Tokenizer.train(told, 400)
    maker = BatchMaker(
        dataset,
        ImageTransform(32),
        TextTransform(tokenizer, 64),
        0,
        training=True,
        audio=AudioTransform(frames=100),
        question=QuestionTransform(tokenizer, 64, 16),
    )
    batch = next(iter(Loader(maker, Order(24, 0), global_batch=24, stop_step=1)))
    assert batch.corrupt == []
    assert (batch.audio_frames > 10).all()
    assert len({row.numpy().tobytes() for row in batch.audio}) > 20
    for row, sample in enumerate(batch.sample.tolist()):
        asked = tokenizer.decode(batch.question[row].tolist()), tokenizer.decode(batch.answer[row].tolist())
        assert asked in dataset.read(sample).questions()


# --- what a row may lack


def test_a_sample_may_lack_what_is_optional(lacking: Dataset) -> None:
    maker = maker_of(lacking, EVERYTHING)
    samples = np.array([number for number in range(SAMPLES) if number not in DAMAGED and number != EMPTY])
    used = torch.full(maker.image_shape(len(samples)), 77, dtype=torch.uint8)  # as in a slot that has been used before
    batch = maker(np.arange(len(samples)), samples, used)
    assert batch.corrupt == []
    assert batch.sample.tolist() == samples.tolist()
    for row, number in enumerate(samples.tolist()):
        missing = LACKS.get(number % 10, ())
        assert batch.has_image[row] == batch.image[row].any() == ("jpg" not in missing)
        assert (batch.audio_frames[row] > 0) == batch.audio[row].any() == ("flac" not in missing)
        assert batch.text[row].any() == ("txt" not in missing)
        assert batch.question[row].any() == batch.answer[row].any() == ("json" not in missing)


def test_what_is_damaged_or_holds_nothing_is_not_a_lack(lacking: Dataset) -> None:
    samples = np.array([*DAMAGED, EMPTY])
    batch = maker_of(lacking, EVERYTHING)(np.arange(len(samples)), samples)
    reasons = {corrupt.sample: corrupt.reason for corrupt in batch.corrupt}
    for number, (_, reason) in DAMAGED.items():
        assert reason in reasons[number]
    assert reasons[EMPTY] == "it has no image and no caption and no sound and no question"
    assert not set(batch.sample.tolist()) & set(samples.tolist())


def test_a_replacement_leaves_nothing_of_the_sample_before_it(lacking: Dataset) -> None:
    """Sample 20 fails at its question, when image, text and sound are in the row already."""
    maker = maker_of(lacking, EVERYTHING)
    batch = maker(np.arange(200), np.full(200, 20))
    alone = in_one(
        [maker(np.array([position]), np.array([sample])) for position, sample in enumerate(batch.sample.tolist())]
    )
    assert not batch.has_image.all()
    assert (batch.audio_frames == 0).any()
    batch.corrupt, alone.corrupt = [], []
    epochs = batch.position // SAMPLES
    assert epochs.unique().tolist() == [0, 1, 2, 3, 4]
    assert_same([batch], [alone])


def test_without_the_setting_it_is_corrupt(lacking: Dataset) -> None:
    samples = np.arange(1, 6)
    batch = maker_of(lacking)(np.arange(5), samples)
    reasons = {corrupt.sample: corrupt.reason for corrupt in batch.corrupt}
    expected = ["it has no image", "it has no sound", "it has no question", "it has no caption", "it has no image"]
    assert [reasons[number] for number in samples.tolist()] == expected
    assert batch.has_image.all()
    assert (batch.audio_frames > 0).all()
    some = maker_of(lacking, frozenset({"audio", "image"}))(np.arange(5), samples)
    assert {corrupt.sample for corrupt in some.corrupt} >= {3, 4, 5}
    assert some.sample.tolist()[:2] == [1, 2]


def test_what_is_not_read_cannot_be_optional(dataset: Dataset) -> None:
    with pytest.raises(ValueError, match=r"optional is \['audio'\], but what is read is \['image'\]"):
        BatchMaker(dataset, ImageTransform(16), None, 0, training=True, optional=frozenset({"audio"}))
    with pytest.raises(ValueError, match=r"optional is \['smell'\]"):
        maker_of(dataset, frozenset({"smell"}))


@pytest.mark.parametrize(
    ("qa", "reason"),
    [
        (5, "qa that is no list of questions"),
        ("what?", "qa that is no list of questions"),
        ([5], "qa that is no list of questions"),
        ([{"question": "what?"}], "qa that is no list of questions"),
        ([{"question": "what?", "answer": 3}], "a question or an answer that is not text"),
    ],
)
def test_questions_of_another_form(qa: Any, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        Sample("s", {"json": json.dumps({"qa": qa}).encode()}).questions()


def test_no_questions() -> None:
    for fields in ({}, {"json": b"{}"}, {"json": b'{"qa": []}'}, {"json": b'{"qa": null}'}):
        assert Sample("s", fields).questions() == []


# --- the same from anyone


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world", [1, 4])
def test_batches_do_not_depend_on_ranks_and_workers(lacking: Dataset, world: int, workers: int) -> None:
    maker, order = maker_of(lacking, frozenset({"image", "audio", "question"})), Order(SAMPLES, SEED)
    settings: dict[str, Any] = {"global_batch": 8, "stop_step": STEPS}
    expected = list(Loader(maker, order, **settings))
    assert any(batch.corrupt for batch in expected)
    ranks = [list(Loader(maker, order, rank=rank, world=world, workers=workers, **settings)) for rank in range(world)]
    assert_same([in_one(list(shares)) for shares in zip(*ranks, strict=True)], [in_one([each]) for each in expected])
    later = list(Loader(maker, order, workers=workers, start_step=7, **settings))
    assert_same(later, expected[7:])


def test_another_process_with_more_threads_hears_the_same(dataset: Dataset, tmp_path: Path) -> None:
    program = (
        "import sys, hashlib, data_pipeline\n"
        "assert not {'scipy', 'soundfile'} & set(sys.modules), 'reading pictures loads what sound needs'\n"
        "from data_pipeline.sound import AudioTransform\n"
        "frames, _ = AudioTransform(frames=700)(open(sys.argv[1], 'rb').read(), None)\n"
        "print(hashlib.sha256(frames.tobytes()).hexdigest())"
    )
    path = tmp_path / "long.wav"
    soundfile.write(path, np.random.default_rng(0).normal(0, 0.1, 320_000), 44_100)
    frames, _ = AudioTransform(frames=700)(path.read_bytes(), None)
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "4")
    command = [sys.executable, "-c", program, str(path)]
    found = subprocess.check_output(command, text=True, env=os.environ | threads).strip()
    assert found == hashlib.sha256(frames.tobytes()).hexdigest()


# --- a batch by hand


def test_what_is_left_out_has_size_0() -> None:
    places = torch.arange(6)
    image = torch.zeros(6, 3, 8, 8, dtype=torch.uint8)
    batch = Batch(image, torch.zeros(6, 5, dtype=torch.int64), places, places, [])
    assert batch.has_image.tolist() == [True] * 6
    assert batch.audio.shape == (6, 0, 0)
    assert batch.question.shape == batch.answer.shape == (6, 0)
    assert batch.audio_frames.tolist() == [0] * 6
    part = batch.rows(slice(1, 4)).to("cpu")
    assert {len(tensor) for tensor in part.tensors().values()} == {3}
    without = Batch(torch.zeros(6, 3, 0, 0, dtype=torch.uint8), batch.text, places, places, [])
    assert not without.has_image.any()


def test_every_tensor_is_sliced_moved_and_pinned(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = maker_of(dataset)(np.arange(6), np.arange(6))
    part = batch.rows(slice(2, 4))
    for name, tensor in batch.tensors().items():
        assert torch.equal(getattr(part, name), tensor[2:4]), name
    assert all(tensor.is_meta for tensor in batch.to("meta").tensors().values())
    pinned: list[torch.Tensor] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor)
    batch.pin_memory()
    assert len(pinned) == len(batch.tensors()) == 9
