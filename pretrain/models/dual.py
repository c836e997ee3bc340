"""The dual encoder (CLIP, SigLIP): two towers that meet only in the joint embedding.

    outputs = model(image, text)        # {"image": [B, E], "text": [B, E], "logit_scale": [], "logit_bias": []}

Objectives read what they need from the outputs; the model does not know which ones are used.
"""

from __future__ import annotations

import torch

from pretrain.models.heads import LogitBias, LogitScale
from pretrain.models.pieces import Build, pieces
from pretrain.models.towers import TextTower, VisionTower
from pretrain.models.transformer import mark_tensor_parallel
from pretrain.sections import Model

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}  # by train.precision


class DualEncoder(torch.nn.Module):
    """This rank's chunks of an image and a text tower; without stages there is one of each, and it is the tower.

    The scale and bias of the logits are where the embeddings come out: on the last stage.
    """

    def __init__(self, config: Model, build: Build | None = None) -> None:
        super().__init__()
        build = build or Build()
        places = pieces(build)
        self.vision = torch.nn.ModuleList(VisionTower(config.vision, config.embed_dim, each, build) for each in places)
        self.text = torch.nn.ModuleList(TextTower(config.text, config.embed_dim, each, build) for each in places)
        if places[-1].last:
            self.logit_scale = LogitScale(config.logit_scale_init, config.logit_scale_max)
            self.logit_bias = LogitBias(config.logit_bias_init)
        mark_tensor_parallel(self)

    def encode_image(self, image: torch.Tensor) -> torch.Tensor:
        """uint8 [B, 3, size, size] -> fp32 [B, E], unit length; without stages."""
        (tower,) = self.vision
        embedding: torch.Tensor = tower(image)
        return embedding

    def encode_text(self, text: torch.Tensor) -> torch.Tensor:
        """Token ids [B, S] -> fp32 [B, E], unit length; without stages."""
        (tower,) = self.text
        embedding: torch.Tensor = tower(text)
        return embedding

    def logits_settings(self) -> dict[str, torch.Tensor]:
        """The scalars that objectives read beside the embeddings; on the last stage."""
        return {"logit_scale": self.logit_scale(), "logit_bias": self.logit_bias()}

    def forward(self, image: torch.Tensor, text: torch.Tensor) -> dict[str, torch.Tensor]:
        embedded = self.encode_text(text)  # first, since it waits for a GPU to count tokens
        return {"image": self.encode_image(image), "text": embedded, **self.logits_settings()}
