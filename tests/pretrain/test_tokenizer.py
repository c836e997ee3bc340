"""A run's own tokenizer: how many ids it learns of so many captions."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from data_pipeline import open_dataset
from data_pipeline.errors import DataError
from data_pipeline.sample import Sample
from data_pipeline.shards import write_shards
from pretrain.config import load_recipe
from pretrain.parallel.groups import start_alone, stop_ranks
from pretrain.tokenizer import tokenizer_of


def words(number: int) -> Sample:
    """Made-up words of two letters from an alphabet of 60: more pairs that occur twice than anybody asks for."""
    drawn = random.Random(number % 1000)
    letters = [chr(code) for code in range(0x4E00, 0x4E00 + 60)]
    return Sample(f"s{number}", {"txt": " ".join("".join(drawn.sample(letters, 2)) for _ in range(30)).encode()})


@pytest.mark.parametrize(
    ("captions", "asked", "ids"), [(900, 1024, 1024), (900, 2000, 1024), (2400, 1300, 1300), (2400, 4096, 1600)]
)
def test_a_vocabulary_grows_with_the_captions(tmp_path: Path, captions: int, asked: int, ids: int) -> None:
    write_shards(captions, words, tmp_path / "data", samples_per_shard=1000, processes=0)
    recipe = load_recipe("quickstart", [f"model.text.vocab_size={asked}"])
    ranks = start_alone(torch.device("cpu"))
    try:
        made = tokenizer_of(recipe, open_dataset(tmp_path / "data"), None, ranks, save=False)
    finally:
        stop_ranks(ranks)
    assert made.vocab_size == ids


def test_a_tokenizer_that_is_given_has_its_own_size(tmp_path: Path) -> None:
    write_shards(2400, words, tmp_path / "data", samples_per_shard=1000, processes=0)
    data = open_dataset(tmp_path / "data")
    ranks = start_alone(torch.device("cpu"))
    try:
        wide = load_recipe("quickstart", ["model.text.vocab_size=1500", f"run.dir={tmp_path}"])
        tokenizer_of(wide, data, None, ranks)
        told = ["model.text.vocab_size=4096", f"data.tokenizer={tmp_path / 'tokenizer.json'}"]
        given = tokenizer_of(load_recipe("quickstart", told), data, None, ranks, save=False)
    finally:
        stop_ranks(ranks)
    assert given.vocab_size == 1500


def test_captions_that_no_run_reads_are_named(tmp_path: Path) -> None:
    samples = [Sample(f"s{n}", {"jpg": b"x", "json": b'{"caption": "a dog"}'}) for n in range(3)]
    write_shards(3, samples.__getitem__, tmp_path / "data", processes=0)
    ranks = start_alone(torch.device("cpu"))
    try:
        with pytest.raises(DataError, match=r"no sample of .* a caption \(there is 'caption', which is not read\): "):
            tokenizer_of(load_recipe("quickstart"), open_dataset(tmp_path / "data"), None, ranks, save=False)
    finally:
        stop_ranks(ranks)
