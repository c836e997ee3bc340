"""The batches that a rank trains on, from the loader that the recipe names; the sequence is the same from each.

Ranks that train on the same share (tensor parallel ones, stages) have one reader among them, which sends each batch to
the others: what is decoded is decoded once, however many ranks hold pieces of the model.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from typing import Any

import torch
import torch.distributed as dist

from data_pipeline import (
    Batch,
    BatchMaker,
    DataError,
    Dataset,
    ImageTransform,
    Joined,
    Loader,
    ReadingOrder,
    TextTransform,
    Tokenizer,
)
from pretrain.config import Recipe
from pretrain.errors import RequestError
from pretrain.parallel.first import sendable
from pretrain.parallel.groups import Ranks

Batches = Generator[Batch, None, None]
STORE = 2  # the memory of Ray's object store over that of batches in advance: those in use lie there too


@contextmanager
def ingest(
    recipe: Recipe,
    dataset: Dataset | Joined,
    order: ReadingOrder,
    tokenizer: Tokenizer,
    ranks: Ranks,
    start: int,
    stop: int,
) -> Iterator[Batches]:
    """This rank's batches of steps start .. stop - 1; whoever makes them is gone when they are closed.

    Every rank calls this. Raises RequestError where the loader is not installed, DataError without a Ray.
    """
    maker = BatchMaker(
        dataset,
        ImageTransform(recipe.model.vision.image_size, recipe.data.crop_scale, recipe.data.flip),
        TextTransform(tokenizer, recipe.model.text.context),
        recipe.run.seed,
        training=True,
    )
    read = _from_ray if recipe.data.loader == "ray" else _in_process
    with read(recipe, maker, order, ranks, start, stop) as batches:
        yield batches if ranks.copy_group is None else _shared(batches, ranks, range(start, stop))


@contextmanager
def _in_process(
    recipe: Recipe, maker: BatchMaker, order: ReadingOrder, ranks: Ranks, start: int, stop: int
) -> Iterator[Batches]:
    loader = Loader(
        maker,
        order,
        global_batch=recipe.train.global_batch,
        rank=ranks.dp_rank,
        world=ranks.dp_size,
        workers=recipe.data.workers,
        start_step=start,
        stop_step=stop,
        pin=ranks.device.type == "cuda",
    )
    with closing(iter(loader)) as batches:
        yield batches


def _shared(batches: Batches, ranks: Ranks, steps: range) -> Batches:
    """The reader's batches on all ranks of its copy, on their devices; elsewhere `batches` is never begun.

    Any error of the reader is raised on every rank. What could not be used is told by the reader alone. All shapes are
    told at the first step; later only the height and width of the pictures may change (data.aspect).
    """
    group = ranks.copy_group
    assert group is not None
    reader = dist.get_global_rank(group, 0)
    shapes: dict[str, tuple[torch.Size, torch.dtype]] = {}
    with closing(batches):
        for step in steps:
            batch = None
            told: list[Any] = [None]
            if ranks.is_reader:
                try:
                    batch = next(batches).to(ranks.device)
                    told = [{name: (sent.shape, sent.dtype) for name, sent in _packed(batch).items()}]
                except Exception as error:  # whatever it is: the other ranks wait for a batch
                    told = [sendable(error)]
            head = torch.tensor([isinstance(told[0], Exception), *(batch.image.shape[2:] if batch else (0, 0))])
            dist.broadcast(head, reader, group=group)
            failed, *size = head.tolist()
            if failed or step == steps.start:
                dist.broadcast_object_list(told, reader, group=group, device=torch.device("cpu"))
                if isinstance(told[0], Exception):
                    raise told[0]
                shapes = told[0]
            rows, _, _, channels = shapes["image"][0]
            shapes["image"] = torch.Size((rows, *size, channels)), shapes["image"][1]
            packed = _packed(batch) if batch else {}
            for name, (shape, dtype) in shapes.items():
                tensor = packed.setdefault(name, torch.empty(shape, dtype=dtype, device=ranks.device))
                if tensor.numel():
                    dist.broadcast(tensor, reader, group=group)
            yield batch or Batch(corrupt=[], **{name: _unpacked(tensor) for name, tensor in packed.items()})


def _packed(batch: Batch) -> dict[str, torch.Tensor]:
    """Its tensors as they lie in memory, contiguous: images are channels last."""
    tensors = batch.tensors()
    return {name: (each.permute(0, 2, 3, 1) if each.ndim == 4 else each).contiguous() for name, each in tensors.items()}


def _unpacked(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.permute(0, 3, 1, 2) if tensor.ndim == 4 else tensor


@contextmanager
def _from_ray(
    recipe: Recipe, maker: BatchMaker, order: ReadingOrder, ranks: Ranks, start: int, stop: int
) -> Iterator[Batches]:
    """With data.ray=local the first rank starts a Ray, which ends with it; the other ranks join."""
    told: list[str | DataError] = ["", f"weft-{uuid.uuid4().hex[:8]}", uuid.uuid4().hex]
    _tell(told, ranks)
    _, pool, token = told
    if recipe.data.ray == "local":
        # Ray listens on every interface of the machine: only who has this run's token is let in. Read at the import
        os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=str(token))
    try:
        from data_pipeline.ray_cluster import connect, disconnect
        from data_pipeline.ray_loader import RayLoader
    except ImportError as error:
        raise RequestError("data.loader=ray needs Ray, which is not installed: pip install 'weft[ray]'") from error
    settings = recipe.data
    decoders, most = (each * ranks.dp_size for each in (max(1, settings.workers), settings.most_workers))
    memory = int(settings.ahead_gib * (1 << 30))
    if ranks.is_first:
        try:
            processors = max(os.cpu_count() or 1, decoders, most)
            told[0] = connect(settings.ray, processors, STORE * memory * ranks.dp_size)
        except DataError as error:
            told[0] = error.with_traceback(None)
    _tell(told, ranks)
    address = told[0]
    if isinstance(address, DataError):
        raise address
    if ranks.is_reader and not ranks.is_first:
        connect(str(address))
    loader = RayLoader(
        maker,
        order,
        pool=str(pool),
        global_batch=recipe.train.global_batch,
        rank=ranks.dp_rank,
        world=ranks.dp_size,
        decoders=decoders,
        most_decoders=most,
        memory=memory,
        start_step=start,
        stop_step=stop,
        pin=ranks.device.type == "cuda",
    )
    with closing(iter(loader)) as batches:
        yield batches
    # not after an error, when a rank that failed would be waited for
    if not ranks.is_first:
        disconnect()
    ranks.wait_for_all()
    disconnect()


def _tell(told: list[str | DataError], ranks: Ranks) -> None:
    """What the first rank knows, to all."""
    if ranks.world > 1:
        dist.broadcast_object_list(told, src=0, group=ranks.control_group)
