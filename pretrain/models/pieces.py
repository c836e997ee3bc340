"""How the model of this rank is built: its precision and kernels, and which pieces of the whole it holds.

A tower is cut between its layers into pp * vpp chunks; stage r of a pipeline holds chunks r, r + pp, r + 2 pp, ... The
model of a rank is the list of its chunks. Parameters go by the names that they have in the whole model
(`parameters_by_name`), so initial values, checkpoints and optimizer settings know nothing of stages.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from megatron.core import parallel_state
from megatron.core.enums import ModelType
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig

from pretrain.sections import Kernels


@dataclass(frozen=True)
class Build:
    """Sizes as in the layout; the groups themselves are Megatron-core's."""

    dtype: torch.dtype = torch.float32
    kernels: Kernels = field(default_factory=Kernels)
    tp: int = 1
    pp: int = 1
    vpp: int = 1
    cp: int = 1
    sequence_parallel: bool = False
    recompute: str = "none"

    @property
    def batch_first(self) -> bool:
        """Whether blocks work on [B, S, D]: attention then reads and writes memory in order.

        Megatron-core's [S, B, D] is needed only where ranks cut the sequence or hand hidden states over.
        """
        return self.pp == self.cp == 1 and not self.sequence_parallel


@dataclass(frozen=True)
class Piece:
    """Where a chunk stands: whether it takes the input, whether it gives the result, and its number on this rank."""

    first: bool = True
    last: bool = True
    chunk: int = 0


def pieces(build: Build) -> list[Piece]:
    """The chunks of a tower that this rank holds."""
    stage = parallel_state.get_pipeline_model_parallel_rank()
    return [
        Piece(
            first=stage == 0 and chunk == 0,
            last=stage == build.pp - 1 and chunk == build.vpp - 1,
            chunk=chunk,
        )
        for chunk in range(build.vpp)
    ]


class Chunk(torch.nn.Module):
    """One chunk of a tower, as Megatron-core's schedules call it: what the stage before sent is set."""

    model_type = ModelType.encoder_or_decoder
    block: TransformerBlock

    @property
    def config(self) -> TransformerConfig:
        """Megatron-core's settings of the block."""
        settings: TransformerConfig = self.block.config
        return settings

    def set_input_tensor(self, received: list[torch.Tensor | None]) -> None:
        """Hidden states [S, B, D] of the chunk before; None for the first one."""
        self.block.set_input_tensor(received[0])


def parameters_by_name(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """This rank's parameters under their names in the whole model, in the model's order.

    `text.1.block.layers.0.mlp.linear_fc1.weight` of a model in chunks is, for instance,
    `text.block.layers.6.mlp.linear_fc1.weight` of the whole one.
    """
    chunks = {f"{name}.": module for name, module in model.named_modules() if isinstance(module, Chunk)}
    for name, parameter in model.named_parameters():
        prefix = next((each for each in chunks if name.startswith(each)), None)
        if prefix is None:
            yield name, parameter
            continue
        tower, inside = prefix.split(".")[0], name.removeprefix(prefix)
        if match := re.match(r"block\.layers\.(\d+)\.", inside):
            number = chunks[prefix].block.layers[int(match[1])].layer_number - 1
            inside = f"block.layers.{number}.{inside.removeprefix(match[0])}"
        yield f"{tower}.{inside}", parameter
