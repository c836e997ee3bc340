"""The order certificate: the same for the same samples in the same order, however they were read; else another."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from data_pipeline import Batch
from pretrain.certificate import Certificate, compare_orders
from pretrain.errors import RequestError

DATA = "ab" * 32


def batch(positions: list[int], samples: list[int]) -> Batch:
    nothing = torch.empty((len(samples), 0))
    return Batch(nothing, nothing, torch.tensor(samples), torch.tensor(positions), [])


def certificate(samples: list[int], batch_size: int, ranks: int = 1, data: str = DATA) -> str:
    """As a run gives it that reads `samples` in global batches, shared by ranks."""
    running = Certificate(data)
    for at in range(0, len(samples), batch_size):
        positions = list(range(at, min(at + batch_size, len(samples))))
        share = batch_size // ranks
        parts = [positions[rank * share : (rank + 1) * share] for rank in range(ranks)]
        terms = [running.terms(batch(part, [samples[position] for position in part])) for part in parts]
        running.add(*(sum(each) for each in zip(*terms, strict=True)))
    return str(running)


SAMPLES = [(7 * number) % 24 for number in range(24)]


@pytest.mark.parametrize(("batch_size", "ranks"), [(4, 1), (4, 2), (12, 3), (24, 1), (1, 1)])
def test_it_depends_on_what_was_read_only(batch_size: int, ranks: int) -> None:
    assert certificate(SAMPLES, batch_size, ranks) == certificate(SAMPLES, 8)


def test_anything_else_has_another() -> None:
    swapped = [SAMPLES[1], SAMPLES[0], *SAMPLES[2:]]
    replaced = [*SAMPLES[:-1], 3]
    others = [swapped, replaced, SAMPLES[:-4], SAMPLES[::-1], [SAMPLES[0], *SAMPLES[:-1]]]
    found = {certificate(each, 4) for each in others} | {
        certificate(SAMPLES, 4),
        certificate(SAMPLES, 4, data="cd" * 32),
    }
    assert len(found) == len(others) + 2
    assert all(len(each) == 16 for each in found)


def test_a_resumed_run_continues_it() -> None:
    first = Certificate(DATA)
    first.add(*first.terms(batch([0, 1], [5, 3])))
    again = Certificate(DATA, str(first))
    for running in (first, again):
        running.add(*running.terms(batch([2, 3], [1, 0])))
    assert str(again) == str(first) != ""
    old = Certificate(DATA, None)  # resumed from a checkpoint that has none
    old.add(1, 2)
    assert str(old) == ""


def test_sums_over_many_ranks_do_not_overflow() -> None:
    running = Certificate(DATA)
    terms = running.terms(batch(list(range(1000)), list(range(1000))))
    assert all(0 <= each < 1 << 32 for each in terms)
    running.add(*(each * 2**20 for each in terms))
    assert len(str(running)) == 16


def run_with(folder: Path, orders: dict[int, str | None], fingerprint: str = DATA, seed: int = 0) -> Path:
    folder.mkdir()
    lines = [
        json.dumps({"step": samples // 4, "samples": samples, "order": order}) for samples, order in orders.items()
    ]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "manifest.json").write_text(json.dumps({"data_fingerprint": fingerprint, "seed": seed}))
    return folder


def test_two_runs_are_compared_where_both_logged(tmp_path: Path) -> None:
    a = run_with(tmp_path / "a", {4: "1", 8: "2", 12: "3"})
    same = compare_orders(a, run_with(tmp_path / "b", {8: "2", 10: "9", 12: "3", 16: "4"}))
    assert (same.same, same.samples, same.differs_at) == (True, 12, None)
    other = compare_orders(a, run_with(tmp_path / "c", {4: "1", 8: "x", 12: "y"}, seed=1))
    assert (other.same, other.samples, other.differs_at) == (False, 4, 8)
    assert "differ within the first 8" in other.sentence
    assert "seeds differ (0 and 1)" in other.sentence
    data = compare_orders(a, run_with(tmp_path / "d", {4: "8"}, fingerprint="0" * 64))
    assert "their data differ" in data.sentence
    without = compare_orders(a, run_with(tmp_path / "e", {4: None}))
    assert not without.same
    assert "e has no order certificate" in without.sentence
    apart = compare_orders(a, run_with(tmp_path / "f", {5: "1"}))
    assert not apart.same
    assert "no common number of samples" in apart.sentence
    with pytest.raises(RequestError, match="is not a run folder"):
        compare_orders(a, tmp_path)
