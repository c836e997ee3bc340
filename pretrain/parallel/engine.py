"""One training step under any layout: forward, the loss over the global batch, backward, reduction, update.

DeepSpeed ZeRO shards optimizer state, gradients and parameters over the data parallel ranks; Megatron-core's layers
inside the model do tensor parallelism. The trainer sees `Engine.step(batch, lr)`.

Design choices:
- One microbatch takes the direct path. With several, no microbatch knows the loss, which ties all samples together:
  a first pass embeds them without gradients, the loss and its gradient with respect to the embeddings are computed
  once over all ranks, and a second pass backpropagates sum <output, gradient> (gradient caching, Gao et al. 2021).
  Both give the gradients of one process on the whole batch.
- The learning rate is set from outside at each step: a schedule is a function of the step and has no state.
- Weight decay falls on matrices only: never on norms, biases, positions, tokens and scales.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from data_pipeline import Batch
from pretrain.config import Objective, Recipe
from pretrain.models.dual import DualEncoder
from pretrain.models.initialise import sharded_axis
from pretrain.objectives import OBJECTIVES
from pretrain.parallel.groups import DeepSpeedGroups, Ranks
from pretrain.parallel.layout import Layout

LARGEST_BUCKET = 500_000_000  # DeepSpeed's own default
NOT_DECAYED = ("tokens.weight", "positions", "class_token")


@dataclass(frozen=True)
class Stepped:
    """What one step gave: losses by objective name and their weighted sum, the global gradient norm before clipping."""

    loss: float
    losses: dict[str, float]
    grad_norm: float
    logit_scale: float


class Engine:
    """A model with its optimizer under a layout. Every rank calls every method, in the same order."""

    def __init__(self, model: DualEncoder, recipe: Recipe, layout: Layout, ranks: Ranks) -> None:
        import deepspeed

        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        self.ranks, self.layout = ranks, layout
        self.objectives: tuple[Objective, ...] = recipe.objectives
        self._clip = recipe.train.grad_clip
        self._grad_norm = 0.0  # of the last step, before clipping
        train = recipe.train
        optimizer = torch.optim.AdamW(
            parameter_groups(model, train.weight_decay), lr=train.lr, betas=(train.beta1, train.beta2), eps=train.eps
        )
        self._engine, self.optimizer, _, _ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            mpu=DeepSpeedGroups(ranks),
            dist_init_required=False,
            config=deepspeed_config(recipe, layout, sum(parameter.numel() for parameter in model.parameters())),
        )

    @property
    def model(self) -> DualEncoder:
        """The model itself; under ZeRO-3 its parameters are pieces, gathered while a module runs."""
        module: DualEncoder = self._engine.module
        return module

    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """The trained parameters by name, in the order of the model."""
        return self.model.named_parameters()

    def step(self, batch: Batch, lr: float) -> Stepped:
        """Train on this rank's share of a global batch, already on the device."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self._engine.train()
        if self.layout.microbatches == 1:
            outputs = self._engine(batch.image, batch.text)
            loss, losses = self._loss(outputs)
            self._backward(loss)
        else:
            outputs, loss, losses = self._step_with_cached_embeddings(batch)
        return Stepped(
            loss=float(loss.detach()),
            losses=losses,
            grad_norm=self._grad_norm,
            logit_scale=float(outputs["logit_scale"].detach()),
        )

    def _backward(self, loss: torch.Tensor) -> None:
        """Backpropagate one microbatch; the last one of a step also reduces, clips and updates."""
        self._engine.backward(loss)
        if self.layout.zero == 0 and self._engine.is_gradient_accumulation_boundary():
            self._grad_norm = self._clip_whole_gradients()
        self._engine.step()
        if self.layout.zero > 0:
            self._grad_norm = float(self._engine.get_global_grad_norm() or 0.0)

    def _clip_whole_gradients(self) -> float:
        """ZeRO-0: DeepSpeed clips but keeps the norm to itself; here both, with tensor parallel pieces added up."""
        squares = torch.zeros(2, dtype=torch.float64, device=self.ranks.device)  # of cut parameters, of whole ones
        gradients = [(each, each.grad) for each in self.model.parameters() if each.grad is not None]
        for parameter, gradient in gradients:
            squares[int(sharded_axis(parameter) is None)] += gradient.double().square().sum()
        dist.all_reduce(squares[:1], group=self.ranks.tp_group)
        norm = float(squares.sum().sqrt())
        if 0 < self._clip < norm:
            for _, gradient in gradients:
                gradient.mul_(self._clip / norm)
        return norm

    def _loss(self, outputs: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        """The weighted sum of all objectives, and each by itself."""
        total = torch.zeros((), device=self.ranks.device)
        losses: dict[str, float] = {}
        for objective in self.objectives:
            loss = OBJECTIVES[objective.name](outputs, objective, self.ranks.dp_group)
            losses[objective.name] = float(loss.detach())
            total = total + objective.weight * loss
        return total, losses

    def _step_with_cached_embeddings(
        self, batch: Batch
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor, dict[str, float]]:
        size, count = self.layout.micro_batch, self.layout.microbatches
        parts = [batch.rows(slice(number * size, (number + 1) * size)) for number in range(count)]
        with torch.no_grad():
            passes = [self._engine(part.image, part.text) for part in parts]
        # embeddings [n, E] are joined over microbatches; scalars are the same in each
        outputs = {
            name: (torch.cat([each[name] for each in passes]) if value.ndim else value).requires_grad_()
            for name, value in passes[0].items()
        }
        loss, losses = self._loss(outputs)
        loss.backward()
        gradients = {name: value.grad for name, value in outputs.items() if value.grad is not None}
        for number, part in enumerate(parts):
            again = self._engine(part.image, part.text)
            rows = slice(number * size, (number + 1) * size)
            terms = [
                (again[name] * (gradient[rows] if gradient.ndim else gradient / count)).sum()
                for name, gradient in gradients.items()
            ]
            # DeepSpeed divides by the number of microbatches, which is right for means; this is a sum
            self._backward(torch.stack(terms).sum() * count)
        return outputs, loss, losses


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameters that decay (matrices), and those that do not."""
    decayed: list[torch.nn.Parameter] = []
    others: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        decays = parameter.ndim >= 2 and not name.endswith(NOT_DECAYED)
        (decayed if decays else others).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def deepspeed_config(recipe: Recipe, layout: Layout, parameters: int) -> dict[str, Any]:
    """DeepSpeed's own settings for a recipe and a model of so many parameters; what weft decides itself is left out."""
    # gradients are copied into a bucket of this many numbers, made anew each step: never larger than they all are
    bucket = min(parameters, LARGEST_BUCKET)
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": layout.micro_batch,
        "gradient_accumulation_steps": layout.microbatches,
        "gradient_clipping": recipe.train.grad_clip if layout.zero else 0.0,  # see `_clip_whole_gradients`
        "zero_optimization": {
            "stage": layout.zero,
            "overlap_comm": False,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
        },
        "zero_allow_untested_optimizer": True,  # torch.optim.AdamW, with the state that checkpoints read
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1 << 60,  # we print ourselves
    }
    if recipe.train.precision == "bf16":
        # immediate_grad_update: without it ZeRO-1 with fp32 accumulation finds no gradient at the step
        config["bf16"] = {"enabled": True, "immediate_grad_update": True}
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config
