"""Batches as the models want them."""

import pytest
import torch

from data_pipeline import Batch
from data_pipeline.tokenizer import BOS, EOS, PAD

CONTEXT = 24


def batch_of(*lengths: int) -> Batch:
    """Captions of so many tokens with their marks."""
    text = torch.full((len(lengths), CONTEXT), PAD)
    for row, length in zip(text, lengths, strict=True):
        row[:length] = torch.tensor([BOS, *range(4, 2 + length), EOS])
    places = torch.arange(len(lengths))
    return Batch(torch.zeros(len(lengths), 3, 8, 8, dtype=torch.uint8), text, places, places, [])


@pytest.mark.parametrize(
    ("lengths", "multiple", "left"),
    [
        ((3, 5, 2), 1, 5),
        ((3, 5, 2), 8, 8),
        ((3, 8, 2), 8, 8),
        ((3, 9, 2), 8, 16),
        ((3, 9), 5, 9),
        ((3, 9), 10, 14),  # counted from the end, so that what the context is a multiple of stays so
        ((3,), 30, CONTEXT),
        ((CONTEXT, 2), 1, CONTEXT),
    ],
)
def test_text_is_cut_behind_the_longest_caption(lengths: tuple[int, ...], multiple: int, left: int) -> None:
    whole = batch_of(*lengths)
    shorter = whole.shortened(multiple)
    assert shorter.text.shape == (len(lengths), left)
    assert torch.equal(shorter.text, whole.text[:, :left])
    assert (whole.text[:, left:] == PAD).all()
    assert torch.equal(shorter.image, whole.image)


def test_batches_without_captions_stay_as_they_are() -> None:
    places = torch.arange(2)
    assert Batch(torch.zeros(2, 3, 8, 8), places.new_zeros(2, 0), places, places, []).shortened(8).text.shape == (2, 0)
    all_padding = Batch(torch.zeros(2, 3, 8, 8), torch.full((2, CONTEXT), PAD), places, places, [])
    assert all_padding.shortened(8).text.shape == (2, 8)
