"""Parquet as a source: the batches of tars of the same samples, few row groups in memory, and errors that say where."""

from __future__ import annotations

import io
import json
import os
import pickle
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from private_network import in_private_network
from servers import WebServer
from tars import picture, tar_of

from data_pipeline.bake import bake
from data_pipeline.batch import Batch, BatchMaker
from data_pipeline.block_order import BlockOrder, quality_of
from data_pipeline.check import check_dataset
from data_pipeline.damage import EMPTY
from data_pipeline.errors import DamagedSampleError, DataError
from data_pipeline.filters import parse_steps, run_filters
from data_pipeline.filters.look import UNREADABLE
from data_pipeline.joined import Joined
from data_pipeline.loader import Loader
from data_pipeline.mixture import Mixture, Phase
from data_pipeline.order import Order, ReadingOrder
from data_pipeline.reader import Dataset, open_dataset, read_order
from data_pipeline.remote import Cache
from data_pipeline.sample import Sample
from data_pipeline.scan import LeftOut
from data_pipeline.shards import write_shards
from data_pipeline.sound import AudioTransform
from data_pipeline.tokenizer import Tokenizer
from data_pipeline.transforms import ImageTransform, QuestionTransform, TextTransform

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
from data_pipeline import parquet  # noqa: E402  # after the question whether pyarrow is there

SAMPLES, GROUP, PER_FILE, SEED = 50, 4, 18, 7  # three files of 5, 5 and 4 row groups
HUGGING_FACE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
KINDS = ("JPEG", "PNG", "WEBP")
BAD = 33  # a picture that ends early


def fields_of(number: int) -> dict[str, Any]:
    """What sample `number` holds, as the cells of a row."""
    sound = io.BytesIO()
    soundfile.write(sound, np.random.default_rng(number).normal(0, 0.1, 1600), 16_000, format="FLAC")
    image = picture(number, (20 + number % 5, 24), KINDS[number % 3])
    return {
        "image": image[:-200] if number == BAD else image,
        "caption": [f"picture number {number}", "another"][: 1 + number % 2],
        "audio": sound.getvalue() if number % 3 else None,
        "qa": [{"question": f"which is {number}", "answer": str(number % 10)}] if number % 4 else None,
        "label": f"class {number % 3}",
    }


def sample_of(number: int) -> Sample:
    """The same as a sample of a tar."""
    cells = fields_of(number)
    metadata = {name: cells[name] for name in ("qa", "label") if cells[name] is not None}
    if len(cells["caption"]) > 1:
        metadata["captions"] = cells["caption"]
    fields = {("jpg", "png", "webp")[number % 3]: cells["image"], "txt": cells["caption"][0].encode()}
    if cells["audio"]:
        fields["flac"] = cells["audio"]
    return Sample(f"s{number}", {**fields, "json": json.dumps(metadata).encode()})


def table_of(numbers: range, form: str) -> Any:
    """Rows with media as they are ("binary"), or as Hugging Face has them."""
    columns: dict[str, Any] = {}
    rows = [fields_of(number) for number in numbers]
    for name in rows[0]:
        cells = [row[name] for row in rows]
        if name in ("image", "audio") and form == "struct":
            cells = pa.array([cell and {"bytes": cell, "path": f"{name}.bin"} for cell in cells], HUGGING_FACE)
        elif name in ("image", "audio"):
            cells = pa.array(cells, pa.binary())
        columns[name] = cells
    return pa.table(columns)


def write_parquet(folder: Path, form: str = "struct") -> Path:
    folder.mkdir()
    for number, start in enumerate(range(0, SAMPLES, PER_FILE)):
        table = table_of(range(start, min(start + PER_FILE, SAMPLES)), form)
        path = folder / f"train-{number:05}-of-00003.parquet"
        options = {"row_group_size": GROUP, "compression": "none", "use_dictionary": False}
        pq.write_table(table, path, write_page_checksum=True, **options)
    return folder


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same samples as tars, and in both forms of Parquet."""
    root = tmp_path_factory.mktemp("parquet")
    write_shards(SAMPLES, sample_of, root / "tars", samples_per_shard=7, processes=0)
    return {"tars": root / "tars", **{form: write_parquet(root / form, form) for form in ("binary", "struct")}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One to damage."""
    return write_parquet(tmp_path / "set")


def write_table(path: Path, **columns: Any) -> Path:
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


def maker_of(dataset: Dataset | Joined) -> BatchMaker:
    tokenizer = Tokenizer.train(["picture number 0123456789"], 270)
    return BatchMaker(
        dataset,
        ImageTransform(16, crop_scale=(0.4, 1.0), flip=True),
        TextTransform(tokenizer, 24),
        SEED,
        training=True,
        audio=AudioTransform(frames=12, mels=20),
        question=QuestionTransform(tokenizer, 16, 4),
        optional=frozenset({"audio", "question"}),
    )


def batches(dataset: Dataset | Joined, order: ReadingOrder, world: int = 1, **options: Any) -> list[list[Batch]]:
    """Those of each rank."""
    options = {"global_batch": 12, "stop_step": 9, **options}
    return [list(Loader(maker_of(dataset), order, rank=rank, world=world, **options)) for rank in range(world)]


def assert_same(found: list[list[Batch]], expected: list[list[Batch]]) -> None:
    """Tensor by tensor; samples that could not be used are the same ones for the same reason."""
    assert [len(rank) for rank in found] == [len(rank) for rank in expected]
    for mine, other in zip(chain(*found), chain(*expected), strict=True):
        for name, tensor in mine.tensors().items():
            assert torch.equal(tensor, getattr(other, name)), name
        assert [(bad.sample, bad.reason) for bad in mine.corrupt] == [(bad.sample, bad.reason) for bad in other.corrupt]


def count_reads(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[str, int]]:
    """Counts what is read from now on: (file, row group) -> times."""
    reads: Counter[tuple[str, int]] = Counter()
    real = parquet._File.read

    def read(file: Any, group: int) -> Any:
        reads[file.path.name, group] += 1
        return real(file, group)

    monkeypatch.setattr(parquet._File, "read", read)
    return reads


# --- the same samples, the same batches


@pytest.mark.parametrize("form", ["binary", "struct"])
def test_every_row_is_the_sample_that_went_in(written: dict[str, Path], form: str) -> None:
    dataset, tars = open_dataset(written[form]), open_dataset(str(written["tars"]))
    assert len(dataset) == len(tars) == SAMPLES
    for number in [*range(SAMPLES), 0, 49, 20]:
        mine, theirs = dataset.read(number), tars.read(number)
        assert mine.metadata() == theirs.metadata()
        assert mine.captions() == theirs.captions()
        assert {**mine.fields, "json": b""} == {**theirs.fields, "json": b""}
    assert dataset.folder == written[form]
    assert dataset.alike(3) == range(SAMPLES)
    np.testing.assert_array_equal(dataset.aspects(), tars.aspects())


def test_where_a_row_is(written: dict[str, Path]) -> None:
    dataset = open_dataset(written["struct"])
    assert [dataset.locate(number) for number in (0, 17, 18, 49)] == [(0, 0), (0, 17), (1, 0), (2, 13)]
    assert dataset.key(18) == dataset.read(18).key == "train-00001-of-00003/0"
    assert dataset.shard_file(49) == "train-00002-of-00003.parquet"
    with pytest.raises(IndexError, match=r"sample 50 of .*, which has samples 0 to 49"):
        dataset.read(50)
    assert len({dataset.key(number) for number in range(SAMPLES)}) == SAMPLES
    row = read_order(dataset, Order(SAMPLES, 1, shuffle=False), 20, 1)[0]
    assert (row["shard"], row["offset"], row["key"]) == (dataset.shard_file(20), 2, dataset.key(20))
    assert quality_of(BlockOrder(SAMPLES, 0, GROUP, 2), dataset, batch=12).shards_a_batch <= 3


@pytest.mark.parametrize("form", ["binary", "struct"])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world", [1, 2])
def test_batches_are_those_of_tars(written: dict[str, Path], form: str, workers: int, world: int) -> None:
    for order in (Order(SAMPLES, SEED), BlockOrder(SAMPLES, SEED, GROUP, 3)):
        expected = batches(open_dataset(written["tars"]), order, world)
        assert any(batch.corrupt for batch in expected[0])
        assert all(batch.audio.any() and batch.answer.any() for batch in expected[0])
        dataset = open_dataset(written[form])
        assert_same(batches(dataset, order, world, workers=workers), expected)
        assert_same(batches(dataset, order, world, workers=workers, start_step=5), [rank[5:] for rank in expected])


def test_mixed_with_tars(written: dict[str, Path]) -> None:
    orders = (Order(SAMPLES, 1), BlockOrder(SAMPLES, 2, GROUP, 3))
    order = Mixture(orders, (Phase(0, (1, 2)),), SEED)
    tars = open_dataset(written["tars"])
    mixed = Joined([tars, open_dataset(written["struct"])])
    expected = batches(Joined([tars, open_dataset(written["tars"])]), order)
    assert_same(batches(mixed, order, workers=2), expected)
    assert mixed.shard_file(SAMPLES) == f"{written['struct']}/train-00000-of-00003.parquet"
    assert mixed.alike(SAMPLES + 3) == range(SAMPLES, 2 * SAMPLES)


def from_ray(written: dict[str, Path]) -> None:
    import ray

    from data_pipeline.ray_cluster import connect, disconnect
    from data_pipeline.ray_loader import RayLoader

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # decoders cannot import a test
    connect("local", 4, 100 << 20)
    try:
        order = BlockOrder(SAMPLES, SEED, GROUP, 3)
        loader = RayLoader(
            maker_of(open_dataset(written["struct"])), order, pool="p", global_batch=12, decoders=2, stop_step=9
        )
        assert_same([list(loader)], batches(open_dataset(written["tars"]), order))
    finally:
        disconnect()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_decoders_on_ray_read_it(written: dict[str, Path]) -> None:
    pytest.importorskip("ray")
    in_private_network(from_ray, written)


def test_other_processes_read_the_same(written: dict[str, Path]) -> None:
    dataset = open_dataset(written["struct"])
    expected = [dataset.read(number) for number in range(SAMPLES)]
    copy = pickle.loads(pickle.dumps(dataset))
    assert copy.fingerprint == dataset.fingerprint
    with ProcessPoolExecutor(2) as pool:  # of the data set as it is sent
        assert list(pool.map(dataset.read, range(SAMPLES))) == expected
    inherited = list(dataset.files._open.values())
    child = os.fork()
    if child == 0:  # and as it is inherited, with open files and row groups in memory
        try:
            assert [dataset.read(number) for number in reversed(range(SAMPLES))] == expected[::-1]
            assert not any(file is other for file in dataset.files._open.values() for other in inherited)
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    dataset.close()
    assert [each.read(5) for each in (dataset, copy)] == [expected[5]] * 2


# --- what is read, and what stays in memory


def test_a_block_order_reads_each_row_group_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = count_reads(monkeypatch)
    dataset = open_dataset(folder)
    group_bytes = dataset.files._group(dataset.files._file(dataset.index.shards[0]), 0).nbytes
    reads.clear()
    monkeypatch.setattr(parquet, "HELD_BYTES", 4 * group_bytes)
    dataset.close()
    for number in BlockOrder(PER_FILE, SEED, GROUP, 2).sample_ids(np.arange(PER_FILE)).tolist():
        dataset.read(number)
    assert set(reads.values()) == {1}
    assert len(reads) == 5
    reads.clear()
    dataset.close()
    for number in Order(SAMPLES, SEED).sample_ids(np.arange(SAMPLES)).tolist():
        dataset.read(number)
    assert reads.total() > 25, "of the 14 groups 4 are kept: most samples find theirs gone"


def test_row_groups_in_memory_are_bounded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = open_dataset(folder)

    def read_all() -> list[int]:
        """The bytes that were held after each sample."""
        dataset.close()
        held = []
        for number in Order(SAMPLES, SEED).sample_ids(np.arange(SAMPLES)).tolist():
            dataset.read(number)
            held.append(sum(table.nbytes for table in dataset.files._held.values()))
            assert dataset.files._held_bytes == held[-1]
        return held

    whole = read_all()
    assert len(dataset.files._held) == 14
    bound = whole[-1] // 3
    monkeypatch.setattr(parquet, "HELD_BYTES", bound)
    assert bound // 2 < max(read_all()) <= bound
    monkeypatch.setattr(parquet, "HELD_BYTES", 1)
    read_all()
    assert len(dataset.files._held) == 1, "the one in use is kept, whatever its size"
    monkeypatch.setattr(parquet, "HELD_BYTES", 1 << 30)
    monkeypatch.setattr(parquet, "HELD_GROUPS", 3)
    read_all()
    assert len(dataset.files._held) == 3
    dataset.close()
    for group in (0, 1, 2, 0, 3):
        dataset.read(GROUP * group)
    assert [group for _, group in dataset.files._held] == [2, 0, 3], "those used last"
    monkeypatch.setattr(parquet, "MOST_OPEN", 2)
    read_all()
    assert len(dataset.files._open) == 2


def test_columns_that_are_not_needed_are_not_read(tmp_path: Path) -> None:
    large = pa.array([{"raw": b"x" * 100_000}] * 3)
    path = write_table(tmp_path / "a.parquet", image=[picture()] * 3, text=["a", "b", "c"], masks=large)
    dataset = open_dataset(path)
    assert sorted(dataset.read(2).fields) == ["png", "txt"]
    assert dataset.files._held_bytes < 10_000


# --- which columns


def test_columns_by_name_and_type(tmp_path: Path) -> None:
    image, wave = picture(kind="JPEG"), b"RIFF\0\0\0\0WAVEfmt "
    paths = ["x.jpg"]
    for number, (columns, expected) in enumerate(
        [
            ({"image": paths, "jpg": [image], "TXT": ["a"]}, {"jpg": image, "txt": b"a"}),  # paths are no pictures
            ({"strange": [image], "text": [[" ", " a ", "b"]]}, {"jpg": image, "txt": b"a"}),
            ({"Image": [image], "caption": ["é"], "title": ["t"]}, {"jpg": image, "txt": "é".encode()}),
            ({"audio": [wave], "text": ["a"]}, {"wav": wave, "txt": b"a"}),
            ({"png": [image], "wav": [b"OggS"], "label": ["cat"]}, {"jpg": image, "ogg": b"OggS"}),
            ({"img": pa.array([None], pa.binary()), "text": pa.array([None], pa.string()), "flac": [b"fLaC"]},
             {"flac": b"fLaC"}),
            ({"picture": pa.array([image], pa.large_binary()), "text": pa.array(["a"]).dictionary_encode()},
             {"jpg": image, "txt": b"a"}),
            ({"image": [b"GIF89a"], "text": ["a"]}, {"jpg": b"GIF89a", "txt": b"a"}),  # for the decoder to refuse
        ]
    ):  # fmt: skip
        fields = open_dataset(write_table(tmp_path / f"{number}.parquet", **columns)).read(0).fields
        assert {name: data for name, data in fields.items() if name != "json"} == expected


def test_what_json_holds(tmp_path: Path) -> None:
    rows: dict[str, Any] = {
        "image": [picture()] * 2,
        "caption": [["one", "two"], []],
        "number": [1, None],
        "share": [float("nan"), 0.5],
        "box": [[{"x": 1.5, "on": True}], None],
        "captions": ["of another column", "left out"],
        "json": ['{"id": "a", "number": 9}', "no object"],
        "when": pa.array([0, 1], pa.timestamp("s")),
        "label": [1, 5],
    }
    features = {"label": {"_type": "ClassLabel", "names": ["cat", "dog"]}, "image": {"_type": "Image"}}
    table = pa.table(rows).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, tmp_path / "a.parquet")
    first, second = (open_dataset(tmp_path).read(number) for number in range(2))
    box = [{"x": 1.5, "on": True}]
    assert first.metadata() == {
        "id": "a", "number": 1, "share": None, "box": box, "captions": ["one", "two"], "label": "dog"
    }  # fmt: skip
    assert first.captions() == ("one", "two")
    assert first.label() == "dog"
    assert second.metadata() == {"share": 0.5, "json": "no object", "label": 5}, "5 is no number of a class"
    assert second.captions() == ()


@pytest.mark.parametrize(
    ("columns", "sentence"),
    [
        ({"imgae": ["x.jpg"], "text": ["a"]}, r"no column of image .*'imgae' \(string\).*'imgae' meant to be"),
        ({"image": ["x.jpg"], "text": ["a"]}, r"no column of image or sound bytes .*: 'image' is not of such a type"),
        ({"one": [b"x"], "two": [b"y"], "text": ["a"]}, r"no column of image .*'one' \(binary\), 'two' \(binary\)"),
        ({"image": [b"x"], "captoin": ["a"]}, r"no column of captions .*: is 'captoin' meant to be 'caption'\?"),
        ({"image": [b"x"], "caption": [3]}, r"no column of captions .*: 'caption' is not of such a type"),
        ({"image": [b"x"]}, r"no column of captions .*such a column is called 'caption', 'captions', 'text' or"),
    ],
)  # fmt: skip
def test_a_missing_column_is_named(tmp_path: Path, columns: dict[str, Any], sentence: str) -> None:
    path = write_table(tmp_path / "a.parquet", **columns)
    with pytest.raises(DataError, match=rf"{path} has {sentence}"):
        open_dataset(path)


def test_files_with_other_columns(tmp_path: Path) -> None:
    write_table(tmp_path / "a.parquet", image=[picture(1)], caption=["a"], more=[1])
    write_table(tmp_path / "b.parquet", image=[picture(2)], caption=pa.array([None], pa.null()), other=["x"])
    dataset = open_dataset(tmp_path)
    assert [dataset.read(number).metadata() for number in range(2)] == [{"more": 1}, {"other": "x"}]
    path = write_table(tmp_path / "c.parquet", image=[picture()], captions=["a"])
    with pytest.raises(DataError, match=rf"{path} has no column 'caption', which a.parquet beside .* only 'captions'"):
        open_dataset(tmp_path)
    write_table(path, image=[picture()], caption=[1.5])
    with pytest.raises(DataError, match=rf"the column 'caption' of {path} holds double, that of a.parquet string"):
        open_dataset(tmp_path)
    pq.write_table(pa.Table.from_arrays([pa.array([b"x"]), pa.array([b"x"])], names=["image", "image"]), path)
    with pytest.raises(DataError, match=rf"{path} has the column 'image' twice"):
        open_dataset(path)


# --- what is damaged


def test_a_file_that_is_cut_off_or_something_else(folder: Path) -> None:
    path = sorted(folder.iterdir())[1]
    whole = path.read_bytes()
    for data in (
        whole[:-1],
        whole[: len(whole) // 2],
        b"PAR1",
        b"",
        b"hello, I am a text",
        whole[:-8] + b"\xff\xff\xff\x7fPAR1",
    ):
        path.write_bytes(data)
        with pytest.raises(DataError, match=rf"{path} is truncated, or no Parquet file: its {len(data)} bytes"):
            open_dataset(folder)
    length = int.from_bytes(whole[-8:-4], "little")
    path.write_bytes(whole[: -8 - length] + b"\xff" * length + whole[-8:])
    with pytest.raises(DataError, match=rf"{path} cannot be read as Parquet: ") as caught:
        open_dataset(folder)
    assert len(str(caught.value).splitlines()) == 1, "what Arrow says ends in a newline"
    assert not str(caught.value).endswith("\n")


def test_no_file_that_is_refused_stays_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []
    real = pa.OSFile

    def remembered(path: str) -> Any:
        opened.append(real(path))
        return opened[-1]

    monkeypatch.setattr(pa, "OSFile", remembered)
    whole = write_table(tmp_path / "footer.parquet", image=[picture()], text=["a"])
    data = whole.read_bytes()
    length = int.from_bytes(data[-8:-4], "little")
    whole.write_bytes(data[: -8 - length] + b"\xff" * length + data[-8:])
    twice = tmp_path / "twice.parquet"
    pq.write_table(pa.Table.from_arrays([pa.array([b"x"]), pa.array([b"x"])], names=["image", "image"]), twice)
    lacking = write_table(tmp_path / "lacking.parquet", image=[picture()])
    for number, path in enumerate((whole, twice, lacking), 1):
        with pytest.raises(DataError):
            open_dataset(path)
        assert [file.closed for file in opened] == [True] * number


def test_a_file_that_changes_under_a_run(folder: Path) -> None:
    dataset = open_dataset(folder)
    path = folder / dataset.shard_file(20)
    before = dataset.read(20)
    whole = path.read_bytes()
    os.truncate(path, 1000)
    assert dataset.read(21).key == "train-00001-of-00003/3", "its row group is in memory"
    with pytest.raises(DataError, match=rf"{path} is truncated, or no Parquet file: its 1000 bytes") as caught:
        dataset.read(30)
    assert not isinstance(caught.value, DamagedSampleError), "this does not mend itself by taking another sample"
    path.unlink()
    with pytest.raises(DataError, match=rf"{path} is missing"):
        dataset.read(30)
    pq.write_table(table_of(range(4), "struct"), path)
    with pytest.raises(DataError, match=rf"{path} changed while it was in use: it had {len(whole)} bytes and 18 rows"):
        dataset.read(30)
    path.write_bytes(whole)
    dataset.close()
    assert dataset.read(20) == before


def damage(folder: Path) -> tuple[Path, list[int]]:
    """Change a byte in a page of pictures; the file, and the samples that it was for."""
    path = folder / "train-00001-of-00003.parquet"
    data, metadata = bytearray(path.read_bytes()), pq.read_metadata(path).row_group(2)
    column = next(
        metadata.column(number) for number in range(20) if metadata.column(number).path_in_schema == "image.bytes"
    )
    data[column.data_page_offset + column.total_compressed_size - 200] ^= 1
    path.write_bytes(data)
    return path, list(range(PER_FILE + 2 * GROUP, PER_FILE + 3 * GROUP))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_row_group_costs_its_rows(folder: Path, workers: int) -> None:
    path, lost = damage(folder)
    dataset = open_dataset(folder)
    where = rf"{path}, row group 2, row 9 cannot be read: .*CRC checksum"
    with pytest.raises(DamagedSampleError, match=where) as caught:
        dataset.read(lost[1])
    assert caught.value.key == dataset.key(lost[1])
    assert "\n" not in str(caught.value)
    assert dataset.read(lost[0] - 1).key == "train-00001-of-00003/7"
    (found,) = batches(dataset, Order(SAMPLES, SEED), stop_step=4, workers=workers)
    corrupt = {bad.sample: bad.reason for batch in found for bad in batch.corrupt}
    assert set(corrupt) >= {*lost[:2], BAD}
    assert set(corrupt) <= {*lost, BAD}
    assert f"{path}, row group 2, row {lost[0] - PER_FILE} cannot be read" in corrupt[lost[0]]
    read = {sample for batch in found for sample in batch.sample.tolist()}
    assert read.isdisjoint({*lost, BAD})


def test_a_row_that_holds_a_path_and_no_bytes(tmp_path: Path) -> None:
    cells = [{"bytes": picture(), "path": None}, {"bytes": None, "path": "a.jpg"}, None]
    path = write_table(tmp_path / "a.parquet", image=pa.array(cells, HUGGING_FACE), text=["a"] * 3)
    dataset = open_dataset(path)
    assert dataset.read(0).image_field == "png"
    with pytest.raises(
        DamagedSampleError, match=rf"{path}, row group 0, row 1 is damaged: its 'image' is the path 'a.jpg'"
    ):
        dataset.read(1)
    assert dataset.read(2).fields == {"txt": b"a"}


def test_the_fingerprint_tells_contents_apart(folder: Path, tmp_path: Path) -> None:
    fingerprint = open_dataset(folder).fingerprint
    again = write_parquet(tmp_path / "again")
    assert open_dataset(again).fingerprint == fingerprint
    pq.write_table(
        table_of(range(1, PER_FILE + 1), "struct"), again / "train-00000-of-00003.parquet", row_group_size=GROUP
    )
    assert open_dataset(again).fingerprint != fingerprint
    (again / "train-00000-of-00003.parquet").unlink()
    assert open_dataset(again).fingerprint != fingerprint
    paths = [write_table(tmp_path / name / "a.parquet", image=[picture()], text=[name]) for name in ("one", "two")]
    assert paths[0].stat().st_size == paths[1].stat().st_size
    assert open_dataset(paths[0]).fingerprint != open_dataset(paths[1]).fingerprint


# --- what a path means


def test_a_folder_a_file_a_pattern(folder: Path) -> None:
    first = folder / "train-00000-of-00003.parquet"
    assert len(open_dataset(first)) == PER_FILE
    assert len(open_dataset(str(folder / "train-0000[01]*.parquet"))) == 2 * PER_FILE
    write_table(folder / "validation-00000-of-00001.parquet", image=[picture()], caption=["a"])
    with pytest.raises(
        ValueError, match=r"files of several splits \(train, validation\): give one, as .*/train\*\.parquet"
    ):
        open_dataset(folder)
    assert len(open_dataset(folder / "train*.parquet")) == SAMPLES
    for nothing in (folder / "tra.parquet", folder / "x*.parquet", folder / "nowhere" / "a.parquet"):
        with pytest.raises(FileNotFoundError, match="there is no such Parquet file"):
            open_dataset(nothing)


@pytest.mark.parametrize(
    ("names", "splits", "pattern"),
    [
        (("coco_train", "coco_test"), "test, train", "*train*.parquet"),
        (("a-Validation-0", "a-TRAIN-0"), "train, validation", "*TRAIN*.parquet"),
        (("test0", "train0", "train1"), "test, train", "train*.parquet"),
        (("val-0", "dev-0"), "dev, val", "dev*.parquet"),
        (("test_set_train", "test_set_val"), "test-train, test-val", "test*train*.parquet"),
        (("train-0", "train-dev-0"), "train, train-dev", "train*dev*.parquet"),  # train* would take both
        (("train0", "retrain_val"), "val, train", "train*.parquet"),
    ],
)
def test_splits_are_told_by_words_of_the_names(
    tmp_path: Path, names: tuple[str, ...], splits: str, pattern: str
) -> None:
    for name in names:
        write_table(tmp_path / "s" / f"{name}.parquet", image=[picture()], caption=["a"])
    with pytest.raises(ValueError, match="files of several splits") as caught:
        open_dataset(tmp_path / "s")
    said = str(caught.value)
    assert said.endswith(f"give one, as {tmp_path / 's' / pattern}")
    assert sorted(said[said.index("(") + 1 : said.index(")")].split(", ")) == sorted(splits.split(", "))
    assert 0 < len(open_dataset(tmp_path / "s" / pattern)) < len(names)


@pytest.mark.parametrize(
    "names",
    [
        ("coco_train_0", "coco_train_1"),
        ("a", "b_test"),
        ("trains", "latest", "devil", "interval", "contest"),
        ("train_test_0", "train_test_1"),
    ],
)
def test_names_of_one_split_or_none_are_one_data_set(tmp_path: Path, names: tuple[str, ...]) -> None:
    for name in names:
        write_table(tmp_path / f"{name}.parquet", image=[picture()], caption=["a"])
    assert len(open_dataset(tmp_path)) == len(names)


def test_a_name_that_could_be_a_pattern(tmp_path: Path) -> None:
    for name in ("a[1].parquet", "what?.parquet", "b*.parquet", "b2.parquet"):
        write_table(tmp_path / name, image=[picture()], caption=[name])
    for name in ("a[1].parquet", "what?.parquet", "b*.parquet"):
        dataset = open_dataset(tmp_path / name)
        assert [dataset.read(number).captions() for number in range(len(dataset))] == [(name,)]
    assert len(open_dataset(tmp_path / "b?.parquet")) == 2


def test_files_whose_rows_would_have_the_same_keys(tmp_path: Path) -> None:
    for name in ("a.parquet", "a.pq", "b.pq"):
        write_table(tmp_path / name, image=[picture()], caption=["a"])
    with pytest.raises(ValueError, match=r"a\.parquet and a\.pq beside it .* the same keys: rename one"):
        open_dataset(tmp_path)
    assert len(open_dataset(tmp_path / "*.pq")) == 2


def test_parquet_beside_tars_is_not_read(tmp_path: Path) -> None:
    """As img2dataset writes it: what is in the tars, once more."""
    write_table(tmp_path / "00000.parquet", url=["a"], caption=["b"])
    (tmp_path / "00000.tar").write_bytes(tar_of({"a.txt": b"from a tar"}))
    assert open_dataset(tmp_path).read(0).fields == {"txt": b"from a tar"}


def test_no_row_and_empty_files(tmp_path: Path) -> None:
    empty = {"image": pa.array([], pa.binary()), "text": pa.array([], pa.string())}
    write_table(tmp_path / "a.parquet", **empty)
    with pytest.raises(DataError, match="there is no row in the 1 Parquet files of"):
        open_dataset(tmp_path)
    write_table(tmp_path / "b.parquet", image=[picture()], text=["a"])
    write_table(tmp_path / "c.parquet", **empty)
    dataset = open_dataset(tmp_path)
    assert (len(dataset), dataset.key(0)) == (1, "b/0")


@pytest.mark.parametrize("struct", [False, True])
def test_what_rows_lack_is_told_by_the_footer(tmp_path: Path, struct: bool) -> None:
    images: list[Any] = [picture(n) if n % 4 else None for n in range(12)]
    if struct:
        images = [None if n == 0 else {"bytes": image, "path": None} for n, image in enumerate(images)]
    kind = HUGGING_FACE if struct else pa.binary()
    captions = [None if n % 2 else f"c {n}" for n in range(12)]
    write_table(tmp_path / "a.parquet", image=pa.array(images, kind), caption=captions)
    write_table(tmp_path / "b.parquet", image=pa.array(images, kind), caption=pa.array([None] * 12, pa.null()))
    dataset = open_dataset(tmp_path)
    assert dataset.index.left_out == LeftOut(without_image=6, without_caption=18)
    assert dataset.remarks() == [f"{tmp_path}: 6 samples without an image; 18 samples without a caption"]
    write_table(tmp_path / "b.parquet", image=pa.array(images, kind), caption=[[f"c {n}"] for n in range(12)])
    assert open_dataset(tmp_path / "b.parquet").index.left_out == LeftOut(without_image=3)  # lists are not looked into
    pq.write_table(pa.table({"image": images[1:2], "caption": ["c"]}), tmp_path / "c.parquet", write_statistics=False)
    assert open_dataset(tmp_path / "c.parquet").remarks() == []


def test_an_empty_row_is_skipped_and_told(tmp_path: Path) -> None:
    images = [picture(n, (40, 40), "JPEG") if n != 4 else None for n in range(6)]
    write_table(tmp_path / "a.parquet", image=images, caption=[None if n == 4 else f"c {n}" for n in range(6)])
    (problem,) = check_dataset(tmp_path, processes=1).problems
    assert str(problem) == "a.parquet, sample 'a/4': it is empty: its row holds no value, and it is skipped"
    assert problem.severity == "warning"
    written = bake(tmp_path, tmp_path / "baked", short_side=20, processes=1)
    assert [(skip.source, skip.reason) for skip in written.skipped] == [("a/4", EMPTY)]
    report = run_filters(tmp_path, tmp_path / "kept", parse_steps(["image-size"]), processes=1)
    assert (report.kept, report.steps[0].reasons) == (5, {UNREADABLE: 1})
    assert [(example.key, example.detail) for example in report.steps[0].examples] == [("a/4", EMPTY)]


# --- at a URL


@pytest.fixture
def web(written: dict[str, Path]) -> Iterator[WebServer]:
    server = WebServer(written["struct"])
    yield server
    server.stop()


@pytest.mark.parametrize("form", ["", "/", "/train-*.parquet", "/train-00000-of-00003.parquet"])
@pytest.mark.parametrize("scheme", ["http", "file"])
def test_at_a_url_it_is_the_same(
    web: WebServer, written: dict[str, Path], tmp_path: Path, scheme: str, form: str
) -> None:
    cache = Cache(tmp_path / "cache")
    at = web.url if scheme == "http" else f"file://{written['struct']}"
    local, remote = open_dataset(f"{written['struct']}{form}"), open_dataset(f"{at}{form}", cache)
    assert remote.fingerprint == local.fingerprint
    assert len(remote) == (SAMPLES if "00000" not in form else PER_FILE)
    again = pickle.loads(pickle.dumps(remote))
    for number in range(len(local)):
        assert local.read(number) == again.read(number)
    assert remote.folder == f"{at}{form}"
    if scheme == "http":
        assert all("bytes=" in each for each in web.asked if each.startswith("GET") and "parquet" in each)
        before = len(web.asked)
        assert [again.read(number).key for number in range(3)] == [local.key(number) for number in range(3)]
        assert len(web.asked) == before, "what is in the cache is not asked for"


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_at_a_url_reads_the_same_batches(
    web: WebServer, written: dict[str, Path], tmp_path: Path, workers: int
) -> None:
    local, remote = open_dataset(written["struct"]), open_dataset(web.url, Cache(tmp_path))
    found = batches(remote, Order(SAMPLES, SEED), workers=workers)
    for mine, other in zip(chain(*found), chain(*batches(local, Order(SAMPLES, SEED))), strict=True):
        for name, tensor in mine.tensors().items():
            assert torch.equal(tensor, getattr(other, name)), name


def test_bytes_damaged_on_their_way_are_fetched_again(web: WebServer, tmp_path: Path) -> None:
    dataset = open_dataset(web.url, Cache(tmp_path))
    for path in tmp_path.glob("*/pieces/*"):
        data = bytearray(path.read_bytes())
        data[900] ^= 255  # of the first row group
        path.write_bytes(data)
    assert dataset.read(0).key == dataset.key(0)


def test_what_is_not_at_a_url_is_one_sentence(web: WebServer, tmp_path: Path) -> None:
    for missing in ("none.parquet", "none-*.parquet"):
        with pytest.raises((FileNotFoundError, DataError), match=r"none.*\.parquet.*there is no such"):
            open_dataset(f"{web.url}/{missing}", Cache(tmp_path))


def test_without_pyarrow(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=rf"reading {folder} needs pyarrow, which is not installed: pip install"):
        open_dataset(folder)
