"""Megatron-core's layers want process groups when they are built: those of a single process, once a file."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from pretrain.parallel.groups import Ranks, start_alone, stop_ranks


@pytest.fixture(scope="module")
def alone() -> Iterator[Ranks]:
    ranks = start_alone(torch.device("cpu"))
    yield ranks
    stop_ranks(ranks)
