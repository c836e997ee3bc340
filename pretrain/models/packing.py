"""Tokens side by side: a text tower computes the tokens of a batch and none of its padding.

    packing = Packing.of(lengths_B, context)        # N = all lengths together
    packed_N = packing.pack(padded_BS)              # [B, S, ...] -> [N, ...]
    padded_BS = packing.unpack(packed_N)            # and back; what comes out where there is padding means nothing

Norms and linear layers see [N, D]; attention, which needs to know which tokens are of one caption, sees [B, S, ...].
Where captions are much shorter than the context, most of a text tower's work on whole rows would be on padding.

Between the layers a packing travels as one tensor, `places`: where each token stands among the N, and N for padding.

Source: Zeng et al. 2022, "Boosting Distributed Training Performance of the Unpadded BERT Model".
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch


@dataclass(frozen=True, eq=False)
class Packing:
    """Where each of [B, S] stands among the tokens, and how many these are."""

    places: torch.Tensor  # [B, S]; N for padding
    tokens: int  # N

    @classmethod
    def of(cls, lengths_B: torch.Tensor, context: int) -> Packing:
        """Of captions of these lengths, 1 to `context`. Waits for a GPU to tell how many tokens these are."""
        is_token_BS = torch.arange(context, device=lengths_B.device) < lengths_B[:, None]
        count_BS = is_token_BS.flatten().cumsum(0).view_as(is_token_BS)
        tokens = int(lengths_B.sum())
        return cls(torch.where(is_token_BS, count_BS - 1, tokens), tokens)

    @cached_property
    def rows(self) -> torch.Tensor:
        """Which of the B * S rows are tokens, in their order: [N]."""
        numbers = torch.arange(self.places.numel(), device=self.places.device)
        # the last one is of padding
        return numbers.new_empty(self.tokens + 1).index_copy_(0, self.places.flatten(), numbers)[:-1]

    @cached_property
    def lengths_B(self) -> torch.Tensor:
        """Tokens of each caption."""
        return (self.places < self.tokens).sum(1)

    @cached_property
    def _sources(self) -> torch.Tensor:
        """The token that each of the B * S rows shows; padding the last one."""
        return self.places.flatten().clamp(max=self.tokens - 1)

    def pack(self, padded_BS: torch.Tensor) -> torch.Tensor:
        """[B, S, ...] -> [N, ...]."""
        packed: torch.Tensor = _Pack.apply(padded_BS.flatten(0, 1), self.rows)
        return packed

    def unpack(self, packed_N: torch.Tensor) -> torch.Tensor:
        """[N, ...] -> [B, S, ...]."""
        padded: torch.Tensor = _Unpack.apply(packed_N, self._sources, self.rows)
        return padded.unflatten(0, self.places.shape)

    def last(self, packed_N: torch.Tensor) -> torch.Tensor:
        """The last token of each caption: [N, ...] -> [B, ...]."""
        return packed_N.index_select(0, self.lengths_B.cumsum(0) - 1)


class _Pack(torch.autograd.Function):
    """Autograd of plain indexing would add up gradients row by row; here each row has one place."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, chosen_N: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(chosen_N)
        ctx.rows = len(rows)
        return rows.index_select(0, chosen_N)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        (gradient,) = gradients
        (chosen_N,) = ctx.saved_tensors
        whole = gradient.new_zeros(ctx.rows, *gradient.shape[1:])
        return whole.index_copy_(0, chosen_N, gradient), None


class _Unpack(torch.autograd.Function):
    """As above; what is done with the token that padding shows is not its gradient."""

    @staticmethod
    def forward(ctx: Any, packed_N: torch.Tensor, sources: torch.Tensor, rows_N: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(rows_N)
        return packed_N.index_select(0, sources)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradient,) = gradients
        (rows_N,) = ctx.saved_tensors
        return gradient.index_select(0, rows_N), None, None
