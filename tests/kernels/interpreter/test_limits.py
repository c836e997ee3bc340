"""Limits of trials and checks against tensor cores: what is right passes with room, a factor of 1% wrong is found.

The kernels run in the interpreter with the tiles of sm_90 and the products of tensor_cores.py. `pytest -s` prints the
room of every limit. It is a factor of 3 at least, for the model may be wrong. fp32 products of attention and of linear
cross entropy are "ieee": they never come to a tensor core, unless torch's switch for TF32 says so, which only the trial
has to bear.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from tensor_cores import accumulate, cut_to_tf32, emulate, product

import kernels.gpu.attention as attention_triton
import kernels.gpu.contrastive as contrastive_triton
from kernels import attention_trial, contrastive, dispatch
from kernels import linear_cross_entropy_chunks as chunks
from kernels.attention_operator import attend
from kernels.attention_spec import Spec
from kernels.bench import attention as attention_bench
from kernels.bench import contrastive as contrastive_bench
from kernels.bench import linear_cross_entropy as linear_bench
from kernels.bench.case import Check
from kernels.bench.check import Judge, judge, numbers

activation, norm, rotary = (importlib.import_module(f"kernels.{name}") for name in ("activation", "norm", "rotary"))
CPU, HALF = torch.device("cpu"), (torch.bfloat16, torch.float16)
ROOM = 3.0
CHECKS = [
    *(each for each in attention_bench.checks(CPU) if each.dtype in HALF and each.name != "ViT 257"),  # as ViT 197
    *contrastive_bench.checks(CPU),
    *(each for each in linear_bench.checks(CPU) if each.dtype in HALF and "N67" in each.name),
]


@pytest.fixture(params=["cut", "aligned and cut"])
def tensor_cores(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    emulate(monkeypatch, aligned=request.param != "cut")
    for launchers in (attention_triton, contrastive_triton):
        monkeypatch.setattr(launchers, "target_of", lambda tensor: "sm_90")
    return str(request.param)


# --- the model


@pytest.mark.parametrize("aligned", [False, True])
def test_the_model_cuts_toward_zero(aligned: bool) -> None:
    ones, total = np.ones((1, 64), np.float32), np.full((1, 1), 2.0**24, np.float32)
    # 1 more has no bit there and 8 more at once have: each addition of 8 counts, and of 1, seven zeros, none
    assert accumulate(ones, ones.T, total, aligned)[0, 0] == 2**24 + 64
    sparse = np.where(np.arange(64) % 8 == 0, 1, 0).astype(np.float32)[None]
    assert accumulate(sparse, ones.T, total, aligned)[0, 0] == 2**24
    assert accumulate(-sparse, ones.T, -total, aligned)[0, 0] == -(2**24)
    assert cut_to_tf32(np.float32([1 + 2**-10 + 2**-11, -1 - 2**-11])).tolist() == [1 + 2**-10, -1]


def test_three_tf32_products_are_nearly_fp32() -> None:
    generator = np.random.default_rng(0)
    a, b = (generator.standard_normal(shape).astype(np.float32) for shape in ((64, 96), (96, 64)))
    truth, nothing = a.astype(np.float64) @ b.astype(np.float64), np.zeros((64, 64), np.float32)

    def error(found: np.ndarray) -> float:
        return float(np.linalg.norm(found - truth) / np.linalg.norm(truth))

    assert 2e-7 < error(product(a, b, nothing, "tf32x3")) < 3e-6
    assert 2e-4 < error(product(a, b, nothing, "tf32")) < 2e-3
    assert error(a @ b) < 2e-7


# --- checks


def of_interest(check: Check, kind: str) -> bool:
    """Alignment takes time, and what it changes is far below the rounding to 16 bits."""
    return kind == "cut" or check.operation is contrastive_bench.INFONCE or check.operation is contrastive_bench.SIGMOID


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.key)
def test_a_check_passes_with_room_and_finds_one_percent(check: Check, tensor_cores: str) -> None:
    if not of_interest(check, tensor_cores):
        pytest.skip("too slow to do for all")
    judged = Judge(check, CPU)
    call = check.operation.implementations(check.call)["triton"].make()
    for name, found in numbers(call, judged._tensors, judged._weights).items():
        peer, truth = judged._plain[name], judged._truth[name]
        if not truth.any():
            continue  # InfoNCE and the bias
        row = judge(name, found, peer, truth)
        rooms = {"largest error": (row["error"], row["allowed"])}
        if truth.numel() >= 64:
            rooms["norm"] = (row["norm"], row["allowed_norm"])
        for what, (error, limit) in rooms.items():
            told = f"{check.key}: {what} of {name}: {error:.1e} of {limit:.1e}"
            print(f"{told}, room {limit / max(error, 1e-30):.1f}")
            assert error * ROOM <= limit, told
        for factor in (0.99, 1.01):
            wrong = judge(name, found * factor, peer, truth)
            assert not wrong["passed"], f"{check.key}: {name} times {factor} passes: {wrong}"


# --- trials


@pytest.fixture
def trials(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, float]]:
    """(error, limit) of all results that a trial has compared."""
    found: list[tuple[float, float]] = []

    def note(mine: Sequence[torch.Tensor], truth: Sequence[torch.Tensor], limit: float, what: str = "") -> None:
        found.extend((float((a - b).norm() / b.norm()), limit) for a, b in zip(mine, truth, strict=True))
        original(mine, truth, limit, what)

    original = dispatch.refuse_difference
    for module in (dispatch, contrastive, chunks):
        monkeypatch.setattr(module, "refuse_difference", note)
    return found


def assert_room(name: str, dtype: torch.dtype, trials: list[tuple[float, float]]) -> None:
    for place, (error, limit) in enumerate(trials):
        told = f"trial of {name} in {dtype}: result {place}: {error:.1e} of {limit:.1e}"
        print(f"{told}, room {limit / max(error, 1e-30):.1f}")
        assert error * ROOM <= limit, told
        assert limit < 1e-2, f"{told}: a factor of 1% would pass"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("operation", ["contrastive_loss", "sigmoid_loss"])
def test_the_contrastive_trial_has_room(operation: str, dtype: torch.dtype, tensor_cores: str, trials: Any) -> None:
    contrastive._try(operation, CPU, dtype)
    assert_room(operation, dtype, trials)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_trial_of_linear_cross_entropy_has_room(
    dtype: torch.dtype, trials: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    emulate(monkeypatch)
    chunks.compare_with_torch(CPU, dtype)
    assert_room("linear_cross_entropy", dtype, trials)


@pytest.mark.parametrize(
    ("dtype", "traits"),
    [
        (torch.float32, ()),
        (torch.bfloat16, ("causal",)),
        (torch.bfloat16, ("documents", "soft cap", "dropout")),
        (torch.float16, ("key lengths",)),
    ],
    ids=str,
)
def test_the_attention_trial_has_room(
    dtype: torch.dtype, traits: tuple[str, ...], trials: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In fp32 under torch's switch for TF32."""
    emulate(monkeypatch)
    monkeypatch.setattr(attention_triton, "target_of", lambda tensor: "sm_90")
    exact = attention_triton._numerics
    kind = "tf32" if dtype == torch.float32 else "ieee"
    monkeypatch.setattr(attention_triton, "_numerics", lambda dtype: exact(dtype) | {"PRECISION": kind})
    attention_trial.compare("triton", CPU, dtype, 64, traits)
    assert_room(f"attention {traits}", dtype, trials)


def test_the_trial_of_torchs_attention_has_room(trials: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its scores are shifted; our kernel stands for theirs, which round at the same places."""
    emulate(monkeypatch)

    def ours(_: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: Spec, __: None) -> torch.Tensor:
        return attend(q, k, v, None, None, None, None, spec.scale, spec.causal, 0, 0.0, 0.0, "triton")[0]

    monkeypatch.setattr(attention_trial.attention_sdpa, "run", ours)
    monkeypatch.setattr(attention_trial, "LENGTHS_OF_TORCHS", (64, 192))
    attention_trial.compare("cudnn", CPU, torch.bfloat16, 64, ())
    assert_room("torch's attention", torch.bfloat16, trials)


@pytest.mark.parametrize("dtype", dispatch.LIMITS, ids=str)
@pytest.mark.parametrize(
    "trial", [norm._trial, partial(activation._trial, "bias_gelu"), partial(activation._trial, "swiglu"), rotary._trial]
)
def test_trials_without_tensor_cores_have_room(
    trial: Callable[[torch.device, torch.dtype], str], dtype: torch.dtype, trials: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "_trials", {})
    assert trial(CPU, dtype) == ""
    assert_room(str(trial), dtype, trials)
