"""What the step is measured on."""

from pathlib import Path

import pytest
import torch
from tars import picture, tar_of

from data_pipeline.tokenizer import EOS
from pretrain.bench_batches import batches_for
from pretrain.config import load_recipe
from pretrain.parallel.groups import start_alone, stop_ranks
from pretrain.parallel.layout import lay_out

RECIPE = ["train.global_batch=4", "data.workers=0", "model.text.context=16", "model.text.vocab_size=300"]


def test_batches_are_of_the_recipe_where_its_data_is_there(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    files = [("png", picture(1)), ("txt", b"a short caption")]
    (tmp_path / "data").mkdir()
    tar = tar_of([(f"{number}.{kind}", data) for number in range(8) for kind, data in files])
    (tmp_path / "data" / "0.tar").write_bytes(tar)
    ranks = start_alone(torch.device("cpu"))
    try:
        for folder, origin in (("data", "batches of"), ("nowhere", "made-up batches, since no data set at")):
            recipe = load_recipe("quickstart", [*RECIPE, f"data.train={tmp_path / folder}", "run.dir=/nowhere/run"])
            batches, source = batches_for(recipe, lay_out(recipe, 1), ranks, 3)
            assert source.startswith(origin), source
            assert [len(batch) for batch in batches] == [4, 4, 4]
            full = [bool((batch.text[:, -1] == EOS).all()) for batch in batches]
            assert full == [folder == "nowhere"] * 3
    finally:
        stop_ranks(ranks)
