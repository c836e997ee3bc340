"""The loader: one sequence of global batches, whatever ranks, workers, restarts and corrupt samples there are."""

import dataclasses
import gc
import io
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from letters import Letters
from PIL import Image
from processes import workers_of

import data_pipeline.loader as loader_module
from data_pipeline import crew, fork_server
from data_pipeline.batch import ATTEMPTS, Batch, BatchMaker, Corrupt
from data_pipeline.crew import Patience
from data_pipeline.errors import DataError
from data_pipeline.loader import HELD, PREFETCH, Loader, sequential_batches
from data_pipeline.order import Order
from data_pipeline.reader import Dataset, open_dataset
from data_pipeline.sample import Sample
from data_pipeline.shards import write_shards
from data_pipeline.slots import Slot, Slots
from data_pipeline.transforms import ImageTransform, TextTransform

SAMPLES, SEED, SIZE, CONTEXT = 37, 11, 16, 24
BAD = {3: "truncated", 8: "no image", 17: "garbage", 18: "no caption", 30: "not UTF-8"}


def jpeg(number: int) -> bytes:
    generator = np.random.default_rng(number)
    file = io.BytesIO()
    pixels = generator.integers(0, 255, size=(20 + number % 7, 20 + number % 5, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "JPEG", quality=90)
    return file.getvalue()


def good(number: int) -> Sample:
    return Sample(f"s{number:03d}", {"jpg": jpeg(number), "txt": f"caption {number}".encode()})


def partly_bad(number: int) -> Sample:
    sample = good(number)
    what = BAD.get(number)
    if what == "truncated":
        sample.fields["jpg"] = sample.fields["jpg"][:-200]
    elif what == "garbage":
        sample.fields["jpg"] = b"<html>404</html>"
    elif what == "no image":
        del sample.fields["jpg"]
    elif what == "no caption":
        del sample.fields["txt"]
    elif what == "not UTF-8":
        sample.fields["txt"] = b"caf\xe9"
    return sample


def all_bad(number: int) -> Sample:
    return Sample(f"s{number}", {"jpg": b"\xff\xd8 no image", "txt": b"a caption"})


def many_captions(number: int) -> Sample:
    captions = [f"{number} {letter}" for letter in "abcd"]
    fields = {"jpg": jpeg(number), "txt": b"unused", "json": json.dumps({"captions": captions}).encode()}
    return Sample(f"s{number}", fields)


@pytest.fixture(scope="module")
def write(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    def write(make: Callable[[int], Sample], samples: int = SAMPLES) -> Path:
        folder = tmp_path_factory.mktemp("data") / "shards"
        write_shards(samples, make, folder, samples_per_shard=10, processes=0)
        return folder

    return write


@pytest.fixture(scope="module")
def dataset(write: Callable[..., Path]) -> Dataset:
    return open_dataset(write(good))


@pytest.fixture(scope="module")
def bad_dataset(write: Callable[..., Path]) -> Dataset:
    return open_dataset(write(partly_bad))


def maker_of(dataset: Dataset, training: bool = True, seed: int = SEED) -> BatchMaker:
    image = ImageTransform(SIZE, crop_scale=(0.4, 1.0), flip=True)
    return BatchMaker(dataset, image, TextTransform(Letters(), CONTEXT), seed, training)


def loader_of(dataset: Dataset, **options: Any) -> Loader:
    return Loader(maker_of(dataset), Order(len(dataset), SEED), **{"global_batch": 12, "stop_step": 8} | options)


def joined(batches: list[Batch]) -> Batch:
    tensors = {name: torch.cat([getattr(batch, name) for batch in batches]) for name in batches[0].tensors()}
    return Batch(**tensors, corrupt=[corrupt for batch in batches for corrupt in batch.corrupt])


def global_batches(dataset: Dataset, world: int = 1, workers: int = 0, **options: Any) -> list[Batch]:
    ranks = [list(loader_of(dataset, rank=rank, world=world, workers=workers, **options)) for rank in range(world)]
    return [joined(list(shares)) for shares in zip(*ranks, strict=True)]


def assert_same(one: list[Batch], other: list[Batch]) -> None:
    assert len(one) == len(other)
    for ours, theirs in zip(one, other, strict=True):
        for name, tensor in ours.tensors().items():
            assert torch.equal(tensor, getattr(theirs, name)), name
        assert ours.corrupt == theirs.corrupt


def text_of(row: torch.Tensor) -> str:
    return "".join(map(chr, row.tolist())).rstrip()


def test_shapes_and_what_is_in_a_row(dataset: Dataset) -> None:
    batch = next(iter(loader_of(dataset)))
    assert len(batch) == 12
    assert batch.image.shape == (12, 3, SIZE, SIZE)
    assert batch.image.dtype == torch.uint8
    assert batch.image.is_contiguous(memory_format=torch.channels_last)
    assert batch.text.shape == (12, CONTEXT)
    assert (batch.text.dtype, batch.sample.dtype, batch.position.dtype) == (torch.int64,) * 3
    assert batch.position.tolist() == list(range(12))
    assert batch.corrupt == []
    for text, sample in zip(batch.text, batch.sample.tolist(), strict=True):
        assert text_of(text) == f"caption {sample}"
    part = batch.rows(slice(3, 7))
    assert torch.equal(part.image, batch.image[3:7])
    assert len(part) == 4
    assert torch.equal(batch.to("cpu").text, batch.text)


@pytest.mark.parametrize("missing", ["image", "text"])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_modality_that_is_not_asked_for(dataset: Dataset, missing: str, workers: int) -> None:
    maker = maker_of(dataset)
    setattr(maker, missing, None)
    batches = list(Loader(maker, Order(SAMPLES, SEED), global_batch=12, stop_step=3, workers=workers))
    assert batches[2].image.shape == ((12, 3, 0, 0) if missing == "image" else (12, 3, SIZE, SIZE))
    assert batches[2].text.shape == ((12, 0) if missing == "text" else (12, CONTEXT))
    assert batches[2].sample.tolist() == Order(SAMPLES, SEED).sample_ids(np.arange(24, 36)).tolist()


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")
@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_global_batches_do_not_depend_on_ranks_and_workers(bad_dataset: Dataset, world: int, workers: int) -> None:
    expected = global_batches(bad_dataset)
    assert any(batch.corrupt for batch in expected)
    assert_same(global_batches(bad_dataset, world, workers), expected)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("start", [0, 1, 3, 7, 8])
def test_resuming_gives_the_tail(bad_dataset: Dataset, start: int, workers: int) -> None:
    loader = loader_of(bad_dataset, start_step=start, workers=workers)
    assert len(loader) == 8 - start
    assert_same(list(loader), global_batches(bad_dataset)[start:])
    assert_same(list(loader), global_batches(bad_dataset)[start:])  # and again from the same object


def test_an_epoch_reads_every_sample_once_across_its_border(dataset: Dataset) -> None:
    batches = global_batches(dataset, world=2, workers=1, global_batch=10, stop_step=12)
    samples = torch.cat([batch.sample for batch in batches]).tolist()
    epochs = [samples[start : start + SAMPLES] for start in range(0, 3 * SAMPLES, SAMPLES)]
    assert all(Counter(epoch) == Counter(range(SAMPLES)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_a_sample_is_cropped_anew_in_each_epoch_and_by_seed(dataset: Dataset) -> None:
    maker, other = maker_of(dataset), maker_of(dataset, seed=SEED + 1)
    sample = np.array([5])
    first, second = maker(np.array([0]), sample), maker(np.array([SAMPLES]), sample)
    assert not torch.equal(first.image, second.image)
    assert not torch.equal(first.image, other(np.array([0]), sample).image)
    assert torch.equal(first.image, maker(np.array([SAMPLES - 1]), sample).image)  # the place in the epoch is no matter


def test_evaluation_draws_nothing(dataset: Dataset) -> None:
    maker = maker_of(dataset, training=False)
    assert torch.equal(maker(np.array([0]), np.array([5])).image, maker(np.array([99]), np.array([5])).image)


def test_corrupt_samples_are_replaced_and_named(bad_dataset: Dataset) -> None:
    batch = joined(global_batches(bad_dataset))  # 96 positions: two epochs and more
    order = Order(SAMPLES, SEED).sample_ids(np.arange(96))
    expected = [sample for sample in order.tolist() if sample in BAD]
    named = [corrupt.sample for corrupt in batch.corrupt]
    assert set(named) == set(BAD)
    assert len(named) >= len(expected)  # a replacement may be corrupt too
    for corrupt in batch.corrupt:
        assert corrupt.key == f"s{corrupt.sample:03d}"
        assert corrupt.shard == f"shard-{corrupt.sample // 10:06d}.tar"
    reasons = {corrupt.sample: corrupt.reason for corrupt in batch.corrupt}
    assert "damaged JPEG" in reasons[3]
    assert reasons[8] == "it has no image"
    assert "not a JPEG" in reasons[17]
    assert reasons[18] == "it has no caption"
    assert "not UTF-8" in reasons[30]
    maker = maker_of(bad_dataset)
    for row, (planned, used) in enumerate(zip(order.tolist(), batch.sample.tolist(), strict=True)):
        assert used not in BAD
        assert used == planned or planned in BAD
        alone = maker(np.array([row // SAMPLES * SAMPLES]), np.array([used]))
        assert torch.equal(batch.image[row], alone.image[0])
        assert text_of(batch.text[row]) == f"caption {used}"


def test_a_seed_chooses_the_replacements(bad_dataset: Dataset) -> None:
    positions, samples = np.arange(20), np.full(20, 3)
    chosen = [maker_of(bad_dataset, seed=seed)(positions, samples).sample.tolist() for seed in (1, 1, 2)]
    assert chosen[0] == chosen[1] != chosen[2]
    assert len(set(chosen[0])) > 5  # one bad sample does not make one other sample frequent


@pytest.mark.parametrize("workers", [0, 2])
def test_a_data_set_beyond_repair_is_one_sentence(write: Callable[..., Path], workers: int) -> None:
    dataset = open_dataset(write(all_bad, samples=24))
    with pytest.raises(DataError, match=f"^{ATTEMPTS} draws in a row from .*damaged JPEG") as caught:
        list(loader_of(dataset, workers=workers))
    assert "\n" not in str(caught.value)
    assert "worker" not in str(caught.value)


def test_a_data_set_without_captions_is_told_in_our_words(write: Callable[..., Path]) -> None:
    dataset = open_dataset(write(lambda number: Sample(f"s{number}", {"jpg": jpeg(number)}), samples=24))
    with pytest.raises(DataError, match=r": it has no caption$"):  # no place in the code
        list(loader_of(dataset, workers=0))


def test_one_of_several_captions_by_seed_and_epoch(write: Callable[..., Path]) -> None:
    dataset = open_dataset(write(many_captions))
    batch = joined(global_batches(dataset, world=2, workers=1, stop_step=31))  # ten epochs
    drawn: dict[int, list[str]] = {sample: [] for sample in range(SAMPLES)}
    for text, sample in zip(batch.text, batch.sample.tolist(), strict=True):
        number, letter = text_of(text).split()
        assert int(number) == sample
        drawn[sample].append(letter)
    letters = Counter(letter for some in drawn.values() for letter in some)
    assert set(letters) == set("abcd")
    assert min(letters.values()) > 60  # of 372; 93 on average
    assert sum(len(set(some)) > 1 for some in drawn.values()) >= SAMPLES - 1
    evaluated = list(sequential_batches(maker_of(dataset, training=False), SAMPLES, 8))
    assert {text_of(text)[-1] for batch in evaluated for text in batch.text} == {"a"}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_truncated_shard_is_the_same_error_from_a_worker(write: Callable[..., Path], workers: int) -> None:
    folder = write(good)
    dataset = open_dataset(folder)
    dataset.read(0), dataset.read(15), dataset.read(25), dataset.read(35)  # the tables are loaded
    os.truncate(folder / "shard-000001.tar", 1000)
    with pytest.raises(DataError, match=r"shard-000001\.tar is truncated") as caught:
        list(loader_of(dataset, workers=workers))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_missing_shard_is_the_same_error_from_a_worker(write: Callable[..., Path], workers: int) -> None:
    folder = write(good)
    dataset = open_dataset(folder)
    (folder / "shard-000002.tar").unlink()
    with pytest.raises(FileNotFoundError, match=r"shard-000002\.tar"):
        list(loader_of(dataset, workers=workers))


def test_batches_that_are_kept_stay_as_they_are(dataset: Dataset) -> None:
    """More than there are slots: no batch may be written over while somebody holds a part of it."""
    steps = 3 * (2 * PREFETCH + HELD)
    kept = list(loader_of(dataset, workers=2, stop_step=steps))
    assert_same(kept, global_batches(dataset, stop_step=steps))
    parts, whole = [], global_batches(dataset, stop_step=steps)
    for batch in loader_of(dataset, workers=2, stop_step=steps):
        parts.append(batch.rows(slice(2, 3)).image[0, 1])  # a view of a view of a view
    gc.collect()
    assert all(torch.equal(part, batch.image[2, 1]) for part, batch in zip(parts, whole, strict=True))


def test_memory_is_used_again(dataset: Dataset) -> None:
    places = {batch.image.data_ptr() for batch in loader_of(dataset, workers=2, stop_step=40)}
    assert len(places) <= 2 * PREFETCH + HELD


def test_leaving_early_ends_the_workers(dataset: Dataset) -> None:
    assert workers_of() == []
    batches = iter(loader_of(dataset, workers=2, stop_step=10_000))
    kept = next(batches)
    workers = workers_of()
    assert len(workers) == 2
    del batches
    gc.collect()
    assert psutil.wait_procs(workers, timeout=400)[1] == []
    assert_same([kept], global_batches(dataset, stop_step=1))  # memory outlives the loader
    assert_no_segment_of([os.getpid(), *(process.pid for process in workers)])


def test_no_more_workers_than_batches(dataset: Dataset) -> None:
    batches = iter(loader_of(dataset, workers=5, stop_step=1))
    assert len(next(batches)) == 12
    assert len(workers_of()) == 1
    assert list(loader_of(dataset, workers=2, start_step=8)) == []


TRAINER = """
import signal, sys, time
from data_pipeline.batch import BatchMaker
from data_pipeline.loader import Loader
from data_pipeline.order import Order
from data_pipeline.reader import open_dataset
from data_pipeline.transforms import ImageTransform, TextTransform
from letters import Letters

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it

dataset = open_dataset(sys.argv[1])
maker = BatchMaker(dataset, ImageTransform(32), TextTransform(Letters(), 5000), 0, training=True)
for number, batch in enumerate(Loader(maker, Order(len(dataset), 0), global_batch=12, workers=2, stop_step=10**9)):
    if number == 3:
        print("ready", flush=True)
        time.sleep(float(sys.argv[2]))
"""


@pytest.mark.parametrize("sleep", [0, 600])
@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGKILL])
def test_workers_end_with_the_trainer(dataset: Dataset, ending: signal.Signals, sleep: float) -> None:
    """Ctrl-C (to the whole process group, as a terminal does) and the out-of-memory killer."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-c", TRAINER, str(dataset.folder), str(sleep)]
    trainer = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment, start_new_session=True
    )
    workers: list[psutil.Process] = []
    try:
        assert trainer.stdout is not None
        assert trainer.stdout.readline() == b"ready\n"
        workers = workers_of(trainer.pid)
        assert len(workers) == 2
        if ending is signal.SIGINT:
            os.killpg(trainer.pid, ending)
        else:
            trainer.send_signal(ending)
        assert trainer.wait(timeout=400) == -ending
        assert psutil.wait_procs(workers, timeout=400)[1] == []
        assert_no_segment_of([trainer.pid, *(worker.pid for worker in workers)])
    finally:
        trainer.kill()
        for worker in workers:
            if worker.is_running():
                worker.kill()
        trainer.communicate()


def assert_no_segment_of(processes: list[int]) -> None:
    """No file of torch's shared memory (torch_PID_...) is left."""
    shared = Path("/dev/shm")
    names = [path.name for path in shared.iterdir()] if shared.is_dir() else []
    assert [name for name in names if any(f"_{process}_" in name for process in processes)] == []


class Slow:
    """A tokenizer that takes its time, so that workers are at work whenever one looks."""

    def encode(self, text: str, context: int) -> np.ndarray:
        time.sleep(0.01)
        return Letters().encode(text, context)


def patience_for(how: signal.Signals) -> Patience:
    """One that no worker tries by being slow: only one that is stopped has to be found by its silence."""
    return Patience(silence=3.0 if how is signal.SIGSTOP else 600.0)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSEGV, signal.SIGSTOP])
def test_a_worker_that_dies_or_hangs_is_replaced_and_the_sequence_is_the_same(
    bad_dataset: Dataset, how: signal.Signals, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(loader_module, "PATIENCE", patience_for(how))
    maker = maker_of(bad_dataset)
    maker.text = TextTransform(Slow(), CONTEXT)
    batches, met, steps = [], set(), 24  # so many that the last worker to be met has more to do
    for batch in Loader(maker, Order(SAMPLES, SEED), global_batch=12, workers=2, stop_step=steps):
        batches.append(batch)
        if len(batches) in (2, 5, 8):
            worker = workers_of()[len(batches) % 2]
            met.add(worker.pid)
            worker.send_signal(how)
    assert len(met) == 3
    assert_same(batches, global_batches(bad_dataset, stop_step=steps))
    assert workers_of() == []
    told = capfd.readouterr().err
    words = "gave no sign of life for" if how is signal.SIGSTOP else f"was ended by {how.name}"
    assert told.count(f"weft: a loader worker {words}") == 3


def test_workers_are_made_anew_when_the_server_dies(dataset: Dataset) -> None:
    batches = []
    for batch in loader_of(dataset, workers=2, stop_step=12):
        batches.append(batch)
        if len(batches) == 3:
            server = fork_server.server_pid()
            assert server is not None
            os.kill(server, signal.SIGKILL)
    assert_same(batches, global_batches(dataset, stop_step=12))


class Deadly:
    """A tokenizer that ends the process that has one caption before it."""

    def __init__(self, caption: str, how: signal.Signals) -> None:
        self.caption, self.how = caption, how

    def encode(self, text: str, context: int) -> np.ndarray:
        if text == self.caption:
            os.kill(os.getpid(), self.how)
        return Letters().encode(text, context)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_sample_that_ends_every_worker_is_named(
    dataset: Dataset, how: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader_module, "PATIENCE", patience_for(how))
    monkeypatch.setattr(crew, "ATTEMPTS", 3)
    maker = maker_of(dataset)
    maker.text = TextTransform(Deadly("caption 13", how), CONTEXT)
    order = Order(SAMPLES, SEED)
    step = int(np.flatnonzero(order.sample_ids(np.arange(SAMPLES)) == 13)[0]) // 12
    batches = iter(Loader(maker, order, global_batch=12, workers=2, stop_step=3))
    for _ in range(step):
        next(batches)
    where = rf"at step {step + 1} while reading sample 's013' in shard-000001\.tar of "
    with pytest.raises(DataError, match=f"^3 loader workers in a row ended {where}") as caught:
        next(batches)
    assert "\n" not in str(caught.value)
    assert workers_of() == []


def test_nothing_is_forked_from_a_process_with_threads(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever threads are alive: workers are children of a process that has one thread and is no fork of this."""

    def refuse() -> int:
        raise AssertionError("forked")

    monkeypatch.setattr(os, "fork", refuse)
    over = threading.Event()
    threads = [threading.Thread(target=over.wait) for _ in range(50)]
    for thread in threads:
        thread.start()
    try:
        batches = iter(loader_of(dataset, workers=2))
        next(batches)
        server = psutil.Process(fork_server.server_pid())
        assert [worker.ppid() for worker in workers_of()] == [server.pid] * 2
        assert server.ppid() == os.getpid()
        assert server.num_threads() == 1
        assert server.cmdline()[1] == "-c"
        batches.close()
    finally:
        over.set()
        for thread in threads:
            thread.join()


def test_workers_serve_a_process_with_more_than_a_thousand_open_files(dataset: Dataset) -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, limits[1]), limits[1]))
    with ExitStack() as stack:
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, limits)
        for _ in range(1100):
            stack.enter_context(open(os.devnull, "rb"))
        assert_same(list(loader_of(dataset, workers=2)), global_batches(dataset))


def test_a_mistake_that_every_sample_meets_is_told_with_its_place(dataset: Dataset) -> None:
    maker = maker_of(dataset)
    maker.text = TextTransform(Wrong(), CONTEXT)
    with pytest.raises(DataError, match=r"16 draws in a row .*.*ZeroDivisionError in transforms\.py, line \d+"):
        list(Loader(maker, Order(SAMPLES, SEED), global_batch=12, workers=2, stop_step=3))


class Wrong:
    def encode(self, text: str, context: int) -> np.ndarray:
        raise ZeroDivisionError


@pytest.mark.parametrize("workers", [0, 2])
def test_pinned_batches_are_the_same(dataset: Dataset, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_that_memory_can_be_pinned(monkeypatch)
    assert_same(list(loader_of(dataset, workers=workers, pin=True)), global_batches(dataset))
    threads = threading.active_count()
    batches = iter(loader_of(dataset, workers=workers, pin=True, stop_step=10**6))
    kept = next(batches)
    batches.close()
    assert threading.active_count() == threads
    assert workers_of() == []
    assert_same([kept], global_batches(dataset, stop_step=1))
    maker = maker_of(dataset)
    maker.text = TextTransform(Wrong(), CONTEXT)
    with pytest.raises(DataError, match="ZeroDivisionError"):
        list(Loader(maker, Order(SAMPLES, SEED), global_batch=12, workers=workers, stop_step=3, pin=True))


@pytest.mark.parametrize("kept", [0, 20])
def test_pinning_gives_its_slots_back(dataset: Dataset, kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread opens the parcels and lets go of their slots; what the trainer keeps is the pinned copy, not a slot."""
    pretend_that_memory_can_be_pinned(monkeypatch)
    taken: list[int] = []
    take = Slots.take

    def noted(slots: Slots) -> Slot:
        slot = take(slots)
        taken.append(slot.number)
        return slot

    monkeypatch.setattr(Slots, "take", noted)
    held: deque[Batch] = deque(maxlen=kept)
    numbers = []
    for batch in loader_of(dataset, workers=2, pin=True, global_batch=2, stop_step=1000):
        numbers.append(batch.position.tolist())
        held.append(batch)
    assert numbers == [[2 * step, 2 * step + 1] for step in range(1000)]
    assert len(taken) == 1000
    assert 0 <= min(taken) <= max(taken) < 2 * PREFETCH + HELD, "none has got memory of its own"
    if kept:
        assert_same(list(held), list(loader_of(dataset, global_batch=2, start_step=1000 - kept, stop_step=1000)))


def pretend_that_memory_can_be_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a card the memory is page-locked; here the copy, and the thread that makes it, is all there is to see."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    monkeypatch.setattr(torch.accelerator, "set_device_index", lambda index: None)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor.clone())


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"global_batch": 0}, "global batch 0 does not fit a data set of 37 samples"),
        ({"global_batch": 38}, "global batch 38 does not fit a data set of 37 samples"),
        ({"global_batch": 12, "world": 5}, "global batch 12 does not divide by 5 ranks: give 10 or 15"),
        ({"global_batch": 2, "world": 3}, "global batch 2 does not divide by 3 ranks: give 3 or 3"),
        ({"world": 2, "rank": 2}, "rank 2 of 2 ranks"),
        ({"rank": -1}, "rank -1 of 1 ranks"),
        ({"workers": -1}, "workers is -1"),
    ],
)
def test_what_does_not_fit_is_refused(dataset: Dataset, options: dict[str, int], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        loader_of(dataset, **options)


def test_an_order_of_another_data_set_is_refused(dataset: Dataset) -> None:
    with pytest.raises(ValueError, match="the order is of 36 samples, the data set of 37"):
        Loader(maker_of(dataset), Order(36, 0), global_batch=4, stop_step=1)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("samples", [SAMPLES, 16, 3, 0])
def test_evaluation_covers_each_sample_once(dataset: Dataset, samples: int, world: int, workers: int) -> None:
    maker = maker_of(dataset, training=False)
    ranks = [list(sequential_batches(maker, samples, 8, rank, world, workers)) for rank in range(world)]
    for rank, batches in enumerate(ranks):
        numbers = range(rank, -(-samples // 8), world)
        assert [batch.sample.tolist() for batch in batches] == [
            list(range(8 * number, min(8 * number + 8, samples))) for number in numbers
        ]
    alone = joined([*sequential_batches(maker, SAMPLES, 64)])
    for batch in (batch for batches in ranks for batch in batches):
        assert torch.equal(batch.image, alone.image[batch.sample])
        assert torch.equal(batch.text, alone.text[batch.sample])


def test_evaluation_of_more_than_there_is_is_refused(dataset: Dataset) -> None:
    with pytest.raises(ValueError, match="38 samples asked of"):
        list(sequential_batches(maker_of(dataset), SAMPLES + 1, 8))


def test_corrupt_is_plain_data() -> None:
    corrupt = Corrupt(3, "s003", "shard-000000.tar", "damaged")
    assert json.loads(json.dumps(dataclasses.asdict(corrupt)))["reason"] == "damaged"
