"""The towers and the dual encoder: what changes an embedding, and what never does."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from data_pipeline.tokenizer import EOS
from pretrain.models.dual import DualEncoder
from pretrain.models.initialise import initialise
from pretrain.models.packing import Packing
from pretrain.models.pieces import Build, Piece, parameters_by_name
from pretrain.models.towers import cut_into_patches, normalise, sincos_2d
from pretrain.models.transformer import build_block, through
from pretrain.objectives import OBJECTIVES, Objective
from pretrain.parallel.groups import Ranks
from pretrain.sections import Model, Text

BOS = 0
SIZE, PATCH, CONTEXT = 15, 5, 9


def model_of(seed: int = 0, dtype: torch.dtype = torch.float32, **vision_or_causal: Any) -> DualEncoder:
    causal = vision_or_causal.pop("causal", True)
    config = Model.model_validate(
        {
            "vision": {"layers": 2, "width": 20, "heads": 2, "image_size": SIZE, "patch": PATCH, **vision_or_causal},
            "text": {"layers": 2, "width": 12, "heads": 3, "context": CONTEXT, "vocab_size": 300, "causal": causal},
            "embed_dim": 7,
        }
    )
    model = DualEncoder(config, Build(dtype=dtype))
    initialise(model, seed)
    return model.eval()


def images(count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(0, 256, (count, 3, SIZE, SIZE), dtype=torch.uint8, generator=generator)


def caption(*tokens: int, padding: int = 0) -> torch.Tensor:
    row = [BOS, *tokens, EOS]
    return torch.tensor(row + [padding] * (CONTEXT - len(row)))


CAPTIONS = torch.stack([caption(5, 6, 7), caption(), caption(9, 9, 9, 9, 9, 9, 9), caption(299)])
VISIONS: list[dict[str, Any]] = [
    {"pool": pool, "positions": positions} for pool in ("mean", "class") for positions in ("learned", "sincos2d")
]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("vision", VISIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embeddings_are_fp32_of_unit_length(
    alone: Ranks, vision: dict[str, Any], causal: bool, dtype: torch.dtype
) -> None:
    outputs = model_of(dtype=dtype, causal=causal, **vision)(images(4), CAPTIONS)
    assert {name: list(each.shape) for name, each in outputs.items()} == {
        "image": [4, 7],
        "text": [4, 7],
        "logit_scale": [],
        "logit_bias": [],
    }
    assert {each.dtype for each in outputs.values()} == {torch.float32}
    for name in ("image", "text"):
        torch.testing.assert_close(outputs[name].norm(dim=1), torch.ones(4))
        assert torch.pdist(outputs[name]).min() > 1e-3, "different inputs are told apart"


@pytest.mark.parametrize("vision", VISIONS, ids=str)
def test_a_sample_does_not_see_its_neighbours(alone: Ranks, vision: dict[str, Any]) -> None:
    for causal in (True, False):
        model = model_of(causal=causal, **vision)
        together = model(images(4), CAPTIONS)
        for row in range(4):
            by_itself = model(images(4)[row : row + 1], CAPTIONS[row : row + 1])
            torch.testing.assert_close(by_itself["image"][0], together["image"][row], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(by_itself["text"][0], together["text"][row], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("vision", VISIONS, ids=str)
@pytest.mark.parametrize("objective", ["contrastive", "sigmoid"])
def test_every_parameter_learns(alone: Ranks, vision: dict[str, Any], objective: str) -> None:
    for causal in (True, False):
        model = model_of(causal=causal, **vision)
        settings = Objective.model_validate({"name": objective})
        OBJECTIVES[objective](model(images(4), CAPTIONS), settings, alone.dp_group).backward()
        for name, parameter in parameters_by_name(model):
            if (name, objective) == ("logit_bias.value", "contrastive"):
                continue
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            # a key's bias shifts all scores of a query alike, so its gradient is 0 in truth; the rest is not
            assert parameter.grad.abs().max() > 0, name


# --- vision


@pytest.mark.parametrize("vision", VISIONS, ids=str)
def test_every_patch_counts_and_so_does_its_place(alone: Ranks, vision: dict[str, Any]) -> None:
    model = model_of(**vision)
    one = images(1)
    before = model.encode_image(one)
    for row in range(0, SIZE, PATCH):
        for column in range(0, SIZE, PATCH):
            changed = one.clone()
            changed[:, :, row : row + PATCH, column : column + PATCH] ^= 255
            assert (model.encode_image(changed) - before).norm() > 1e-3
    assert (model.encode_image(one.flip(3)) - before).norm() > 1e-3
    swapped = torch.cat([one[:, :, PATCH:], one[:, :, :PATCH]], 2)  # whole patches change their places
    assert (model.encode_image(swapped) - before).norm() > 1e-3


@pytest.mark.parametrize("pool", ["mean", "class"])
def test_without_positions_the_places_of_patches_are_nothing(alone: Ranks, pool: str) -> None:
    """So nothing but the positions tells a patch where it is, and no patch is left out of attention."""
    model = model_of(pool=pool, positions="learned")
    assert model.vision[0].patches.positions is not None
    with torch.no_grad():
        model.vision[0].patches.positions.zero_()
    one = images(1)
    swapped = torch.cat([one[:, :, PATCH:], one[:, :, :PATCH]], 2)
    torch.testing.assert_close(model.encode_image(swapped), model.encode_image(one), atol=1e-5, rtol=1e-5)


def test_the_two_poolings_read_other_places(alone: Ranks) -> None:
    """The class token is one more place in front, and there are no positions on it."""
    model = model_of(pool="class")
    assert model.vision[0].class_token is not None
    seen: list[torch.Tensor] = []
    model.vision[0].block.register_forward_hook(lambda _, inputs, output: seen.append(torch.stack([inputs[0], output])))
    (tower,) = model.vision
    pooled = tower(images(2))
    torch.testing.assert_close(seen[0][0][:, 0], model.vision[0].class_token.expand(2, -1))
    assert seen[0].shape[1:] == (2, 1 + 9, 20)
    torch.testing.assert_close(pooled, normalise(tower.projection(seen[0][1][:, 0])))
    model = model_of(pool="mean")
    model.vision[0].block.register_forward_hook(lambda _, inputs, output: seen.append(output))
    (tower,) = model.vision
    torch.testing.assert_close(tower(images(2)), normalise(tower.projection(seen[1].mean(1))))


def test_pixels_go_from_minus_one_to_one(alone: Ranks) -> None:
    model = model_of()
    seen: list[torch.Tensor] = []
    model.vision[0].patches.linear.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    picture = images(1)
    picture[0, :, 0, :3] = torch.tensor([0, 255, 51], dtype=torch.uint8)
    with_uint8 = model.encode_image(picture)
    assert seen[0].shape == (1, 9, 3 * PATCH**2)
    torch.testing.assert_close(seen[0][0, 0, :3], torch.tensor([-1.0, 1.0, -0.6]))
    torch.testing.assert_close(model.encode_image(picture.float()), with_uint8)


@pytest.mark.parametrize(("height", "width", "patch"), [(4, 4, 1), (6, 6, 3), (4, 8, 2), (5, 5, 5)])
def test_patches_are_cut_in_reading_order(height: int, width: int, patch: int) -> None:
    picture = torch.arange(2 * 3 * height * width).reshape(2, 3, height, width)
    patches = cut_into_patches(picture, patch)
    expected = [
        picture[:, :, row : row + patch, column : column + patch].flatten(1)
        for row in range(0, height, patch)
        for column in range(0, width, patch)
    ]
    assert torch.equal(patches, torch.stack(expected, 1))


@pytest.mark.parametrize(("rows", "columns", "width"), [(1, 1, 4), (3, 3, 8), (7, 7, 20), (2, 5, 8), (5, 2, 8)])
def test_sincos_positions_are_sines_and_cosines_of_row_and_column(rows: int, columns: int, width: int) -> None:
    found = sincos_2d(rows, columns, width).double()
    quarter = width // 4
    for row in range(rows):
        for column in range(columns):
            place = found[row * columns + column]
            for part, coordinate in ((0, row), (2, column)):
                for number in range(quarter):
                    angle = torch.tensor(coordinate / 10_000 ** (number / quarter), dtype=torch.float64)
                    assert place[part * quarter + number] == pytest.approx(float(angle.sin()), abs=1e-7)
                    assert place[(part + 1) * quarter + number] == pytest.approx(float(angle.cos()), abs=1e-7)
    if rows * columns > 1:
        assert torch.pdist(found).min() > 0.1, "no two places look alike"


def test_sincos_positions_are_no_parameters(alone: Ranks) -> None:
    fixed, learned = (dict(parameters_by_name(model_of(positions=kind))) for kind in ("sincos2d", "learned"))
    assert set(learned) - set(fixed) == {"vision.patches.positions"}
    assert not any("grid" in name for name in model_of().state_dict())


@pytest.mark.parametrize("vision", VISIONS, ids=str)
def test_pictures_of_another_shape(alone: Ranks, vision: dict[str, Any]) -> None:
    """The square's embedding is untouched, and a picture on its side is another one, whose patches know their place."""
    model = model_of(**vision)
    wide = images(4).repeat(1, 1, 1, 2)[:, :, : SIZE - PATCH]  # 2 x 6 patches
    embeddings = model.encode_image(wide)
    assert embeddings.shape == (4, 7)
    halves = wide.split(SIZE, dim=3)
    exchanged = model.encode_image(torch.cat([halves[0].flip(3), halves[1]], 3))
    assert (embeddings - exchanged).abs().max() > 1e-4
    (tower,) = model.vision
    square = tower.patches._positions(3, 3)
    assert torch.equal(square, tower.patches.grid if tower.patches.positions is None else tower.patches.positions)
    stretched = tower.patches._positions(3, 6).unflatten(0, (3, 6))
    if tower.patches.positions is None:
        assert torch.allclose(stretched[:, :3].flatten(0, 1), square, atol=1e-6)
    else:
        # the middle of the second of six columns is a quarter of the way from that of the first to that of the second
        first, second, _ = square.unflatten(0, (3, 3)).unbind(1)
        assert torch.allclose(stretched[:, 1], 0.75 * first + 0.25 * second, atol=1e-6)
        embeddings.sum().backward()
        assert tower.patches.positions.grad.abs().min() > 0


# --- text


@pytest.mark.parametrize("causal", [True, False])
def test_what_is_behind_the_end_mark_never_changes_the_embedding(alone: Ranks, causal: bool) -> None:
    model = model_of(causal=causal)
    expected = model.encode_text(caption(5, 6, 7)[None])
    behind = caption(5, 6, 7, padding=0)
    behind[5:] = torch.tensor([17, EOS, 255, 3])
    padded = torch.stack([caption(5, 6, 7, padding=pad) for pad in (0, 2, 299)] + [behind])
    for row in model.encode_text(padded):
        torch.testing.assert_close(row, expected[0], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(model.encode_text(caption(5, 6, 7)[None, :5]), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("causal", [True, False])
def test_every_token_before_the_end_mark_and_their_order_count(alone: Ranks, causal: bool) -> None:
    model = model_of(causal=causal)
    before = model.encode_text(caption(5, 6, 7)[None])
    for changed in (caption(8, 6, 7), caption(5, 8, 7), caption(5, 6, 8), caption(6, 5, 7), caption(5, 6, 7, 7)):
        assert (model.encode_text(changed[None]) - before).norm() > 1e-3


def test_causal_and_bidirectional_see_other_tokens(alone: Ranks) -> None:
    """The first place of a causal tower knows nothing of what follows it; the other one's does."""
    for causal in (True, False):
        model = model_of(causal=causal)
        hidden: list[torch.Tensor] = []
        first = model.text[0].block.layers[0]  # the last one gives the pooled row alone
        first.register_forward_hook(lambda _, inputs, output, kept=hidden: kept.append(output[0]))
        model.encode_text(caption(5, 6, 7)[None])
        model.encode_text(caption(5, 6, 8)[None])
        changed = (hidden[0] - hidden[1])[0].norm(dim=1) > 1e-4
        assert changed[:5].tolist() == ([False, False, False, True, True] if causal else [True] * 5)


@pytest.mark.parametrize("causal", [True, False])
def test_a_caption_is_pooled_at_its_end_mark(alone: Ranks, causal: bool) -> None:
    """As by a block that computes all rows of all its layers."""
    model = model_of(causal=causal)
    (tower,) = model.text
    text = Text(layers=2, width=12, heads=3, context=CONTEXT, vocab_size=300)
    by_rows = Build(cp=2)  # of a sequence that ranks cut, though here one has all of it
    whole = build_block(text, Piece(), by_rows, causal=causal)
    whole.load_state_dict(tower.block.state_dict())
    hidden: list[torch.Tensor] = []
    ends = torch.tensor([4, 1, 8, 2])
    packing = Packing.of(ends + 1, CONTEXT)

    def beside(_: torch.nn.Module, inputs: tuple[torch.Tensor]) -> None:
        rows_SBD = packing.unpack(inputs[0][0]).transpose(0, 1).contiguous()
        hidden.append(through(whole, rows_SBD, by_rows, ends + 1).transpose(0, 1))

    tower.block.register_forward_pre_hook(beside)
    pooled = model.encode_text(CAPTIONS)
    for row, end in enumerate(ends):
        expected = normalise(tower.projection(hidden[0][row, end][None]))
        torch.testing.assert_close(pooled[row], expected[0])
