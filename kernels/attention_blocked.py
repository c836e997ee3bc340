"""Attention in plain torch, a block of query rows at a time: every option, every device, every dtype, no Q x S matrix.

    o_i = sum_j w_ij v_j,   w_ij = exp(s_ij - l_i),   l_i = log sum_j exp(s_ij),   s_ij = scale q_i . k_j over seen keys
    dv_j = sum_i w_ij do_i,   ds_ij = w_ij (do_i . v_j - do_i . o_i),   dq_i = scale sum_j ds_ij k_j   and dk_j likewise

Source: Rabe and Staats 2021, "Self-attention does not need O(n^2) memory"; for the backward, Dao 2023,
"FlashAttention-2", algorithm 2. With a soft cap c, s becomes t = c tanh(s / c) and ds gets the factor 1 - (t / c)^2;
with dropout, w_ij and do_i . v_j get the factor keep_ij / (1 - p), which leaves do_i . o_i as it is.

Design choices:
- A block holds the keys that its rows can see and no others, so a window, a causal half, short samples and documents
  cost what they see, and a key that nobody sees may hold anything. Only blocks with an edge are masked.
- About BLOCK_BYTES of scores are alive at a time, twice that in the backward, which makes the scores again.
- Sums and products are fp32 (fp64 for fp64) whatever the inputs.
- Dropout draws from one generator, seeded at the start; forward and backward walk the same blocks in the same order,
  so they draw the same mask. It depends on the shapes and on the device, and is not that of the Triton kernels.
- Key lengths, starts and the seed are read on the host: on a GPU this path waits for the device.

Axes: B batch, G heads of keys, R query heads that share one of them, Q queries, S keys, K size of a head; n heads of
keys of a block, b samples of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch

from kernels.attention_spec import Spec, laid_out_as
from kernels.precision import accumulator_of

BLOCK_BYTES = 8 << 20  # of one block of scores: what the cache of a CPU holds
BLOCK_BYTES_ON_GPU = 256 << 20  # worth the dozen launches that a block takes
MOST_ROWS, LEAST_ROWS = 128, 32  # of a block; with fewer the products are slow, whatever the keys take


@dataclass(frozen=True)
class Block:
    """A rectangle of the scores of some heads."""

    samples: slice
    groups: slice
    queries: slice
    keys: slice
    hidden: torch.Tensor | None  # bool [Q, S], True: not seen; None: all is seen


@dataclass(frozen=True)
class Segment:
    """Queries that share the same keys: those of a batch, of one sample cut to its length, or of a document."""

    samples: slice
    queries: slice
    keys: slice
    shift: int  # query i stands at place i + shift among the keys


def forward(
    q_BHQK: torch.Tensor,
    k_BGSK: torch.Tensor,
    v_BGSK: torch.Tensor,
    spec: Spec,
    *,
    key_lengths_B: torch.Tensor | None = None,
    query_starts: torch.Tensor | None = None,
    key_starts: torch.Tensor | None = None,
    seed: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(output like q, log-sum-exp [B, H, Q] in fp32, or fp64 for fp64); a row without keys gives 0 and -inf."""
    accumulator = accumulator_of(q_BHQK.dtype)
    out_BHQK = laid_out_as(q_BHQK).zero_()
    lse_BHQ = q_BHQK.new_full(q_BHQK.shape[:3], -torch.inf, dtype=accumulator)
    groups = k_BGSK.shape[1]
    q_BGRQK, out_BGRQK, lse_BGRQ = (each.unflatten(1, (groups, -1)) for each in (q_BHQK, out_BHQK, lse_BHQ))
    generator = _generator(spec, seed)
    segments = _segments(q_BHQK, k_BGSK, key_lengths_B, query_starts, key_starts)
    for block in _blocks(segments, q_BGRQK, groups, spec):
        rows = block.samples, block.groups, slice(None), block.queries
        q_nQK = _rows(q_BGRQK[rows], accumulator)
        weights_nQS = _scores(q_nQK, _keys(k_BGSK, block, accumulator), spec, block)
        most_nQ = weights_nQS.amax(-1, keepdim=True)
        most_nQ.masked_fill_(most_nQ == -torch.inf, 0)  # of a row without keys
        weights_nQS.sub_(most_nQ).exp_()
        total_nQ = weights_nQS.sum(-1, keepdim=True)
        lse_BGRQ[rows] = (most_nQ + total_nQ.log()).view(lse_BGRQ[rows].shape)
        if generator is not None:
            weights_nQS *= _kept(weights_nQS, spec.dropout, generator)
        out_nQK = torch.bmm(weights_nQS, _keys(v_BGSK, block, accumulator))
        out_nQK /= total_nQ.masked_fill_(total_nQ == 0, 1)
        out_BGRQK[rows] = out_nQK.view(q_BGRQK[rows].shape).to(q_BHQK.dtype)
    return out_BHQK, lse_BHQ


def backward(
    grad_BHQK: torch.Tensor,
    q_BHQK: torch.Tensor,
    k_BGSK: torch.Tensor,
    v_BGSK: torch.Tensor,
    out_BHQK: torch.Tensor,
    lse_BHQ: torch.Tensor,
    spec: Spec,
    *,
    key_lengths_B: torch.Tensor | None = None,
    query_starts: torch.Tensor | None = None,
    key_starts: torch.Tensor | None = None,
    seed: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v, given the forward's outputs and the same everything else."""
    accumulator = accumulator_of(q_BHQK.dtype)
    dq_BHQK = laid_out_as(q_BHQK).zero_()
    dk_BGSK, dv_BGSK = (laid_out_as(each, accumulator).zero_() for each in (k_BGSK, v_BGSK))
    groups = k_BGSK.shape[1]
    q_BGRQK, dq_BGRQK, grad_BGRQK, out_BGRQK, lse_BGRQ = (
        each.unflatten(1, (groups, -1)) for each in (q_BHQK, dq_BHQK, grad_BHQK, out_BHQK, lse_BHQ)
    )
    generator = _generator(spec, seed)
    segments = _segments(q_BHQK, k_BGSK, key_lengths_B, query_starts, key_starts)
    for block in _blocks(segments, q_BGRQK, groups, spec):
        rows, keys = (block.samples, block.groups, slice(None), block.queries), _place(block)
        q_nQK, grad_nQK, out_nQK = (_rows(each[rows], accumulator) for each in (q_BGRQK, grad_BGRQK, out_BGRQK))
        k_nSK, v_nSK = (_keys(each, block, accumulator) for each in (k_BGSK, v_BGSK))
        scores_nQS = _scores(q_nQK, k_nSK, spec, block)
        slopes_nQS = 1 - (scores_nQS / spec.soft_cap).square_() if spec.soft_cap else None
        lse_nQ = lse_BGRQ[rows].reshape(scores_nQS.shape[:2])[..., None]
        weights_nQS = scores_nQS.sub_(lse_nQ.masked_fill(lse_nQ == -torch.inf, 0)).exp_()
        dweights_nQS = torch.bmm(grad_nQK, v_nSK.mT)
        dropped_nQS = weights_nQS
        if generator is not None:
            kept_nQS = _kept(weights_nQS, spec.dropout, generator)
            dweights_nQS *= kept_nQS
            dropped_nQS = kept_nQS.mul_(weights_nQS)
        _add(dv_BGSK[keys], torch.bmm(dropped_nQS.mT, grad_nQK))
        dscores_nQS = dweights_nQS.sub_((grad_nQK * out_nQK).sum(-1, keepdim=True)).mul_(weights_nQS)
        if slopes_nQS is not None:
            # a hidden score is -inf and so is its slope, but its weight is 0
            dscores_nQS.mul_(slopes_nQS.masked_fill_(weights_nQS == 0, 0))
        dq_nQK = torch.bmm(dscores_nQS, k_nSK).mul_(spec.scale)
        dq_BGRQK[rows] = dq_nQK.view(q_BGRQK[rows].shape).to(q_BHQK.dtype)
        _add(dk_BGSK[keys], torch.bmm(dscores_nQS.mT, q_nQK).mul_(spec.scale))
    return dq_BHQK, dk_BGSK.to(k_BGSK.dtype), dv_BGSK.to(v_BGSK.dtype)


# --- which rows see which keys


def _segments(
    q_BHQK: torch.Tensor,
    k_BGSK: torch.Tensor,
    key_lengths_B: torch.Tensor | None,
    query_starts: torch.Tensor | None,
    key_starts: torch.Tensor | None,
) -> list[Segment]:
    batch, queries, keys = q_BHQK.shape[0], q_BHQK.shape[2], k_BGSK.shape[2]
    if query_starts is not None and key_starts is not None:
        q_bounds, k_bounds = _spans("query_starts", query_starts, queries), _spans("key_starts", key_starts, keys)
        return [Segment(slice(0, 1), q, k, k.stop - q.stop) for q, k in zip(q_bounds, k_bounds, strict=True)]
    if key_lengths_B is None:
        return [Segment(slice(0, batch), slice(0, queries), slice(0, keys), keys - queries)]
    lengths = [min(max(length, 0), keys) for length in key_lengths_B.tolist()]
    return [
        Segment(slice(sample, sample + 1), slice(0, queries), slice(0, length), keys - queries)
        for sample, length in enumerate(lengths)
    ]


def _spans(name: str, starts: torch.Tensor, most: int) -> list[slice]:
    places: list[int] = starts.tolist()
    spans = [slice(start, stop) for start, stop in pairwise(places)]
    if places[0] < 0 or places[-1] > most or any(span.start > span.stop for span in spans):
        raise ValueError(f"attention: {name} {places} must rise from 0 to {most}, the number of rows")
    return spans


def _blocks(segments: list[Segment], q_BGRQK: torch.Tensor, groups: int, spec: Spec) -> Iterator[Block]:
    """The blocks that see a key at all, in an order that depends on the shapes alone."""
    itemsize = accumulator_of(q_BGRQK.dtype).itemsize
    most = BLOCK_BYTES_ON_GPU if q_BGRQK.device.type == "cuda" else BLOCK_BYTES
    reach = spec.window - 1 if spec.causal else 2 * (spec.window - 1)
    for segment in segments:
        keys = segment.keys.stop - segment.keys.start
        widest = min(keys, MOST_ROWS + reach) if spec.window else keys
        row_bytes = max(1, q_BGRQK.shape[2] * widest * itemsize)
        rows = min(MOST_ROWS, max(LEAST_ROWS, most // row_bytes))
        heads = max(1, most // (row_bytes * rows))
        for queries in _cut(segment.queries, rows):
            seen = _seen_keys(queries, segment, spec)
            if seen.start >= seen.stop:
                continue
            hidden_QS = _hidden(queries, seen, segment.shift, spec, q_BGRQK.device)
            for samples in _cut(segment.samples, max(1, heads // max(1, groups))):
                for each in _cut(slice(0, groups), heads):
                    yield Block(samples, each, queries, seen, hidden_QS)


def _cut(whole: slice, step: int) -> Iterator[slice]:
    for start in range(whole.start, whole.stop, step):
        yield slice(start, min(start + step, whole.stop))


def _seen_keys(queries: slice, segment: Segment, spec: Spec) -> slice:
    """From the first key that any of these queries sees to the last."""
    first, last = queries.start + segment.shift, queries.stop - 1 + segment.shift
    start, stop = segment.keys.start, segment.keys.stop
    if spec.window:
        start = max(start, first - spec.window + 1)
    if spec.causal:
        stop = min(stop, last + 1)
    elif spec.window:
        stop = min(stop, last + spec.window)
    return slice(start, stop)


def _hidden(queries: slice, keys: slice, shift: int, spec: Spec, device: torch.device) -> torch.Tensor | None:
    """[Q, S]: where a query of the block does not see a key of it; None if there is no such place."""
    # how far a key is behind the query's own place: seen from `least` to `most`
    least = 0 if spec.causal else 1 - spec.window
    most = spec.window - 1
    behind_least, behind_most = queries.start + shift - keys.stop + 1, queries.stop - 1 + shift - keys.start
    too_new = (spec.causal or spec.window > 0) and behind_least < least
    too_old = spec.window > 0 and behind_most > most
    if not too_new and not too_old:
        return None
    places_Q = torch.arange(queries.start + shift, queries.stop + shift, device=device)
    behind_QS = places_Q[:, None] - torch.arange(keys.start, keys.stop, device=device)
    if too_new and too_old:
        return (behind_QS < least) | (behind_QS > most)
    return behind_QS < least if too_new else behind_QS > most


# --- pieces of a block


def _scores(q_nQK: torch.Tensor, k_nSK: torch.Tensor, spec: Spec, block: Block) -> torch.Tensor:
    """[n, R * Q, S]: scaled, capped, and -inf where hidden."""
    scores = torch.bmm(q_nQK * spec.scale, k_nSK.mT)
    if spec.soft_cap:
        scores.div_(spec.soft_cap).tanh_().mul_(spec.soft_cap)
    if block.hidden is not None:
        scores.unflatten(1, (-1, len(block.hidden))).masked_fill_(block.hidden, -torch.inf)
    return scores


def _rows(rows_bnRQK: torch.Tensor, accumulator: torch.dtype) -> torch.Tensor:
    """[n, R * Q, K]: the rows of all heads that share keys, below one another."""
    return rows_bnRQK.to(accumulator).flatten(0, 1).flatten(1, 2)


def _keys(keys_BGSK: torch.Tensor, block: Block, accumulator: torch.dtype) -> torch.Tensor:
    """[n, S, K] of the block."""
    return keys_BGSK[_place(block)].to(accumulator).flatten(0, 1)


def _place(block: Block) -> tuple[slice, slice, slice]:
    return block.samples, block.groups, block.keys


def _add(place_bnSK: torch.Tensor, rows_nSK: torch.Tensor) -> None:
    place_bnSK += rows_nSK.view(place_bnSK.shape)


def _generator(spec: Spec, seed: torch.Tensor | None) -> torch.Generator | None:
    """None without dropout."""
    if not spec.dropout:
        return None
    assert seed is not None, "the public function draws one"
    return torch.Generator(seed.device).manual_seed(int(seed))


def _kept(weights_nQS: torch.Tensor, dropout: float, generator: torch.Generator) -> torch.Tensor:
    """1 / (1 - dropout) where a weight is kept, else 0."""
    return torch.empty_like(weights_nQS).bernoulli_(1 - dropout, generator=generator).div_(1 - dropout)
