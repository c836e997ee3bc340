"""The boundary around a sample: whatever is raised inside is its damage, named, with the cause; the shard's passes."""

import struct
import zlib
from pathlib import Path

import pytest
from tars import picture, tar_of

from data_pipeline import BatchMaker, ImageTransform, Joined, batch, open_dataset
from data_pipeline.damage import cause_of, opened
from data_pipeline.errors import DamagedSampleError, DataError


def dataset(folder: Path, samples: int = 8) -> Path:
    folder.mkdir()
    (folder / "0.tar").write_bytes(
        tar_of([each for n in range(samples) for each in ((f"s{n}.png", picture(n)), (f"s{n}.txt", b"words"))])
    )
    return folder


RAISED = [
    KeyError(6),
    IndexError("x"),
    struct.error("unpack requires 4 bytes"),
    zlib.error("Error -3"),
    RecursionError("maximum recursion depth exceeded"),
    MemoryError(),
    OverflowError("Python int too large to convert to C long"),
    UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
    AssertionError("that cannot be"),
    OSError("image file is truncated"),
    ZeroDivisionError(),
    DataError("damaged JPEG"),
]


@pytest.mark.parametrize("error", RAISED, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("joined", [False, True])
def test_whatever_is_raised_names_sample_shard_and_cause(tmp_path: Path, error: Exception, joined: bool) -> None:
    data = open_dataset(dataset(tmp_path / "data"))
    with pytest.raises(DamagedSampleError) as caught, opened(Joined([data, data]) if joined else data, 3):
        raise error
    told = caught.value
    assert told.key == "s3"
    assert told.shard == (f"{tmp_path}/data/0.tar" if joined else "0.tar")
    assert "sample 's3' in" in str(told)
    assert type(error).__name__ in cause_of(told)
    assert told.reason == "damaged JPEG" or type(error).__name__ in told.reason


def test_interrupts_and_faults_of_the_shard_pass(tmp_path: Path) -> None:
    folder = dataset(tmp_path / "data")
    data = open_dataset(folder)
    with pytest.raises(KeyboardInterrupt), opened(data, 0):
        raise KeyboardInterrupt
    data.close()
    (folder / "0.tar").unlink()
    with pytest.raises((DataError, OSError)) as caught, opened(data, 0):
        pass
    assert not isinstance(caught.value, DamagedSampleError), "no other sample of this shard is better"


def test_what_is_wrong_with_every_sample_is_told_without_a_word_of_python(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "0.tar").write_bytes(tar_of({"a.jpg": b"no image", "a.txt": b"x"}))
    maker = BatchMaker(open_dataset(folder), ImageTransform(8), None, seed=0, training=True)
    with pytest.raises(DataError, match=r"16 draws in a row .* not a JPEG, PNG or WebP image .*'no image'\)$"):
        maker(*[batch.np.arange(4)] * 2)


def test_an_error_of_our_own_in_every_sample_ends_with_its_cause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(data: bytes) -> None:
        raise AttributeError("module has no attribute 'decoed'")

    monkeypatch.setattr(batch, "decode_image", broken)
    data = open_dataset(dataset(tmp_path / "data"))
    maker = BatchMaker(data, ImageTransform(8), None, seed=0, training=True)
    with pytest.raises(DataError, match=r"16 draws in a row.*AttributeError: module has no .* \(AttributeError in"):
        maker(*[batch.np.arange(4)] * 2)
