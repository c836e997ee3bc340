"""`weft data score`: a table of what a checkpoint thinks of each sample, for the filter steps that read one.

A row of the table, a line of JSON, has the sample's "key" and

  similarity   cosine of the picture's and the (first) caption's embedding: the CLIP score of Hessel et al. 2021
  label        the nearest of the classes to the picture, zero-shot
  confidence   its probability, by softmax over the classes of logit scale * cosine
  uncertainty  the entropy of these probabilities over that of a uniform guess, 0 to 1

Samples that cannot be used are left out of the table; a filter step calls them "not in the table of scores".
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from data_pipeline import (
    BatchMaker,
    Dataset,
    ImageTransform,
    TextTransform,
    Tokenizer,
    open_dataset,
    sequential_batches,
)
from data_pipeline.importers.annotations import read_lines
from data_pipeline.index import written_whole
from data_pipeline.keys import refuse_equal_keys
from data_pipeline.sample import trimmed
from pretrain import load_model
from pretrain.config import Recipe
from pretrain.errors import RequestError, WeftError
from pretrain.evaluation.test_set import labels_of
from pretrain.models.dual import DualEncoder
from pretrain.parallel.groups import pick_device

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Scored:
    """What was written: rows of the table, samples left out of it by reason, and the classes."""

    rows: int
    left_out: dict[str, int]
    classes: tuple[str, ...]


def score_samples(
    checkpoint: Path,
    path: Path,
    out: Path,
    *,
    classes: Path | None = None,
    captions: bool = True,
    batch: int | None = None,
    workers: int = 0,
    progress: Progress | None = None,
) -> Scored:
    """Score the data set `path` into the new file `out`; the file appears whole or not at all.

    classes: a text file, or a data set; default: the labels in `path`, and no class columns where there are none.
    Raises RequestError for a file that is there, a checkpoint of a captioner, or when there is nothing to score by;
    ValueError when two samples have one key, by which a filter step looks for a row;
    WeftError when the model's embeddings are not finite.
    """
    if out.exists():
        raise RequestError(f"{out} is there already: give a new file, or remove it")
    dataset = open_dataset(path)
    refuse_equal_keys(dataset, np.arange(len(dataset)))
    names = _class_names(classes, dataset)
    if not names and not captions:
        raise RequestError(f"--no-captions leaves classes to score by, and no sample of {path} has a label: --classes")
    if captions and dataset.index.left_out.without_caption == len(dataset):
        classes_too = "" if names else ", with --classes FILE"
        raise RequestError(f"no sample of {path} has a caption: --no-captions{classes_too} scores the images alone")
    device = str(pick_device("auto"))
    model, tokenizer, recipe = load_model(checkpoint, device)
    if not isinstance(model, DualEncoder):
        raise RequestError(f"{checkpoint} is a {recipe.model.kind}: scores are of a model with two towers")
    left_out: Counter[str] = Counter()
    scorer = _Scorer(str(checkpoint), model, tokenizer, recipe, device, batch or recipe.eval.batch, names, captions)
    rows = 0
    out.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(out) as unfinished, unfinished.open("w", encoding="utf-8") as file:
        for row in scorer.rows(dataset, workers, left_out, progress):
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            rows += 1
    return Scored(rows, dict(left_out.most_common()), names)


def _class_names(classes: Path | None, dataset: Dataset) -> tuple[str, ...]:
    """The names of the classes, sorted, each once; RequestError when the user's are none, DataError for no UTF-8."""
    if classes is not None and classes.is_file():
        found = set(map(trimmed, read_lines(classes))) - {""}
    else:
        labelled = dataset if classes is None else open_dataset(classes)
        found = labels_of(labelled, range(len(labelled)))  # what cannot be read is told where its scores are missing
    if len(found) < 2 and classes is not None:
        raise RequestError(f"--classes {classes} names {len(found)} of them, and there must be two or more")
    return tuple(sorted(found)) if len(found) > 1 else ()


class _Scorer:
    """A model with the classes' embeddings."""

    def __init__(
        self,
        name: str,
        model: DualEncoder,
        tokenizer: Tokenizer,
        recipe: Recipe,
        device: str,
        batch: int,
        names: tuple[str, ...],
        captions: bool,
    ) -> None:
        self._name, self._model = name, model.eval()
        self._tokenizer, self._recipe = tokenizer, recipe
        self._device, self._batch = device, batch
        self._names, self._captions = names, captions
        self._class_CE = self._embed_classes() if names else None

    def rows(
        self, dataset: Dataset, workers: int, left_out: Counter[str], progress: Progress | None
    ) -> Iterator[dict[str, Any]]:
        """A row for each sample that can be used, in order; why others cannot is counted in `left_out`."""
        config = self._recipe.model
        text = TextTransform(self._tokenizer, config.text.context) if self._captions else None
        maker = BatchMaker(dataset, ImageTransform(config.vision.image_size), text, seed=0, training=False)
        done = 0
        for batch in sequential_batches(maker, len(dataset), self._batch, workers=workers):
            first = {corrupt.sample: corrupt.reason for corrupt in reversed(batch.corrupt)}
            columns = self._columns(batch.image, batch.text)
            used = (batch.sample == batch.position).tolist()
            for row, (sample, is_used) in enumerate(zip(batch.position.tolist(), used, strict=True)):
                if is_used:
                    if not all(isinstance(value[row], str) or math.isfinite(value[row]) for value in columns.values()):
                        raise WeftError(f"{self._name}: its embeddings are not finite (of {dataset.key(sample)!r})")
                    yield {"key": dataset.key(sample), **{name: values[row] for name, values in columns.items()}}
                else:
                    left_out[first[sample]] += 1
            done += len(batch)
            if progress:
                progress(done, len(dataset))

    def _columns(self, image: torch.Tensor, text: torch.Tensor) -> dict[str, list[Any]]:
        """Column -> a value a row, of images uint8 [B, 3, size, size] and token ids [B, S]."""
        with torch.no_grad():
            image_BE = self._model.encode_image(image.to(self._device))
            columns: dict[str, list[Any]] = {}
            if self._captions:
                text_BE = self._model.encode_text(text.to(self._device))
                columns["similarity"] = _rounded((image_BE * text_BE).sum(1))
            if self._class_CE is not None:
                logits_BC = self._model.logit_scale() * image_BE @ self._class_CE.T
                log_BC = logits_BC.double().log_softmax(1)
                best = log_BC.max(1)
                columns["label"] = [self._names[number] for number in best.indices.tolist()]
                columns["confidence"] = _rounded(best.values.exp())
                entropy_B = -(log_BC.exp() * log_BC).sum(1)
                columns["uncertainty"] = _rounded(entropy_B / math.log(len(self._names)))
        return columns

    def _embed_classes(self) -> torch.Tensor:
        """The mean embedding of each class's prompts, fp32 [C, E], unit length; as zero-shot classification has it."""
        templates = self._recipe.eval.templates
        prompts = [template.replace("{}", name) for name in self._names for template in templates]
        tokens = torch.from_numpy(self._tokenizer.encode_batch(prompts, self._recipe.model.text.context)).long()
        with torch.no_grad():
            parts = [self._model.encode_text(part.to(self._device)) for part in tokens.split(self._batch)]
        return F.normalize(torch.cat(parts).reshape(len(self._names), len(templates), -1).mean(1), dim=1)


def _rounded(values: torch.Tensor) -> list[float]:
    """Numbers with the six places that mean something."""
    return [round(value, 6) for value in values.tolist()]
