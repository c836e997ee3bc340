"""Data parallel replicas (layout.zero=0): every rank keeps all weights, gradients and moments of its pieces, in fp32.

A gradient is moved into its place in one flat tensor the moment autograd has it. In the last microbatch of a step the
gradients of the ranks with the same parameters meet in buckets, while the rest of backward runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist

from pretrain.config import Recipe
from pretrain.models.initialise import sharded_axis
from pretrain.models.pieces import parameters_by_name
from pretrain.parallel.flat import Flat
from pretrain.parallel.groups import Ranks
from pretrain.parallel.layout import Layout
from pretrain.parallel.updater import Updater, adamw, add_up_sequence_pieces, on_both_ends, parameter_groups

BUCKETS = 2  # of a model; more where one would have more than LARGEST_BUCKET numbers
LARGEST_BUCKET = 16 << 20


@dataclass
class Bucket:
    """Numbers [start, end) of the flat gradients, which travel together."""

    start: int
    end: int
    members: int = 0
    missing: int = 0  # of this step's last microbatch
    travels: bool = False


class Replicas(Updater):
    """A model and its AdamW, whole on each of the ranks with the same parameters."""

    def __init__(self, model: torch.nn.Module, recipe: Recipe, layout: Layout, ranks: Ranks) -> None:
        self.model, self.ranks = model, ranks
        self.grad_norm = 0.0
        self._clip, self._microbatches = recipe.train.grad_clip, layout.microbatches
        add_up_sequence_pieces(model, ranks.tp_group)
        self._shared = on_both_ends(model)
        groups = parameter_groups(model, recipe.train.weight_decay)
        place = {parameter: number for number, parameter in enumerate(_as_gradients_come(model))}
        self._flat = Flat([sorted(group["params"], key=place.__getitem__) for group in groups])
        for group, flat in zip(groups, self._flat.groups, strict=True):
            group["params"] = [flat]
        self.optimizer = adamw(groups, recipe.train)
        self._gradients = [(each, self._flat.gradient_of(each)) for each in self._flat.places]
        # of ranks and stages with other parameters; a table on both ends counts once
        counted = [pair for pair in self._gradients if not getattr(pair[0], "ds_pipe_replicated", False)]
        self._cut = [gradient for each, gradient in counted if sharded_axis(each) is not None]
        self._whole = [gradient for each, gradient in counted if sharded_axis(each) is None]
        self._buckets, bucket_of = _in_buckets(self._flat)
        self._hooks = [
            each.register_post_accumulate_grad_hook(partial(self._take, gradient, bucket_of[each]))
            for each, gradient in self._gradients
        ]
        self._begin_step()

    def _begin_step(self) -> None:
        self._backwards = 0
        self._taken: set[torch.nn.Parameter] = set()
        self._is_last = False  # of the step's microbatches, and no stage waits for more
        self._under_way: list[dist.Work] = []
        for bucket in self._buckets:
            bucket.missing, bucket.travels = bucket.members, False

    def forward(self, *inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        outputs: dict[str, torch.Tensor] = self.model(*inputs)
        return outputs

    def backward(self, loss: torch.Tensor) -> None:
        self._backwards += 1
        self._is_last = self._backwards == self._microbatches
        loss.backward()
        if self._is_last:
            self._update()

    @contextmanager
    def gathering(self) -> Iterator[None]:
        yield
        for parameter in self._shared:
            dist.all_reduce(self._flat.gradient_of(parameter), group=self.ranks.end_stages_group)
        self._update()

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def moment_of(self, parameter: torch.nn.Parameter, moment: str) -> torch.Tensor:
        """A view of "exp_avg" or "exp_avg_sq", in the parameter's shape."""
        group, place = self._flat.in_group(parameter)
        return place.of(self.optimizer.state[group][moment])

    def _take(self, gradient: torch.Tensor, bucket: Bucket, parameter: torch.nn.Parameter) -> None:
        """Move a gradient that autograd has just finished into its place."""
        assert parameter.grad is not None
        assert not bucket.travels, "autograd gives a gradient once a microbatch"
        if parameter in self._taken:
            gradient += parameter.grad
        else:
            gradient.copy_(parameter.grad)
            self._taken.add(parameter)
        parameter.grad = None
        if self._is_last:
            bucket.missing -= 1
            self._send()

    def _send(self) -> None:
        """Start the sum of what is complete; in one order, as all ranks must."""
        if self.ranks.zero_size == 1:
            return
        for bucket in self._buckets:
            if bucket.missing:
                return
            if not bucket.travels:
                part = self._flat.gradients[bucket.start : bucket.end]
                work = dist.all_reduce(part, group=self.ranks.zero_group, async_op=True)
                assert work is not None
                self._under_way.append(work)
                bucket.travels = True

    def _update(self) -> None:
        for parameter, gradient in self._gradients:
            if parameter not in self._taken:  # no objective reads it
                gradient.zero_()
        for bucket in self._buckets:
            bucket.missing = 0
        self._send()
        for work in self._under_way:
            work.wait()
        mean = 1 / self.ranks.zero_size
        self.grad_norm = norm = self._norm() * mean
        if math.isfinite(norm):
            factor = mean * (self._clip / (norm + 1e-6) if 0 < self._clip < norm else 1.0)  # as DeepSpeed and torch
            if factor != 1:
                self._flat.gradients *= factor
            self.optimizer.step()
        else:
            self.grad_norm = math.inf
        self._begin_step()

    def _norm(self) -> float:
        """Of all gradients of a copy of the model."""
        if self.ranks.tp_size == self.ranks.pp_size == 1:
            return self._flat.gradient_norm()
        squares = torch.stack([_sum_of_squares(each, self.ranks.device) for each in (self._cut, self._whole)])
        dist.all_reduce(squares[:1], group=self.ranks.tp_group)
        dist.all_reduce(squares, group=self.ranks.pp_group)
        return float(squares.sum().sqrt())


def _sum_of_squares(gradients: list[torch.Tensor], device: torch.device) -> torch.Tensor:
    if not gradients:
        return torch.zeros((), dtype=torch.float64, device=device)
    return torch.stack(torch._foreach_norm(gradients, 2, dtype=torch.float64)).square().sum()


def _as_gradients_come(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """The last layers first, tower by tower: nearly the order in which backward is done with them."""
    towers: dict[str, list[torch.nn.Parameter]] = {}
    for name, parameter in parameters_by_name(model):
        towers.setdefault(name.split(".")[0], []).insert(0, parameter)
    return [parameter for tower in towers.values() for parameter in tower]


def _in_buckets(flat: Flat) -> tuple[list[Bucket], dict[torch.nn.Parameter, Bucket]]:
    """Neighbours together, and the bucket of each."""
    size = min(len(flat.gradients) // BUCKETS, LARGEST_BUCKET)
    buckets: list[Bucket] = []
    bucket_of = {}
    for parameter, place in flat.places.items():
        if not buckets or place.end - buckets[-1].start > size:
            buckets.append(Bucket(place.start, place.end))
        buckets[-1].end, buckets[-1].members = place.end, buckets[-1].members + 1
        bucket_of[parameter] = buckets[-1]
    return buckets, bucket_of
