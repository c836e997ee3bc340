"""Parameters laid side by side in one tensor, and their gradients in another of the same shape.

    flat = Flat([matrices, others])
    flat.weights, flat.gradients            # [N], N a multiple of ROW; the parameters are views of the weights
    flat.groups                             # the part of each list, a parameter for an optimizer
    flat.gradient_of(parameter)             # a view, in the parameter's shape

What is done to all parameters, such as a norm, an update or a reduction over ranks, is then one operation and not one
for each of them. What fills the gaps between them is zero and stays so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

ALIGNMENT = 16  # numbers of fp32: 64 bytes, the widest vector register and a line of cache
ROW = 1024  # numbers


@dataclass(frozen=True)
class Slot:
    """Where a parameter lies: numbers [start, start + numel)."""

    start: int
    numel: int
    shape: torch.Size

    @property
    def end(self) -> int:
        """The first number behind it and behind what fills up to the next one."""
        return self.start + _rounded(self.numel, ALIGNMENT)

    def of(self, flat: torch.Tensor) -> torch.Tensor:
        """The parameter's part of a flat tensor, in its shape."""
        return flat[self.start : self.start + self.numel].view(self.shape)


class Flat:
    """The weights and the gradients of lists of parameters of one precision, one list after the other."""

    def __init__(self, lists: Sequence[Sequence[torch.nn.Parameter]]) -> None:
        self.places: dict[torch.nn.Parameter, Slot] = {}
        bounds, end = [0], 0
        for parameters in lists:
            for parameter in parameters:
                self.places[parameter] = place = Slot(end, parameter.numel(), parameter.shape)
                end = place.end
            end = _rounded(end, ROW)
            bounds.append(end)
        first = next(iter(self.places))
        self.weights = torch.zeros(end, dtype=first.dtype, device=first.device)
        self.gradients = torch.zeros_like(self.weights)
        for parameter, place in self.places.items():
            view = place.of(self.weights)
            view.copy_(parameter.detach())
            parameter.data = view
        self.groups: list[torch.nn.Parameter] = []
        for start, stop in pairwise(bounds):
            group = torch.nn.Parameter(self.weights[start:stop])
            group.grad = self.gradients[start:stop]
            self.groups.append(group)
        self._starts = bounds[:-1]

    def gradient_of(self, parameter: torch.nn.Parameter) -> torch.Tensor:
        """A view of its gradient, in its shape."""
        return self.places[parameter].of(self.gradients)

    def in_group(self, parameter: torch.nn.Parameter) -> tuple[torch.nn.Parameter, Slot]:
        """The group that a parameter is in, and where in it."""
        place = self.places[parameter]
        number = max(n for n, start in enumerate(self._starts) if start <= place.start)
        return self.groups[number], Slot(place.start - self._starts[number], place.numel, place.shape)

    def gradient_norm(self) -> float:
        """Of all gradients: rows in fp32, their squares added up in fp64."""
        rows = torch.linalg.vector_norm(self.gradients.view(-1, ROW), dim=1)
        norm = float(torch.linalg.vector_norm(rows, dtype=torch.float64))
        if norm < float("inf"):
            return norm
        # the square of a large number overflows in fp32, where the number itself does not
        return float(torch.linalg.vector_norm(self.gradients, dtype=torch.float64))


def _rounded(numbers: int, multiple: int) -> int:
    return numbers + -numbers % multiple
