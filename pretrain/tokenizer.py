"""The tokenizer of a run: the checkpoint's, the one the recipe names, or one trained on the captions of the data.

The first rank makes it and tells the others, so that all have the same wherever their files are.
"""

from __future__ import annotations

import sys
from pathlib import Path

from data_pipeline import Dataset, Joined, Tokenizer
from data_pipeline.check_sample import unread_caption
from data_pipeline.damage import opened
from data_pipeline.errors import DamagedSampleError, DataError
from pretrain.checkpoint.format import TOKENIZER, Checkpoint, file_problem
from pretrain.checkpoint.warm_start import WarmStart
from pretrain.config import Recipe
from pretrain.errors import RequestError
from pretrain.parallel.first import from_first
from pretrain.parallel.groups import Ranks

CAPTIONS_FOR_TOKENIZER = 200_000
# a row of the token table learns from the captions that hold its id: 4,096 ids gain two points of recall where there
# are 7,000 captions, and cost as much where there are 700 (README)
CAPTIONS_AN_ID, LEAST_IDS = 1.5, 1024


def given_tokenizer(checkpoint: Checkpoint | None, warm: WarmStart | None) -> Path | None:
    """The tokenizer of the checkpoint that a run resumes from, or of the one whose token table it begins with."""
    source = _source(checkpoint, warm)
    return source.path / TOKENIZER if source else None


def refuse_another_tokenizer(recipe: Recipe, checkpoint: Checkpoint | None, warm: WarmStart | None) -> None:
    """RequestError where data.tokenizer is not, in content, the one that the weights' token table was trained with."""
    mine, source = recipe.data.tokenizer, _source(checkpoint, warm)
    if mine is None or source is None or file_problem(source, TOKENIZER):
        return  # a damaged one is told where all files of the checkpoint are read
    if Tokenizer.load(mine).to_json() == Tokenizer.load(source.path / TOKENIZER).to_json():
        return
    if checkpoint:
        way_out = "give that one, or leave data.tokenizer out; another needs another run.dir"
    else:
        way_out = "leave data.tokenizer out, or take over a part without tokens, such as train.init_only=[vision.]"
    raise RequestError(f"data.tokenizer is {mine}, but {source.path} was trained with another tokenizer: {way_out}")


def _source(checkpoint: Checkpoint | None, warm: WarmStart | None) -> Checkpoint | None:
    return checkpoint or (warm.checkpoint if warm and warm.brings_tokenizer else None)


def tokenizer_of(
    recipe: Recipe, dataset: Dataset | Joined, given: Path | None, ranks: Ranks, *, save: bool = True
) -> Tokenizer:
    """The tokenizer of the run, the same on every rank; `save`: in the run folder. `given`: of a checkpoint.

    What goes wrong on the first rank is raised on every rank; RequestError for one that does not fit the model.
    """

    def made() -> str:
        tokenizer = Tokenizer.load(given) if given else _made(recipe, dataset)
        if save:
            tokenizer.save(recipe.run.dir / "tokenizer.json")
        return tokenizer.to_json()

    tokenizer = Tokenizer(from_first(made, ranks))
    limit = recipe.model.text.vocab_size
    if tokenizer.vocab_size > limit:
        raise RequestError(
            f"the tokenizer has {tokenizer.vocab_size} ids, more than model.text.vocab_size={limit}: "
            f"set model.text.vocab_size={tokenizer.vocab_size} or more"
        )
    return tokenizer


def _made(recipe: Recipe, dataset: Dataset | Joined) -> Tokenizer:
    """The one that the recipe names, or one trained on captions of the data; says how many captions it will cut."""
    limit, context = recipe.model.text.vocab_size, recipe.model.text.context
    captions = _captions(dataset)
    if recipe.data.tokenizer:
        made = Tokenizer.load(recipe.data.tokenizer)
    else:
        made = Tokenizer.train(captions, min(limit, max(LEAST_IDS, int(len(captions) / CAPTIONS_AN_ID))))
    cut = sum(made.length(caption) > context for caption in captions)
    if cut:
        print(
            f"{cut} of {len(captions)} captions are longer than model.text.context={context} tokens and will be cut",
            file=sys.stderr,
        )
    return made


def _captions(dataset: Dataset | Joined) -> list[str]:
    """The captions of at most CAPTIONS_FOR_TOKENIZER samples, evenly spread; unreadable ones left out.

    Raises DataError when there is none, with the first reason where samples are damaged.
    """
    every = -(-len(dataset) // CAPTIONS_FOR_TOKENIZER)
    captions: list[str] = []
    first: DamagedSampleError | None = None
    elsewhere: str | None = None
    for number in range(0, len(dataset), every):
        try:
            with opened(dataset, number) as sample:
                own = sample.captions()
                elsewhere = elsewhere or (None if own else unread_caption(sample))
                captions += own
        except DamagedSampleError as error:  # named in quarantine.jsonl when training meets it
            first = first or error
    if first and not captions:
        raise DataError(f"no caption of {dataset.folder} can be read; the first: {first}") from first
    if not captions:
        there = f" (there is {elsewhere!r}, which is not read)" if elsewhere else ""
        raise DataError(f"no sample of {dataset.folder} has a caption{there}: `weft data check` says where they belong")
    return captions
