"""The loaders that others use, at the same work as ours: each in a process of its own that `loader.py` asks for rounds.

    mosaicml-streaming    an MDS copy of the samples, StreamingDataset and StreamingDataLoader
    megatron-energon      the shards with its index beside them, get_train_dataset as in its quickstart, and get_loader
    Ray Data              read_webdataset on the shards, map and iter_torch_batches, on a Ray of its own

Design choices:
- What is not said here is left at the peer's own default. Every peer decodes with PIL, and makes of the PIL image what
  torchvision's Resize, CenterCrop, ToTensor and Normalize make, in the workers, as float32: `pil_pixels`. torchvision
  itself does not load beside torch's CPU build. By default energon decodes to float tensors and Ray Data to arrays;
  they are asked for a PIL image and for bytes, with which they are faster: what differs is then the loader.
- A process for each: what a peer imports weighs on nobody's memory and forks, and one that fails ends nobody else.
- Only rounds count: not importing, nor writing the copy, nor starting Ray and its workers, which would weigh in a round
  as they do not in a run. CPU time is that of the peer's process and all below it, Ray's own processes too.
- mosaicml-streaming and Ray Data get as many samples as a round takes, so that none pays for the start of an epoch.
"""

from __future__ import annotations

import gc
import io
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from data_pipeline.bench.measure import Speed, measure, pil_pixels
from data_pipeline.ray_token import guard_own_ray

GRACE = 60.0  # seconds for a peer to end: longer than a round that nobody waits for any more
START = "from data_pipeline.bench.peers import serve; serve()"
SHUFFLE = 100  # energon's two sizes without a default, as in its quickstart


@dataclass(frozen=True)
class Job:
    """What every way is to do: `steps` batches of `batch` images of size x size, by `workers` processes."""

    shards: list[str]  # WebDataset tars with a jpg each sample
    images: int  # samples in them
    folder: str  # for a peer's own files
    size: int  # pixels
    batch: int
    steps: int
    workers: int

    @property
    def samples(self) -> int:
        """In a round."""
        return self.steps * self.batch


def _load_mosaicml() -> None:
    import streaming  # noqa: F401


def _write_mosaicml(job: Job) -> None:
    """Its own format, MDS, with the JPEGs as they are."""
    import webdataset
    from streaming import MDSWriter

    jpegs = [sample["jpg"] for sample in webdataset.WebDataset(job.shards, shardshuffle=False)]
    with MDSWriter(out=job.folder, columns={"jpg": "bytes"}) as writer:
        for jpeg in islice(cycle(jpegs), job.samples):
            writer.write({"jpg": jpeg})


def _mosaicml(job: Job) -> Iterator[torch.Tensor]:
    from streaming import StreamingDataLoader, StreamingDataset

    class Images(StreamingDataset):
        """As its documentation has it: samples transformed when they are asked for."""

        def __getitem__(self, at: Any) -> torch.Tensor:
            return pil_pixels(Image.open(io.BytesIO(super().__getitem__(at)["jpg"])), job.size)

    usual = tempfile.tempdir
    tempfile.tempdir = job.folder  # where it leaves files to lock
    try:
        dataset = Images(local=job.folder, batch_size=job.batch)
    finally:
        tempfile.tempdir = usual
    yield from islice(StreamingDataLoader(dataset, batch_size=job.batch, num_workers=job.workers), job.steps)


def _load_energon() -> None:
    import megatron.energon  # noqa: F401


def _index_for_energon(job: Job) -> None:
    """Its own files about the shards, beside links to them."""
    from megatron.energon.flavors.webdataset.prepare import WebdatasetPreparator

    for shard in job.shards:
        (Path(job.folder) / Path(shard).name).symlink_to(shard)
    names = [Path(shard).name for shard in job.shards]
    WebdatasetPreparator.prepare_dataset(job.folder, names, split_parts_ratio=[("train", 1.0)], workers=1)
    about = "sample_type: {__module__: megatron.energon, __class__: ImageSample}\nfield_map: {image: jpg}\n"
    (Path(job.folder) / ".nv-meta" / "dataset.yaml").write_text(about)


def _energon(job: Job) -> Iterator[Any]:
    from megatron.energon import (
        DefaultTaskEncoder,
        SampleDecoder,
        WorkerConfig,
        get_loader,
        get_train_dataset,
        stateless,
    )

    class Encoder(DefaultTaskEncoder):
        """PIL images, where its default makes float tensors of whole images first."""

        decoder = SampleDecoder(image_decode="pilrgb")

        @stateless
        def encode_sample(self, sample: Any) -> Any:
            sample.image = pil_pixels(sample.image, job.size)
            return sample

    dataset = get_train_dataset(
        job.folder,
        worker_config=WorkerConfig(rank=0, world_size=1, num_workers=job.workers),
        batch_size=job.batch,
        shuffle_buffer_size=SHUFFLE,
        max_samples_per_sequence=SHUFFLE,
        task_encoder=Encoder(),
    )
    yield from islice(get_loader(dataset), job.steps)


def _load_ray() -> None:
    guard_own_ray()
    import ray.data

    ray.data.DataContext.get_current().enable_progress_bars = False


@contextmanager
def _own_ray(job: Job) -> Iterator[None]:
    """A Ray of this process, with as many processors as the others have workers, whose workers have started."""
    from data_pipeline.ray_cluster import connect, disconnect

    connect("local", processors=max(1, job.workers))
    try:
        for _ in _ray_data(replace(job, steps=max(1, job.workers))):
            pass
        yield
    finally:
        disconnect()


def _ray_data(job: Job) -> Iterator[Any]:
    import ray.data

    def pixels(sample: dict[str, Any]) -> dict[str, Any]:
        return {"image": pil_pixels(Image.open(io.BytesIO(sample["jpg"])), job.size).numpy()}

    passes = -(-job.samples // job.images)
    dataset = ray.data.read_webdataset(job.shards * passes, decoder=None).map(pixels)
    yield from islice(dataset.iter_torch_batches(batch_size=job.batch, drop_last=True), job.steps)


def _nothing(job: Job) -> None:
    """Of a peer that reads the shards as they are."""


@dataclass(frozen=True)
class Peer:
    """A loader of others: how it is named, imported, given the samples, and read."""

    label: str
    distribution: str  # what pip installs
    load: Callable[[], None]
    prepare: Callable[[Job], None]
    batches: Callable[[Job], Iterator[Any]]
    running: Callable[[Job], AbstractContextManager[Any]] = lambda job: (
        nullcontext()
    )  # what a round needs, and does not count


PEERS = {
    "mosaicml_streaming": Peer("mosaicml-streaming", "mosaicml-streaming", _load_mosaicml, _write_mosaicml, _mosaicml),
    "megatron_energon": Peer("megatron-energon", "megatron-energon", _load_energon, _index_for_energon, _energon),
    "ray_data": Peer("Ray Data", "ray", _load_ray, _nothing, _ray_data, _own_ray),
}


class PeerProcess:
    """A peer in a process of its own: `round` measures once; `missing` says why it cannot, None as long as it can."""

    def __init__(self, name: str, job: Job) -> None:
        self.missing: str | None = None
        self._process: subprocess.Popen[str] | None = None
        try:
            metadata.version(PEERS[name].distribution)
        except metadata.PackageNotFoundError:
            self.missing = "not installed"
            return
        self._log = Path(job.folder + ".log")
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-c", START, name, json.dumps(asdict(job))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )
        try:
            self.missing = self._answer().get("missing")
        except BaseException:
            self.close()
            raise

    def round(self, weigh: bool = False) -> Speed | None:
        """Measure the peer once; None when it is missing, or fails now."""
        if self.missing is not None or self._process is None:
            return None
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended: the answer will say so
            self._process.stdin.write("weigh\n" if weigh else "go\n")
            self._process.stdin.flush()
        answer = self._answer()
        self.missing = answer.get("missing")
        return None if self.missing is not None else Speed(**answer)

    @property
    def pid(self) -> int | None:
        """Of its process; None when there is none."""
        return None if self._process is None else self._process.pid

    def close(self) -> None:
        """End the process; it ends its own."""
        if self._process is None:
            return
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(GRACE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._process = None

    def _answer(self) -> dict[str, Any]:
        """What the process says next; when it has ended instead, the last line of its complaint."""
        assert self._process is not None
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            answer: dict[str, Any] = json.loads(line)
            return answer
        code = self._process.wait()
        lines = self._log.read_text(errors="replace").strip().splitlines() or ["it said nothing"]
        return {"missing": f"failed with exit code {code}: {lines[-1]}"}


def serve() -> None:
    """The process of a peer: prepare, then a measurement for each line of standard input; answers are lines of JSON."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # peers print
    peer, job = PEERS[sys.argv[1]], Job(**json.loads(sys.argv[2]))
    torch.set_num_threads(1)
    try:
        peer.load()
    except (ImportError, RuntimeError, OSError) as error:  # torchvision beside another build of torch: RuntimeError
        print(json.dumps({"missing": _why(error)}), file=answers)
        return
    peer.prepare(job)
    print(json.dumps({}), file=answers)
    for line in sys.stdin:
        with peer.running(job):
            speed = measure(
                lambda: peer.batches(job), job.steps, job.batch, job.workers, live=True, weigh=line == "weigh\n"
            )
        print(json.dumps(asdict(speed)), file=answers)
        gc.collect()  # workers that a loader keeps end with it


def _why(error: Exception) -> str:
    """Why a peer that is installed does not import, in a few words."""
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    if "torchvision" in text:
        return "needs torchvision" if isinstance(error, ImportError) else f"needs torchvision that loads ({text})"
    if isinstance(error, ModuleNotFoundError):
        return f"needs {error.name}"
    return f"does not import ({text})"
