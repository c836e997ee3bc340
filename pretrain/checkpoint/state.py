"""This rank's own numbers of each parameter, wherever DeepSpeed and Megatron-core have put them.

A parameter's state is its fp32 master weight and Adam's two moments. Tensor parallel ranks each hold a piece of the
whole tensor (cut along one axis); of a piece that is made flat, each rank that ZeRO partitions over holds a run of
numbers, its fragment. Nothing here speaks to other ranks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from pretrain.checkpoint.format import MOMENTS
from pretrain.models.initialise import sharded_axis
from pretrain.parallel.engine import Engine
from pretrain.parallel.replicas import Replicas

# where DeepSpeed's optimizers keep this rank's flat fp32 partitions: ZeRO-1 and 2, bf16 ZeRO-1, ZeRO-3
_PARTITIONS = ("single_partition_of_fp32_groups", "fp32_groups_flat_partition", "fp32_partitioned_groups_flat")


@dataclass(frozen=True)
class Run:
    """Numbers [start, start + numel) of a flat tensor parallel piece; numel is 0 where this rank has none of it."""

    start: int
    numel: int


def whole_shape(parameter: torch.nn.Parameter, tp_size: int) -> tuple[int, ...]:
    """The shape a parameter has without tensor parallelism and ZeRO-3."""
    shape = list(getattr(parameter, "ds_shape", parameter.shape))
    if (axis := sharded_axis(parameter)) is not None:
        shape[axis] *= tp_size
    return tuple(shape)


def own_run(engine: Engine, parameter: torch.nn.Parameter) -> Run:
    """Which numbers of its tensor parallel piece this rank keeps for ZeRO; all of them where nothing is partitioned."""
    if engine.layout.zero == 3:
        size, numel = parameter.ds_tensor.numel(), _piece_numel(parameter)  # type: ignore[attr-defined]  # ZeRO-3's
        start = min(size * engine.ranks.zero_rank, numel)
        return Run(start, min(size, numel - start))  # the last partition is padded
    if engine.layout.zero == 0 or not parameter.requires_grad:
        return Run(0, parameter.numel())
    mapping = parameter._hp_mapping  # type: ignore[attr-defined]  # DeepSpeed's
    return Run(mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel) if mapping else Run(0, 0)


def own_numbers(engine: Engine, parameter: torch.nn.Parameter, part: str) -> torch.Tensor:
    """The numbers of `own_run` of a weight or a moment, flat, in fp32 unless the parameter is frozen."""
    if engine.layout.zero == 3:
        return _partition(engine, parameter, part).flatten()[: own_run(engine, parameter).numel]
    if part == "weight" and (engine.layout.zero == 0 or not parameter.requires_grad):
        return parameter.detach().flatten()
    if isinstance(engine.updater, Replicas):
        return engine.updater.moment_of(parameter, part).flatten()
    mapping = parameter._hp_mapping  # type: ignore[attr-defined]  # DeepSpeed's
    if mapping is None:
        return torch.empty(0, device=engine.ranks.device)
    kept: torch.Tensor = mapping.get_hp_fragment(None if part == "weight" else part)
    return kept.detach()


@torch.no_grad()
def set_own_numbers(engine: Engine, parameter: torch.nn.Parameter, part: str, numbers: torch.Tensor) -> None:
    """Overwrite what `own_numbers` gives. The model's own copy of the weights is `set_model_weight`'s."""
    if engine.layout.zero < 3 or not parameter.requires_grad:
        own_numbers(engine, parameter, part).copy_(numbers)
        return
    from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

    # what DeepSpeed gives for an offloaded optimizer is a copy on the device
    padded = torch.zeros_like(_partition(engine, parameter, part))
    padded[: numbers.numel()] = numbers
    if part == "weight":
        safe_set_local_fp32_param(parameter, padded)
    else:
        safe_set_local_optimizer_state(parameter, padded, part)


def model_weight_run(engine: Engine, parameter: torch.nn.Parameter) -> Run:
    """Which numbers of its piece the model's own copy on this rank holds: all, or under ZeRO-3 mostly a partition."""
    if engine.layout.zero == 3 and not _is_gathered(parameter):
        return own_run(engine, parameter)
    return Run(0, _piece_numel(parameter))


@torch.no_grad()
def set_model_weight(engine: Engine, parameter: torch.nn.Parameter, numbers: torch.Tensor) -> None:
    """Fill the model's own copy, in its precision, with the numbers of `model_weight_run`."""
    if engine.layout.zero == 3:
        if _is_gathered(parameter):
            parameter.copy_(numbers.view(parameter.shape))
            own = own_run(engine, parameter)
            numbers = numbers[own.start : own.start + own.numel]
        parameter.ds_tensor.flatten()[: numbers.numel()].copy_(numbers)  # type: ignore[attr-defined]  # ZeRO-3's
    else:
        parameter.copy_(numbers.view(parameter.shape))


def make_moments(engine: Engine, updates: int | None = None) -> None:
    """Give Adam the state that it else makes at its first step, where it has none; `updates`: how often it has stepped.

    Frozen parameters get none.
    """
    adam = _adam(engine)
    for tensor in _stepped_tensors(engine):
        if not adam.state.get(tensor):
            adam.state[tensor] = {
                "step": torch.zeros((), device=tensor.device),  # where fused AdamW reads it
                **{moment: torch.zeros_like(tensor, memory_format=torch.preserve_format) for moment in MOMENTS},
            }
        if updates is not None:
            adam.state[tensor]["step"].fill_(float(updates))
    _link_moments(engine)


def count_updates(engine: Engine) -> int:
    """How often Adam has stepped here; 0 where this rank trains nothing."""
    return max((int(state["step"]) for state in _adam(engine).state.values()), default=0)


def _stepped_tensors(engine: Engine) -> list[Any]:
    """What torch's Adam steps: our flat groups of parameters, or DeepSpeed's flat partitions of them."""
    if engine.layout.zero == 0:
        return [tensor for group in engine.optimizer.param_groups for tensor in group["params"]]
    return list(next(getattr(engine.optimizer, name) for name in _PARTITIONS if hasattr(engine.optimizer, name)))


def _adam(engine: Engine) -> torch.optim.Optimizer:
    adam: torch.optim.Optimizer = engine.optimizer if engine.layout.zero == 0 else engine.optimizer.optimizer
    return adam


def _partition(engine: Engine, parameter: torch.nn.Parameter, part: str) -> torch.Tensor:
    """ZeRO-3: one of zero_size equal runs of the flat piece, the last one padded."""
    if not parameter.requires_grad:
        frozen: torch.Tensor = parameter.ds_tensor  # type: ignore[attr-defined]  # set by ZeRO-3
        return frozen.detach()
    from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state

    if part == "weight":
        return safe_get_local_fp32_param(parameter).detach()
    return safe_get_local_optimizer_state(parameter, part).detach()


def _is_gathered(parameter: torch.nn.Parameter) -> bool:
    """ZeRO-3 leaves small parameters whole between steps."""
    return parameter.data.numel() == _piece_numel(parameter) > 0


def _piece_numel(parameter: torch.nn.Parameter) -> int:
    return math.prod(getattr(parameter, "ds_shape", parameter.shape))


def _link_moments(engine: Engine) -> None:
    """Tie each parameter to its part of Adam's state, which DeepSpeed's own functions and `own_numbers` go by.

    stage_1_and_2.py:2987 does this once, after the first group has stepped and before the others have any state.
    """
    if hasattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state"):
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
