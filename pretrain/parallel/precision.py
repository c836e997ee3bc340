"""bf16 models whose logit scale and bias stay fp32: what DeepSpeed 0.19 takes for granted about one precision.

A learned temperature moves by less than a bf16 number can: from 54.6 on its steps are 3 %. So these parameters are
fp32, in groups of their own (`updater.parameter_groups`), under every ZeRO stage. Each entry of `keep_precisions` names
the lines that would cast them, or that lay all parameters into one tensor.
"""

from __future__ import annotations

from typing import Any

import torch


def keep_precisions() -> None:
    """Let every parameter of a model keep its precision in this process. Again does nothing more."""
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.runtime.zero import stage3

    # engine.py:1850 casts all parameters to bf16: ours come in the precision that they are to have
    DeepSpeedEngine._cast_module_mixed_precision = lambda self, *_: None
    # stage3.py:972 lays the partitions of all groups into one buffer, which line 1290 cuts into groups again
    if stage3.defragment is not _one_buffer_a_precision:
        stage3.defragment = _one_buffer_a_precision
        stage3.DeepSpeedZeroOptimizer_Stage3._set_fp16_partitioned_groups_flat = _cut_into_groups


def _one_buffer_a_precision(tensors: list[torch.Tensor]) -> dict[torch.dtype, torch.Tensor]:
    from deepspeed.runtime.zero.utils import defragment

    precisions = dict.fromkeys(tensor.dtype for tensor in tensors)
    return {each: defragment([tensor for tensor in tensors if tensor.dtype == each]) for each in precisions}


def _cut_into_groups(optimizer: Any) -> None:
    """A group has one precision, and lies in the buffer of that one, in the order of groups."""
    begins = dict.fromkeys(optimizer.lp_param_buffer, 0)
    for group in optimizer.fp16_groups:
        dtype, numel = group[0].ds_tensor.dtype, sum(parameter.partition_numel() for parameter in group)
        flat = optimizer.lp_param_buffer[dtype].narrow(0, begins[dtype], numel)
        optimizer.fp16_partitioned_groups_flat.append(flat)
        begins[dtype] += numel
