"""What stands between a tower and a loss: the learned scale and bias of the logits.

Their parameters have one element and one axis: DeepSpeed cannot broadcast a tensor without axes.
"""

from __future__ import annotations

import math

import torch


class LogitScale(torch.nn.Module):
    """The learned factor on cosine similarities, kept at or below `maximum` (Radford et al. 2021: 100).

    The parameter is its logarithm. Above the maximum the value is clamped, and the gradient passes only where a step
    against it leads back below: a projected gradient, the same under every layout. Clamping the parameter itself would
    miss the fp32 master copy that ZeRO keeps.
    """

    def __init__(self, initial: float, maximum: float) -> None:
        super().__init__()
        self.log = torch.nn.Parameter(torch.tensor([math.log(initial)]))
        self.log_maximum = math.log(maximum)

    def forward(self) -> torch.Tensor:
        value: torch.Tensor = _ClampFromAbove.apply(self.log.float()[0], self.log_maximum)
        return value.exp()


class _ClampFromAbove(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, value: torch.Tensor, maximum: float) -> torch.Tensor:
        ctx.above = value > maximum  # type: ignore[attr-defined]
        return value.clamp(max=maximum)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        (gradient,) = gradients
        outwards = ctx.above & (gradient < 0)  # type: ignore[attr-defined]
        return torch.where(outwards, torch.zeros_like(gradient), gradient), None


class LogitBias(torch.nn.Module):
    """The learned bias of the sigmoid loss (Zhai et al. 2023)."""

    def __init__(self, initial: float) -> None:
        super().__init__()
        self.value = torch.nn.Parameter(torch.tensor([initial]))

    def forward(self) -> torch.Tensor:
        return self.value.float()[0]
