"""What trains a model: backward, the reduction of gradients over ranks, clipping and the update, behind one interface.

`replicas` keeps the whole state on every rank (layout.zero=0), `zero` shares it among them (1 to 3). What both do is
here:

- Tensor parallel ranks that share a sequence have each a part of the gradients of norms and biases; a hook adds them up
  the moment they appear, so that whoever reduces sees whole gradients.
- Weight decay falls on matrices only: never on norms, biases, positions, tokens and scales.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist

from pretrain.models.pieces import parameters_by_name
from pretrain.sections import Train

NOT_DECAYED = ("tokens.weight", "positions", "class_token")


class Updater(ABC):
    """A model and its AdamW. Every rank calls every method, in the same order.

    A step whose gradients are not finite changes nothing: their norm tells all ranks alike.
    """

    model: torch.nn.Module  # this rank's chunks
    optimizer: Any  # torch's AdamW, or DeepSpeed's wrapper of it
    grad_norm: float  # of the last step, before clipping; inf where it was not finite

    def begin(self, lr: float) -> None:
        """Before the first microbatch of a step."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if not self.model.training:  # to say it to each of a hundred modules takes a millisecond
            self.model.train()

    @abstractmethod
    def forward(self, *inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """The outputs of the model for a microbatch."""

    @abstractmethod
    def backward(self, loss: torch.Tensor) -> None:
        """Backpropagate one of the step's microbatches, whose losses add up; the last one also updates."""

    @abstractmethod
    def _update(self) -> None:
        """All gradients of the step are there."""

    @abstractmethod
    def gathering(self) -> AbstractContextManager[None]:
        """Within it anything may run backward through the bare model; at its end gradients are reduced and applied."""

    @abstractmethod
    def close(self) -> None:
        """Nothing can be trained any more, and memory is given back."""


def add_up_sequence_pieces(model: torch.nn.Module, group: dist.ProcessGroup) -> None:
    """Make the gradients of parameters that each rank of `group` has used on its piece of the sequence whole."""

    def added_up(gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient, group=group)
        return gradient

    for parameter in model.parameters():
        if getattr(parameter, "sequence_parallel", False) and parameter.requires_grad:
            parameter.register_hook(added_up)


def on_both_ends(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """A token table on the first and on the last stage is one parameter, whose gradients belong together."""
    return [each for each in model.parameters() if getattr(each, "on_both_ends", False) and each.requires_grad]


def adamw(groups: list[dict[str, Any]], train: Train, fused: bool | None = True) -> torch.optim.AdamW:
    """AdamW over groups. fused: one pass over weight, gradient and moments, on CPU and CUDA; None as torch chooses.

    What torch chooses on CUDA takes several passes, and memory for what is between them, as much as the gradients.
    """
    return torch.optim.AdamW(groups, lr=train.lr, betas=(train.beta1, train.beta2), eps=train.eps, fused=fused)


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
