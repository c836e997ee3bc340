"""Score a model on a test set with all ranks: retrieval and zero-shot classification, or captioning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from data_pipeline import Corrupt, Dataset, ImageTransform, TextTransform, Tokenizer
from pretrain.errors import RequestError, WeftError
from pretrain.evaluation.captioning import Reader, captioning_scores
from pretrain.evaluation.examples import examples
from pretrain.evaluation.retrieval import retrieval_scores
from pretrain.evaluation.rounds import Encoder, embed_images, embed_texts
from pretrain.evaluation.test_set import Classes, Item, classes_of, spread
from pretrain.evaluation.zero_shot import confusable, zero_shot_scores
from pretrain.parallel.groups import Ranks
from pretrain.sections import Eval, Model

TASKS = {"dual": ("retrieval", "zero_shot"), "captioner": ("captioning",)}
NAMED = 3  # unusable samples named in a line; all of them are in the JSON


@dataclass
class Evaluation:
    """The scores of each task, what they were taken from, and what has to be said of them.

    problem: why the scores mean nothing because of the model ("its embeddings are not finite"); "" when they do.
    """

    scores: dict[str, Any]
    test_set: dict[str, Any]  # samples, chosen, images, captions, cut_captions, unusable
    notes: list[str] = field(default_factory=list)
    problem: str = ""
    examples: list[dict[str, Any]] = field(default_factory=list)

    def as_tree(self) -> dict[str, Any]:
        """For JSON, without the examples."""
        told = {"test_set": self.test_set, "notes": self.notes, "problem": self.problem or None}
        return {**self.scores, **told}


@torch.no_grad()
def evaluate(
    model: Encoder | Reader,
    dataset: Dataset,
    tokenizer: Tokenizer,
    model_config: Model,
    settings: Eval,
    ranks: Ranks,
    *,
    memory: Path | None = None,
    tasks: Sequence[str] | None = None,
) -> Evaluation:
    """Score at most `settings.samples` samples, spread over the set; the same on every rank, under any layout.

    memory: a folder in which the classes of a large set are kept; tasks: some of TASKS of this kind of model.
    Raises WeftError when too few samples can be used, RequestError when a task that is asked for cannot be scored.
    """
    image = ImageTransform(model_config.vision.image_size)
    text = TextTransform(tokenizer, model_config.text.context)
    samples = spread(len(dataset), settings.samples)
    if model_config.kind == "captioner":
        scores, items, unusable = captioning_scores(
            cast(Reader, model), dataset, samples, image, text, settings.batch, ranks
        )
        found = Evaluation({"captioning": scores}, {})
        if not torch.tensor(scores["loss"]).isfinite():
            found.problem = "its loss is not finite"
    else:
        encoder = cast(Encoder, model)
        image_NE, items, unusable = embed_images(encoder, dataset, samples, image, settings.batch, ranks)
        embed = _Embed(encoder, tokenizer, text.context, settings.batch, ranks)
        found = Evaluation({}, {})
        if tasks is None or "zero_shot" in tasks:
            classes = classes_of(dataset, items, len(samples), memory, ranks)
            _zero_shot(found, image_NE, items, settings, classes, embed)
        if tasks is None or "retrieval" in tasks:
            _retrieval(found, image_NE, items, dataset, embed, ranks)
        if not found.scores and (tasks is None or len(items) < 2):
            told = unusable[-1] if unusable else None
            why = f" ({told.key!r} in {told.shard} is left out: {told.reason})" if told else ""
            count = f"{len(items)} usable sample{'s' * (len(items) != 1)}"
            raise WeftError(f"{dataset.folder} has {count}, and retrieval needs 2 or more{why}")
        bad = int((~image_NE.isfinite().all(1)).sum())
        if bad or embed.bad:
            texts = f"{embed.bad} of {embed.count} texts"
            found.problem = f"its embeddings are not finite: those of {bad} of {len(items)} images and {texts}"
    if tasks is not None and (missing := [task for task in tasks if task not in found.scores]):
        raise RequestError(_why_not(missing[0], dataset))
    _describe(found, dataset, samples, items, unusable, tokenizer, text.context)
    return found


def summary(found: Evaluation) -> str:
    """The scores of an evaluation in one line, and what they were taken from."""
    parts = []
    if retrieval := found.scores.get("retrieval"):
        for way in ("image_to_text", "text_to_image"):
            recall = retrieval[way]
            name = way.replace("_", " ")
            parts.append(f"{name} R@1 {recall['r1']:.1%} R@5 {recall['r5']:.1%} R@10 {recall['r10']:.1%}")
    if captioning := found.scores.get("captioning"):
        parts.append(f"caption loss {captioning['loss']:.4f} per token, perplexity {captioning['perplexity']:.1f}")
    if zero_shot := found.scores.get("zero_shot"):
        classes = f"{zero_shot['classes']} {'class' if zero_shot['classes'] == 1 else 'classes'}"
        parts.append(f"zero-shot top-1 {zero_shot['top1']:.1%} of {classes} ({zero_shot['images']} labelled images)")
    return ", ".join([*parts, _counted(found)])


class _Embed:
    """Texts to embeddings, counting those that are not finite."""

    def __init__(self, model: Encoder, tokenizer: Tokenizer, context: int, batch: int, ranks: Ranks) -> None:
        self._arguments = (model, tokenizer), (context, batch, ranks)
        self.count = self.bad = 0

    def __call__(self, texts: list[str]) -> torch.Tensor:
        """[len(texts), E]; every rank gives the same texts."""
        (model, tokenizer), (context, batch, ranks) = self._arguments
        text_NE = embed_texts(model, tokenizer, texts, context, batch, ranks)
        self.count += len(texts)
        self.bad += int((~text_NE.isfinite().all(1)).sum())
        return text_NE

    def tokens(self, text: str) -> bytes:
        """What the model sees of a text."""
        (_, tokenizer), (context, *_) = self._arguments
        return tokenizer.encode(text, context).tobytes()


def _retrieval(
    found: Evaluation, image_NE: torch.Tensor, items: list[Item], dataset: Dataset, embed: _Embed, ranks: Ranks
) -> None:
    """Over the items with captions, if there are two."""
    rows = [row for row, item in enumerate(items) if item.captions]
    if len(rows) < 2:
        return
    image_NE, items = image_NE[rows], [items[row] for row in rows]
    captions = [caption for item in items for caption in item.captions]
    owners = [row for row, item in enumerate(items) for _ in item.captions]
    distinct = {caption: number for number, caption in enumerate(dict.fromkeys(captions))}
    text_DE = embed(list(distinct))
    text_ME = text_DE[[distinct[caption] for caption in captions]]
    scores: dict[str, Any] = retrieval_scores(image_NE, text_ME, captions, owners)
    found.scores = {"retrieval": scores, **found.scores}
    if max(way["r1"] for way in scores["chance"].values()) >= 1:
        found.notes.append("every image has the same captions, so retrieval scores mean nothing")
    if ranks.is_first:
        firsts = text_DE[[distinct[item.captions[0]] for item in items]]
        found.examples = examples(dataset, items, image_NE, firsts)


def _zero_shot(
    found: Evaluation, image_NE: torch.Tensor, items: list[Item], settings: Eval, classes: Classes, embed: _Embed
) -> None:
    """Over the items with a label, if there are any."""
    rows = [row for row, item in enumerate(items) if item.label is not None]
    if not rows:
        return
    labels = [str(items[row].label) for row in rows]
    scores = zero_shot_scores(image_NE[rows], labels, settings.templates, embed, classes.names)
    found.scores["zero_shot"] = scores
    if scores["classes"] == 1:
        found.notes.append(f"all labels are {labels[0]!r}: zero-shot accuracy over one class means nothing")
    found.notes += confusable(sorted({*labels, *classes.names}), settings.templates, embed.tokens)
    if classes.partial:
        found.notes.append("zero-shot classes are those of a part of the set, which is too large to read every label")


def _describe(
    found: Evaluation,
    dataset: Dataset,
    samples: np.ndarray,
    items: list[Item],
    unusable: list[Corrupt],
    tokenizer: Tokenizer,
    context: int,
) -> None:
    """What the scores were taken from, and the notes about it."""
    captions = [caption for item in items for caption in item.captions]
    cut = 0 if set(found.scores) == {"zero_shot"} else sum(tokenizer.length(caption) > context for caption in captions)
    found.test_set = {
        "samples": len(dataset),
        "chosen": len(samples),
        "images": len(items),
        "captions": len(captions),
        "cut_captions": cut,
        "unusable": [{"key": each.key, "shard": each.shard, "reason": each.reason} for each in unusable],
    }
    if len(samples) < len(dataset):
        found.notes.append(
            f"scored on {len(samples)} of {len(dataset)} samples, spread over the set (eval.samples); scores that "
            "others publish are of a whole set"
        )
    if cut:
        found.notes.append(
            f"{cut} of {len(captions)} captions are longer than the context of {context} tokens and were cut"
        )
    if unusable:
        named = "; ".join(f"{each.key!r} in {each.shard}: {each.reason}" for each in unusable[:NAMED])
        more = f"; and {len(unusable) - NAMED} more" if len(unusable) > NAMED else ""
        count = (
            f"{len(unusable)} of {len(samples)} samples could not be used and {'is' if len(unusable) == 1 else 'are'}"
        )
        found.notes.append(f"{count} left out of the scores: {named}{more}")


def _counted(found: Evaluation) -> str:
    """ "10 of 120 images, 50 captions (48 distinct)"."""
    images, total = found.test_set["images"], found.test_set["samples"]
    text = f"{images} {'image' if images == 1 else 'images'}" if images == total else f"{images} of {total} images"
    retrieval = found.scores.get("retrieval")
    captions = retrieval["captions"] if retrieval else found.test_set["captions"]
    if set(found.scores) != {"zero_shot"}:
        text += f", {captions} {'caption' if captions == 1 else 'captions'}"
    if retrieval and retrieval["distinct_captions"] != captions:
        text += f" ({retrieval['distinct_captions']} distinct)"
    return text


def _why_not(task: str, dataset: Dataset) -> str:
    if task == "zero_shot":
        return f"--task zero_shot: no usable sample of {dataset.folder} has a label in its json"
    return f"--task {task}: {dataset.folder} has fewer than 2 images with captions"
