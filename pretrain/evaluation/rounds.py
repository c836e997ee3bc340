"""Embed images and texts with all ranks.

Each data parallel rank embeds every dp_size-th batch, then all hold all embeddings. The ranks run the model equally
often, on a blank batch where one has none left: under ZeRO-3 a forward pass is a collective.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from data_pipeline import Corrupt, Dataset, ImageTransform, Tokenizer
from data_pipeline.tokenizer import BOS, EOS, PAD
from pretrain.evaluation.test_set import Item, gathered_items, gathered_unusable, read_item
from pretrain.parallel.groups import Ranks


class Encoder(Protocol):
    """A dual encoder, or an engine around one."""

    def encode_image(self, image: torch.Tensor) -> torch.Tensor:
        """uint8 [B, 3, size, size] -> fp32 [B, E], unit length."""
        ...

    def encode_text(self, text: torch.Tensor) -> torch.Tensor:
        """Token ids [B, S] -> fp32 [B, E], unit length."""
        ...


def embed_images(
    model: Encoder, dataset: Dataset, samples: np.ndarray, image: ImageTransform, batch: int, ranks: Ranks
) -> tuple[torch.Tensor, list[Item], list[Corrupt]]:
    """(embeddings [N, E] on CPU, the N usable samples, those that are not) of these ascending sample ids."""
    items: list[Item] = []
    unusable: list[Corrupt] = []

    def encode(part: int | None) -> torch.Tensor:
        ids = [] if part is None else samples[part * batch :][:batch].tolist()
        images_BCHW = torch.zeros(max(len(ids), 1), 3, image.size, image.size, dtype=torch.uint8)
        for row, sample in enumerate(ids):
            read = read_item(dataset, sample, image, labels=True)
            if isinstance(read, Corrupt):
                unusable.append(read)
            else:
                items.append(read[0])
                images_BCHW[row] = read[1]
        return model.encode_image(images_BCHW.to(ranks.device))

    image_NE = _in_rounds(len(samples), batch, encode, ranks)
    used = gathered_items(items, ranks)
    rows = np.searchsorted(samples, [item.sample for item in used])
    return image_NE[torch.from_numpy(rows)], used, gathered_unusable(unusable, ranks)


def embed_texts(
    model: Encoder, tokenizer: Tokenizer, texts: Sequence[str], context: int, batch: int, ranks: Ranks
) -> torch.Tensor:
    """Embeddings [len(texts), E] on CPU; every rank gives the same texts."""

    def encode(part: int | None) -> torch.Tensor:
        if part is None:
            tokens = blank_text(context)
        else:
            tokens = torch.from_numpy(tokenizer.encode_batch(texts[part * batch :][:batch], context)).long()
        return model.encode_text(tokens.to(ranks.device))

    return _in_rounds(len(texts), batch, encode, ranks)


def blank_text(context: int) -> torch.Tensor:
    """The token ids of an empty caption, [1, context]."""
    return torch.tensor([[BOS, EOS] + [PAD] * (context - 2)])


def _in_rounds(count: int, batch: int, encode: Callable[[int | None], torch.Tensor], ranks: Ranks) -> torch.Tensor:
    """The rows of all parts, [count, E] on CPU: part p is rows p * batch and on, and `encode(None)` a blank one."""
    parts = -(-count // batch)
    rounds = []
    for first in range(0, parts, ranks.dp_size):
        part = first + ranks.dp_rank
        rows = encode(part if part < parts else None)
        rounds.append(F.pad(rows, (0, 0, 0, batch - len(rows))))
    mine_RBE = torch.stack(rounds)
    everyone = [torch.empty_like(mine_RBE) for _ in range(ranks.dp_size)]
    dist.all_gather(everyone, mine_RBE, group=ranks.dp_group)
    return torch.stack(everyone, 1).flatten(0, 2)[:count].cpu()
