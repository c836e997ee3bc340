"""What we write by ourselves is a safetensors file to everyone else."""

import errno
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pretrain.checkpoint import tensor_file
from pretrain.checkpoint.format import checksum_of
from pretrain.checkpoint.tensor_file import write_tensors

SHAPES = {"matrix": (37, 11), "scale": (), "bias": (1023,), "one": (1,), "cube": (3, 1, 5)}
SIZES = {name: torch.Size(shape).numel() for name, shape in SHAPES.items()}


@pytest.mark.parametrize("piece", [1, 1000, 8 << 20])
def test_another_tool_reads_the_same_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    monkeypatch.setattr(tensor_file, "PIECE", piece)
    numbers = torch.randn(sum(SIZES.values()), generator=torch.Generator().manual_seed(0))
    path = tmp_path / "weight.safetensors"
    assert write_tensors(path, SHAPES, numbers) == checksum_of(path)
    found = load_file(path)
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == SHAPES
    for (name, shape), flat in zip(SHAPES.items(), numbers.split(list(SIZES.values())), strict=True):
        assert torch.equal(found[name], flat.view(shape))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_an_os_error() -> None:
    with pytest.raises(OSError, match="No space") as caught:
        write_tensors(Path("/dev/full"), {"a": (4,)}, torch.zeros(4))
    assert caught.value.errno == errno.ENOSPC
