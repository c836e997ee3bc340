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


def test_the_shapes_of_images_are_not_kept_in_a_run_folder(tmp_path: Path) -> None:
    """A run that was never begun has none, and the bench makes none."""
    pictures = [(f"{number}.png", picture(1, [(13, 7), (7, 13)][number % 2])) for number in range(8)]
    (tmp_path / "data").mkdir()
    tar = tar_of([each for name, data in pictures for each in ((name, data), (f"{name[0]}.txt", b"a short caption"))])
    (tmp_path / "data" / "0.tar").write_bytes(tar)
    overrides = [f"data.train={tmp_path / 'data'}", "data.aspect=2", f"run.dir={tmp_path / 'run'}"]
    recipe = load_recipe("quickstart", [*RECIPE, *overrides])
    ranks = start_alone(torch.device("cpu"))
    try:
        batches, source = batches_for(recipe, lay_out(recipe, 1), ranks, 1)
    finally:
        stop_ranks(ranks)
    assert (len(batches), source.startswith("batches of")) == (1, True)
    assert not (tmp_path / "run").exists()
