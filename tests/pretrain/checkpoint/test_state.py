"""Adam's state where this rank's numbers are: made for a checkpoint, it is of the kind that Adam makes itself."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pretrain.checkpoint.state import count_updates, make_moments
from pretrain.parallel.updater import adamw
from pretrain.sections import Train


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_state_made_for_a_checkpoint_lies_where_fused_adamw_reads_it(device: str) -> None:
    """On CUDA the fused kernel reads the count of updates too: one on the CPU would be an illegal memory access."""
    tensor = torch.nn.Parameter(torch.ones(4, device=device))
    optimizer = adamw([{"params": [tensor]}], Train())
    assert optimizer.param_groups[0]["fused"]
    engine: Any = SimpleNamespace(layout=SimpleNamespace(zero=0), optimizer=optimizer)
    make_moments(engine, None if device == "meta" else 7)
    assert {name: each.device.type for name, each in optimizer.state[tensor].items()} == dict.fromkeys(
        ("step", "exp_avg", "exp_avg_sq"), device
    )
    if device == "meta":
        return
    assert count_updates(engine) == 7
    tensor.grad = torch.ones(4)
    optimizer.step()
    own = adamw([{"params": [tensor]}], Train())
    own.step()  # what it makes itself
    made, itself = (each.state[tensor]["step"] for each in (optimizer, own))
    assert (made.dtype, made.shape, float(made)) == (itself.dtype, itself.shape, 8.0)
