"""Parameters and floating point operations of a model, counted from its recipe.

Convention: a multiply-add is 2 operations; only matrix products count (projections, feed-forward, attention scores and
values); a causal mask does not halve attention, since the usual kernels do the work anyway. Backward is twice forward.
Padding is not counted, and of the last layer of a text tower only what its pooled row needs, beside q, k and v of all
tokens, under every layout: one that cuts the sequence or the layers does both, and its MFU is so much lower.
Source of the convention: Kaplan et al. 2020, "Scaling Laws for Neural Language Models", table 1, with attention added.
"""

from __future__ import annotations

import torch

from kernels.cards import peak_flops
from pretrain.sections import Model, Tower


def forward_flops_per_sample(model: Model, text_length: float | None = None) -> float:
    """One image and one caption of so many tokens (default: the context) through both towers, or the one decoder."""
    vision, text = model.vision, model.text
    length = text.context if text_length is None else text_length
    if model.kind == "captioner":
        together = _block_flops(text, vision.patches + length)
        return together + 2 * text.width * (vision.patches * 3 * vision.patch**2 + length * text.vocab_size)
    image = _block_flops(vision, vision.tokens)
    image += 2 * vision.patches * 3 * vision.patch**2 * vision.width + 2 * vision.width * model.embed_dim
    caption = _block_flops(text, length, pooled=True) + 2 * text.width * model.embed_dim
    return image + caption


def training_flops_per_sample(model: Model, text_length: float | None = None) -> float:
    """Forward and backward of one pair. Recomputation and the loss are not counted."""
    return 3 * forward_flops_per_sample(model, text_length)


def peak_tflops(device: torch.device) -> float | None:
    """The card's dense bf16 peak; None where we do not know it (any CPU)."""
    peak = peak_flops(device)
    return peak / 1e12 if peak else None


def _block_flops(tower: Tower, length: float, pooled: bool = False) -> float:
    """A transformer over `length` tokens: 4 D^2 for q, k, v and output, 2 D F for feed-forward, 2 S D for attention.

    pooled: all of the last layer but q, k and v is of one row.
    """
    width, hidden = tower.width, int(tower.width * tower.mlp_ratio)
    query_key_value = 2 * 3 * width**2
    rest = 2 * (width**2 + 2 * width * hidden) + 4 * length * width
    rows = tower.layers * length
    return rows * query_key_value + (rows - (length - 1 if pooled else 0)) * rest
