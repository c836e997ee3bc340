"""What `weft bench step` trains on: the batches of a recipe's first steps, or made-up ones of the same shape."""

from __future__ import annotations

import torch

from data_pipeline import Batch
from data_pipeline.tokenizer import EOS
from pretrain.config import Recipe
from pretrain.ingest import ingest
from pretrain.parallel.groups import Ranks
from pretrain.parallel.layout import Layout
from pretrain.sources import open_training_data, picture_aspects, reading_order
from pretrain.tokenizer import tokenizer_of


def batches_for(recipe: Recipe, layout: Layout, ranks: Ranks, count: int) -> tuple[list[Batch], str]:
    """(this rank's batches of the first `count` steps, on its device; where they come from)."""
    try:
        dataset = open_training_data(recipe)
    except FileNotFoundError as error:
        made = [_made_up(recipe, layout.share, ranks, number).to(ranks.device) for number in range(count)]
        return made, f"made-up batches, since {error}"
    order = reading_order(recipe, dataset, picture_aspects(recipe, dataset, ranks, save=False))
    tokenizer = tokenizer_of(recipe, dataset, None, ranks, save=False)
    with ingest(recipe, dataset, order, tokenizer, ranks, 0, count) as batches:
        return [batch.to(ranks.device) for batch in batches], f"batches of {recipe.data.train}"


def _made_up(recipe: Recipe, rows: int, ranks: Ranks, number: int) -> Batch:
    """Noise and captions that fill the context."""
    generator = torch.Generator().manual_seed(1000 * ranks.dp_rank + number)
    size, context = recipe.model.vision.image_size, recipe.model.text.context
    image = torch.randint(0, 256, (rows, 3, size, size), generator=generator, dtype=torch.uint8)
    text = torch.randint(4, recipe.model.text.vocab_size, (rows, context), generator=generator)
    text[:, -1] = EOS
    places = torch.arange(rows)
    return Batch(image, text, places, places, [])
