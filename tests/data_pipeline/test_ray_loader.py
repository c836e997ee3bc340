"""Batches from Ray: those of the loader in process, byte by byte, whatever is killed. Real Ray, private network."""

from __future__ import annotations

import getpass
import io
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from private_network import MARK, in_private_network, marked

from data_pipeline.batch import Batch, BatchMaker
from data_pipeline.block_order import BlockOrder
from data_pipeline.buckets import BucketOrder, bucket_sizes
from data_pipeline.errors import DataError
from data_pipeline.joined import Joined
from data_pipeline.loader import Loader
from data_pipeline.mixture import Mixture, Phase
from data_pipeline.order import Order
from data_pipeline.reader import open_dataset
from data_pipeline.sample import Sample
from data_pipeline.shards import write_shards
from data_pipeline.sound import AudioTransform
from data_pipeline.tokenizer import Tokenizer
from data_pipeline.transforms import ImageTransform, QuestionTransform, TextTransform

pytest.importorskip("ray")

SAMPLES, SEED, STEPS = 75, 5, 40  # 12 rows a step: six epochs, whose borders lie within batches
pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures with captions, of which some cannot be used."""
    folder = tmp_path_factory.mktemp("data") / "shards"
    write_shards(SAMPLES, _sample, folder, samples_per_shard=20, processes=0)
    return folder


def _sample(number: int) -> Sample:
    file = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 255, (30, 24, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "JPEG")
    image = file.getvalue()[:-300] if number in (7, 40) else file.getvalue()
    fields = {"jpg": image, "txt": f"picture number {number}".encode()}
    if number % 3:
        fields["flac"] = _flac(number)
    if number % 4:
        asked = [{"question": f"number {part} of {number}", "answer": f"{part}"} for part in range(number % 4)]
        fields["json"] = json.dumps({"qa": asked}).encode()
    return Sample(f"s{number}", fields)


def _flac(number: int) -> bytes:
    """Sounds of 0.1 s to 0.8 s."""
    file = io.BytesIO()
    wave = np.random.default_rng(number).normal(0, 0.1, 1600 * (1 + number % 8))
    soundfile.write(file, wave, 16_000, format="FLAC")
    return file.getvalue()


def _maker(folder: Path, kind: type[BatchMaker] = BatchMaker) -> BatchMaker:
    tokenizer = Tokenizer.train(["picture number 0123456789"], 270)
    image = ImageTransform(16, crop_scale=(0.4, 1.0), flip=True)
    return kind(open_dataset(folder), image, TextTransform(tokenizer, 24), SEED, training=True)


def _hearing_maker(folder: Path) -> BatchMaker:
    """One that reads sounds and questions too, where there are any."""
    maker = _maker(folder)
    assert maker.text is not None
    return BatchMaker(
        maker.dataset,
        maker.image,
        maker.text,
        SEED,
        training=True,
        audio=AudioTransform(frames=30, mels=20),
        question=QuestionTransform(maker.text.tokenizer, 16, 4),
        optional=frozenset({"audio", "question"}),
    )


def _same(found: list[Batch], expected: list[Batch]) -> None:
    assert len(found) == len(expected)
    for mine, other in zip(found, expected, strict=True):
        for name, tensor in mine.tensors().items():
            assert torch.equal(tensor, getattr(other, name)), name
        assert mine.image.stride() == other.image.stride()
        assert mine.corrupt == other.corrupt


@contextmanager
def _ray(**settings: Any) -> Iterator[None]:
    import ray

    from data_pipeline.ray_cluster import connect, disconnect

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # decoders cannot import a test
    connect("local", 6, 100 << 20)
    try:
        yield
    finally:
        disconnect()  # also with a pool that nobody has left: its thread must not ask what has gone


def _actors() -> list[str]:
    import ray

    return sorted(each["name"] for each in ray.util.list_named_actors(all_namespaces=True))


def _eventually(holds: Callable[[], bool], seconds: float = 400) -> None:
    ends = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < ends, "it never came"
        time.sleep(0.1)


# --- the sequence


def same_batches(folder: Path) -> None:
    """1, 2, 4 decoders; 1, 2, 4 ranks; from the start and from ten steps on the way."""
    from data_pipeline.ray_loader import RayLoader
    from data_pipeline.ray_pool import Pool

    maker, order = _maker(folder), Order(SAMPLES, SEED)
    settings: dict[str, Any] = {"global_batch": 12, "stop_step": STEPS}
    truth = {
        (rank, world): list(Loader(maker, order, rank=rank, world=world, **settings))
        for world in (1, 2, 4)
        for rank in range(world)
    }
    assert any(batch.corrupt for batch in truth[0, 1])
    with _ray():
        keeper = Pool("same", maker, order, 99, 100, decoders=1)  # so that the decoders stay from loader to loader
        for decoders, world in ((1, 1), (2, 2), (4, 4)):
            keeper.want(decoders)
            _eventually(lambda decoders=decoders: keeper.size == decoders)
            for rank in range(world):
                loader = RayLoader(maker, order, pool="same", rank=rank, world=world, processes=100, **settings)
                _same(list(loader), truth[rank, world])
        for start in np.random.default_rng(0).integers(1, STEPS, 10).tolist():
            loader = RayLoader(maker, order, pool="same", processes=100, start_step=start, **settings)
            assert len(loader) == STEPS - start
            _same(list(loader), truth[0, 1][start:])
        hearing = _hearing_maker(folder)
        heard = list(Loader(hearing, order, **settings))
        assert all(0 < int((batch.audio_frames > 0).sum()) < 12 for batch in heard)
        _same(list(RayLoader(hearing, order, pool="hearing", decoders=2, **settings)), heard)
        aspects = np.random.default_rng(0).choice([0.6, 1.0, 1.7], SAMPLES)  # made up: crops of any shape can be had
        shaped = BucketOrder(aspects, bucket_sizes(16, patch=4), 12, SEED)
        expected = list(Loader(maker, shaped, **settings))
        assert len({batch.image.shape for batch in expected}) == 3
        _same(list(RayLoader(maker, shaped, pool="shaped", decoders=2, **settings)), expected)
        parts_of = Joined([maker.dataset, open_dataset(folder)])
        mixing = BatchMaker(parts_of, maker.image, maker.text, SEED, training=True)
        orders = (BlockOrder(SAMPLES, 1, 8, 3), Order(SAMPLES, 2))
        mixture = Mixture(orders, [Phase(0, (3, 1)), Phase(200, (1, 1))], SEED)
        for start in (0, 7, 23):
            options = settings | {"start_step": start}
            mixed = RayLoader(mixing, mixture, pool="mixed", decoders=2, processes=100, **options)
            _same(list(mixed), list(Loader(mixing, mixture, **options)))
        whole = truth[0, 1]
        parts = [truth[rank, 4] for rank in range(4)]
        for step in range(STEPS):
            assert torch.equal(torch.cat([part[step].sample for part in parts]), whole[step].sample)


def test_the_same_batches_as_in_process(folder: Path) -> None:
    in_private_network(same_batches, folder)


class Slow(BatchMaker):
    def __call__(self, *arguments: Any) -> Batch:
        time.sleep(0.3)
        return super().__call__(*arguments)


class Deadly(BatchMaker):
    """One position ends whatever process makes it."""

    def __call__(self, positions: np.ndarray, *arguments: Any) -> Batch:
        if 50 in positions:
            os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(60)  # another thread may be the one that it meets first
        return super().__call__(positions, *arguments)


def limits(folder: Path) -> None:
    """Memory, growth, errors, and what is left when all have left."""
    from data_pipeline import ray_loader
    from data_pipeline.ray_loader import RayLoader

    order, settings = Order(SAMPLES, SEED), {"global_batch": 12, "stop_step": STEPS}
    with _ray():
        endless = {"global_batch": 12, "stop_step": 1000 * STEPS}
        slow = RayLoader(
            _maker(folder, Slow), order, pool="slow", most_decoders=3, memory=3 * 12 * 16 * 16 * 3, **endless
        )
        batches, sizes, deadline = iter(slow), [0], time.monotonic() + 500
        while sizes[-1] < 3:  # the trainer waits for data, and decoders are added: they take seconds to start
            assert len(next(batches)) == 12
            assert time.monotonic() < deadline, f"decoders: {sizes}"
            assert slow.pool is not None
            sizes.append(slow.pool.size)
            assert sum(slow.pool._asked.values()) <= 3, "more is asked for than memory holds"
        assert sizes[1] == 1
        batches.close()
        _eventually(lambda: not _actors())

        ray_loader.ATTEMPTS = 3
        with pytest.raises(DataError, match=r"step 4, positions 48 to 59 of .*shards: 3 decoders in a row could not"):
            list(RayLoader(_maker(folder, Deadly), order, pool="deadly", decoders=2, **settings))

        with pytest.raises(ValueError, match="global batch 12 does not divide by 5 ranks"):
            RayLoader(_maker(folder), order, pool="uneven", world=5, **settings)
        shard = sorted(folder.glob("*.tar"))[1]
        maker = _maker(folder)
        size = shard.stat().st_size
        os.truncate(shard, size // 2)
        sentences = []
        for loader in (RayLoader(maker, order, pool="cut", **settings), Loader(maker, order, **settings)):
            with pytest.raises(DataError, match="truncated: sample") as caught:
                list(loader)
            sentences.append(str(caught.value))
        assert sentences[0] == sentences[1]


@pytest.mark.slow
def test_memory_growth_and_errors(folder: Path, tmp_path: Path) -> None:
    own = tmp_path / "shards"
    write_shards(SAMPLES, _sample, own, samples_per_shard=20, processes=0)
    in_private_network(limits, own)


# --- faults


def _kill(pid: int, number: int = signal.SIGKILL) -> None:
    os.kill(pid, number)


def faults(folder: Path, times: int, with_nodes: bool) -> dict[str, int]:
    """Kill and stop whatever there is while batches are read; how often each was done."""
    import ray
    from ray.cluster_utils import Cluster

    from data_pipeline.ray_cluster import connect
    from data_pipeline.ray_loader import RayLoader
    from data_pipeline.ray_pool import Times

    generator = np.random.default_rng(1)
    maker, order = _maker(folder), Order(SAMPLES, SEED)
    os.environ.update(RAY_health_check_period_ms="1000", RAY_health_check_failure_threshold="2")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": 80 << 20})
    node_settings = {"num_cpus": 2, "object_store_memory": 80 << 20}
    nodes = [cluster.add_node(**node_settings)]
    connect(cluster.address)
    done = dict.fromkeys(["decoder killed", "decoder stopped", "coordinator killed", "raylet killed"], 0)

    def decoder(number: int) -> None:
        assert loader.pool is not None
        hand = loader.pool.pick()
        loader.pool.done(hand)
        _kill(ray.get(hand.actor.ping.remote(), timeout=120)[1], number)

    def coordinator() -> None:
        assert loader.pool is not None
        _kill(ray.get(loader.pool._coordinator.process.remote(), timeout=120))

    def raylet() -> None:
        _kill(nodes[-1].all_processes["raylet"][0].process.pid)
        nodes.append(cluster.add_node(**node_settings))

    kinds: dict[str, Callable[[], None]] = {
        "decoder killed": lambda: decoder(signal.SIGKILL),
        "decoder stopped": lambda: decoder(signal.SIGSTOP),
        "coordinator killed": coordinator,
        "raylet killed": raylet,
    }
    if not with_nodes:
        del kinds["raylet killed"]

    plan = [kind for kind in kinds for _ in range(times)]
    generator.shuffle(plan)
    times = Times(silence=4.0)
    loader = RayLoader(maker, order, pool="faults", decoders=2, times=times, global_batch=12, stop_step=1000 * STEPS)
    found: list[Batch] = []
    next_strike = 0.0
    for batch in loader:
        found.append(batch)
        if plan and time.monotonic() > next_strike:
            with suppress(ray.exceptions.RayError):  # it was hit already: another time
                kinds[plan[0]]()
                done[plan.pop(0)] += 1
            next_strike = time.monotonic() + generator.uniform(0.1, 1.5)
        time.sleep(0.02)
        if not plan and len(found) >= STEPS:
            break
    _same(found, list(Loader(maker, order, global_batch=12, stop_step=len(found))))
    ray.shutdown()
    cluster.shutdown()
    return done


def test_kills_change_nothing(folder: Path) -> None:
    done = in_private_network(faults, folder, 1, False)
    assert [done[kind] for kind in ("decoder killed", "decoder stopped", "coordinator killed")] == [1, 1, 1]


@pytest.mark.slow
def test_kills_and_lost_nodes_change_nothing(folder: Path) -> None:
    done = in_private_network(faults, folder, 5, True, timeout=1100)
    assert set(done.values()) == {5}


def leases(folder: Path) -> None:
    """A process that reads is killed: what it had started on the cluster ends by itself."""
    import subprocess

    from data_pipeline.ray_cluster import connect

    address = connect("local", 4, 80 << 20)
    child = subprocess.Popen([sys.executable, __file__, "reader", address, str(folder)], stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    assert _actors() == ["left/coordinator", "left/decoder-0"]
    child.kill()
    child.wait()
    _eventually(lambda: not _actors())


def _read_on(address: str, folder: Path) -> None:
    from data_pipeline.ray_cluster import connect
    from data_pipeline.ray_pool import Pool, Times

    connect(address)
    pool = Pool("left", _maker(folder), Order(SAMPLES, SEED), 0, 1, decoders=1, times=Times(lease=30.0))
    pool.pick()
    time.sleep(40)  # longer than a lease: it is kept alive by reports
    pool.pick()
    print("it reads", flush=True)
    time.sleep(600)


@pytest.mark.slow
def test_what_a_killed_trainer_leaves_ends_by_itself(folder: Path) -> None:
    in_private_network(leases, folder)


# --- the trainer


def trained(data: Path, runs: Path, loader: list[str]) -> list[float]:
    """Losses of a run with two ranks; nothing of Ray is left behind."""
    import json
    import subprocess

    small = ["model.vision.image_size=32", "model.vision.layers=1", "model.text.layers=1", "train.warmup=2"]
    command = [sys.executable, "-m", "pretrain.cli", "train", "quickstart", f"data.train={data}", "eval.every=0"]
    command += [f"run.dir={runs}", "train.steps=10", "train.global_batch=8", "train.log_every=1", *small, *loader]
    ended = subprocess.run([*command, "--nproc", "2"], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-3000:]
    _eventually(lambda: marked(os.environ[MARK]) == [os.getpid()])
    lines = [json.loads(line) for line in (runs / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines]


@pytest.mark.slow
def test_training_is_the_same(folder: Path, tmp_path: Path) -> None:
    losses = [
        in_private_network(trained, folder, tmp_path / name, [f"data.loader={name}", "data.test=null"])
        for name in ("ray", "inprocess")
    ]
    assert len(losses[0]) == 10
    assert losses[0] == losses[1]


def interrupted(data: Path, runs: Path) -> None:
    """Ctrl-C in the middle of a run on Ray: it saves, and leaves no process, no shared memory, no temporary file."""
    import subprocess

    def shared_memory() -> set[str]:
        return {path.name for path in Path("/dev/shm").glob("*")}

    before = shared_memory()
    temporary = Path(tempfile.mkdtemp(prefix="c-", dir="/tmp"))
    small = ["model.vision.image_size=32", "model.vision.layers=1", "model.text.layers=1", "data.test=null"]
    command = [sys.executable, "-m", "pretrain.cli", "train", "quickstart", f"data.train={data}", "data.loader=ray"]
    command += [f"run.dir={runs}", "train.steps=100000", "train.global_batch=8", "train.log_every=1", *small]
    running = subprocess.Popen(
        [*command, "--nproc", "2"], stderr=subprocess.PIPE, text=True, env=os.environ | {"TMPDIR": str(temporary)}
    )
    assert running.stderr is not None
    for line in running.stderr:
        if line.startswith("step 5/"):
            used = [path.name for path in temporary.glob("weft-ray-*")]
            running.send_signal(signal.SIGINT)
            break
    rest = running.stderr.read()
    assert running.wait(400) == 130, rest[-3000:]
    assert "to go on: weft train" in rest
    _eventually(lambda: marked(os.environ[MARK]) == [os.getpid()])
    _eventually(lambda: shared_memory() <= before)  # another test may use some for a moment
    assert used, "it should have kept its files there"
    left = {path.name for path in temporary.iterdir()}
    shutil.rmtree(temporary)
    assert left <= {f"torchinductor_{getpass.getuser()}"}, "torch's cache of what it compiles is to stay"


@pytest.mark.slow
def test_ctrl_c_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    in_private_network(interrupted, folder, tmp_path / "run")


if __name__ == "__main__" and sys.argv[1:2] == ["reader"]:
    _read_on(sys.argv[2], Path(sys.argv[3]))
