"""What torch.distributed and CUDA are asked for on a card; that they then do it, only a card can show."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from pretrain.parallel import groups
from pretrain.parallel.groups import ALLOCATOR_SETTINGS, start_alone, start_ranks
from pretrain.parallel.layout import Layout


class ReachedError(Exception):
    """Nothing behind this can run without a card."""


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Arguments by what they were given to, as a process without groups that has a card would give them."""
    found: dict[str, Any] = {"order": []}

    def noted(name: str) -> Any:
        def note(*arguments: Any, **named: Any) -> None:
            found["order"].append(name)
            found[name] = (*arguments, named) if named else arguments
            if name == "init":
                raise ReachedError

        return note

    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", *ALLOCATOR_SETTINGS):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    monkeypatch.setattr(dist, "init_process_group", noted("init"))
    monkeypatch.setattr(torch.cuda, "set_device", noted("set_device"))
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", noted("allocator"))
    monkeypatch.setattr(groups, "meet", lambda *_: "the store of all")
    return found


def layout_of(world: int) -> Layout:
    return Layout(world=world, dp=world, tp=1, zero=1, share=1, micro_batch=1)


def test_a_single_rank_on_a_card_opens_no_port_and_is_bound_to_nothing(asked: dict[str, Any]) -> None:
    with pytest.raises(ReachedError):
        start_ranks(layout_of(1), torch.device("cuda", 0), timedelta(seconds=9))
    assert asked["order"] == ["allocator", "set_device", "init"]
    backend, named = asked["init"]
    assert backend == "nccl"
    assert isinstance(named.pop("store"), dist.HashStore)
    assert named == {"rank": 0, "world_size": 1, "timeout": timedelta(seconds=9)}


@pytest.mark.parametrize(("kind", "backend"), [("cuda", "nccl"), ("cpu", "gloo")])
def test_each_of_several_ranks_is_bound_to_its_card(
    asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch, kind: str, backend: str
) -> None:
    environment = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    for name, value in {**environment, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    device = torch.device(kind, 1) if kind == "cuda" else torch.device(kind)
    with pytest.raises(ReachedError):
        start_ranks(layout_of(8), device)
    given, named = asked["init"]
    assert (given, named["rank"], named["world_size"], named["store"]) == (backend, 5, 8, "the store of all")
    assert named["device_id"] == (device if kind == "cuda" else None)
    assert asked["order"] == (["allocator", "set_device", "init"] if kind == "cuda" else ["init"])


@pytest.mark.parametrize("name", ALLOCATOR_SETTINGS)
def test_segments_that_grow_are_the_default_and_the_user_can_say_otherwise(
    asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    with pytest.raises(ReachedError):
        start_ranks(layout_of(1), torch.device("cuda", 0))
    assert asked["allocator"] == ("expandable_segments:True",)
    asked["order"].clear()
    monkeypatch.setenv(name, "expandable_segments:False")
    with pytest.raises(ReachedError):
        start_ranks(layout_of(1), torch.device("cuda", 0))
    assert "allocator" not in asked["order"]


def test_a_card_without_a_number_is_the_current_one(asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """`load_model(run, "cuda")`: torch.cuda.set_device refuses a device without an index."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    with pytest.raises(ReachedError):
        start_alone(torch.device("cuda"))
    assert asked["set_device"] == (torch.device("cuda", 3),)
