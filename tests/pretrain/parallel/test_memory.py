"""The counted memory against what real runs hold: every tensor that lives before an update, and what autograd keeps."""

from __future__ import annotations

import gc
import time
from typing import Any

import pytest
import torch
from layout_cases import made_up_batch, recipe_of
from ranks import run_ranks

from data_pipeline.tokenizer import EOS
from pretrain.activations import SavedBytes
from pretrain.parallel.build import build_model
from pretrain.parallel.engine import Engine
from pretrain.parallel.groups import start_ranks, stop_ranks
from pretrain.parallel.layout import lay_out
from pretrain.parallel.memory import Place, memory_of, parameter_sizes
from pretrain.parallel.updater import Updater

WIDE = ["model.vision.width=128", "model.text.width=96", "run.device=cpu"]
BF16 = ["train.precision=bf16"]
WORLDS: dict[int, list[tuple[str, list[str]]]] = {
    # cases in bf16 under ZeRO-1 come last: DeepSpeed lets go of that optimizer some time later
    1: [
        ("contrastive", []),
        ("contrastive", ["train.micro_batch=4"]),
        ("contrastive", ["layout.zero=0"]),
        ("contrastive", ["layout.recompute=full"]),
        ("sigmoid", ["model.vision.pool=class", "model.vision.positions=learned"]),
        ("caption", ["train.micro_batch=8"]),
        ("contrastive", BF16),
    ],
    2: [
        ("contrastive", ["layout.zero=1"]),
        ("contrastive", ["layout.zero=2", *BF16]),
        ("contrastive", ["layout.zero=3"]),
        ("contrastive", ["layout.zero=3", *BF16]),
        ("contrastive", ["layout.tp=2"]),
        ("contrastive", ["layout.cp=2"]),
        ("contrastive", ["layout.pp=2", "train.micro_batch=2"]),
        ("contrastive", ["layout.pp=2", "layout.vpp=2", "train.micro_batch=2"]),
        ("caption", ["layout.pp=2", "train.micro_batch=4"]),
        ("contrastive", ["layout.tp=2", "layout.sequence_parallel=true", *BF16]),
    ],
}


def living() -> int:
    """Bytes of all tensors of this process, once threads have let go of those that they have sent."""
    gc.collect()
    readings = [_living()]
    for _ in range(2):
        time.sleep(0.1)
        readings.append(_living())
    return min(readings)


def _living() -> int:
    storages = {}
    for each in gc.get_objects():
        if isinstance(each, torch.Tensor):
            storage = each.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def measure(rank: int, world: int) -> list[dict[str, Any]]:
    """Of each case: what is counted, and what is there in the second step."""
    found = []
    for model, overrides in WORLDS[world]:
        recipe = recipe_of(model, WIDE + overrides)
        layout = lay_out(recipe, world)
        before = living()
        ranks = start_ranks(layout, torch.device("cpu"))
        engine = Engine(build_model(recipe, layout, ranks), recipe, layout, ranks)
        held: list[int] = []
        updater = type(engine.updater)
        update = updater._update

        def look_and_update(self: Updater, before: int = before, held: list[int] = held, update: Any = update) -> None:
            held.append(living() - before)
            update(self)

        first = ranks.dp_rank * layout.share
        batch = made_up_batch(0).rows(slice(first, first + layout.share))
        batch.text[:, 1:-1], batch.text[:, -1] = 5, EOS  # captions that fill the context, as the count takes them to do
        engine.step(batch, 1e-3)
        updater._update = look_and_update  # type: ignore[method-assign]
        with SavedBytes(engine.model.parameters()) as saved:
            engine.step(batch, 1e-3)
        updater._update = update  # type: ignore[method-assign]
        counted = memory_of(recipe, layout, ranks.pp_rank)
        sizes = sum(size for _, size in parameter_sizes(recipe, Place(ranks.pp_rank, layout)))
        found.append(
            {
                "sizes": (sizes, sum(getattr(each, "ds_numel", each.numel()) for each in engine.model.parameters())),
                "state": (counted.parameters + counted.gradients + counted.optimizer, held[-1]),
                "activations": (counted.activations, saved.peak),
            }
        )
        engine.close()
        stop_ranks(ranks)
        del engine
    return found


@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_count_is_what_a_run_holds(world: int) -> None:
    for rank, found in enumerate(run_ranks(measure, world, timeout=900)):
        for case, each in zip(WORLDS[world], found, strict=True):
            counted, held = each["sizes"]
            assert counted == held, f"parameters of rank {rank}, {case}"
            for name in ("state", "activations"):
                counted, held = each[name]
                assert counted == pytest.approx(held, rel=0.05), f"{name} of rank {rank}, {case}"
