"""Next-token prediction: the mean cross entropy over all predicted tokens of the global batch.

    L = 1/T sum_t -log p(token_t | picture, tokens before t)

The model gives the sum over its own rows; this scales it so that the mean over the group's ranks is L.
Source: Vinyals et al. 2015, "Show and Tell: A Neural Image Caption Generator", equation 1.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist

from pretrain.sections import Objective


def caption(
    outputs: Mapping[str, torch.Tensor], settings: Objective, group: dist.ProcessGroup, backend: str = "auto"
) -> torch.Tensor:
    """This rank's share of the loss, from "token_losses" [] (a sum) and "all_tokens" [], counted over the group."""
    return outputs["token_losses"] * dist.get_world_size(group) / outputs["all_tokens"]
