"""Every kernel that a row of the table times on a Hopper GPU meets the truth in a check: the same tile and the same
constants, with as many turns of each loop as the row has, or STAGES + 2, so that what is fetched ahead goes round.

Pure arithmetic: the launchers' own choice of tiles, and how often the loops of kernels/gpu/attention_*.py turn.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton")

import kernels.gpu.attention as launchers
from kernels.attention_spec import Spec
from kernels.bench import activation, attention, contrastive, linear_cross_entropy, norm
from kernels.bench.case import Case, Check
from kernels.gpu import activation as gpu_activation
from kernels.gpu import contrastive as gpu_contrastive
from kernels.gpu import linear_cross_entropy as gpu_linear
from kernels.gpu import norm as gpu_norm
from kernels.gpu.attention_tiles import DKDV, DQ, FORWARD, Tile, edge

CUDA, HALF = torch.device("cuda"), torch.bfloat16
MULTIPROCESSORS = 132  # of an H200
Kernels = dict[tuple[Any, ...], tuple[int, ...]]  # what is compiled: how often each of its loops turns, at most


def turns_over_keys(tile: Tile, step: int, queries: int, keys: int, spec: Spec) -> Iterator[tuple[int, ...]]:
    """(left edge of a window, whole blocks, blocks with an edge) of each program; as attention_blocks.key_ranges."""
    for first in range(0, queries, tile.own):
        place, start, left, whole, end = first + keys - queries, 0, 0, keys, keys
        if spec.causal or spec.window:
            ahead = 1 if spec.causal else spec.window
            whole, end = min(whole, max(place + ahead, 0)), min(end, max(place + tile.own - 1 + ahead, 0))
        whole = whole // tile.step * tile.step
        if spec.window:
            start = max(place - spec.window + 1, 0) // tile.step * tile.step
            left = min(-(-max(place + tile.own - spec.window, 0) // tile.step) * tile.step, end)
            whole = max(whole, left)
        yield -(-max(left - start, 0) // step), (whole - left) // tile.step, -(-max(end - whole, 0) // step)


def turns_over_rows(tile: Tile, queries: int, keys: int, spec: Spec) -> Iterator[tuple[int, ...]]:
    """As attention_blocks.row_range."""
    for first_key in range(0, keys, tile.own):
        first, end, shift = 0, queries, keys - queries
        if spec.causal:
            first = max(first_key - shift, 0) // tile.step * tile.step
        elif spec.window:
            first = max(first_key - shift - spec.window + 1, 0) // tile.step * tile.step
        if spec.window:
            end = min(end, max(first_key + tile.own - 1 + spec.window - shift, 0))
        yield (-(-max(end - first, 0) // tile.step),)


def attention_kernels(what: Case | Check, lengths: list[int] | None) -> Kernels:
    """`lengths`: of the documents."""
    asked: dict[str, Any] = {}

    def note(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
        asked.update(q=q, k=k, **options)
        return q

    with FakeTensorMode():
        what.call(note, what.draw(torch.device("cpu")))
        q, k = asked.pop("q"), asked.pop("k")
        starts, keys_of = asked.pop("query_starts", None), asked.pop("key_lengths_B", None)
        if q.dtype != HALF:
            return {}
        spec = Spec(q.shape[-1] ** -0.5, **asked)
        call = launchers._Call(q, k, spec, keys_of, starts, None, None)
        fixed = tuple(sorted((name, str(value)) for name, value in call.constants.items()))
        fixed += (starts is not None, keys_of is not None)
        tokens, documents = q.shape[2], lengths if starts is not None else [q.shape[2]]
    found: Kernels = {}
    for name, tiles in (("forward", FORWARD), ("dq", DQ), ("dkdv", DKDV)):
        tile = call.tile(tiles, tokens)
        step = edge(tile, tokens, call.ragged)
        turns = [
            each
            for length in documents or []
            for each in (
                turns_over_rows(tile, length, length, spec)
                if name == "dkdv"
                else turns_over_keys(tile, step, length, length, spec)
            )
        ]
        found[name, tile, step, fixed] = tuple(max(column) for column in zip(*turns, strict=True))
    return found


def test_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launchers, "target_of", lambda tensor: "sm_90")
    monkeypatch.setattr(launchers, "dense", lambda tensor: tensor)  # fake ones lie nowhere
    checked: list[Kernels] = []
    for check in attention.checks(CUDA):
        lengths = attention.LONG_DOCUMENTS if check.name.startswith("long") else [1, 67, 30, 128, 5]
        checked.append(attention_kernels(check, lengths))
    missing = []
    for case in attention.cases(CUDA, quick=False):
        kernels = attention_kernels(case, attention.lengths_of(65536, attention.DOCUMENT))
        assert len(kernels) == 3
        for key, turns in kernels.items():
            wanted = [min(each, key[1].stages + 2) for each in turns]
            met = [each[key] for each in checked if key in each]
            if not any(all(a >= b for a, b in zip(each, wanted, strict=True)) for each in met):
                missing.append(f"{case.name}: {key[:3]} with turns {wanted}, met with {met}")
    assert not missing, "\n".join(missing)


def test_turns_are_those_of_the_kernels() -> None:
    """257 keys are 4 blocks of 64 and an edge block of 16; a causal program of 128 rows has two blocks with an edge."""
    tile = Tile(128, 64, 64, 4, 3)
    assert set(turns_over_keys(tile, 16, 257, 257, Spec(1.0))) == {(0, 4, 1)}
    causal = list(turns_over_keys(Tile(128, 128, 64, 4, 3), 64, 257, 257, Spec(1.0, causal=True)))
    assert causal == [(0, 0, 2), (0, 2, 2), (0, 4, 1)]
    assert list(turns_over_rows(tile, 128, 128, Spec(1.0, causal=True))) == [(2,), (1,)]


def test_contrastive_losses() -> None:
    """The steps of a tile, and more than one band of tiles."""
    checked = {}
    for check in contrastive.checks(CUDA):
        pairs, size = (int(word[1:]) for word in check.name.split()[:2])
        if check.dtype == HALF:
            checked[check.operation.function, pairs, size] = size // 64
    for case in contrastive.cases(CUDA, quick=False):
        size = int(case.shape.split()[1][1:])
        for kernel in ("sums", "gradient", "sigmoid"):
            tiling = gpu_contrastive.tiling_of(kernel, HALF, "sm_90")
            step = gpu_contrastive._constexprs(tiling, HALF, size, "sm_90")["STEP"]
            assert step == gpu_contrastive._constexprs(tiling, HALF, 512, "sm_90")["STEP"]
            assert any(
                function == case.operation.function and turns >= min(size // step, tiling.stages + 2)
                and pairs > 8 * tiling.rows
                for (function, pairs, _), turns in checked.items()
            ), (case.key, kernel)  # fmt: skip


def test_rows_of_many_blocks() -> None:
    def blocks(what: Case | Check) -> tuple[int, int, bool]:
        columns = int((what.name if isinstance(what, Case) else what.name.split()[2]).removeprefix("V"))
        block, _ = gpu_linear.block_of(columns, 2)
        return block, columns // block, columns % block > 0

    checked = [blocks(each) for each in linear_cross_entropy.checks(CUDA) if each.dtype == HALF]
    for case in linear_cross_entropy.cases(CUDA, quick=False):
        block, turns, rest = blocks(case)
        assert any(each[0] == block and each[1] >= min(turns, 5) and each[2] == rest for each in checked), case.name


def test_programs_that_add_up_several_blocks_of_rows() -> None:
    def norm_turns(name: str) -> tuple[Any, ...]:
        rows, columns = (int(each) for each in name.removesuffix(" + residual").split(" x "))
        tile = gpu_norm.tile_of(columns)
        return (columns, tile, "residual" in name), -(-rows // tile.rows) // (gpu_norm.SHARES * MULTIPROCESSORS)

    for operation in (norm.LAYER, norm.RMS):
        checked = [norm_turns(each.name) for each in norm.checks(CUDA) if each.operation is operation]
        for case in norm.cases(CUDA, quick=False):
            if case.operation is operation:
                kernel, turns = norm_turns(case.name)
                assert any(each == kernel and done >= min(turns, 5) for each, done in checked), case.key

    def gelu_turns(name: str) -> int:
        rows, columns = (int(each) for each in name.split(" x ")[-2:])
        tile = gpu_activation.tile_of(columns)
        down = -(-gpu_norm.SHARES * MULTIPROCESSORS // -(-columns // tile.width))
        return -(-rows // tile.rows) // down

    gelus = [each for each in activation.checks(CUDA) if each.operation is activation.GELU and each.dtype == HALF]
    assert max(gelu_turns(each.name) for each in gelus if each.name.endswith(" 4096")) >= 5


@pytest.mark.parametrize("operation", [activation.SWIGLU, activation.ROTARY], ids=lambda each: each.function)
def test_widths_of_the_table(operation: Any) -> None:
    checked = {each.name.split(" x ")[-1] for each in activation.checks(CUDA) if each.operation is operation}
    for case in activation.cases(CUDA, quick=False):
        if case.operation is operation:
            assert case.shape.removesuffix(" bf16").split(" x ")[-1] in checked, case.shape
