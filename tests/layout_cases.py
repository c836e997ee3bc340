"""What the layouts of the matrix have in common: tiny models, made-up batches, and one run of a few steps on a rank."""

from __future__ import annotations

import io
import json
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from tars import tar_of

from data_pipeline import Batch, Tokenizer, open_dataset
from data_pipeline.tokenizer import BOS, EOS, PAD
from pretrain.checkpoint.state import make_moments, own_numbers, own_run
from pretrain.config import Recipe, load_recipe
from pretrain.evaluation.evaluate import evaluate
from pretrain.models.initialise import sharded_axis
from pretrain.models.pieces import Chunk
from pretrain.parallel.build import build_model
from pretrain.parallel.engine import Engine
from pretrain.parallel.groups import start_ranks, stop_ranks
from pretrain.parallel.layout import Layout, lay_out
from pretrain.sections import Eval

BATCH, STEPS, LR = 16, 4, 1e-3
TINY = [
    "data.train=unused",
    "model.text={layers: 4, width: 24, heads: 2, vocab_size: 300, context: 16, mlp_ratio: 4}",
    f"train={{global_batch: {BATCH}, steps: 100, lr: 1.0e-3, warmup: 1, eps: 1.0e-4, grad_clip: 0.5, watchdog: 0}}",
]
TOWERS = ["model.vision={layers: 4, width: 32, heads: 4, image_size: 32, patch: 8, mlp_ratio: 4}", "model.embed_dim=20"]
MODELS = {
    # with the usual scale of 14.3 plain torch in fp32 is itself 1.0e-6 from fp64: no room for another order of sums
    "contrastive": [*TOWERS, "objectives=[{name: contrastive, label_smoothing: 0.1}]", "model.logit_scale_init=4"],
    "sigmoid": [*TOWERS, "objectives=[{name: sigmoid}]", "model.text.causal=false"],
    "caption": ["objectives=[{name: caption}]", "model.kind=captioner", "model.vision={image_size: 32, patch: 8}"],
}


@dataclass
class Trained:
    """What a rank saw: losses and norms by step, and how its parts of gradients and parameters differ from the truth.

    gradient_error and parameter_error are root mean squares over all numbers of this rank, relative to those of the
    true gradient (of step 1, clipped) and absolute in the parameters after STEPS steps.
    """

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    gradient_error: float = 0.0
    parameter_error: float = 0.0
    applied: dict[str, Any] = field(default_factory=dict)
    scores: dict[str, Any] = field(default_factory=dict)  # of an evaluation behind the last step


def recipe_of(model: str, overrides: list[str]) -> Recipe:
    return load_recipe("quickstart", [*TINY, *MODELS[model], "layout.zero=1", *overrides])


def made_up_batch(step: int) -> Batch:
    """The global batch of a step: pictures of one colour a patch, captions of uneven lengths, short at odd steps.

    Noise within patches would average out: embeddings that are nearly equal make gradients that are mostly rounding.
    """
    generator, longest = torch.Generator().manual_seed(step), 8 if step % 2 else 16
    colours = torch.randint(0, 256, (BATCH, 3, 4, 4), generator=generator, dtype=torch.uint8)
    image = colours.repeat_interleave(8, 2).repeat_interleave(8, 3)
    text = torch.randint(4, 300, (BATCH, 16), generator=generator)
    ends = torch.randint(2, longest, (BATCH, 1), generator=generator)
    text[:, 0] = BOS
    text[torch.arange(16) == ends] = EOS
    text[torch.arange(16) > ends] = PAD
    places = torch.arange(BATCH)
    return Batch(image, text, places, places, [])


def make_test_set(folder: Path) -> None:
    """21 images of one colour a patch with up to three captions and a label each, stored class by class."""
    words = random.Random(3)
    files: list[tuple[str, bytes]] = []
    captions: list[str] = []
    for number in range(21):
        pixels = np.random.default_rng(number).integers(0, 256, (4, 4, 3), np.uint8).repeat(8, 0).repeat(8, 1)
        image = io.BytesIO()
        Image.fromarray(pixels).save(image, "PNG")
        own = [
            f"{words.choice('abcdef')} {words.randrange(10 ** words.randrange(1, 5))}" for _ in range(1 + number % 3)
        ]
        captions += own
        told = {"captions": own, "label": f"class {number // 6}"}
        files += [(f"{number:02d}.png", image.getvalue()), (f"{number:02d}.json", json.dumps(told).encode())]
    (folder / "test").mkdir()
    (folder / "test" / "0.tar").write_bytes(tar_of(files))
    open_dataset(folder / "test")  # indexed before several ranks want to
    Tokenizer.train(captions, 300).save(folder / "test.json")


def train_case(
    model: str,
    overrides: list[str],
    world: int,
    truth: Path,
    write: bool = False,
    label: str = "",
    evaluated: bool = False,
) -> Trained:
    """STEPS steps under a layout on this rank; gradients and parameters are written to `truth`/label, or compared.

    evaluated: then the model is scored on the test set in `truth`, in batches of an odd size.
    """
    recipe = recipe_of(model, overrides)
    layout = lay_out(recipe, world)
    ranks = start_ranks(layout, torch.device("cpu"))
    try:
        engine = Engine(build_model(recipe, layout, ranks), recipe, layout, ranks)
        seen: list[int] = []  # lengths of the sequence between layers
        for module in engine.model.modules():
            if isinstance(module, Chunk) and not getattr(module, "packed", False):  # whose tokens are no sequence
                axis = int(module.build.batch_first)
                module.block.layers[0].register_forward_hook(
                    lambda _, __, output, axis=axis: seen.append(output[0].shape[axis])
                )
        trained = Trained()
        kept = {} if write else torch.load(truth / f"{label or model}.pt")
        for step in range(STEPS):
            first = ranks.dp_rank * layout.share
            batch = made_up_batch(step).rows(slice(first, first + layout.share))
            # the truth reads the whole context, the layouts as far as the captions go
            stepped = engine.step(batch if write else batch.shortened(layout.text_step), LR)
            trained.losses.append(stepped.loss)
            trained.norms.append(stepped.grad_norm)
            if step == 0:
                make_moments(engine)
                # Adam's first moment begins at 0, so after one step it is the gradient times 1 - beta1
                scale = 1 / (1 - recipe.train.beta1)
                trained.gradient_error = _compare(engine, "exp_avg", scale, kept, write, relative=True)
        trained.parameter_error = _compare(engine, "weight", 1.0, kept, write, relative=False)
        if write:
            torch.save(kept, truth / f"{label or model}.pt")
        trained.applied = _applied(engine, layout, seen)
        if evaluated:
            test, tokenizer = open_dataset(truth / "test"), Tokenizer.load(truth / "test.json")
            # 3 rows do not divide by stages, and there is one batch too few or too many for most numbers of ranks
            trained.scores = evaluate(engine, test, tokenizer, recipe.model, Eval(batch=3, samples=19), ranks).scores
        engine.close()
        return trained
    finally:
        stop_ranks(ranks)


def _compare(
    engine: Engine, part: str, scale: float, truth: dict[tuple[str, str], torch.Tensor], write: bool, relative: bool
) -> float:
    """Root mean square of the difference of this rank's own numbers from the truth; 0 where it is only written."""
    difference = total = torch.zeros((), dtype=torch.float64)
    count = 0
    for name, parameter in engine.named_parameters():
        if part != "weight" and not parameter.requires_grad:
            continue  # frozen: it has no moments
        mine = own_numbers(engine, parameter, part).double() * scale
        if write:
            truth[part, name] = mine.view(parameter.shape).float()
            continue
        whole, axis, run = truth[part, name], sharded_axis(parameter), own_run(engine, parameter)
        piece = whole if axis is None else whole.chunk(engine.ranks.tp_size, axis)[engine.ranks.tp_rank]
        right = piece.flatten()[run.start : run.start + run.numel].double()
        difference = difference + (mine - right).square().sum()
        total = total + right.square().sum()
        count += run.numel
    if write:
        return 0.0
    both = torch.stack([difference, total, torch.tensor(float(count), dtype=torch.float64)])
    dist.all_reduce(both)  # copies are counted alike in all three
    return float((both[0] / (both[1] if relative else both[2])).sqrt())


def _applied(engine: Engine, layout: Layout, lengths: list[int]) -> dict[str, Any]:
    """What shows that the layout is more than a name."""
    ranks = engine.ranks
    chunks = [module for module in engine.model.modules() if isinstance(module, Chunk)]
    layers = chunks[0].block.layers
    qkv = layers[0].self_attention.linear_qkv.weight
    trained = [each for _, each in engine.named_parameters() if each.requires_grad]
    kept = sum(own_numbers(engine, each, "exp_avg").numel() for each in trained)
    return {
        "groups": {
            name: dist.get_world_size(getattr(ranks, f"{name}_group")) for name in ("tp", "pp", "dp", "zero", "model")
        },
        "offloaded": any(getattr(engine.optimizer, name, False) for name in ("cpu_offload", "offload_optimizer")),
        "chunks": len(chunks),
        "layers": len(layers),
        "qkv rows": getattr(qkv, "ds_shape", qkv.shape)[0],
        "lengths": sorted(set(lengths)),
        "share": layout.share,
        "moments": kept,
        "resident": sum(getattr(each, "ds_tensor", each).numel() for each in engine.model.parameters()),
    }
