"""Models, objectives, the parallel engine, the trainer, checkpoints, evaluation and the `weft` command.

To use what a run has trained:

    from pretrain import load_model, load_recipe
    model, tokenizer, recipe = load_model("runs/quickstart")
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from pretrain.config import Recipe, load_recipe

if TYPE_CHECKING:
    from data_pipeline import Tokenizer
    from pretrain.models.captioner import Captioner
    from pretrain.models.dual import DualEncoder

__all__ = ["Recipe", "load_model", "load_recipe"]


def load_model(path: str | Path, device: str = "cpu") -> tuple[DualEncoder | Captioner, Tokenizer, Recipe]:
    """The model of a checkpoint (or of a run's newest one) in fp32 on one device, its tokenizer and its recipe.

    Raises RequestError when there is no checkpoint at `path`, WeftError when its bytes are damaged.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Megatron-core misses Apex and Transformer Engine, which nothing here needs
        from pretrain.checkpoint import load  # it also takes seconds to import

    return load.load_model(path, device)
