"""The state of an engine as whole fp32 tensors by parameter name, whatever the layout; and back again.

A parameter's state is its master weight and Adam's two moments. DeepSpeed holds them in flat partitions over the data
parallel ranks, Megatron-core cuts them over the tensor parallel ones; both are undone here, so a checkpoint knows
nothing of either. Every rank calls these functions together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from pretrain.models.initialise import sharded_axis
from pretrain.parallel.engine import Engine

MOMENTS = ("exp_avg", "exp_avg_sq")  # torch.optim.AdamW's names
PARTS = ("weight", *MOMENTS)

# where DeepSpeed's optimizers keep this rank's flat fp32 partitions: ZeRO-1 and 2, bf16 ZeRO-1, ZeRO-3
_PARTITIONS = ("single_partition_of_fp32_groups", "fp32_groups_flat_partition", "fp32_partitioned_groups_flat")


def gather_state(engine: Engine) -> Iterator[tuple[str, str, torch.Tensor]]:
    """(part, parameter name, whole fp32 tensor on CPU) for each of PARTS of each parameter, after at least one step."""
    _link_moments(engine)
    for name, parameter in engine.named_parameters():
        for part in PARTS:
            piece = _get(engine, parameter, part)
            yield part, name, _join(piece, parameter, engine).to("cpu", torch.float32)


def restore_state(engine: Engine, read: Callable[[str, str], torch.Tensor], step: int) -> None:
    """Fill the engine with read(part, name) for every parameter; `step` is how often Adam has stepped."""
    _make_moments(engine, step)
    for name, parameter in engine.named_parameters():
        for part in PARTS:
            whole = read(part, name).to(engine.ranks.device)
            axis = sharded_axis(parameter)
            piece = whole if axis is None else whole.chunk(engine.ranks.tp_size, dim=axis)[engine.ranks.tp_rank]
            _set(engine, parameter, part, piece.contiguous())


def whole_shape(parameter: torch.nn.Parameter, tp_size: int) -> list[int]:
    """The shape a parameter has without tensor parallelism and ZeRO-3."""
    shape = list(getattr(parameter, "ds_shape", parameter.shape))
    if (axis := sharded_axis(parameter)) is not None:
        shape[axis] *= tp_size
    return shape


def _join(piece: torch.Tensor, parameter: torch.nn.Parameter, engine: Engine) -> torch.Tensor:
    axis = sharded_axis(parameter)
    if axis is None or engine.ranks.tp_size == 1:
        return piece
    pieces = [torch.empty_like(piece) for _ in range(engine.ranks.tp_size)]
    dist.all_gather(pieces, piece.contiguous(), group=engine.ranks.tp_group)
    return torch.cat(pieces, dim=axis)


def _get(engine: Engine, parameter: torch.nn.Parameter, part: str) -> torch.Tensor:
    """This rank's tensor parallel piece, whole over the data parallel ranks."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    if engine.layout.zero == 0:
        return parameter.detach() if part == "weight" else engine.optimizer.state[parameter][part]
    if part == "weight":
        return safe_get_full_fp32_param(parameter).detach()
    return safe_get_full_optimizer_state(parameter, part).detach()


@torch.no_grad()
def _set(engine: Engine, parameter: torch.nn.Parameter, part: str, piece: torch.Tensor) -> None:
    """Write this rank's tensor parallel piece, of which ZeRO keeps what is this rank's."""
    if engine.layout.zero == 0:
        (parameter if part == "weight" else engine.optimizer.state[parameter][part]).copy_(piece)
    elif engine.layout.zero == 3:
        _set_partition(engine, parameter, part, piece)
    elif part == "weight":
        from deepspeed.utils import safe_set_full_fp32_param

        safe_set_full_fp32_param(parameter, piece)
        parameter.copy_(piece)  # the model's own copy, in its precision
    else:
        from deepspeed.utils import safe_set_full_optimizer_state

        safe_set_full_optimizer_state(parameter, piece, part)


def _set_partition(engine: Engine, parameter: torch.nn.Parameter, part: str, piece: torch.Tensor) -> None:
    """ZeRO-3: a rank keeps one of dp_size equal runs of the flat tensor, the last one padded.

    Not `safe_set_full_*`: stage3.py:3196 forgets the padding.
    """
    import deepspeed
    from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

    size = parameter.ds_tensor.numel()  # type: ignore[attr-defined]  # set by ZeRO-3
    padded = F.pad(piece.flatten(), (0, size * engine.ranks.dp_size - piece.numel()))
    own = padded.narrow(0, size * engine.ranks.dp_rank, size)
    if part == "weight":
        safe_set_local_fp32_param(parameter, own)
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            parameter.copy_(piece)
    else:
        safe_set_local_optimizer_state(parameter, own, part)


def _adam(engine: Engine) -> torch.optim.Optimizer:
    adam: torch.optim.Optimizer = engine.optimizer if engine.layout.zero == 0 else engine.optimizer.optimizer
    return adam


def _make_moments(engine: Engine, step: int) -> None:
    """Adam makes its state at the first step; a restored run needs it before."""
    adam = _adam(engine)
    if engine.layout.zero == 0:
        owned: list[Any] = [parameter for _, parameter in engine.named_parameters()]
    else:
        owned = next(getattr(engine.optimizer, name) for name in _PARTITIONS if hasattr(engine.optimizer, name))
    for tensor in owned:
        adam.state[tensor] = {
            "step": torch.tensor(float(step)),
            **{moment: torch.zeros_like(tensor, memory_format=torch.preserve_format) for moment in MOMENTS},
        }
    _link_moments(engine)


def _link_moments(engine: Engine) -> None:
    """Tie each parameter to its part of Adam's state, for DeepSpeed's `safe_*` functions.

    stage_1_and_2.py:2987 does this once, after the first group has stepped and before the others have any state.
    """
    if hasattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state"):
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
