"""Embed a test set with all ranks and score it; also the examples that a report shows.

Each data parallel rank embeds every dp_size-th batch, then all hold all embeddings and compute the same scores. The
ranks run the model equally often, on a blank batch where one has none left: under ZeRO-3 a forward pass is a
collective.
"""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from typing import Any, Protocol, cast

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image

from data_pipeline import (
    BatchMaker,
    Dataset,
    ImageTransform,
    TextTransform,
    Tokenizer,
    decode_image,
    sequential_batches,
)
from data_pipeline.tokenizer import BOS, EOS, PAD
from pretrain.errors import WeftError
from pretrain.evaluation.captioning import Reader, captioning_scores
from pretrain.evaluation.retrieval import nearest, retrieval_scores
from pretrain.evaluation.zero_shot import zero_shot_scores
from pretrain.parallel.groups import Ranks
from pretrain.sections import Eval, Model

EXAMPLES, SHOWN, THUMBNAIL = 8, 5, 96


@dataclass(frozen=True)
class Evaluation:
    """Scores as a tree of numbers, and a few captions with the pictures they found."""

    scores: dict[str, Any]
    examples: list[dict[str, Any]]


class Encoder(Protocol):
    """A dual encoder, or an engine around one."""

    def encode_image(self, image: torch.Tensor) -> torch.Tensor:
        """uint8 [B, 3, size, size] -> fp32 [B, E], unit length."""
        ...

    def encode_text(self, text: torch.Tensor) -> torch.Tensor:
        """Token ids [B, S] -> fp32 [B, E], unit length."""
        ...


def evaluate(
    model: Encoder | Reader,
    dataset: Dataset,
    tokenizer: Tokenizer,
    model_config: Model,
    settings: Eval,
    ranks: Ranks,
) -> Evaluation:
    """What is scored of such a model: retrieval and zero-shot classification, or captioning; the same on every rank.

    Raises WeftError when too few samples can be used.
    """
    if model_config.kind == "captioner":
        scores = captioning_scores(cast(Reader, model), dataset, tokenizer, model_config, settings, ranks)
        return Evaluation(scores, [])
    return evaluate_embeddings(cast(Encoder, model), dataset, tokenizer, model_config, settings, ranks)


@torch.no_grad()
def evaluate_embeddings(
    model: Encoder, dataset: Dataset, tokenizer: Tokenizer, model_config: Model, settings: Eval, ranks: Ranks
) -> Evaluation:
    """Retrieval over the first `settings.samples` samples, zero-shot classification over those with a label.

    Raises WeftError when fewer than two samples can be used.
    """
    text = TextTransform(tokenizer, model_config.text.context)
    maker = BatchMaker(dataset, ImageTransform(model_config.vision.image_size), text, seed=0, training=False)
    image_NE, text_NE, sample_N = _embed_all(model, maker, min(settings.samples, len(dataset)), settings.batch, ranks)
    if len(sample_N) < 2:
        raise WeftError(f"{dataset.folder} has {len(sample_N)} usable samples, and retrieval needs 2 or more")
    read = [dataset.read(sample) for sample in sample_N.tolist()]
    captions = [each.captions()[0] for each in read]
    scores: dict[str, Any] = {"retrieval": retrieval_scores(image_NE, text_NE, captions)}
    labels = [each.label() for each in read]
    labelled = [row for row, label in enumerate(labels) if label is not None]
    if labelled:

        def embed(prompts: list[str]) -> torch.Tensor:
            tokens = torch.from_numpy(tokenizer.encode_batch(prompts, text.context)).long().to(ranks.device)
            return torch.cat([model.encode_text(part) for part in tokens.split(settings.batch)]).cpu()

        names = [str(labels[row]) for row in labelled]
        scores["zero_shot"] = zero_shot_scores(image_NE[labelled], names, settings.templates, embed)
    return Evaluation(scores, _examples(dataset, image_NE, text_NE, sample_N, captions))


def summary(scores: dict[str, Any]) -> str:
    """The scores of an evaluation in one line."""
    parts = []
    if retrieval := scores.get("retrieval"):
        for way in ("image_to_text", "text_to_image"):
            recall = retrieval[way]
            name = way.replace("_", " ")
            parts.append(f"{name} R@1 {recall['r1']:.1%} R@5 {recall['r5']:.1%} R@10 {recall['r10']:.1%}")
        parts.append(f"among {retrieval['captions']} captions")
    if captioning := scores.get("captioning"):
        parts.append(f"caption loss {captioning['loss']:.4f} a token, perplexity {captioning['perplexity']:.1f}")
    if zero_shot := scores.get("zero_shot"):
        parts.append(f"zero-shot top-1 {zero_shot['top1']:.1%} of {zero_shot['classes']} classes")
    return ", ".join(parts)


def _embed_all(
    model: Encoder, maker: BatchMaker, samples: int, batch_size: int, ranks: Ranks
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(image [N, E], text [N, E], sample id [N]) on CPU, by sample id, unusable samples left out."""
    batches = sequential_batches(maker, samples, batch_size, rank=ranks.dp_rank, world=ranks.dp_size)
    rounds = -(-samples // (batch_size * ranks.dp_size))
    images, texts, ids = [], [], []
    for _ in range(rounds):
        batch = next(batches, None)
        if batch is None:
            size, context = maker.image.size, maker.text.context  # type: ignore[union-attr]  # evaluate gives both
            blank = torch.tensor([BOS, EOS] + [PAD] * (context - 2), device=ranks.device)
            image, text = torch.zeros(1, 3, size, size, dtype=torch.uint8, device=ranks.device), blank[None]
            sample = torch.tensor([-1])
        else:
            image, text = batch.image.to(ranks.device), batch.text.to(ranks.device)
            # where a replacement stands in for an unusable sample, there is nothing to score
            sample = torch.where(batch.sample == batch.position, batch.sample, -1)
        images.append(_padded(model.encode_image(image), batch_size, 0.0))
        texts.append(_padded(model.encode_text(text), batch_size, 0.0))
        ids.append(_padded(sample[:, None].to(ranks.device), batch_size, -1.0))
    image_NE, text_NE, sample_N1 = (_gathered(torch.cat(each), ranks).cpu() for each in (images, texts, ids))
    order = sample_N1[:, 0].argsort()
    usable = order[sample_N1[order, 0] >= 0]
    return image_NE[usable], text_NE[usable], sample_N1[usable, 0]


def _padded(rows: torch.Tensor, count: int, value: float) -> torch.Tensor:
    return F.pad(rows, (0, 0, 0, count - len(rows)), value=value)


def _gathered(rows: torch.Tensor, ranks: Ranks) -> torch.Tensor:
    parts = [torch.empty_like(rows) for _ in range(ranks.dp_size)]
    dist.all_gather(parts, rows.contiguous(), group=ranks.dp_group)
    return torch.cat(parts)


def _examples(
    dataset: Dataset, image_NE: torch.Tensor, text_NE: torch.Tensor, sample_N: torch.Tensor, captions: list[str]
) -> list[dict[str, Any]]:
    """Some captions spread over the test set, each with the pictures nearest to it, nearest first."""
    rows = np.unique(np.linspace(0, len(captions) - 1, EXAMPLES).astype(int)).tolist()
    similarity, found = nearest(text_NE[rows], image_NE, SHOWN)
    return [
        {
            "caption": captions[row],
            "pictures": [
                {
                    "caption": captions[picture],
                    "right": captions[picture] == captions[row],
                    "similarity": round(value, 4),
                    "jpeg": _thumbnail(dataset, int(sample_N[picture])),
                }
                for value, picture in zip(values, pictures, strict=True)
            ],
        }
        for row, values, pictures in zip(rows, similarity.tolist(), found.tolist(), strict=True)
    ]


def _thumbnail(dataset: Dataset, sample: int) -> str:
    """A small JPEG in base64."""
    read = dataset.read(sample)
    assert read.image_field is not None, "it has been embedded, so it has an image"
    image = Image.fromarray(decode_image(read.fields[read.image_field]))
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90)
    return base64.b64encode(buffer.getvalue()).decode()
