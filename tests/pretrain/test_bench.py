"""`weft bench step`: whom it compares with, what it says of each, and that one who is missing is a sentence."""

from __future__ import annotations

import json
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from pretrain import bench, bench_peers
from pretrain.bench import Measured, StepBench, bench_training_step
from pretrain.config import Recipe, load_recipe
from pretrain.plain import PlainBlock, PlainDualEncoder, plain_contrastive_loss

TINY = [
    "run.device=cpu",
    "data.train=missing",
    "train.global_batch=4",
    "layout={auto: true, memory_gib: 8}",
    "model.vision={image_size: 16, patch: 8, layers: 1, width: 32, heads: 2, pool: class, positions: learned}",
    "model.text={context: 8, vocab_size: 300, layers: 1, width: 32, heads: 2}",
    "model.embed_dim=16",
]


@pytest.fixture(autouse=True)
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "ROUNDS", 1)
    monkeypatch.setattr(bench, "STEPS_A_ROUND", 1)


def recipe(*overrides: str) -> Recipe:
    return load_recipe("vit_l_14", ["train.precision=fp32", *TINY, *overrides])


def without_open_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "open_clip", None)  # importing it is then an ImportError


def with_open_clip(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A stand-in with the names that are used of it; what it was made with."""
    found: dict[str, Any] = {}

    class Clip(torch.nn.Module):
        def __init__(self, embed_dim: int, vision: Any, text: Any) -> None:
            super().__init__()
            found.update(embed_dim=embed_dim, vision=vars(vision), text=vars(text))
            self.visual, self.transformer = torch.nn.Module(), torch.nn.Module()
            for tower in (self.visual, self):
                tower.transformer = torch.nn.Module()
                tower.transformer.resblocks = torch.nn.ModuleList([torch.nn.Linear(4, 4)])
            self.inner = PlainDualEncoder(recipe().model)
            for parameter in self.inner.parameters():
                torch.nn.init.normal_(parameter, std=0.02)

        def forward(self, image: torch.Tensor, text: torch.Tensor) -> Any:
            found["pixels"] = (float(image.min()) >= -1, float(image.max()) <= 1)
            return self.inner(image * 127.5 + 127.5, text)

    def clip_loss(*arguments: Any, **named: Any) -> Any:
        found["loss"] = (*arguments, named)
        return plain_contrastive_loss

    package, model = ModuleType("open_clip"), ModuleType("open_clip.model")
    package.ClipLoss = clip_loss  # type: ignore[attr-defined]
    model.CLIP = Clip  # type: ignore[attr-defined]
    model.CLIPVisionCfg = model.CLIPTextCfg = lambda **sizes: SimpleNamespace(**sizes)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "open_clip", package)
    monkeypatch.setitem(sys.modules, "open_clip.model", model)
    return found


def test_all_peers_take_turns_and_each_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    made = with_open_clip(monkeypatch)
    compiled: list[torch.nn.Module] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **_: compiled.append(module))
    found = bench_training_step(recipe(), compiled=True)
    assert found is not None
    names = ["plain torch", "plain torch, fused AdamW", "open_clip", "plain torch, compiled", "open_clip, compiled"]
    assert list(found.peers) == names
    assert found.left_out == ()
    assert found.fastest in names
    assert found.first_loss_difference == pytest.approx(0, abs=1e-5)
    assert [type(each) for each in compiled] == [PlainBlock] * 2 + [torch.nn.Linear] * 2, "every block of the compiled"
    assert all(line in str(found) for line in names)
    assert "samples/s" in str(found)
    assert "GFLOP a sample" in str(found)
    assert json.loads(json.dumps(found.as_dict()))["weft_seconds"] == found.weft.seconds
    assert (made["vision"]["head_width"], made["vision"]["pool_type"], made["vision"]["pos_embed_type"]) == (
        16,
        "tok",
        "learnable",
    )
    assert made["text"]["vocab_size"] == 384
    assert made["pixels"] == (True, True)
    assert made["loss"] == (False, False, {"cache_labels": True, "rank": 0, "world_size": 1})


@pytest.mark.parametrize("way", ["missing", "broken", "full", "other version"])
def test_a_peer_that_is_not_to_be_had_is_one_sentence(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    if way == "missing":
        without_open_clip(monkeypatch)
    else:
        with_open_clip(monkeypatch)
        error = "operator torchvision::nms does not exist" if way == "broken" else "CUDA out of memory. Tried 3 GiB"
        kind = TypeError if way == "other version" else RuntimeError

        class Broken(ModuleType):
            def __getattr__(self, name: str) -> Any:
                raise RuntimeError(error)

        if way == "broken":
            monkeypatch.setitem(sys.modules, "open_clip.model", Broken("open_clip.model"))
        else:

            def full(*_: object) -> Any:
                raise kind("unexpected keyword 'no_causal_mask'" if way == "other version" else error)

            monkeypatch.setattr(bench_peers, "_open_clip", full)
    found = bench_training_step(recipe())
    assert found is not None
    assert list(found.peers) == ["plain torch", "plain torch, fused AdamW"], "not compiled on a CPU unless asked"
    (sentence,) = found.left_out
    assert sentence.startswith("open_clip is not measured: ")
    why = {"missing": "pip install", "broken": "torchvision::nms", "full": "the memory is full"}
    assert why.get(way, "no_causal_mask") in sentence
    assert sentence in str(found)


@pytest.mark.parametrize(
    ("override", "why"),
    [
        ("train.freeze=[vision.]", "train.freeze"),
        ("data.aspect=2", "data.aspect is 2"),
        ("model.text.causal=false", "model.text.causal=true"),
    ],
)
def test_weft_is_measured_alone_where_the_others_would_do_something_else(override: str, why: str) -> None:
    """A frozen tower made weft look faster by what plain torch trained in its place."""
    found = bench_training_step(recipe(override))
    assert found is not None
    assert (found.peers, found.ratio) == ({}, None)
    (sentence,) = found.left_out
    assert sentence.startswith("plain torch and open_clip are not measured: ")
    assert why in sentence


def test_plain_torch_with_another_loss_is_not_compared() -> None:
    """Label smoothing, which it does not know; nor would it know the next setting of a loss."""
    found = bench_training_step(recipe("objectives=[{name: contrastive, label_smoothing: 0.3}]"))
    assert found is not None
    assert not [name for name in found.peers if name.startswith("plain torch")]
    assert any("plain torch is not measured: its first loss is" in sentence for sentence in found.left_out)
    assert found.ratio is None or found.fastest == "open_clip"


def test_a_card_has_its_use_and_its_memory_beside() -> None:
    one = Measured(0.5, 256, 4e5, mfu=0.404, memory_gib=61.25)
    assert str(one) == "0.5000 s a step, 256 samples/s, 400000 GFLOP/s, 40.4% MFU, 61.2 GiB"
    told = str(StepBench("dp1", "NVIDIA H200", "made-up", 8, 128, 427_600_000, 502.0, one, 0.0, 1 << 30))
    assert "40.4% MFU" in told
    assert "weft /" not in told, "a model that is cut has no peer"
