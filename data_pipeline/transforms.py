"""A decoded image to model input, texts to token ids; and where every random draw of them comes from.

Design choices:
- Everything stays uint8: float normalisation happens on the trainer's device, where a batch is four times larger.
- Crop first, then resize the crop: the resize reads only what is kept.
- Resize is torch's antialiased bilinear on uint8, from channels last (as decoded) to channels last, into the
  batch's own row. Taking the channels apart here would cost half as much again; copying the row, another tenth.
- A draw's generator is made from (seed, epoch, sample, purpose) and nothing else: the same sample in the same epoch is
  cropped alike by any worker of any rank, and adding a draw for one purpose moves no other.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

LOG_ASPECT = math.log(4 / 3)  # a random crop's sides differ by 3/4 to 4/3 (Szegedy et al. 2015, section 6)


class Encoder(Protocol):
    """What makes text into token ids; `Tokenizer` is one."""

    def encode(self, text: str, context: int) -> np.ndarray:
        """Text -> int32 [context]."""


def sample_generator(seed: int, epoch: int, sample_id: int, purpose: str) -> np.random.Generator:
    """The generator for one purpose ("crop", "caption", ...) with one sample in one epoch."""
    path = f"{seed}/{epoch}/{sample_id}/{purpose}".encode()
    key = int.from_bytes(hashlib.blake2b(path, digest_size=16).digest(), "little")
    return np.random.Generator(np.random.Philox(key=key))


@dataclass(frozen=True)
class ImageTransform:
    """uint8 [height, width, 3] -> uint8 [3, size, size], channels last in memory: crop, resize, maybe mirror.

    Evaluation (no generator) keeps the centre square. In training a crop of `crop_scale` (smallest, largest) of the
    image's area is taken at random, with sides 3/4 to 4/3 of each other; (1, 1) means the centre square there too.
    Where a batch has another shape than a square (buckets.py), all of this is said of that shape.
    `flip` mirrors every second image: not for captions that say left and right.
    Raises ValueError when size or crop_scale make no sense.
    """

    size: int
    crop_scale: tuple[float, float] = (1.0, 1.0)
    flip: bool = False

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"image size is {self.size}: give 1 or more pixels")
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise ValueError(f"crop_scale is {low} to {high}: give two parts of the area, 0 < smallest <= largest <= 1")

    @property
    def draws(self) -> bool:
        """Whether anything is left to chance in training; if not, no generator is needed there either."""
        return self.flip or self.crop_scale != (1.0, 1.0)

    def __call__(
        self, image: np.ndarray, generator: np.random.Generator | None, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """uint8 [height, width, 3] -> uint8 [3, size, size], or into `out` [3, H, W]; generator None = evaluation."""
        height, width = image.shape[:2]
        if out is None:
            out = torch.empty((self.size, self.size, 3), dtype=torch.uint8).permute(2, 0, 1)
        wanted = (out.shape[1], out.shape[2])
        if generator is None or self.crop_scale == (1.0, 1.0):
            top, left, rows, columns = _centre_crop(height, width, wanted)
        else:
            top, left, rows, columns = _random_crop(height, width, self.crop_scale, generator, wanted[1] / wanted[0])
        crop_1HWC = torch.from_numpy(image)[None, top : top + rows, left : left + columns]
        crop_1CHW = crop_1HWC.permute(0, 3, 1, 2)
        # what interpolate(mode="bilinear", antialias=True) calls; that has no `out`, nor has the type stub of this
        resize: Any = torch._C._nn._upsample_bilinear2d_aa
        resize(crop_1CHW, wanted, False, None, None, out=out[None])
        if self.flip and generator is not None and generator.random() < 0.5:
            out.copy_(out.flip(-1))
        return out


@dataclass(frozen=True)
class TextTransform:
    """text -> int32 [context] token ids."""

    tokenizer: Encoder
    context: int

    def __call__(self, text: str) -> np.ndarray:
        """text -> int32 [context]."""
        return self.tokenizer.encode(text, self.context)


@dataclass(frozen=True)
class QuestionTransform:
    """A question and its answer -> token ids of each."""

    tokenizer: Encoder
    context: int
    answer_context: int

    def __call__(self, question: str, answer: str) -> tuple[np.ndarray, np.ndarray]:
        """(question, answer) -> (int32 [context], int32 [answer_context])."""
        return self.tokenizer.encode(question, self.context), self.tokenizer.encode(answer, self.answer_context)


def _centre_crop(height: int, width: int, wanted: tuple[int, int]) -> tuple[int, int, int, int]:
    """(top, left, rows, columns) of the largest crop of the shape of (height, width) `wanted`, in the middle."""
    scale = min(height / wanted[0], width / wanted[1])
    rows, columns = max(1, round(scale * wanted[0])), max(1, round(scale * wanted[1]))
    return (height - rows) // 2, (width - columns) // 2, rows, columns


def _random_crop(
    height: int, width: int, scale: tuple[float, float], generator: np.random.Generator, wanted_aspect: float = 1.0
) -> tuple[int, int, int, int]:
    """(top, left, rows, columns) of a crop of random area, aspect and place; cut to what the image has."""
    area = height * width * generator.uniform(*scale)
    aspect = wanted_aspect * math.exp(generator.uniform(-LOG_ASPECT, LOG_ASPECT))  # width / height
    rows = max(1, min(height, round(math.sqrt(area / aspect))))
    columns = max(1, min(width, round(math.sqrt(area * aspect))))
    top = int(generator.integers(height - rows + 1))
    left = int(generator.integers(width - columns + 1))
    return top, left, rows, columns
