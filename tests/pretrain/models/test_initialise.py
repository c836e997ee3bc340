"""Initial parameters are a function of seed, name and shape alone; a tensor parallel model is a cut of the whole."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from ranks import run_ranks

from pretrain.models.dual import DualEncoder
from pretrain.models.initialise import initialise, sharded_axis
from pretrain.models.pieces import Build, parameters_by_name
from pretrain.objectives import OBJECTIVES
from pretrain.parallel.groups import Ranks, start_ranks, stop_ranks
from pretrain.parallel.layout import Layout
from pretrain.sections import Model, Objective

CONFIG: dict[str, Any] = {
    "vision": {
        "layers": 2,
        "width": 24,
        "heads": 2,
        "image_size": 12,
        "patch": 4,
        "pool": "class",
        "positions": "learned",
    },
    "text": {"layers": 3, "width": 16, "heads": 4, "context": 7, "vocab_size": 300, "causal": False, "mlp_ratio": 3},
    "embed_dim": 11,
}
EOS = 1


def parameters_of(
    seed: int, config: dict[str, Any] = CONFIG, dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    model = DualEncoder(Model.model_validate(config), Build(dtype=dtype))
    initialise(model, seed)
    return {name: each.detach() for name, each in parameters_by_name(model)}


def is_drawn(name: str) -> bool:
    return not name.endswith(".bias") and "norm" not in name and not name.startswith("logit_")


def test_the_seed_alone_decides(alone: Ranks) -> None:
    torch.manual_seed(1)
    one = parameters_of(3)
    state = torch.get_rng_state()
    torch.manual_seed(2)
    two, other = parameters_of(3), parameters_of(4)
    for name, value in one.items():
        assert torch.equal(value, two[name]), name
        assert torch.equal(value, other[name]) != is_drawn(name), name
    torch.manual_seed(1)
    parameters_of(3)
    assert torch.equal(torch.get_rng_state(), state), "no draw of ours depends on torch's own generator"


def test_nothing_is_left_as_it_was_in_memory(alone: Ranks) -> None:
    """Parameters are built empty: each must be filled, whatever was there."""
    model = DualEncoder(Model.model_validate(CONFIG))
    with torch.no_grad():
        for name, each in parameters_by_name(model):
            if not name.startswith("logit_"):
                each.fill_(torch.nan)
    initialise(model, 3)
    expected = parameters_of(3)
    for name, each in parameters_by_name(model):
        torch.testing.assert_close(each.detach(), expected[name], msg=name)


def test_equal_shapes_under_other_names_are_other_draws(alone: Ranks) -> None:
    parameters = {name: each for name, each in parameters_of(0).items() if is_drawn(name)}
    seen: dict[tuple[int, ...], list[torch.Tensor]] = {}
    for name, each in parameters.items():
        for other in seen.setdefault(tuple(each.shape), []):
            correlation = torch.corrcoef(torch.stack([each.flatten(), other.flatten()]))[0, 1]
            assert abs(correlation) < 6 / math.sqrt(each.numel()), name
        seen[tuple(each.shape)].append(each)


def test_another_part_of_the_model_changes_nothing_here(alone: Ranks) -> None:
    """A run with a deeper text tower starts from the same image tower."""
    deeper = CONFIG | {"text": CONFIG["text"] | {"layers": 5}}
    one, two = parameters_of(0), parameters_of(0, deeper)
    for name, each in one.items():
        if name.startswith("vision"):
            assert torch.equal(each, two[name]), name


def test_scales_are_those_of_clip_and_gpt_2(alone: Ranks) -> None:
    wide = {
        "vision": {"layers": 3, "width": 128, "heads": 2, "pool": "class", "positions": "learned"},
        "text": {"layers": 5, "width": 96, "heads": 2},
        "logit_scale_init": 7.5,
    }
    parameters = parameters_of(0, wide)
    expected = {
        "vision.patches.linear.weight": 192**-0.5,
        "vision.patches.positions": 0.02,
        "vision.class_token": 0.02,
        "text.tokens.weight": 0.02,
        "text.positions": 0.02,
        "vision.projection.weight": 128**-0.5,
        "text.projection.weight": 96**-0.5,
        "vision.block.layers.1.self_attention.linear_qkv.weight": 128**-0.5,
        "vision.block.layers.1.self_attention.linear_proj.weight": 128**-0.5 / 6**0.5,
        "vision.block.layers.2.mlp.linear_fc1.weight": 128**-0.5,
        "vision.block.layers.2.mlp.linear_fc2.weight": 512**-0.5 / 6**0.5,
        "text.block.layers.4.self_attention.linear_proj.weight": 96**-0.5 / 10**0.5,
        "text.block.layers.0.mlp.linear_fc2.weight": 384**-0.5 / 10**0.5,
    }
    for name, deviation in expected.items():
        found = parameters[name]
        assert float(found.std()) == pytest.approx(deviation, rel=4 / math.sqrt(2 * found.numel())), name
        assert abs(float(found.mean())) < 5 * deviation / math.sqrt(found.numel()), name
    for name, found in parameters.items():
        if name.endswith(".bias"):
            assert torch.count_nonzero(found) == 0, name
        elif "norm" in name:
            assert torch.all(found == 1), name
    assert float(parameters["logit_scale.log"]) == pytest.approx(math.log(7.5))
    assert float(parameters["logit_bias.value"]) == -10


def test_a_bf16_model_is_the_rounded_fp32_model(alone: Ranks) -> None:
    full, half = parameters_of(5), parameters_of(5, dtype=torch.bfloat16)
    for name, each in half.items():
        assert torch.equal(each, full[name].to(each.dtype)), name


# --- tensor parallelism


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(8)
    image = torch.randint(0, 256, (5, 3, 12, 12), dtype=torch.uint8, generator=generator)
    text = torch.randint(2, 300, (5, 7), generator=generator)
    text[torch.arange(5), torch.tensor([6, 2, 3, 5, 1])] = EOS
    return image, text


def run_model(model: DualEncoder, ranks: Ranks) -> dict[str, Any]:
    """Outputs, parameters with the axis of their cut, and gradients of the contrastive loss on one batch."""
    outputs = model(*batch())
    OBJECTIVES["contrastive"](outputs, Objective(name="contrastive"), ranks.dp_group).backward()
    return {
        "outputs": {name: each.detach() for name, each in outputs.items()},
        "parameters": {name: each.detach() for name, each in parameters_by_name(model)},
        "gradients": {name: each.grad for name, each in parameters_by_name(model)},
        "axes": {name: sharded_axis(each) for name, each in parameters_by_name(model)},
    }


def on_ranks(rank: int, world: int) -> dict[str, Any]:
    """The model cut over all ranks."""
    layout = Layout(world=world, dp=1, tp=world, zero=0, share=5, micro_batch=5)
    ranks = start_ranks(layout, torch.device("cpu"))
    assert (ranks.tp_rank, ranks.tp_size, ranks.dp_size) == (rank, world, 1)
    model = DualEncoder(Model.model_validate(CONFIG), Build(tp=world))
    initialise(model, 3, tp_rank=ranks.tp_rank, tp_size=ranks.tp_size)
    result = run_model(model, ranks)
    stop_ranks(ranks)
    return result


def test_a_cut_model_is_a_cut_of_the_whole(alone: Ranks) -> None:
    """Two ranks: the same outputs, each holds its piece of every parameter and of every gradient."""
    model = DualEncoder(Model.model_validate(CONFIG))
    initialise(model, 3)
    whole = run_model(model, alone)
    pieces = run_ranks(on_ranks, 2)
    cut = [name for name, axis in pieces[0]["axes"].items() if axis is not None]
    # weight and bias of two linear layers, the weight alone of two more, in 5 layers; the token table
    assert len(cut) == 6 * 5 + 1
    for rank, mine in enumerate(pieces):
        for name, value in whole["outputs"].items():
            torch.testing.assert_close(mine["outputs"][name], value, atol=1e-6, rtol=1e-5, msg=name)
        assert mine["parameters"].keys() == whole["parameters"].keys()
        for name, value in whole["parameters"].items():
            axis = mine["axes"][name]
            assert torch.equal(mine["parameters"][name], value if axis is None else value.chunk(2, axis)[rank]), name
            expected = whole["gradients"][name]
            if expected is None:
                assert mine["gradients"][name] is None, name
                continue
            piece = expected if axis is None else expected.chunk(2, axis)[rank]
            error = float((mine["gradients"][name] - piece).abs().max())
            assert error <= max(1e-5 * float(piece.abs().max()), 1e-6), name
