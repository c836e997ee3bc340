"""A cache that `kernels.bench.warm` fills holds what calls of the launchers look for on the card."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton

from kernels.attention_spec import Spec
from kernels.bench import activation, attention, contrastive, norm, warm
from kernels.gpu import attention as attention_gpu
from kernels.gpu import contrastive as contrastive_gpu
from kernels.gpu import norm as norm_gpu

BF16 = torch.bfloat16
MODULES = {"attention": attention, "norm": norm, "contrastive": contrastive, "activation": activation}
WARMED = ("attention: causal 4k", "rms_norm: 16384 x 4096", "contrastive_loss: N64k D512")


def of(names: tuple[str, ...]) -> dict[str, Any]:
    """The modules of the benchmark with these cases alone."""

    def some(module: Any, *arguments: Any) -> list[Any]:
        return [case for case in module.cases(*arguments) if case.key in names]

    return {name: SimpleNamespace(cases=partial(some, module), checks=lambda _: []) for name, module in MODULES.items()}


def launched(monkeypatch: pytest.MonkeyPatch, target: str) -> dict[str, list[str]]:
    """By case or check, the kernels that a warm-up would compile."""
    found: dict[str, list[str]] = {}
    names: list[str] = []
    call = warm._call

    def recorded(job: Any, backend: str) -> None:
        names.clear()
        try:
            call(job, backend)
        finally:
            found[f"{job.key} by {backend}"] = sorted({*names})

    with monkeypatch.context() as patch:
        patch.setattr(warm, "_call", recorded)
        patch.setattr(triton.JITFunction, "run", lambda kernel, *_, **__: names.append(kernel.__name__))
        patch.setattr(warm, "launches_compiled", lambda *_: warm.contextlib.nullcontext())
        warm.warm(Path("none"), target)
    return found


def test_every_row_and_check_is_warmed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    found = launched(monkeypatch, "sm_90")
    rows = ["attention_delta_kernel", "attention_dkdv_kernel", "attention_dq_kernel"]
    assert found["attention: packed 72 by triton"] == sorted([*rows, "attention_forward_kernel"])
    assert found["attention: full 4k by gluon"] == sorted([*rows, "attention_gluon_kernel"])
    assert found["contrastive_loss: N256k D1024 by triton"] == ["gradient_kernel", "sums_kernel"]
    assert found["linear_cross_entropy: V131072 by triton"] == ["chunk_kernel"]
    without = [key for key, kernels in found.items() if not kernels and not key.endswith("gluon")]
    assert without == [key for key in found if " D33 " in key]  # which the kernels refuse
    assert [key for key, kernels in launched(monkeypatch, "gfx942").items() if kernels and key.endswith("gluon")] == []


def test_the_launchers_find_what_was_warmed_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On tensors with memory, as on the card, and other ones than those of the warm-up."""
    monkeypatch.setattr(warm, "OPERATIONS", of(WARMED))
    number = warm.warm(tmp_path, "sm_90")
    assert number == len({*tmp_path.glob("*/*.cubin")}) == 5 + 2 + 2  # causal attention by Gluon has one of its own

    for module in (attention_gpu, contrastive_gpu):
        monkeypatch.setattr(module, "target_of", lambda _: "sm_90")
    q, lse = torch.empty(1, 2, 4096, 128, dtype=BF16), torch.empty(1, 2, 4096)
    x, weight, statistics = torch.empty(6, 4096, dtype=BF16), torch.empty(4096, dtype=BF16), torch.empty(1, 6)
    embeddings, numbers, scalar = torch.empty(300, 512, dtype=BF16), torch.empty(300), torch.empty(())
    causal = Spec(0.1, causal=True)
    hits: list[bool] = []
    calls: dict[str, Callable[[], object]] = {
        "forward": partial(attention_gpu.forward, q, q, q, causal),
        "backward": partial(attention_gpu.backward, q, q, q, q, q, lse, causal),
        "norm": partial(norm_gpu.forward, x, None, weight, None, x, None, statistics, 1e-6),
        "sums": partial(
            contrastive_gpu.sums, embeddings, embeddings, scalar, scalar, 0, numbers, column_wrong_C=numbers
        ),
    }
    again: set[str] = set()
    with triton.knobs.compilation.scope(), warm.launches_compiled(tmp_path, "sm_90", again):
        triton.knobs.compilation.listener = lambda *, cache_hit, **_: hits.append(cache_hit)
        for call in calls.values():
            call()
        assert hits == [True] * len(again) == [True] * 6
        window = Spec(0.1, causal=True, window=100)
        attention_gpu.forward(q, q, q, window)  # and what was not is missed
        assert hits[-1] is False


def test_nothing_of_the_pretence_stays(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from kernels import contrastive as losses
    from kernels import dispatch, linear_cross_entropy_chunks

    driver, run, cache = triton.runtime.driver._active, triton.JITFunction.run, triton.knobs.cache.dir
    monkeypatch.setattr(warm, "OPERATIONS", of(()))
    assert warm.warm(tmp_path, "sm_90") == 0
    assert not torch.empty(1).is_cuda
    assert losses.trial is dispatch.trial
    assert "meta" not in linear_cross_entropy_chunks.CHUNK_BYTES
    assert (driver, run, cache) == (triton.runtime.driver._active, triton.JITFunction.run, triton.knobs.cache.dir)
