"""A causal decoder over a picture and its caption: each token of the caption is predicted from all before it.

    outputs = model(image, text)        # {"token_losses": []}: the sum of the cross entropies of all predicted tokens

The sequence is the patches, then the caption; one transformer reads both (as in Fuyu, Bavishi et al. 2023). The token
table gives the input embeddings and the output weights (Press & Wolf 2017). Each row of the caption predicts the token
behind it, up to the end mark; patches predict nothing.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core import parallel_state

from kernels import linear_cross_entropy
from pretrain.models.pieces import Build, Chunk, Piece, pieces
from pretrain.models.towers import Patches, end_marks, token_table
from pretrain.models.transformer import build_block, cut_sequence, join_sequence, mark_tensor_parallel, through
from pretrain.sections import Model

NOTHING = -100  # the target of a row that predicts nothing


class Decoder(Chunk):
    """A chunk of the decoder. The last one gives the sum of the cross entropies of its rows.

    The token table is on the first and the last chunk; where these are on two stages there are two copies, marked so
    that the engine adds up their gradients and counts them once.
    """

    def __init__(self, config: Model, piece: Piece, build: Build) -> None:
        super().__init__()
        self.piece, self.build, self.backend = piece, build, build.kernels.loss
        text = config.text
        if piece.first:
            self.patches = Patches(config.vision, build.dtype, text.width)
            self.positions = torch.nn.Parameter(torch.empty(text.context, text.width, dtype=build.dtype))
        if piece.first or piece.last:
            self.tokens = token_table(text, build)
            self.tokens.weight.on_both_ends = build.pp > 1
            # DeepSpeed counts what is marked so in no gradient norm
            self.tokens.weight.ds_pipe_replicated = build.pp > 1 and not piece.first
        self.block = build_block(text, piece, build, causal=True)

    def forward(self, image: torch.Tensor, text_BS: torch.Tensor) -> torch.Tensor:
        """Hidden states [S, B, D]; of the last chunk the sum of its rows' cross entropies. The image may be empty."""
        hidden_SBD = self._embed(image, text_BS) if self.piece.first else None
        hidden_SBD = through(self.block, hidden_SBD, self.build)
        if not self.piece.last:
            return hidden_SBD
        hidden_SBD = join_sequence(hidden_SBD, self.build, context=False)
        targets_BS = self._targets(text_BS, patches=len(hidden_SBD) * self.build.cp - text_BS.shape[1])
        losses: torch.Tensor = linear_cross_entropy(
            hidden_SBD.transpose(0, 1).flatten(0, 1),
            self.tokens.weight,
            targets_BS.flatten(),
            ignore_index=NOTHING,
            reduction="sum",
            group=parallel_state.get_tensor_model_parallel_group(),
            backend=self.backend,
        )
        return losses

    def _embed(self, image: torch.Tensor, text_BS: torch.Tensor) -> torch.Tensor:
        words_SBD = self.tokens(text_BS).transpose(0, 1) + self.positions[: text_BS.shape[1], None]
        if image.shape[-1] == 0:
            # a microbatch of captions alone still runs the patches: under ZeRO-3 that is a collective
            side = self.patches.side
            blank = torch.zeros(1, 3, side, side, dtype=torch.uint8, device=text_BS.device)
            return cut_sequence(words_SBD + 0 * self.patches(blank).sum(), self.build)
        return cut_sequence(torch.cat([self.patches(image), words_SBD]), self.build)

    def _targets(self, text_BS: torch.Tensor, patches: int) -> torch.Tensor:
        """The token behind each of this rank's rows [B, S'], NOTHING where there is none to predict."""
        next_BS = F.pad(text_BS[:, 1:], (0, 1), value=NOTHING)
        behind_end = torch.arange(text_BS.shape[1], device=text_BS.device) >= end_marks(text_BS)[:, None]
        targets_BS = F.pad(next_BS.masked_fill(behind_end, NOTHING), (patches, 0), value=NOTHING)
        if self.build.cp > 1:
            targets_BS = targets_BS.chunk(self.build.cp, 1)[parallel_state.get_context_parallel_rank()]
        return targets_BS


class Captioner(torch.nn.Module):
    """This rank's chunks of a decoder."""

    def __init__(self, config: Model, build: Build | None = None) -> None:
        super().__init__()
        build = build or Build()
        self.decoder = torch.nn.ModuleList(Decoder(config, each, build) for each in pieces(build))
        mark_tensor_parallel(self)

    def token_losses(self, image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """The sum of the cross entropies of this rank's rows, []; without stages."""
        (decoder,) = self.decoder
        losses: torch.Tensor = decoder(image, text)
        return losses

    def forward(self, image: torch.Tensor, text: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"token_losses": self.token_losses(image, text)}
