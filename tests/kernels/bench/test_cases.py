"""What is measured: all cases of a GPU and of a CPU are well formed, and the peers compute the same thing."""

from __future__ import annotations

import types
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from kernels.bench import activation, attention, contrastive, linear_cross_entropy, norm, peers, step
from kernels.bench.case import Layout, Tensors, normal_draw
from kernels.bench.check import numbers
from kernels.bench.jobs import OPERATIONS
from kernels.bench.measure import Clock
from kernels.bench.rows import Bench

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
@pytest.mark.parametrize("quick", [True, False])
def test_cases_are_well_formed(name: str, device: torch.device, quick: bool) -> None:
    module = OPERATIONS[name]
    cases = module.cases(device, quick)
    assert cases
    for each in cases:
        assert each.peers
        assert all(each.bytes[which] > 0 for which in each.passes)
        assert set(each.targets) <= set(each.passes)
    keys = [each.key for each in (*cases, *module.checks(device))]
    assert len(keys) == len(set(keys))
    if quick:
        assert {each.key for each in cases} <= {each.key for each in module.cases(device, quick=device == CPU)}


def test_what_would_take_minutes_or_fill_the_memory_is_left_out() -> None:
    left_out = {
        each.key: set(each.left_out)
        for module in OPERATIONS.values()
        for each in module.cases(CUDA, False)
        if each.left_out
    }
    assert left_out == {
        "attention: full 4k": {"SDPA math"},
        "attention: causal 4k": {"SDPA math"},
        "attention: window 1024, 16k": {"SDPA math"},
        "attention: soft cap 30, 16k": {"SDPA math"},
        "contrastive_loss: N256k D1024": {"torch"},
    }


def test_a_library_kernel_is_measured_once() -> None:
    for each in attention.cases(CUDA, False):
        assert set(each.same.values()) <= set(each.peers)
        assert set(each.same).isdisjoint(each.operation.own)
    assert len(attention.cases(CUDA, False)[0].same) == 3


@pytest.mark.parametrize("module", [attention, contrastive, linear_cross_entropy, norm, activation])
def test_plain_definitions_are_exact_in_fp64(module: ModuleType) -> None:
    """The definition in the inputs' dtype and the truth are one function: fp64 of fp32 inputs is close to fp32."""
    for check in module.checks(CPU):
        if check.dtype != torch.float32:
            continue
        tensors = check.draw(CPU)
        found, wide = numbers(check.plain, tensors), numbers(check.truth, widened(tensors))
        for name, value in found.items():
            torch.testing.assert_close(value.double(), wide[name], atol=2e-3, rtol=1e-4)


def widened(tensors: Tensors) -> Tensors:
    from kernels.bench.check import widened

    return widened(tensors)


def draw_pairs() -> Tensors:
    return contrastive._draw(37, 16, torch.float64)(CPU)


@pytest.mark.parametrize("rows", [1, 10, 64])
def test_chunked_losses_are_the_naive_ones(rows: int) -> None:
    for naive, chunked in (
        (contrastive.naive_infonce, contrastive.chunked_infonce),
        (contrastive.naive_sigmoid, contrastive.chunked_sigmoid),
    ):
        torch.testing.assert_close(numbers(naive, draw_pairs()), numbers(partial(chunked, rows), draw_pairs()))
    tensors = linear_cross_entropy._draw(37, 16, 50, torch.float64)(CPU)
    chunked_lines = numbers(partial(linear_cross_entropy.chunked, rows), tensors)
    torch.testing.assert_close(numbers(linear_cross_entropy.naive, tensors), chunked_lines)


def test_padded_documents_give_what_packed_ones_do() -> None:
    lengths = attention.lengths_of(70, 20)
    assert sum(lengths) == 70
    assert max(lengths) < 20
    tensors = attention._packed_draw(2, lengths, 8, torch.float64)(CPU)
    padded = attention.padded(lengths, 20)
    out_DHTK = attention._padded_sdpa(padded.tensors(tensors))
    torch.testing.assert_close(padded.usual(out_DHTK), attention._defined({}, tensors))


@pytest.mark.parametrize("layout", [attention.padded([3, 20, 7], 20), attention.TOKENS_FIRST, attention.HEADS_SECOND])
def test_layouts_go_there_and_back(layout: Layout) -> None:
    tensors = attention._packed_draw(2, [3, 20, 7], 8, torch.float64)(CPU)
    own = layout.tensors(tensors)
    assert own["q"].shape != tensors["q"].shape
    assert all(own[name].requires_grad and own[name].is_leaf and own[name].is_contiguous() for name in "qkv")
    torch.testing.assert_close(layout.usual(own["q"]), tensors["q"])


@pytest.mark.parametrize(
    "options", [{}, {"causal": True}, {"causal": True, "window": 5}, {"causal": True, "window": 99}]
)
def test_pairs_counts_what_is_seen(options: attention.Options) -> None:
    mask = attention.seen(options, 17, 17, CPU)
    assert attention.pairs(options, 17) == (17 * 17 if mask is None else int(mask.sum()))


def test_draws_repeat() -> None:
    first, second = (normal_draw({"x": (5, 3)}, torch.bfloat16)(CPU)["x"] for _ in range(2))
    assert torch.equal(first, second)
    assert first.requires_grad


def test_the_two_training_steps_are_one_model() -> None:
    losses = []
    for operations in step.OPERATIONS.values():
        action = step.training_step(step.SMALL, operations(), CPU, compile_blocks=False)
        losses.append([float(action()) for _ in range(2)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0][1] < losses[0][0]


def test_a_step_with_another_loss_is_wrong_and_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def off() -> step.Operations:
        right = step.usual()
        return replace(right, loss=lambda *inputs: 1.05 * right.loss(*inputs))

    monkeypatch.setitem(step.OPERATIONS, step.KERNELS, off)
    rows = {row["implementation"]: row for row in step.rows(Bench(Clock(CPU), quick=True, case_seconds=0.1))}
    assert {name: row["status"] for name, row in rows.items()} == {"torch": "ok", "kernels": "wrong"}
    assert "its first loss is" in rows["kernels"]["message"]


@pytest.mark.parametrize(
    ("seconds", "batches"),
    [({}, [128, 128]), ({128: 0.2, 256: 0.3}, [128, 256, 256]), ({128: 0.2, 256: 0.5}, [128, 256, 128])],
)
def test_a_short_step_is_tried_with_twice_the_batch(
    monkeypatch: pytest.MonkeyPatch, seconds: dict[int, float], batches: list[int]
) -> None:
    tried: list[tuple[int, bool]] = []

    def pair(size: step.Size, compile_blocks: bool, bench: Any) -> Any:
        tried.append((size.batch, compile_blocks))
        yield {}
        return seconds.get(size.batch, 0.4)

    monkeypatch.setattr(step, "_pair", pair)
    bench = types.SimpleNamespace(device=CUDA)
    assert len(list(step.rows(bench))) == len(tried)  # type: ignore[arg-type]
    assert [batch for batch, _ in tried] == batches
    assert [compile_blocks for _, compile_blocks in tried] == [*[False] * (len(tried) - 1), True]


def test_a_step_of_twice_the_batch_has_a_name_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else one that ends its process there is out at the usual batch too, and takes that row along."""
    monkeypatch.setattr(step, "VIT_L", replace(step.SMALL, batch=2))
    skip = {"train step": {" kernels, twice the batch": "it ended the process of step"}}
    bench = Bench(Clock(CPU), quick=True, skip=skip)
    rows = [row for batch in (2, 4) for row in step._pair(replace(step.SMALL, batch=batch), False, bench)]
    assert {row["implementation"]: row["status"] for row in rows} == {
        "torch": "ok",
        "kernels": "ok",
        "torch, twice the batch": "ok",
        "kernels, twice the batch": "error",
    }


def test_flops_of_vit_l() -> None:
    """4.4 and 1.5 GFLOP a layer and tower: 162 GFLOP an image, as published (81 G multiply-adds), and 13 a caption."""
    assert step.VIT_L.image.flops == pytest.approx(162e9, rel=0.03)
    assert step.VIT_L.text.flops == pytest.approx(13.3e9, rel=0.03)
    assert step.VIT_L.training_flops == pytest.approx(3 * (162e9 + 13.3e9), rel=0.03)


def test_what_a_peers_package_imports_is_not_waited_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """open_clip's brings transformers and torchvision along: a quarter of a minute, in each process that measures."""
    folder = tmp_path / "a_peer_of_a_test"
    folder.mkdir()
    (folder / "__init__.py").write_text("raise AssertionError('imported')")
    (folder / "loss.py").write_text("VALUE = 3")
    (folder / "broken.py").write_text("import no_such_module")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(
        peers, "OPTIONAL", {"A": (folder.name, "a-peer"), "B": ("no_such_peer", "b"), "C": ("torch",) * 2}
    )
    assert peers.present() == {"A": "present", "B": "not installed", "C": torch.__version__}
    assert peers.imported_alone(folder.name, "loss").VALUE == 3
    for package, module in ((folder.name, "broken"), (folder.name, "none"), ("no_such_peer", "loss")):
        with pytest.raises(peers.MissingPeerError, match="cannot import"):
            peers.imported_alone(package, module)
