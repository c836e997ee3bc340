"""The transformer block against the same mathematics in plain torch, with the block's own weights."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_block import TransformerBlock

from pretrain.models.initialise import sharded_axis
from pretrain.models.packing import Packing
from pretrain.models.pieces import Build, Piece
from pretrain.models.transformer import Norm, build_block, mark_tensor_parallel, through
from pretrain.parallel.groups import Ranks
from pretrain.sections import Tower

WIDTH, HEADS, LAYERS = 24, 3, 2


def block_of(
    *,
    causal: bool,
    mlp_ratio: float = 4.0,
    dtype: torch.dtype = torch.float64,
    build: Build | None = None,
    pooled: bool = False,
) -> TransformerBlock:
    """A block with every parameter drawn, norms and biases too."""
    tower = Tower(layers=LAYERS, width=WIDTH, heads=HEADS, mlp_ratio=mlp_ratio)
    block = build_block(tower, Piece(), build or Build(dtype=dtype), causal=causal, pooled=pooled)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in block.parameters():
            drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(drawn * 0.5 / parameter.shape[-1] ** 0.5 if parameter.ndim > 1 else 1 + 0.3 * drawn)
    return block


def plain_block(weights: dict[str, torch.Tensor], hidden_SBD: torch.Tensor, seen_BSS: torch.Tensor) -> torch.Tensor:
    """A pre-norm transformer, as in the books. Megatron-core keeps q, k and v of a head side by side."""
    sequence, batch, _ = hidden_SBD.shape
    size = WIDTH // HEADS

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        mean, variance = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
        return (x - mean) / (variance + 1e-5).sqrt() * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    for layer in range(LAYERS):
        at = f"layers.{layer}"
        qkv = linear(norm(hidden_SBD, f"{at}.input_layernorm"), f"{at}.self_attention.linear_qkv")
        q, k, v = qkv.reshape(sequence, batch, HEADS, 3, size).unbind(3)
        scores = torch.einsum("qbhk,sbhk->bhqs", q, k) / size**0.5
        weight = scores.masked_fill(~seen_BSS[:, None], -torch.inf).softmax(-1)
        mixed = torch.einsum("bhqs,sbhk->qbhk", weight, v).reshape(sequence, batch, WIDTH)
        hidden_SBD = hidden_SBD + linear(mixed, f"{at}.self_attention.linear_proj")
        inner = F.gelu(linear(norm(hidden_SBD, f"{at}.pre_mlp_layernorm"), f"{at}.mlp.linear_fc1"))
        hidden_SBD = hidden_SBD + linear(inner, f"{at}.mlp.linear_fc2")
    return norm(hidden_SBD, "final_layernorm")


def draw(sequence: int, batch: int) -> torch.Tensor:
    return torch.randn(sequence, batch, WIDTH, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


@pytest.mark.parametrize(("sequence", "batch", "mlp_ratio"), [(1, 1, 4.0), (7, 3, 4.0), (13, 2, 2.5)])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("build", [Build(dtype=torch.float64), Build(dtype=torch.float64, cp=2)], ids=["BSD", "SBD"])
def test_is_a_pre_norm_transformer(
    alone: Ranks, sequence: int, batch: int, mlp_ratio: float, causal: bool, build: Build
) -> None:
    block = block_of(causal=causal, mlp_ratio=mlp_ratio, build=build)
    weights = {name: each.detach().clone().requires_grad_() for name, each in block.named_parameters()}
    seen = torch.ones(sequence, sequence, dtype=torch.bool)
    hidden, plain_hidden = (draw(sequence, batch).requires_grad_() for _ in range(2))
    out = through(block, hidden, build)
    expected = plain_block(weights, plain_hidden, (seen.tril() if causal else seen).expand(batch, -1, -1))
    torch.testing.assert_close(out, expected, atol=1e-11, rtol=1e-9)
    gradient = torch.randn(out.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    out.backward(gradient)
    expected.backward(gradient)
    torch.testing.assert_close(hidden.grad, plain_hidden.grad, atol=1e-10, rtol=1e-8)
    for name, parameter in block.named_parameters():
        torch.testing.assert_close(parameter.grad, weights[name].grad, atol=1e-10, rtol=1e-8, msg=name)


LENGTHS = torch.tensor([4, 9, 1])


def seen_of(causal: bool) -> torch.Tensor:
    """Who looks at whom in captions of these lengths, [3, 9, 9]."""
    seen_BSS = (torch.arange(9) < LENGTHS[:, None])[:, None].expand(3, 9, 9)
    return seen_BSS.tril() if causal else seen_BSS


def test_the_mask_is_the_number_of_keys(alone: Ranks) -> None:
    build = Build(dtype=torch.float64, cp=2)
    block = block_of(causal=False, build=build)
    weights = {name: each.detach() for name, each in block.named_parameters()}
    hidden = draw(9, 3)
    expected = plain_block(weights, hidden, seen_of(False))
    torch.testing.assert_close(through(block, hidden, build, LENGTHS), expected, atol=1e-11, rtol=1e-9)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("pooled", [False, True])
def test_a_packed_block_gives_what_plain_rows_give_and_their_gradients(
    alone: Ranks, causal: bool, pooled: bool
) -> None:
    block = block_of(causal=causal, pooled=pooled)
    weights = {name: each.detach().clone().requires_grad_() for name, each in block.named_parameters()}
    packing = Packing.of(LENGTHS, 9)
    plain_hidden, packed_hidden = (draw(9, 3).requires_grad_() for _ in range(2))
    expected = plain_block(weights, plain_hidden, seen_of(causal)).transpose(0, 1)
    real = torch.arange(9) < LENGTHS[:, None]
    expected = expected[torch.arange(3), LENGTHS - 1] if pooled else expected[real]
    packed = packing.pack(packed_hidden.transpose(0, 1))
    found = through(block, packed.unsqueeze(1), Build(), packing.places)
    found = found[0] if pooled else found[:, 0]
    torch.testing.assert_close(found, expected, atol=1e-11, rtol=1e-9)
    gradient = torch.randn(found.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    found.backward(gradient)
    expected.backward(gradient)
    torch.testing.assert_close(packed_hidden.grad, plain_hidden.grad, atol=1e-11, rtol=1e-9)
    for name, parameter in block.named_parameters():
        torch.testing.assert_close(parameter.grad, weights[name].grad, atol=1e-10, rtol=1e-8, msg=name)


def test_nothing_is_random_while_training(alone: Ranks) -> None:
    """No dropout hides in Megatron-core's defaults: the order of samples is the only source of noise."""
    block = block_of(causal=True, dtype=torch.float32).train()
    hidden = draw(5, 2).float()
    assert torch.equal(block(hidden, attention_mask=None), block(hidden, attention_mask=None))


def test_cut_weights_are_marked_with_their_axis(alone: Ranks) -> None:
    block = block_of(causal=False)
    mark_tensor_parallel(block)
    axes = {name.removeprefix("layers.0."): sharded_axis(each) for name, each in block.named_parameters()}
    assert {name: axis for name, axis in axes.items() if axis is not None and not name.startswith("layers")} == {
        "self_attention.linear_qkv.weight": 0,
        "self_attention.linear_qkv.bias": 0,
        "self_attention.linear_proj.weight": 1,
        "mlp.linear_fc1.weight": 0,
        "mlp.linear_fc1.bias": 0,
        "mlp.linear_fc2.weight": 1,
    }


def test_the_norm_takes_its_precision_from_the_config(alone: Ranks) -> None:
    block = block_of(causal=False, dtype=torch.bfloat16)
    norms = [module for module in block.modules() if isinstance(module, Norm)]
    assert len(norms) == 2 * LAYERS + 1
    assert {norm.weight.dtype for norm in norms} == {torch.bfloat16}
    assert block(draw(5, 2).bfloat16(), attention_mask=None).dtype == torch.bfloat16
