"""The contrastive losses over groups of ranks, against one process with the whole batch and against the definitions.

All exchanges, one to eight ranks with uneven and empty shares, groups in which a rank has another number than in the
world, extra negatives, the fallback, torch.compile, and parameters under data parallelism.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import run_ranks
from torch.distributed.nn.functional import all_gather

from kernels import contrastive_loss, contrastive_squares, reference, sigmoid_loss
from kernels.contrastive_group import EXCHANGES

Numbers = list[torch.Tensor]  # loss, then the gradients of x, y, scale, negatives or bias
WORLDS = [1, 2, 3, 4, 8]
SHARES = [[20], [5, 5, 5, 5], [9, 0, 1, 10]]  # of 20 pairs, for a step of training


class Case(NamedTuple):
    """Rows of rank r are rows[r]; negatives likewise, or none."""

    loss: str
    rows: list[int]
    negatives: list[int] | None = None
    size: int = 5
    scale: float = 14.3
    smoothing: float = 0.0
    side: int = 1024  # of a square
    falls_back: bool = False


CASES = [
    Case("contrastive", [5, 5, 5, 5, 5, 5, 5, 5]),
    Case("contrastive", [7, 1, 12, 3, 0, 9, 2, 4], scale=100.0, side=4),
    Case("contrastive", [31, 30, 2, 29, 5, 0, 1, 8], smoothing=0.1, side=16),
    Case("contrastive", [9, 4, 11, 6, 0, 3, 1, 2], scale=3000.0, smoothing=0.2, side=3, falls_back=True),
    Case("contrastive", [0, 8, 0, 1, 0, 5, 0, 0], scale=4000.0, falls_back=True),
    Case("contrastive", [1, 0, 0, 0, 0, 0, 0, 0], scale=10.0),
    Case("contrastive", [6, 0, 5, 3, 2, 2, 0, 7], [4, 4, 0, 1, 3, 0, 9, 2], smoothing=0.1, side=5),
    Case("contrastive", [4, 4, 4, 4, 4, 4, 4, 4], [2, 2, 2, 2, 2, 2, 2, 2], scale=3000.0, falls_back=True),
    Case("sigmoid", [5, 5, 5, 5, 5, 5, 5, 5]),
    Case("sigmoid", [7, 1, 12, 3, 0, 9, 2, 4], scale=100.0, side=6),
    Case("sigmoid", [6, 0, 5, 3, 2, 2, 0, 7], [4, 4, 0, 1, 3, 0, 9, 2], side=5),
]
GROUPS = {1: [[0]], 2: [[0, 1]], 3: [[0, 1, 2]], 4: [[0, 1, 2, 3], [0, 2], [3, 1]], 8: [list(range(8))]}


def draw(rows: int, size: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, size, generator=generator, dtype=torch.float64), dim=1)


def number(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


def share(all_rows: torch.Tensor, sizes: list[int], members: list[int], rank: int) -> torch.Tensor:
    """What a rank holds of rows that lie in rank order."""
    before = sum(sizes[member] for member in members if member < rank)
    return all_rows[before : before + sizes[rank]]


def batch(case: Case, members: list[int]) -> list[torch.Tensor]:
    """x, y and, if the case has some, negatives of the group."""
    pairs = sum(case.rows[member] for member in members)
    x = draw(pairs, case.size, seed=pairs)
    y = F.normalize(x + draw(pairs, case.size, seed=pairs + 1), dim=1)
    if case.negatives is None:
        return [x, y]
    return [x, y, draw(sum(case.negatives[member] for member in members), case.size, seed=2)]


def numbers(case: Case, inputs: list[torch.Tensor], loss_of: Callable[..., torch.Tensor], **options: Any) -> Numbers:
    """The loss and its gradients by all inputs, scale and bias."""
    x, y, *negatives = [each.detach().clone().requires_grad_() for each in inputs]
    scalars = [number(case.scale).requires_grad_()]
    if case.loss == "sigmoid":
        scalars.append(number(-3.0).requires_grad_())
    else:
        options["label_smoothing"] = case.smoothing
    if negatives:
        options["negatives_MD"] = negatives[0]
    loss = loss_of(x, y, *scalars, **options)
    return [loss.detach(), *torch.autograd.grad(loss, [x, y, *negatives, *scalars])]


def public(case: Case) -> Callable[..., torch.Tensor]:
    return sigmoid_loss if case.loss == "sigmoid" else contrastive_loss


def definition(case: Case) -> Callable[..., torch.Tensor]:
    return reference.sigmoid_loss if case.loss == "sigmoid" else reference.contrastive_loss


@functools.cache
def on_ranks(world: int) -> list[dict[str, Any]]:
    """All that this file does on so many ranks, in one launch of them."""
    return run_ranks(on_rank, world, timeout=900)


def on_rank(rank: int, world: int) -> dict[str, Any]:
    found: dict[str, Any] = {str(sizes): steps_on_rank(rank, sizes) for sizes in SHARES if len(sizes) == world}
    if world <= 2:
        found["compiled"] = compiled_on_rank(rank, world)
        found["broken"] = broken_on_rank(rank) if world == 2 else []
    if world in (2, 4):
        found["half"] = half_on_rank(rank, world)
    if world == 4:
        found["held"] = held_on_rank(rank)
        found["collectives"] = collectives_on_rank(rank)
    return found | {"cases": cases_on_rank(rank, world)}


def cases_on_rank(rank: int, world: int) -> dict[tuple[str, int, int], tuple[Numbers, bool]]:
    """By (exchange, group, case): the numbers of this rank's share, and whether the fallback was taken."""
    exact, taken = contrastive_squares.exact_sums, []

    def counted(*args: Any) -> torch.Tensor:
        taken.append(1)
        return exact(*args)

    contrastive_squares.exact_sums = counted
    results = {}
    for place, members in enumerate(GROUPS[world]):
        group = dist.new_group(members)
        for at, case in enumerate(CASES if rank in members else []):
            contrastive_squares.SIDE = case.side
            sizes = [case.rows, case.rows, case.negatives or []]
            own = [
                share(each, size, sorted(members), rank)
                for each, size in zip(batch(case, members), sizes, strict=False)
            ]
            for exchange in EXCHANGES:
                taken.clear()
                found = numbers(case, own, public(case), group=group, exchange=exchange)
                results[exchange, place, at] = found, bool(taken)
    return results


@pytest.mark.parametrize("world", WORLDS)
def test_a_group_gives_what_one_process_gives(world: int) -> None:
    """Every rank has the global loss, `world` times the gradient of its own rows, and the gradients of the scalars."""
    results = [each["cases"] for each in on_ranks(world)]
    compared = 0
    for place, members in enumerate(GROUPS[world]):
        for at, case in enumerate(CASES):
            inputs = batch(case, members)
            if not len(inputs[0]):
                continue
            truth = numbers(case, inputs, definition(case))
            alone = numbers(case, inputs, public(case))
            for rank in members:
                sizes = [case.rows, case.rows, case.negatives or []]
                for exchange in EXCHANGES:
                    mine, fell_back = results[rank][exchange, place, at]
                    assert fell_back == (case.falls_back and len(inputs[0]) > 1), (case, members, rank, exchange)
                    for expected, tolerance in ((alone, 1e-10), (truth, 1e-9)):
                        rows = expected[1 : 1 + len(inputs)]
                        own = [
                            len(members) * share(each, size, sorted(members), rank)
                            for each, size in zip(rows, sizes, strict=False)
                        ]
                        wanted = [expected[0], *own, *expected[1 + len(inputs) :]]
                        torch.testing.assert_close(
                            mine,
                            wanted,
                            atol=tolerance,
                            rtol=tolerance,
                            msg=lambda text, about=(case, members, rank, exchange): f"{about}: {text}",
                        )
                        compared += 1
    assert compared >= 2 * len(EXCHANGES) * (len(CASES) - 1) * world


# --- the definition that CLIP and SigLIP are trained with, over ranks


def library_clip(x: torch.Tensor, y: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Every rank gathers both sides, with gradients, and has the loss of the whole batch."""
    all_x, all_y = torch.cat(all_gather(x)), torch.cat(all_gather(y))
    logits = scale * all_x @ all_y.T
    answers = torch.arange(len(all_x))
    return (F.cross_entropy(logits, answers) + F.cross_entropy(logits.T, answers)) / 2


def library_siglip(x: torch.Tensor, y: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """A rank's own rows against everyone's columns, divided by its own number of rows."""
    loss = x.new_zeros(())
    for owner, columns in enumerate(all_gather(y)):
        logits = scale * x @ columns.T + bias
        signs = 2 * torch.eye(len(x), dtype=x.dtype) - 1 if owner == dist.get_rank() else -torch.ones_like(logits)
        loss = loss - F.logsigmoid(signs * logits).sum() / len(x)
    return loss


class Towers(torch.nn.Module):
    def __init__(self, bias: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text = (torch.nn.Linear(size, 6, dtype=torch.float64) for size in (9, 7))
        self.scale = torch.nn.Parameter(number(14.3))
        self.bias = torch.nn.Parameter(number(bias))

    def forward(self, image: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return F.normalize(self.image(image), dim=1), F.normalize(self.text(text), dim=1), self.scale, self.bias


def step(
    images: torch.Tensor, texts: torch.Tensor, loss_of: Callable[..., torch.Tensor], mean: Callable[..., torch.Tensor]
) -> Numbers:
    """The loss, and all parameters' gradients after what data parallelism does to them."""
    towers = Towers(-5.0)
    x, y, scale, bias = towers(images, texts)
    loss = (
        loss_of(x, y, scale, bias)
        if "siglip" in loss_of.__name__ or "sigmoid" in loss_of.__name__
        else loss_of(x, y, scale)
    )
    loss.backward()
    return [mean(loss.detach()), *(mean(each.grad) for each in towers.parameters() if each.grad is not None)]


def mean_over_ranks(value: torch.Tensor) -> torch.Tensor:
    value = value.clone()
    dist.all_reduce(value)
    return value / dist.get_world_size()


def samples(pairs: int) -> tuple[torch.Tensor, torch.Tensor]:
    return draw(pairs, 9, seed=3), draw(pairs, 7, seed=4)


def steps_on_rank(rank: int, sizes: list[int]) -> dict[str, Numbers]:
    """One training step with our losses, by each exchange, and the library's where shares are equal."""
    before = sum(sizes[:rank])
    own = [each[before : before + sizes[rank]] for each in samples(sum(sizes))]
    found = {}
    for exchange in EXCHANGES:
        for loss_of in (contrastive_loss, sigmoid_loss):

            def on_group(
                *inputs: torch.Tensor, loss_of: Callable[..., torch.Tensor] = loss_of, exchange: str = exchange
            ) -> torch.Tensor:
                return loss_of(*inputs, group=dist.group.WORLD, exchange=exchange)

            on_group.__name__ = loss_of.__name__
            found[f"{loss_of.__name__} {exchange}"] = step(*own, on_group, mean_over_ranks)
    if len(set(sizes)) == 1:
        found["library_clip"] = step(*own, library_clip, mean_over_ranks)
        found["library_siglip"] = step(*own, library_siglip, mean_over_ranks)
    return found


@pytest.mark.parametrize("sizes", SHARES, ids=str)
def test_averaged_parameter_gradients_are_those_of_one_process_and_of_the_public_library(sizes: list[int]) -> None:
    one_process = {loss.__name__: step(*samples(20), loss, torch.clone) for loss in (contrastive_loss, sigmoid_loss)}
    for results in on_ranks(len(sizes)):
        found = results[str(sizes)]
        assert len(found) == 2 * len(EXCHANGES) + 2 * (len(set(sizes)) == 1)
        for name, mine in found.items():
            expected = one_process["sigmoid_loss" if "sig" in name else "contrastive_loss"]
            assert all(each.norm() > 1e-6 for each in mine)
            torch.testing.assert_close(
                mine, expected, atol=1e-9, rtol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
            )


# --- what a group must not change


def compiled_on_rank(rank: int, world: int) -> list[tuple[Numbers, Numbers]]:
    """The numbers as they are, and under torch.compile."""
    case = Case("sigmoid", [4, 7], [3, 0])
    own = [
        share(each, size, [0, 1], rank)
        for each, size in zip(batch(case, [0, 1][:world]), [[4, 7], [4, 7], [3, 0]], strict=True)
    ]
    pairs = []
    for loss in ("contrastive", "sigmoid"):
        for exchange in EXCHANGES:
            options = {"group": dist.group.WORLD, "exchange": exchange}
            eager = public(case._replace(loss=loss))
            compiled = torch.compile(eager, fullgraph=True, backend="aot_eager")
            pairs.append(tuple(numbers(case._replace(loss=loss), own, each, **options) for each in (eager, compiled)))
    return pairs


@pytest.mark.parametrize("world", [1, 2])
def test_compiles_with_a_group(world: int) -> None:
    for found in on_ranks(world):
        assert len(found["compiled"]) == 2 * len(EXCHANGES)
        for eager, compiled in found["compiled"]:
            torch.testing.assert_close(compiled, eager, atol=0, rtol=0)


def broken_on_rank(rank: int) -> list[float]:
    """The losses, where one embedding of the last rank is not a number."""
    losses = []
    for loss in ("contrastive", "sigmoid"):
        case = Case(loss, [4, 7])
        for bad in (torch.nan, torch.inf):
            own = [share(each, case.rows, [0, 1], rank) for each in batch(case, [0, 1])]
            if rank == 1:
                own[0][2, 0] = bad
            losses += [numbers(case, own, public(case), group=dist.group.WORLD, exchange=each)[0] for each in EXCHANGES]
    return [float(each) for each in losses]


def test_what_is_not_a_number_on_one_rank_is_seen_by_all() -> None:
    for found in on_ranks(2):
        assert len(found["broken"]) == 4 * len(EXCHANGES)
        assert not any(map(math.isfinite, found["broken"]))


def collectives_on_rank(rank: int) -> dict[str, int]:
    """How many there are in a loss with its gradients, by gathering, and as few pairs do it."""
    found: dict[str, int] = {}
    for case in (CASES[0], CASES[2], CASES[8]):
        own = [share(each, case.rows, [0, 1, 2, 3], rank) for each in batch(case, [0, 1, 2, 3])]
        for exchange in ("gather", "auto"):
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
                numbers(case, own, public(case), group=dist.group.WORLD, exchange=exchange)
            events = [event.name for event in profiler.events() or []]
            found[f"{exchange} {case.loss} {case.smoothing}"] = sum(name.startswith("c10d::") for name in events)
    return found


def test_few_collectives_make_a_loss() -> None:
    """Sizes, columns, sums of columns (InfoNCE), gradients of columns, totals; one more for smoothed labels.

    Of few pairs: sizes, and rows with their columns.
    """
    for found in on_ranks(4):
        few = {"auto contrastive 0.0": 2, "auto contrastive 0.1": 2, "auto sigmoid 0.0": 2}
        many = {"gather contrastive 0.0": 5, "gather contrastive 0.1": 6, "gather sigmoid 0.0": 4}
        assert found["collectives"] == {**few, **many}


def half_on_rank(rank: int, world: int) -> list[tuple[Numbers, Numbers]]:
    """Of bf16 embeddings, and by one process of the same in fp64."""
    pairs = []
    members = list(range(world))
    for case in (CASES[6], CASES[10]):
        sizes = [case.rows, case.rows, case.negatives or []]
        whole = [each.bfloat16() for each in batch(case, members)]
        own = [share(each, size, members, rank) for each, size in zip(whole, sizes, strict=True)]
        loss, *rest = numbers(case, [each.double() for each in whole], definition(case))
        rows = [world * share(each, size, members, rank) for each, size in zip(rest[:3], sizes, strict=True)]
        for exchange in EXCHANGES:
            options = {"group": dist.group.WORLD, "exchange": exchange, "products": torch.bfloat16}
            pairs.append((numbers(case, own, public(case), **options), [loss, *rows, *rest[3:]]))
    return pairs


@pytest.mark.parametrize("world", [2, 4])
def test_bf16_embeddings_over_a_group(world: int) -> None:
    for found in on_ranks(world):
        assert len(found["half"]) == 2 * len(EXCHANGES)
        for (loss, *rest), (loss_truth, *rest_truth) in found["half"]:
            torch.testing.assert_close(loss.double(), loss_truth, atol=0, rtol=5e-6)
            for mine, truth in zip(rest, rest_truth, strict=True):
                step = 2.0**-8 if mine.dtype == torch.bfloat16 else 0.0
                assert (mine.double() - truth).norm() <= (step + 1e-5) * truth.norm()


def held_on_rank(rank: int) -> dict[str, int]:
    """By exchange: the most rows of y that a block of this rank had. Two runs give the same bits."""
    seen: list[int] = []
    sums = contrastive_squares.sums

    def watched(x: torch.Tensor, y: torch.Tensor, *rest: Any, **named: Any) -> torch.Tensor:
        seen.append(len(y))
        return sums(x, y, *rest, **named)

    contrastive_squares.sums = watched
    case = Case("contrastive", [6] * 4)
    own = [share(each, case.rows, [0, 1, 2, 3], rank) for each in batch(case, [0, 1, 2, 3])]
    most = {}
    for exchange in EXCHANGES:
        seen.clear()
        first, second = (numbers(case, own, contrastive_loss, group=dist.group.WORLD, exchange=exchange) for _ in "12")
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)), exchange
        most[exchange] = max(seen)
    contrastive_squares.sums = sums
    return most


def test_a_ring_never_holds_all_rows_and_all_repeat_themselves() -> None:
    assert [each["held"] for each in on_ranks(4)] == [{"replicate": 24, "gather": 24, "ring": 6}] * 4
