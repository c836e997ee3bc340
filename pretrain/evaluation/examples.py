"""What a report shows of an evaluation: a few captions with the images that they found."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from data_pipeline import Dataset, decode_image
from data_pipeline.damage import opened
from data_pipeline.errors import DamagedSampleError
from pretrain.evaluation.retrieval import nearest
from pretrain.evaluation.test_set import Item

EXAMPLES, SHOWN, THUMBNAIL = 8, 5, 96


def examples(
    dataset: Dataset, items: Sequence[Item], image_NE: torch.Tensor, text_NE: torch.Tensor
) -> list[dict[str, Any]]:
    """Some items spread over the test set: the first caption, and the images nearest to it, nearest first.

    Embeddings of the items' images and of their first captions, both [N, E].
    """
    rows = np.unique(np.linspace(0, len(items) - 1, EXAMPLES).astype(int)).tolist()
    similarity, found = nearest(text_NE[rows], image_NE, SHOWN)
    return [
        {
            "caption": items[row].captions[0],
            "pictures": [
                {
                    "caption": items[other].captions[0],
                    "right": items[row].captions[0] in items[other].captions,
                    "similarity": round(value, 4),
                    "jpeg": _thumbnail(dataset, items[other].sample),
                }
                for value, other in zip(values, others, strict=True)
            ],
        }
        for row, values, others in zip(rows, similarity.tolist(), found.tolist(), strict=True)
    ]


def _thumbnail(dataset: Dataset, sample: int) -> str:
    """A small JPEG in base64; "" where the sample can no longer be read."""
    try:
        with opened(dataset, sample) as read:
            image = Image.fromarray(decode_image(read.fields[read.image_field or ""]))
    except DamagedSampleError:
        return ""
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90)
    return base64.b64encode(buffer.getvalue()).decode()
