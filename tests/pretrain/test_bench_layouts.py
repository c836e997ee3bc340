"""The table of layouts: what is measured, and how rows are told."""

from __future__ import annotations

import pytest

from pretrain.bench_layouts import layouts, markdown
from pretrain.config import load_recipe
from pretrain.parallel.layout import lay_out


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_every_layout_of_the_table_is_one(ranks: int) -> None:
    base = ["model.text.layers=4", "train.global_batch=64"]
    recipe = load_recipe("quickstart", base)
    found = layouts(recipe, ranks)
    assert len(found) == (2 if ranks == 1 else 9)
    sizes = set()
    for count, overrides in found.values():
        layout = lay_out(load_recipe("quickstart", base + overrides), count)
        sizes.add(
            (layout.dp, layout.tp, layout.pp, layout.cp, layout.zero, layout.sequence_parallel, layout.microbatches)
        )
    assert len(sizes) == len(found), "no two are the same"


def test_the_table_is_relative_to_one_process() -> None:
    row = {
        "ranks": 1,
        "threads": 2,
        "global_batch": 100,
        "weft_seconds": 0.5,
        "communication": 0.0,
        "activations": 1 << 20,
    }
    table = markdown([row | {"name": "one"}, row | {"name": "two", "ranks": 2, "threads": 1, "weft_seconds": 0.6}])
    assert table.splitlines()[2] == "| one | 1 x 2 | 0.5000 | 200 | 1.00 | 0% | 1.0 MiB |"
    assert table.splitlines()[3].startswith("| two | 2 x 1 | 0.6000 | 167 | 1.20 |")
