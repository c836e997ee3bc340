"""Megatron-core's schedules over the chunks of one tower: 1F1B, or interleaved where a stage has several chunks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch.nn import ModuleList

from pretrain.models.pieces import Chunk
from pretrain.parallel.layout import Layout

Inputs = tuple[torch.Tensor, ...]  # of one microbatch: what a chunk is called with
Loss = Callable[[int, torch.Tensor], torch.Tensor]  # (number of the microbatch, what the last chunk gave) -> scalar


class Pipeline:
    """Runs microbatches through the stages of a layout. Every rank of a copy of the model calls it together."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout

    @torch.no_grad()
    def outputs(self, chunks: ModuleList, parts: Sequence[Inputs], length: int) -> list[torch.Tensor]:
        """What the last chunk gives for each microbatch, without gradients; [] on all but the last stage.

        length: of the whole sequence, before it is cut.
        """
        return self._run(chunks, parts, length, None)

    def backpropagate(self, chunks: ModuleList, parts: Sequence[Inputs], length: int, loss: Loss) -> None:
        """Add the gradients of the sum of all microbatches' losses, which are taken on the last stage."""
        self._run(chunks, parts, length, loss)

    def _run(self, chunks: ModuleList, parts: Sequence[Inputs], length: int, loss: Loss | None) -> list[torch.Tensor]:
        def forward_step(numbered: Iterator[tuple[int, Inputs]], chunk: Chunk) -> tuple[torch.Tensor, Any]:
            number, inputs = next(numbered)

            def finish(output: torch.Tensor, non_loss_data: bool = False) -> Any:
                if loss is None:
                    return output
                # schedules.py:240 multiplies by the context parallel size and divides by the number of microbatches,
                # which is right for means; these are sums
                return loss(number, output) * (len(parts) / self.layout.cp), None

            return chunk(*inputs), finish

        results: list[torch.Tensor] = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=[iter(enumerate(parts)) for _ in chunks],
            model=list(chunks),
            num_microbatches=len(parts),
            seq_length=length,
            micro_batch_size=len(parts[0][0]),
            forward_only=loss is None,
            collect_non_loss_data=loss is None,
        )
        return results
