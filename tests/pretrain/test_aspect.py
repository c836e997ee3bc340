"""Pictures that keep their shape: batches of one height and width each, trained on under every layout that can."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from ranks import run_ranks

from data_pipeline import open_dataset
from data_pipeline.buckets import BucketOrder, bucket_sizes
from data_pipeline.sample import Sample
from data_pipeline.shards import write_shards
from pretrain.config import Recipe, load_recipe
from pretrain.errors import RequestError
from pretrain.metrics import read_lines
from pretrain.parallel.groups import start_alone, stop_ranks
from pretrain.parallel.layout import lay_out
from pretrain.sources import picture_aspects, reading_order, shapes_of

SHAPES = [(40, 40), (64, 36), (30, 66), (80, 30)]  # (width, height) by sample % 4
STEPS = 12


def sample_of(number: int) -> Sample:
    width, height = SHAPES[number % 4]
    pixels = np.random.default_rng(number).integers(0, 255, (height // 2, width // 2, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize((width, height)).save(file, "PNG")
    return Sample(f"s{number}", {"png": file.getvalue(), "txt": f"picture number {number}".encode()})


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("aspect") / "shards"
    write_shards(96, sample_of, folder, samples_per_shard=32, processes=0)
    return folder


def recipe_of(shards: Path, *more: str) -> Recipe:
    small = [
        "model.vision={layers: 2, width: 32, image_size: 48, positions: learned, mlp_ratio: 4}",
        "model.text={layers: 2, context: 32, mlp_ratio: 4}",
    ]
    length = [f"train.steps={STEPS}", "train.global_batch=8", "train.warmup=2", "train.eps=1e-4", "train.log_every=1"]
    common = [f"data.train={shards}", "data.test=null", "data.aspect=3", "run.seed=3", *small, *length]
    return load_recipe("quickstart", [*common, *more])


def trained(rank: int, world: int, shards: Path, out: Path, cases: list[list[str]]) -> list[list[float]]:
    """The losses of each case."""
    from pretrain.train import train

    found = []
    for number, case in enumerate(cases):
        run = out / f"{world}-{number}"
        assert train(recipe_of(shards, f"run.dir={run}", *case), "") == 0
        found.append([line["loss"] for line in read_lines(run / "metrics.jsonl")] if rank == 0 else [])
    return found


def shapes_seen(rank: int, world: int, shards: Path, out: Path) -> set[tuple[int, ...]]:
    """The heights and widths that the model was given."""
    from pretrain.models.towers import Patches
    from pretrain.train import train

    seen: set[tuple[int, ...]] = set()
    forward = Patches.forward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Patches, "forward", lambda self, image: seen.add((*image.shape[2:],)) or forward(self, image))
        assert train(recipe_of(shards, f"run.dir={out}"), "") == 0
    return seen


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_any_layout_sees_the_same_shapes_and_losses(shards: Path, tmp_path: Path) -> None:
    [truth] = run_ranks(trained, 1, shards, tmp_path, [[]])[0]
    assert len(truth) == STEPS
    cases = {
        1: [["train.stop_at=5"], ["data.workers=0", "train.micro_batch=2"]],
        2: [[], ["layout.tp=2"], ["layout.zero=3", "train.micro_batch=2"], ["layout.tp=2", "train.micro_batch=4"]],
    }
    for world, options in cases.items():
        for case, losses in zip(
            options, run_ranks(trained, world, shards, tmp_path / "other", options)[0], strict=True
        ):
            torch.testing.assert_close(losses, truth[: len(losses)], atol=1e-5, rtol=0, msg=f"{world} rank(s), {case}")
    [resumed] = run_ranks(trained, 1, shards, tmp_path / "other", [[]])[0]  # goes on from step 5
    assert resumed == truth
    order = BucketOrder(
        np.array([width / height for width, height in SHAPES * 24]), bucket_sizes(48, 8, 3.0), 8, seed=3
    )
    sizes = {order.size_of(step) for step in range(STEPS)}
    assert len(sizes) >= 3
    assert run_ranks(shapes_seen, 1, shards, tmp_path / "seen")[0] == sizes


def test_what_needs_sequences_of_one_length_is_refused(shards: Path) -> None:
    for options, key in (
        (["layout.pp=2"], "pp"),
        (["layout.cp=2"], "cp"),
        (["layout.tp=2", "layout.sequence_parallel=true"], "sequence_parallel"),
    ):
        with pytest.raises(
            RequestError, match=rf"layout\.{key} needs them of one length: use layout\.tp or layout\.zero"
        ):
            lay_out(recipe_of(shards, *options), 2)


def test_pictures_of_one_shape_are_refused(shards: Path) -> None:
    recipe, data = recipe_of(shards, "train.global_batch=24"), open_dataset(shards)
    with pytest.raises(RequestError, match=r"all pictures would be 48 x 48: no second shape .* use data\.aspect=1"):
        reading_order(recipe, data, np.ones(96))
    aspects = np.array([width / height for width, height in SHAPES * 24])
    assert shapes_of(reading_order(recipe, data, aspects)).startswith("pictures, by width x height: 48 of 72 x 32, ")


@pytest.mark.parametrize("damage", ["noise", "header", "short", "none"])
def test_aspects_that_are_kept_damaged_are_collected_again(shards: Path, tmp_path: Path, damage: str) -> None:
    recipe, data = recipe_of(shards, f"run.dir={tmp_path}"), open_dataset(shards)
    ranks = start_alone(torch.device("cpu"))
    try:
        truth = picture_aspects(recipe, data, ranks)
        assert truth is not None
        (kept,) = tmp_path.glob("aspects-*.npy")
        whole = kept.read_bytes()
        kept.write_bytes(
            {
                "noise": b"no array",
                "header": whole[:20] + b"[" * 30 + whole[50:],  # NumPy's tokenizer has an error of its own
                "short": whole[:-4],
                "none": b"",
            }[damage]
        )
        again = picture_aspects(recipe, data, ranks)
    finally:
        stop_ranks(ranks)
    np.testing.assert_array_equal(again, truth)
    assert kept.read_bytes() == whole


def test_another_order_beside_it_is_refused(shards: Path) -> None:
    with pytest.raises(RequestError, match=r"aspect is 3\.0 and block is given"):
        recipe_of(shards, "data.block=8")
    with pytest.raises(RequestError, match=r"aspect is 3\.0 and also is given"):
        recipe_of(shards, f"data.also=[{{data: {shards}}}]")
