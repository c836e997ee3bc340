"""Initial parameters as a pure function of (seed, name, shape): the same under every layout.

Each full tensor is drawn from a generator of its own and then cut, so a tensor parallel rank holds exactly its piece
of what a single process would hold. Scales follow CLIP (Radford et al. 2021) and GPT-2: standard deviation
1/sqrt(fan in), and 1/sqrt(2 * layers) of that on the matrices that write into the residual stream.
"""

from __future__ import annotations

import hashlib

import torch

from pretrain.models.pieces import Chunk, parameters_by_name

RESIDUAL_WRITERS = ("linear_proj.weight", "linear_fc2.weight")


def initialise(model: torch.nn.Module, seed: int, *, tp_rank: int = 0, tp_size: int = 1) -> None:
    """Fill every parameter of this rank's chunks in place. The learned scales keep the values they were built with."""
    layers = {
        name.split(".")[0]: each.config.num_layers for name, each in model.named_modules() if isinstance(each, Chunk)
    }
    for name, parameter in parameters_by_name(model):
        if name.startswith(("logit_scale.", "logit_bias.")):
            continue
        shape = list(parameter.shape)
        axis = sharded_axis(parameter)
        if axis is not None:
            shape[axis] *= tp_size
        full = _draw(name, shape, seed, layers=layers[name.split(".")[0]])
        with torch.no_grad():
            parameter.copy_(full if axis is None else full.chunk(tp_size, dim=axis)[tp_rank])


def sharded_axis(parameter: torch.Tensor) -> int | None:
    """The axis along which tensor parallel ranks hold pieces of this parameter, or None if each holds it whole."""
    if not getattr(parameter, "tensor_model_parallel", False):
        return None
    axis: int = parameter.partition_dim  # type: ignore[attr-defined]  # Megatron-core sets both
    return axis


def _draw(name: str, shape: list[int], seed: int, layers: int) -> torch.Tensor:
    if name.endswith(".bias"):
        return torch.zeros(shape)
    if "norm" in name:
        return torch.ones(shape)
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    if name.endswith(("tokens.weight", "positions", "class_token")):
        deviation = 0.02
    else:
        deviation = shape[-1] ** -0.5
        if name.endswith(RESIDUAL_WRITERS):
            deviation /= (2 * layers) ** 0.5
    return torch.randn(shape, generator=generator) * deviation
