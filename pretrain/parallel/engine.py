"""One training step under any layout: forward, the loss over the global batch, backward, reduction, update.

The trainer sees `Engine.step(batch, lr)`. How the microbatches of a step meet in a loss is told in `embedding_cache`
(losses that tie samples together) and `token_losses` (losses that add up), how gradients meet in `updater`, how stages
hand over in `pipeline`. The learning rate is set from outside at each step: a schedule is a function of the step, and
has no state.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from data_pipeline import Batch
from pretrain.config import Recipe
from pretrain.models.captioner import Captioner
from pretrain.models.dual import DualEncoder
from pretrain.models.pieces import parameters_by_name
from pretrain.parallel.embedding_cache import JointLoss, Outcome, step_at_once, step_in_stages, step_with_cache
from pretrain.parallel.groups import Ranks
from pretrain.parallel.layout import Layout
from pretrain.parallel.pipeline import Inputs, Pipeline
from pretrain.parallel.replicas import Replicas
from pretrain.parallel.token_losses import TokenLoss, step_tokens, step_tokens_in_stages
from pretrain.parallel.updater import Updater
from pretrain.parallel.zero import Zero


@dataclass(frozen=True)
class Stepped:
    """What one step gave: losses by objective name and their weighted sum, the global gradient norm before clipping."""

    loss: float
    losses: dict[str, float]
    grad_norm: float
    logit_scale: float | None  # of a dual encoder

    @property
    def updated(self) -> bool:
        """Whether the parameters moved: a step whose gradients are not finite changes nothing."""
        return math.isfinite(self.grad_norm)


class Engine:
    """A model with its optimizer under a layout. Every rank calls every method, in the same order."""

    def __init__(self, model: DualEncoder | Captioner, recipe: Recipe, layout: Layout, ranks: Ranks) -> None:
        self.ranks, self.layout = ranks, layout
        self.updater: Updater = (Zero if layout.zero else Replicas)(model, recipe, layout, ranks)
        self.optimizer = self.updater.optimizer
        self._pipeline = Pipeline(layout)
        self._lengths, self._embed_dim = recipe.model.sequence_lengths, recipe.model.embed_dim
        self._context = recipe.model.text.context
        self._joint = JointLoss(recipe.objectives, ranks, recipe.kernels.loss)
        self._tokens = TokenLoss(recipe.objectives, ranks, recipe.kernels.loss)

    @property
    def model(self) -> DualEncoder | Captioner:
        """This rank's chunks; under ZeRO-3 their parameters are pieces, gathered while a module runs."""
        model = self.updater.model
        assert isinstance(model, DualEncoder | Captioner)
        return model

    def close(self) -> None:
        """Nothing can be trained any more, and memory is given back."""
        self.updater.close()

    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """This rank's parameters by their names in the whole model; frozen ones need no gradient."""
        return parameters_by_name(self.model)

    def step(self, batch: Batch, lr: float, loss_limit: float = math.inf) -> Stepped:
        """Train on this rank's share of a global batch, already on the device; its text may be `shortened`.

        Nothing changes where the loss is above the limit, or gradients are not finite.
        """
        self.updater.begin(lr)
        self._joint.limit = self._tokens.limit = loss_limit
        outcome = self._run(batch)
        return Stepped(outcome.loss, outcome.losses, self.updater.grad_norm, outcome.logit_scale)

    def _run(self, batch: Batch) -> Outcome:
        size, staged = self.layout.micro_batch, self.layout.pp > 1
        missing = self._context - batch.text.shape[1]
        lengths = {name: length - (missing if name != "vision" else 0) for name, length in self._lengths.items()}
        parts = [batch.rows(slice(at, at + size)) for at in range(0, len(batch), size)]
        if isinstance(self.model, Captioner):
            if staged:
                return step_tokens_in_stages(self.updater, self._pipeline, parts, lengths, self._tokens)
            return step_tokens(self.updater, parts, self._tokens)
        if staged:
            return step_in_stages(self.updater, self._pipeline, parts, lengths, self._joint)
        if len(parts) == 1:
            return step_at_once(self.updater, batch, self._joint)
        return step_with_cache(self.updater, parts, self._joint)

    # --- for evaluation

    def parameters_are_finite(self) -> bool:
        """Whether all parameters are, on every rank."""
        held = [getattr(each, "ds_tensor", each).detach() for each in self.model.parameters()]  # a piece under ZeRO-3
        bad = sum(int((~each.isfinite()).sum()) for each in held)
        return not int(self.ranks.agree(torch.tensor([bad])))

    @torch.no_grad()
    def token_losses(self, image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """The sum of the cross entropies of a captioner, [], over this rank's rows; on the last stage."""
        model = self.model
        assert isinstance(model, Captioner)
        model.eval()
        if self.layout.pp == 1:
            return model.token_losses(image, text)
        (length,) = self._lengths.values()
        found = self._pipeline.outputs(model.decoder, self._microbatches(image, text), length)
        return torch.stack(found).sum() if found else torch.zeros((), device=text.device)

    def encode_image(self, image: torch.Tensor) -> torch.Tensor:
        """uint8 [B, 3, size, size] -> fp32 [B, E], unit length, on every rank."""
        return self._encode("vision", image)

    def encode_text(self, text: torch.Tensor) -> torch.Tensor:
        """Token ids [B, S] -> fp32 [B, E], unit length, on every rank."""
        return self._encode("text", text)

    @torch.no_grad()
    def _encode(self, tower: str, inputs: torch.Tensor) -> torch.Tensor:
        model = self.model
        assert isinstance(model, DualEncoder)
        model.eval()
        chunks = getattr(model, tower)
        if self.layout.pp == 1:
            embedding: torch.Tensor = chunks[0](inputs)
            return embedding
        parts = self._microbatches(inputs)
        found = self._pipeline.outputs(chunks, parts, self._lengths[tower])
        shape = (len(parts) * len(parts[0][0]), self._embed_dim)
        embedding = torch.cat(found) if found else torch.empty(shape, device=inputs.device)
        return self.ranks.from_last_stage(embedding)[: len(inputs)]

    def _microbatches(self, *inputs: torch.Tensor) -> list[Inputs]:
        """Rows as microbatches of one size: one, or where a stage has several chunks as many as there are stages.

        What fills up the last one is blank: images of zeros, captions of padding alone, which predict nothing.
        """
        count = self.layout.pp if self.layout.vpp > 1 else 1
        size = -(-len(inputs[0]) // count)
        filled = [torch.cat([each, each.new_zeros(size * count - len(each), *each.shape[1:])]) for each in inputs]
        return list(zip(*(each.split(size) for each in filled), strict=True))
