"""A large layout without a machine: the model of a rank of each stage, on fake groups and tensors without memory.

What it holds is what the planner counts, and the same count holds for small real runs (test_memory.py).
"""

from __future__ import annotations

import subprocess
import sys
import textwrap

from pretrain.config import load_recipe
from pretrain.parallel.layout import lay_out
from pretrain.parallel.memory import Place, memory_of, parameter_sizes

TWENTY_BILLION = [
    "data.train=unused",
    "train.precision=bf16",
    "train.global_batch=4096",
    "train.micro_batch=16",
    "model.vision={layers: 64, width: 4096, heads: 64, mlp_ratio: 4, image_size: 224, patch: 14}",
    "model.text={layers: 32, width: 4096, heads: 64, mlp_ratio: 4, context: 80, vocab_size: 49408}",
    "model.embed_dim=2048",
    "layout={tp: 8, pp: 4, sequence_parallel: true, zero: 1}",
]
WORLD = 8 * 4 * 16
BUILD = """
    import sys, torch, torch.distributed as dist
    from megatron.core import parallel_state
    from torch.testing._internal.distributed.fake_pg import FakeStore
    from pretrain.config import load_recipe
    from pretrain.parallel.build import build_of
    from pretrain.parallel.cpu import enable_cpu
    from pretrain.parallel.layout import lay_out
    from pretrain.models.dual import DualEncoder
    from pretrain.models.initialise import sharded_axis

    rank, world, *overrides = sys.argv[1:]
    enable_cpu()
    dist.init_process_group("fake", store=FakeStore(), rank=int(rank), world_size=int(world))
    recipe = load_recipe("quickstart", overrides)
    layout = lay_out(recipe, int(world))
    parallel_state.initialize_model_parallel(layout.tp, layout.pp, create_gloo_process_groups=False)
    with torch.device("meta"):
        model = DualEncoder(recipe.model, build_of(recipe, layout))
    assert all(each.is_meta for each in model.parameters())
    held = of_stage = bytes_held = 0
    for each in model.parameters():
        held += each.numel()
        of_stage += each.numel() * (layout.tp if sharded_axis(each) is not None else 1)
        bytes_held += each.numel() * each.element_size()
    print(parallel_state.get_pipeline_model_parallel_rank(), held, of_stage, bytes_held)
"""


def test_twenty_billion_parameters_on_512_ranks() -> None:
    recipe = load_recipe("quickstart", TWENTY_BILLION)
    layout = lay_out(recipe, WORLD)
    assert (layout.tp, layout.pp, layout.dp) == (8, 4, 16)
    assert layout.microbatches == 16
    whole = 0
    for stage in range(layout.pp):
        rank = stage * (WORLD // layout.pp) + 13  # tp rank 5 of data parallel rank 1
        command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(BUILD), str(rank), str(WORLD), *TWENTY_BILLION]
        words = subprocess.run(command, capture_output=True, text=True, check=True, timeout=900).stdout.split()
        found_stage, held, of_stage, bytes_held = map(int, words)
        counted = memory_of(recipe, layout, stage)
        assert found_stage == stage
        assert counted.parameter_count == held == sum(size for _, size in parameter_sizes(recipe, Place(stage, layout)))
        assert abs(counted.parameters - bytes_held) <= 4 * 4  # the learned scalars are fp32
        whole += of_stage
    assert 19e9 < whole < 22e9
    first, last = memory_of(recipe, layout, 0), memory_of(recipe, layout, 3)
    assert first.activations > 3 * last.activations, "the first stage holds four microbatches, the last one"
    assert first.total < 60 << 30, "and fits an 80 GiB card"
