"""The dual encoder (CLIP, SigLIP): two towers that meet only in the joint embedding.

    outputs = model(image, text)        # {"image": [B, E], "text": [B, E], "logit_scale": [], "logit_bias": []}

Objectives read what they need from the outputs; the model does not know which ones are used.
"""

from __future__ import annotations

import torch

from pretrain.config import Model
from pretrain.models.heads import LogitBias, LogitScale
from pretrain.models.towers import TextTower, VisionTower, normalise
from pretrain.models.transformer import mark_tensor_parallel

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}  # by train.precision


class DualEncoder(torch.nn.Module):
    """Image and text towers with linear projections; embeddings come out fp32 and unit length."""

    def __init__(self, config: Model, *, tp: int = 1, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.vision = VisionTower(config.vision, tp=tp, dtype=dtype)
        self.text = TextTower(config.text, tp=tp, dtype=dtype)
        self.vision_projection = torch.nn.Linear(config.vision.width, config.embed_dim, bias=False, dtype=dtype)
        self.text_projection = torch.nn.Linear(config.text.width, config.embed_dim, bias=False, dtype=dtype)
        self.logit_scale = LogitScale(config.logit_scale_init, config.logit_scale_max)
        self.logit_bias = LogitBias(config.logit_bias_init)
        mark_tensor_parallel(self)

    def encode_image(self, image: torch.Tensor) -> torch.Tensor:
        """uint8 [B, 3, size, size] -> fp32 [B, E], unit length."""
        return normalise(self.vision_projection(self.vision(image)))

    def encode_text(self, text: torch.Tensor) -> torch.Tensor:
        """Token ids [B, S] -> fp32 [B, E], unit length."""
        return normalise(self.text_projection(self.text(text)))

    def forward(self, image: torch.Tensor, text: torch.Tensor) -> dict[str, torch.Tensor]:
        return {
            "image": self.encode_image(image),
            "text": self.encode_text(text),
            "logit_scale": self.logit_scale(),
            "logit_bias": self.logit_bias(),
        }
