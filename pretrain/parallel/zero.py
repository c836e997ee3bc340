"""DeepSpeed ZeRO around a model, stages 1 to 3: what the ranks with the same parameters would all keep, they share.

Without pipeline stages DeepSpeed's engine drives (`forward`, `backward`). With stages Megatron-core's schedule runs the
bare chunks inside `gathering`, and ZeRO-1 only reduces and updates, once, when every microbatch is through. In bf16 the
scale and the bias of the logits stay fp32 (`precision`).
"""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any

import torch
import torch.distributed as dist

from pretrain.config import Recipe
from pretrain.parallel.groups import DeepSpeedGroups, Ranks
from pretrain.parallel.layout import Layout
from pretrain.parallel.precision import keep_precisions
from pretrain.parallel.updater import Updater, adamw, add_up_sequence_pieces, on_both_ends, parameter_groups

LARGEST_BUCKET = 500_000_000  # DeepSpeed's own default
OVERLAPPED_BUCKET = 1 << 25  # numbers: 128 MiB in fp32, of which ZeRO-1 has two


class Zero(Updater):
    """A model and its AdamW under a ZeRO stage."""

    def __init__(self, model: torch.nn.Module, recipe: Recipe, layout: Layout, ranks: Ranks) -> None:
        import deepspeed

        keep_precisions()
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        self.ranks = ranks
        self.grad_norm = 0.0
        add_up_sequence_pieces(model, ranks.tp_group)
        self._shared = on_both_ends(model)
        groups = parameter_groups(model, recipe.train.weight_decay)
        with redirect_stdout(io.StringIO()):  # runtime/utils.py:838 prints what memory bf16 takes, whatever is set
            self._engine, self.optimizer, _, _ = deepspeed.initialize(
                model=model,
                optimizer=adamw(groups, recipe.train),
                mpu=DeepSpeedGroups(ranks),
                dist_init_required=False,
                config=deepspeed_config(
                    recipe,
                    layout,
                    [parameter.numel() for parameter in model.parameters()],
                    overlap=ranks.device.type == "cuda" and can_overlap(layout),
                ),
            )
        self.model = self._engine.module

    def close(self) -> None:
        # DeepSpeed's hooks would keep the model, and its process groups, for as long as the process
        self._engine.destroy()

    def forward(self, *inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        outputs: dict[str, torch.Tensor] = self._engine(*inputs)
        return outputs

    def backward(self, loss: torch.Tensor) -> None:
        # DeepSpeed divides by the number of microbatches, which is right for means
        self._engine.backward(loss * self._engine.gradient_accumulation_steps())
        if self._engine.is_gradient_accumulation_boundary():
            self._update()
        else:
            self._engine.step()

    @contextmanager
    def gathering(self) -> Iterator[None]:
        self._engine.set_gradient_accumulation_boundary(False)
        with self._engine.no_sync():
            yield
        self._engine.set_gradient_accumulation_boundary(True)
        for parameter in self._shared:
            dist.all_reduce(_gradient(parameter), group=self.ranks.end_stages_group)
        self._engine.allreduce_gradients()
        self._update()

    def _update(self) -> None:
        self._engine.step()
        self.grad_norm = float(self._engine.get_global_grad_norm() or 0.0)


def _gradient(parameter: torch.nn.Parameter) -> torch.Tensor:
    """Accumulated over microbatches: DeepSpeed keeps it in fp32 beside a bf16 parameter."""
    kept = getattr(parameter, "_hp_grad", None)
    gradient = parameter.grad if kept is None else kept
    assert gradient is not None, "a shared parameter takes part in every microbatch"
    return gradient


def can_overlap(layout: Layout) -> bool:
    """Whether gradients may travel while the rest of backward runs (DeepSpeed's `overlap_comm`).

    ZeRO-3 is made for it: without, its parameters are fetched in line with the computation as well. ZeRO-1 has it since
    the races that spoilt gradients are mended in what weft requires (DeepSpeed issues 7188, 7804 and 8061, pull
    requests 7805, 7965 and 8080; for ZeRO-3 7898). Not ZeRO-2, of which reports of other losses are open (2867, 5523),
    and which would send every microbatch. Not with stages: stage_1_and_2.py:974 then leaves to hooks what they have
    not done, and each rank goes by its own gradients (seen on gloo: the norm is another). Not with an offloaded
    optimizer, whose gradients go to the host beside; and alone nothing travels.
    """
    return layout.zero in (1, 3) and layout.pp == 1 and not layout.offload and layout.dp * layout.cp > 1


def deepspeed_config(recipe: Recipe, layout: Layout, sizes: Sequence[int], *, overlap: bool = False) -> dict[str, Any]:
    """DeepSpeed's own settings for a recipe and parameters of such sizes; what weft decides itself is left out."""
    # gradients are copied into a bucket of this many numbers, made anew each step: never larger than they all are. To
    # travel while others are computed there must be several; one that is smaller than a parameter takes another way
    parameters = sum(sizes)
    most = max(OVERLAPPED_BUCKET, *sizes) if overlap else LARGEST_BUCKET
    bucket = min(parameters + parameters % 2, most + most % 2)  # stage_1_and_2.py:390 wants an even number
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": layout.micro_batch,
        "gradient_accumulation_steps": layout.microbatches,
        "gradient_clipping": recipe.train.grad_clip,
        "zero_optimization": {
            "stage": layout.zero,
            "overlap_comm": overlap,
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
