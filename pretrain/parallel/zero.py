"""DeepSpeed ZeRO around a model: backward, reduction over the ranks with the same parameters, clipping, update.

Design choices:
- Without pipeline stages DeepSpeed's engine drives (`forward`, `backward`). With stages Megatron-core's schedule runs
  the bare chunks inside `gathering`, and ZeRO-0 or 1 only reduces and updates, once, when every microbatch is through.
- Tensor parallel ranks that share a sequence have each a part of the gradients of norms and biases; a hook adds them up
  the moment they appear, so that every ZeRO stage sees whole gradients.
- A step whose gradients are not finite changes nothing: their norm tells all ranks alike.
- Weight decay falls on matrices only: never on norms, biases, positions, tokens and scales.
- In bf16 the scale and the bias of the logits stay fp32 (`precision`).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from pretrain.config import Recipe
from pretrain.models.initialise import sharded_axis
from pretrain.models.pieces import parameters_by_name
from pretrain.parallel.groups import DeepSpeedGroups, Ranks
from pretrain.parallel.layout import Layout
from pretrain.parallel.precision import keep_precisions

LARGEST_BUCKET = 500_000_000  # DeepSpeed's own default
NOT_DECAYED = ("tokens.weight", "positions", "class_token")


class Zero:
    """A model and its AdamW under a ZeRO stage. Every rank calls every method, in the same order."""

    def __init__(self, model: torch.nn.Module, recipe: Recipe, layout: Layout, ranks: Ranks) -> None:
        import deepspeed

        keep_precisions()
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        self.ranks, self.stage = ranks, layout.zero
        self._clip = recipe.train.grad_clip
        self.grad_norm = 0.0  # of the last step, before clipping; inf where it was not finite
        _add_up_sequence_pieces(model, ranks.tp_group)
        self._shared = [each for each in model.parameters() if getattr(each, "on_both_ends", False)]
        train = recipe.train
        self._engine, self.optimizer, _, _ = deepspeed.initialize(
            model=model,
            optimizer=torch.optim.AdamW(
                parameter_groups(model, train.weight_decay),
                lr=train.lr,
                betas=(train.beta1, train.beta2),
                eps=train.eps,
                # one pass over weight, gradient and moments; what DeepSpeed steps lies flat on the CPU
                fused=ranks.device.type == "cpu" or None,
            ),
            mpu=DeepSpeedGroups(ranks),
            dist_init_required=False,
            config=deepspeed_config(recipe, layout, sum(parameter.numel() for parameter in model.parameters())),
        )

    @property
    def model(self) -> torch.nn.Module:
        """This rank's chunks; under ZeRO-3 their parameters are pieces, gathered while a module runs."""
        module: torch.nn.Module = self._engine.module
        return module

    def close(self) -> None:
        """Let go of the model: DeepSpeed's hooks would keep it, and its process groups, for as long as the process."""
        self._engine.destroy()

    def begin(self, lr: float) -> None:
        """Before the first microbatch of a step."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self._engine.train()

    def forward(self, *inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """The outputs of the model for a microbatch."""
        outputs: dict[str, torch.Tensor] = self._engine(*inputs)
        return outputs

    def backward(self, loss: torch.Tensor) -> None:
        """Backpropagate one of the step's microbatches, whose losses add up; the last one also updates."""
        # DeepSpeed divides by the number of microbatches, which is right for means
        self._engine.backward(loss * self._engine.gradient_accumulation_steps())
        if self._engine.is_gradient_accumulation_boundary():
            self._update()
        else:
            self._engine.step()

    @contextmanager
    def gathering(self) -> Iterator[None]:
        """Within it anything may run backward through the bare model; at its end gradients are reduced and applied."""
        self._engine.set_gradient_accumulation_boundary(False)
        with self._engine.no_sync():
            yield
        self._engine.set_gradient_accumulation_boundary(True)
        for parameter in self._shared:  # a token table on the first and on the last stage is one parameter
            dist.all_reduce(_gradient(parameter), group=self.ranks.end_stages_group)
        self._engine.allreduce_gradients()
        self._update()

    def _update(self) -> None:
        if self.stage == 0:
            self.grad_norm = self._clip_whole_gradients()
        self._engine.step()
        if self.stage > 0:
            self.grad_norm = float(self._engine.get_global_grad_norm() or 0.0)

    def _clip_whole_gradients(self) -> float:
        """ZeRO-0: DeepSpeed clips but keeps the norm to itself, and gets it wrong with stages; here both are done."""
        squares = torch.zeros(2, dtype=torch.float64, device=self.ranks.device)  # of cut parameters, of whole ones
        gradients = [(each, each.grad) for each in self.model.parameters() if each.grad is not None]
        for parameter, gradient in gradients:
            if not getattr(parameter, "ds_pipe_replicated", False):
                length = torch.linalg.vector_norm(gradient, dtype=torch.float64)
                squares[int(sharded_axis(parameter) is None)] += length.square()
        dist.all_reduce(squares[:1], group=self.ranks.tp_group)
        dist.all_reduce(squares, group=self.ranks.pp_group)
        norm = float(squares.sum().sqrt())
        if not math.isfinite(norm):
            for parameter, _ in gradients:
                parameter.grad = None  # AdamW passes over what has none
            return math.inf
        if 0 < self._clip < norm:
            for _, gradient in gradients:
                gradient.mul_(self._clip / (norm + 1e-6))  # as DeepSpeed and torch have it
        return norm


def _add_up_sequence_pieces(model: torch.nn.Module, group: dist.ProcessGroup) -> None:
    def added_up(gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient, group=group)
        return gradient

    for parameter in model.parameters():
        if getattr(parameter, "sequence_parallel", False) and parameter.requires_grad:
            parameter.register_hook(added_up)


def _gradient(parameter: torch.nn.Parameter) -> torch.Tensor:
    """Accumulated over microbatches: DeepSpeed keeps it in fp32 beside a bf16 parameter."""
    kept = getattr(parameter, "_hp_grad", None)
    gradient = parameter.grad if kept is None else kept
    assert gradient is not None, "a shared parameter takes part in every microbatch"
    return gradient


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trained parameters that decay (matrices), and those that do not; each group of one precision."""
    decayed: list[torch.nn.Parameter] = []
    others: list[torch.nn.Parameter] = []
    for name, parameter in parameters_by_name(model):
        if parameter.requires_grad:
            decays = parameter.ndim >= 2 and not name.endswith(NOT_DECAYED)
            (decayed if decays else others).append(parameter)
    # DeepSpeed lays a group into one flat tensor, so a group has one precision
    return [
        {"params": [each for each in parameters if each.dtype == dtype], "weight_decay": decay}
        for parameters, decay in ((decayed, weight_decay), (others, 0.0))
        for dtype in dict.fromkeys(each.dtype for each in parameters)
    ]


def deepspeed_config(recipe: Recipe, layout: Layout, parameters: int) -> dict[str, Any]:
    """DeepSpeed's own settings for a recipe and a model of so many parameters; what weft decides itself is left out."""
    # gradients are copied into a bucket of this many numbers, made anew each step: never larger than they all are
    bucket = min(parameters + parameters % 2, LARGEST_BUCKET)  # stage_1_and_2.py:390 wants an even number
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": layout.micro_batch,
        "gradient_accumulation_steps": layout.microbatches,
        "gradient_clipping": recipe.train.grad_clip if layout.zero else 0.0,  # see `_clip_whole_gradients`
        "zero_optimization": {
            "stage": layout.zero,
            "overlap_comm": False,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            **({"offload_optimizer": {"device": "cpu"}} if layout.offload else {}),
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
