"""Operations of a model: counted by hand, and against what the model really multiplies."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pretrain.flops import forward_flops_per_sample, peak_tflops, training_flops_per_sample
from pretrain.models.dual import DualEncoder
from pretrain.models.initialise import initialise
from pretrain.parallel.groups import start_alone, stop_ranks
from pretrain.sections import Model


@pytest.fixture(scope="module")
def alone() -> Iterator[None]:
    ranks = start_alone(torch.device("cpu"))
    yield
    stop_ranks(ranks)


def test_by_hand() -> None:
    model = Model.model_validate(
        {
            "vision": {
                "layers": 2,
                "width": 8,
                "heads": 2,
                "mlp_ratio": 3,
                "image_size": 6,
                "patch": 2,
                "pool": "class",
            },
            "text": {"layers": 3, "width": 4, "heads": 1, "mlp_ratio": 2, "context": 5},
            "embed_dim": 7,
        }
    )
    patches, tokens = 9, 10  # a class token more
    qkv_and_out, feed_forward = tokens * 4 * 8 * 8, tokens * 2 * 8 * 24
    scores_and_values = 2 * tokens * tokens * 8
    image = 2 * (qkv_and_out + feed_forward + scores_and_values) + patches * 12 * 8 + 8 * 7
    whole_layer = 5 * 4 * 4 * 4 + 5 * 2 * 4 * 8 + 2 * 5 * 5 * 4
    pooled_layer = 5 * 3 * 4 * 4 + 4 * 4 + 2 * 4 * 8 + 2 * 5 * 4  # q, k, v of all rows; the rest of one
    caption = 2 * whole_layer + pooled_layer + 4 * 7
    assert forward_flops_per_sample(model) == 2 * (image + caption)
    assert training_flops_per_sample(model) == 6 * (image + caption)


@pytest.mark.parametrize("pool", ["mean", "class"])
@pytest.mark.parametrize("causal", [False, True])
def test_is_what_torch_counts_in_the_model(alone: None, pool: str, causal: bool) -> None:
    config = Model.model_validate(
        {
            "vision": {"layers": 2, "width": 24, "heads": 3, "image_size": 20, "patch": 5, "pool": pool},
            "text": {"layers": 1, "width": 20, "heads": 2, "context": 11, "mlp_ratio": 2, "causal": causal},
            "embed_dim": 13,
        }
    )
    model = DualEncoder(config)
    initialise(model, 0)
    image = torch.zeros(3, 3, 20, 20, dtype=torch.uint8)
    text = torch.tensor([[0, 5, 6, 7, 8, 9, 9, 9, 9, 9, 1]] * 3)
    # torch counts no operation of its blocked attention on CPU, but it does count plain matrix products
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        outputs = model(image, text)
    assert counter.get_total_flops() == 3 * forward_flops_per_sample(config)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as shorter:
        model(image, text[:, 4:])
    assert shorter.get_total_flops() == 3 * forward_flops_per_sample(config, 7)
    # backward is twice forward, but for the patches, whose pixels need no gradient
    pixels = 2 * 3 * 16 * 75 * 24
    with FlopCounterMode(display=False) as backward:
        (outputs["image"].sum() + outputs["text"].sum()).backward()
    twice = 3 * (training_flops_per_sample(config) - forward_flops_per_sample(config))
    assert backward.get_total_flops() == twice - pixels


def test_tensor_parallelism_and_the_batch_do_not_enter() -> None:
    """It is a property of the model: nothing else is an argument."""
    small, wide = Model(), Model(embed_dim=256)
    towers = small.vision.width + small.text.width
    assert forward_flops_per_sample(wide) - forward_flops_per_sample(small) == 2 * 128 * towers


def test_the_peak_of_a_card_is_known_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert peak_tflops(torch.device("cpu")) is None
    for name, peak in (("NVIDIA H200", 989.0), ("NVIDIA A100-SXM4-80GB", 312.0), ("Some Other Card", None)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _, name=name: name)
        assert peak_tflops(torch.device("cuda", 0)) == peak
