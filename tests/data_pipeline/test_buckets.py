"""Aspect buckets: every global batch of one size, every picture in its epoch, no picture squeezed."""

from __future__ import annotations

import io
import os
import pickle
import shutil
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipeline.batch import BatchMaker
from data_pipeline.buckets import BucketOrder, assign, bucket_sizes
from data_pipeline.decode import decode_image, image_aspect
from data_pipeline.joined import Joined
from data_pipeline.loader import HELD, PREFETCH, Loader
from data_pipeline.order import Order
from data_pipeline.reader import Dataset, open_dataset
from data_pipeline.sample import Sample
from data_pipeline.shards import write_shards
from data_pipeline.transforms import ImageTransform

SIZES = bucket_sizes(32, patch=8)
SHAPES = [(60, 30), (40, 40), (30, 52)]  # (width, height) of our pictures, by sample % 3
SAMPLES, BATCH, STEPS, NO_PICTURE = 61, 6, 30, 13

EARLY = ("first", "offset", "size", "field", "crc", "key_end", "keys", "field_names", "checksum")  # of tables once


def picture(number: int, turned: bool = False) -> bytes:
    """Across and down a ramp each, so that what a crop keeps can be told from its values."""
    width, height = SHAPES[number % 3]
    across, down = np.meshgrid(np.linspace(0, 250, width), np.linspace(0, 250, height))
    file = io.BytesIO()
    image = Image.fromarray(np.stack([across, down, np.full_like(down, number)], axis=2).astype(np.uint8))
    exif = Image.Exif()
    if turned:
        exif[0x0112] = 6
    image.save(file, "PNG", exif=exif)
    return file.getvalue()


def sample_of(number: int) -> Sample:
    fields = {"txt": b"none"} if number == NO_PICTURE else {"png": picture(number), "txt": b"a ramp"}
    return Sample(f"s{number}", fields)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = tmp_path_factory.mktemp("data") / "shards"
    write_shards(SAMPLES, sample_of, folder, samples_per_shard=25, processes=0)
    return open_dataset(folder)


@pytest.fixture(scope="module")
def order(dataset: Dataset) -> BucketOrder:
    return BucketOrder(dataset.aspects(), SIZES, BATCH, seed=2)


def made_up(samples: int = 5000) -> np.ndarray:
    generator = np.random.default_rng(1)
    return np.exp(generator.normal(0, 0.4, samples))


# --- sizes, and who belongs where


def test_sizes_are_whole_patches_within_the_square() -> None:
    assert bucket_sizes(32, 8) == [(24, 40), (32, 32), (40, 24)]
    sizes = bucket_sizes(224, 16)
    assert (224, 224) in sizes
    assert len(sizes) == len(set(sizes)) == 9
    assert {(width, height) for height, width in sizes} == set(sizes)
    for height, width in sizes:
        assert height % 16 == width % 16 == 0
        assert 0.75 * 224**2 < height * width <= 224**2
        assert max(height, width) <= 2 * min(height, width)
    assert bucket_sizes(224, 16, most=1) == [(224, 224)]
    for size, patch, most in ((30, 8, 2), (0, 8, 2), (32, 0, 2), (32, 8, 0.5)):
        with pytest.raises(ValueError, match=r"not whole patches|give 1 or more"):
            bucket_sizes(size, patch, most)


def test_each_picture_goes_to_the_nearest() -> None:
    sizes = bucket_sizes(224, 16)
    aspects = np.concatenate([made_up(), [np.nan, 0, np.inf, 1e-9, 1e9]])
    distances = np.abs(np.log(made_up())[:, None] - np.log([width / height for height, width in sizes]))
    found = assign(aspects, sizes)
    assert found[:5000].tolist() == distances.argmin(axis=1).tolist()
    assert [sizes[number] for number in found[5000:5003]] == [(224, 224)] * 3
    assert [sizes[number] for number in found[5003:]] == [sizes[-1], sizes[0]]
    assert len(set(found.tolist())) == len(sizes)


def test_aspects_are_read_from_headers_upright(dataset: Dataset, tmp_path: Any) -> None:
    aspects = dataset.aspects()
    assert np.isnan(aspects[NO_PICTURE])
    expected = [SHAPES[number % 3][0] / SHAPES[number % 3][1] for number in range(SAMPLES)]
    seen = np.arange(SAMPLES) != NO_PICTURE
    np.testing.assert_allclose(aspects[seen], np.array(expected)[seen], rtol=1e-6)
    odd = [picture(0, turned=True), b"no picture", picture(0)[:20], picture(1)]
    write_shards(4, lambda number: Sample(f"s{number}", {"png": odd[number]}), tmp_path / "odd", processes=0)
    np.testing.assert_allclose(open_dataset(tmp_path / "odd").aspects(), [0.5, np.nan, np.nan, 1])


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("turned", range(1, 9))
def test_the_aspect_is_that_of_the_decoded_picture(kind: str, turned: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = turned
    file = io.BytesIO()
    Image.new("RGB", (37, 20), "red").save(file, kind, exif=exif)
    height, width, _ = decode_image(file.getvalue()).shape
    assert image_aspect(file.getvalue()) == width / height


def test_aspects_are_those_of_the_index(dataset: Dataset, tmp_path: Any) -> None:
    """No shard is read for them; several data sets have them one after the other."""
    folder = tmp_path / "copy"
    shutil.copytree(dataset.folder, folder)
    for path in folder.glob("*.tar"):
        os.truncate(path, 0)
        os.truncate(path, next(shard.bytes for shard in dataset.index.shards if shard.file == path.name))
    copy = open_dataset(folder)
    np.testing.assert_array_equal(copy.aspects(), dataset.aspects())
    early = tmp_path / "early"  # its tables have none
    shutil.copytree(dataset.folder, early)
    for path in early.glob("*.npz"):
        with np.load(path) as arrays:
            kept = {name: arrays[name] for name in EARLY}
        np.savez(path, allow_pickle=False, **kept)
    np.testing.assert_array_equal(open_dataset(early).aspects(), dataset.aspects())
    joined = Joined([copy, dataset]).aspects()
    np.testing.assert_array_equal(joined, np.tile(dataset.aspects(), 2))


# --- the order


def test_every_global_batch_is_of_one_bucket() -> None:
    order = BucketOrder(made_up(), bucket_sizes(224, 16), 64, seed=5)
    ids = order.sample_ids(np.arange(64 * 4096))
    buckets = assign(order.aspects, order.open_sizes)[ids].reshape(4096, 64)
    assert (buckets == buckets[:, :1]).all()
    for step in range(0, 4096, 97):
        assert order.size_of(step) == order.open_sizes[buckets[step, 0]]
    steps, members = np.bincount(buckets[:, 0]), [len(each) for each in order.members]
    np.testing.assert_allclose(steps / 4096, np.array(members) / 5000, atol=1 / 4096)


def test_a_bucket_reads_all_of_its_pictures_once_an_epoch() -> None:
    order = BucketOrder(made_up(), bucket_sizes(224, 16), 64, seed=5)
    positions = np.arange(64 * 4500)  # over a period of the Mixture
    ids, epochs = order.sample_ids(positions), order.epochs(positions)
    assert epochs.max() > 10
    buckets = assign(order.aspects, order.open_sizes)[ids]
    for number, members in enumerate(order.members):
        mine, of_epoch = ids[buckets == number], epochs[buckets == number]
        assert (np.diff(of_epoch) >= 0).all()
        for epoch in range(int(of_epoch.max())):  # the last has not ended
            assert sorted(mine[of_epoch == epoch].tolist()) == members.tolist()
        assert mine[of_epoch == 0].tolist() != mine[of_epoch == 1].tolist()
    assert np.concatenate(order.members).size == len(set(np.concatenate(order.members).tolist())) == 5000


def test_any_stretch_is_the_same_from_anyone() -> None:
    order = BucketOrder(made_up(), bucket_sizes(224, 16), 64, seed=5)
    there = pickle.loads(pickle.dumps(BucketOrder(made_up(), bucket_sizes(224, 16), 64, seed=5)))
    whole = order.sample_ids(np.arange(64 * 200))
    for start in np.random.default_rng(0).integers(0, 64 * 190, 20).tolist():
        positions = np.arange(start, start + 333)
        assert there.sample_ids(positions).tolist() == whole[positions].tolist()
    late = np.arange(64 * 4090, 64 * 4110)  # over the border of a period
    assert (
        np.concatenate([there.sample_ids(part) for part in np.split(late, 20)]).tolist()
        == order.sample_ids(late).tolist()
    )
    assert np.concatenate([there.epochs(part) for part in np.split(late, 20)]).tolist() == order.epochs(late).tolist()
    assert there.sample_ids(np.arange(12).reshape(3, 4)).tolist() == whole[:12].reshape(3, 4).tolist()
    assert BucketOrder(made_up(), order.sizes, 64, seed=6).sample_ids(np.arange(640)).tolist() != whole[:640].tolist()
    for asked in (-7, [5, -7]):  # the number that was asked for, not the step that it lies in
        for ask in (order.sample_ids, order.epochs):
            with pytest.raises(ValueError, match="positions count from 0, but -7 was asked for"):
                ask(np.array(asked))
    with pytest.raises(ValueError, match="positions count from 0"):
        order.sample_ids(np.array([-1]))


def test_what_is_too_small_for_a_batch_goes_to_the_next_nearest() -> None:
    aspects = np.array([1.0] * 50 + [1.7] * 9 + [0.6] * 10)
    order = BucketOrder(aspects, SIZES, 10, seed=0)
    assert order.open_sizes == [(32, 32), (40, 24)]
    assert order.members[0].tolist() == [*range(59)]
    assert BucketOrder(aspects, SIZES, 60, seed=0).open_sizes == [(32, 32)]
    rare = np.array([1.0] * 5000 + [1.7] * 19)  # 19 of 5019 are less than a 256th
    assert BucketOrder(rare, SIZES, 10, seed=0).open_sizes == [(32, 32)]
    for sizes, batch in (([], 10), (SIZES, 0), (SIZES, 70)):
        with pytest.raises(ValueError, match="give a size or more"):
            BucketOrder(aspects, sizes, batch, seed=0)


# --- the batches


def maker_of(dataset: Dataset, scale: tuple[float, float] = (1.0, 1.0)) -> BatchMaker:
    return BatchMaker(dataset, ImageTransform(32, crop_scale=scale), None, 2, training=True)


def test_pictures_keep_their_shape(dataset: Dataset, order: BucketOrder) -> None:
    batches = list(Loader(maker_of(dataset), order, global_batch=BATCH, stop_step=STEPS))
    assert Counter(tuple(batch.image.shape[2:]) for batch in batches).keys() == set(SIZES)
    for batch in batches:
        assert batch.image.is_contiguous(memory_format=torch.channels_last)
        replaced = {corrupt.sample for corrupt in batch.corrupt}
        assert replaced <= {NO_PICTURE}
        for row, sample in enumerate(batch.sample.tolist()):
            height, width = batch.image.shape[2:]
            if not replaced:
                assert SIZES[assign(order.aspects, SIZES)[sample]] == (height, width)
            assert (batch.image[row, 2] == sample).all()
            own_width, own_height = SHAPES[sample % 3]
            scale = min(own_width / width, own_height / height)  # our pixels a pixel, the same across and down
            for ramp, wanted, own in (
                (batch.image[row, 0, 0], width, own_width),
                (batch.image[row, 1, :, 0], height, own_height),
            ):
                kept = float(ramp[-2] - ramp[1]) / (wanted - 3) * (own - 1) / 250  # own pixels for one of the batch
                assert kept == pytest.approx(scale, rel=0.05)
                assert abs(float(ramp[0]) + float(ramp[-1]) - 250) < 12  # the middle is kept


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world", [1, 3])
def test_batches_do_not_depend_on_ranks_and_workers(
    dataset: Dataset, order: BucketOrder, world: int, workers: int
) -> None:
    maker, settings = maker_of(dataset, (0.4, 1.0)), {"global_batch": BATCH, "stop_step": STEPS}
    expected = list(Loader(maker, order, **settings))
    assert len({batch.image.shape for batch in expected}) == 3
    assert 2 * (workers * PREFETCH + HELD) < STEPS  # each slot holds one size after another
    ranks = [list(Loader(maker, order, rank=rank, world=world, workers=workers, **settings)) for rank in range(world)]
    for shares, whole in zip(zip(*ranks, strict=True), expected, strict=True):
        assert torch.equal(torch.cat([share.image for share in shares]), whole.image)
        assert torch.cat([share.sample for share in shares]).tolist() == whole.sample.tolist()
        assert all(share.image.is_contiguous(memory_format=torch.channels_last) for share in shares)
    later = list(Loader(maker, order, workers=workers, start_step=17, **settings))
    assert all(torch.equal(ours.image, theirs.image) for ours, theirs in zip(later, expected[17:], strict=True))


def test_slots_are_used_again_for_every_size(dataset: Dataset, order: BucketOrder) -> None:
    loader = Loader(maker_of(dataset), order, global_batch=BATCH, stop_step=STEPS, workers=2)
    assert len({batch.image.data_ptr() for batch in loader}) <= 2 * PREFETCH + HELD


def test_random_crops_have_the_shape_of_the_bucket() -> None:
    """A picture with the aspect of the bucket, cropped at random: across and down alike on average."""
    across, down = np.meshgrid(np.linspace(0, 250, 400), np.linspace(0, 250, 200))
    image = np.stack([across, down, down], axis=2).astype(np.uint8)
    transform, out = ImageTransform(32, crop_scale=(0.3, 0.5)), torch.empty((3, 20, 40), dtype=torch.uint8)
    spans = []
    for seed in range(200):
        transform(image, np.random.default_rng(seed), out=out)
        spans.append([float(out[0, 0, -1] - out[0, 0, 0]), float(out[1, -1, 0] - out[1, 0, 0])])
    wide, high = np.mean(np.log(spans), axis=0)
    assert abs(wide - high) < 0.08  # a crop with the aspect of a square would differ by log 2


def test_what_does_not_fit_is_refused(dataset: Dataset, order: BucketOrder) -> None:
    with pytest.raises(ValueError, match="the buckets are for a global batch of 6: 12"):
        Loader(maker_of(dataset), order, global_batch=12, stop_step=1)
    small = BatchMaker(dataset, ImageTransform(24), None, 0, training=True)
    with pytest.raises(ValueError, match="a bucket has 1024 pixels, over the 576 of image size 24"):
        Loader(small, order, global_batch=BATCH, stop_step=1)
    with pytest.raises(ValueError, match="the order is of 5000 samples, the data set of 61"):
        Loader(maker_of(dataset), BucketOrder(made_up(), SIZES, BATCH, 0), global_batch=BATCH, stop_step=1)


def test_squares_alone_are_as_without_buckets(dataset: Dataset) -> None:
    """The same pixels for the same sample in the same epoch."""
    alone = BucketOrder(np.ones(SAMPLES), [(32, 32)], BATCH, seed=2)
    plain, settings = Order(SAMPLES, 2), {"global_batch": BATCH, "stop_step": STEPS}
    maker = maker_of(dataset, (0.4, 1.0))
    for ours, theirs in zip(Loader(maker, alone, **settings), Loader(maker, plain, **settings), strict=True):
        assert torch.equal(ours.image, theirs.image)
        assert torch.equal(ours.sample, theirs.sample)
