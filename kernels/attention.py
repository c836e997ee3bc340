"""Scaled dot-product attention: softmax(q k^T / sqrt(K)) v, with masks, soft cap, dropout and rotary positions.

    s_ij = scale q_i . k_j,   or c tanh(s_ij / c) with a soft cap c
    l_i  = log sum_j exp(s_ij) over the keys that query i sees
    o_i  = sum_j keep_ij / (1 - p) exp(s_ij - l_i) v_j

Source: Vaswani et al. 2017, "Attention Is All You Need", equation 1; sliding window: Beltagy et al. 2020, "Longformer";
soft cap: Gemma Team 2024, "Gemma 2"; heads that share keys: Ainslie et al. 2023, "GQA".

Backends, and what "auto" prefers:
- On CPU and on devices other than CUDA: "sdpa", torch's own fused kernel, for all that it can; then "blocked"
  (attention_blocked.py), which can everything.
- On CUDA plain and causal attention goes to torch's fused kernels, which are the fastest published for them: "cudnn",
  "flash", "efficient" from sm_90 on, where cuDNN's is reported ahead of FlashAttention 2, and "flash" first on older
  cards. What those cannot (key lengths, window, documents, soft cap, dropout, log-sum-exp) goes to "triton", then to
  "sdpa" with a mask, then to "blocked". "gluon" must be named: its barriers could hang a card, which no trial catches.
  None of this order has been measured by us: the Triton and Gluon kernels compile for sm_80, sm_90, sm_100 and gfx942
  (Gluon: sm_90), and have not yet run on a GPU.
- Triton's, and torch's own on CUDA, must first agree with fp64 on this card, once for each dtype, size of a head and
  set of options (attention_trial.py).
- In deterministic mode cuDNN refuses; the other kernels add in a fixed order then, and ours always do.

Axes: B batch, H heads, G heads of keys and values (H a multiple of G), Q queries, S keys, K size of a head, R rotated.
"""

from __future__ import annotations

from typing import Any

import torch

from kernels import attention_sdpa
from kernels.attention_operator import attend
from kernels.attention_spec import Spec
from kernels.attention_trial import trust
from kernels.dispatch import AUTO, Choice, choose, chosen_by, constant_when_compiled, no_triton, record

ON_CPU = ("sdpa", "blocked", "triton", "gluon", "cudnn", "flash", "efficient")
ON_CUDA = ("flash", "cudnn", "efficient", "triton", "sdpa", "blocked", "gluon")
ON_HOPPER_AND_LATER = ("cudnn", "flash", "efficient", "triton", "sdpa", "blocked", "gluon")
BACKENDS = ON_CPU
OURS = ("blocked", "triton", "gluon")  # served by the operator weft::attention
INTEGERS = (torch.int32, torch.int64)


def _choice(q_BHQK: torch.Tensor, k_BGSK: torch.Tensor, v_BGSK: torch.Tensor, **options: Any) -> Choice:
    """For `why`: what `attention` would choose for the same arguments."""
    q_BHQK, k_BGSK, v_BGSK = _autocast(q_BHQK, k_BGSK, v_BGSK)
    options.pop("rotary", None)
    if options.get("seed") is None:
        options["seed"] = 0  # to draw one would move torch's generator
    return _plan(q_BHQK, k_BGSK, v_BGSK, **options)[0]


@chosen_by(_choice)
def attention(
    q_BHQK: torch.Tensor,
    k_BGSK: torch.Tensor,
    v_BGSK: torch.Tensor,
    *,
    causal: bool = False,
    key_lengths_B: torch.Tensor | None = None,
    window: int | None = None,
    query_starts: torch.Tensor | None = None,
    key_starts: torch.Tensor | None = None,
    soft_cap: float | None = None,
    dropout: float = 0.0,
    seed: torch.Tensor | int | None = None,
    rotary: tuple[torch.Tensor, torch.Tensor] | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str = AUTO,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention output [B, H, Q, K] in the inputs' dtype (under autocast, in autocast's); differentiable in q, k and v.

    Query i stands at place p = i + S - Q among the keys: the last query at the last key. A query that sees no key
    gives 0, and gradient 0.

    causal          it sees keys up to p
    key_lengths_B   int [B]: sample b has only its first key_lengths_B[b] keys; the rest are never seen
    window          causal: it sees keys p - window + 1 to p; else those with |p - key| < window
    query_starts    int [documents + 1], B = 1: document d is the queries query_starts[d] to query_starts[d + 1] - 1,
                    which see the keys of document d alone; p counts within the document. Rows of none see nothing
    key_starts      the same for keys; as query_starts if None
    soft_cap        scaled scores s become soft_cap * tanh(s / soft_cap)
    dropout         probability that a weight is zeroed after the softmax; those kept are divided by 1 - dropout
    seed            of the dropout, int or int64 []: with the same backend and shapes it drops the same weights. None:
                    one is drawn from torch's default generator (under Inductor: from its own)
    rotary          (cos, sin), each [S, R] or [B, S, R]: kernels.rotary turns q and k first; Q must be S
    scale           of the scores, K^-1/2 if None
    return_lse      return (output, l [B, H, Q]): the log-sum-exp in fp32 (fp64 for fp64), without dropout, -inf where
                    no key is seen; it carries no gradient

    Raises ValueError for arguments that contradict each other, and for a named backend that cannot do the call.
    """
    q_BHQK, k_BGSK, v_BGSK = _autocast(q_BHQK, k_BGSK, v_BGSK)
    choice, spec, tensors = _plan(
        q_BHQK, k_BGSK, v_BGSK, causal=causal, key_lengths_B=key_lengths_B, window=window, query_starts=query_starts,
        key_starts=key_starts, soft_cap=soft_cap, dropout=dropout, seed=seed, scale=scale, return_lse=return_lse,
        backend=backend,
    )  # fmt: skip
    if rotary is not None:
        q_BHQK, k_BGSK = _turned(q_BHQK, k_BGSK, rotary)
    if record(choice) not in OURS:
        return attention_sdpa.run(choice.backend, q_BHQK, k_BGSK, v_BGSK, spec, key_lengths_B)
    out_BHQK, lse_BHQ = attend(
        q_BHQK, k_BGSK, v_BGSK, *tensors.values(),
        spec.scale, spec.causal, spec.window, spec.soft_cap, spec.dropout, choice.backend,
    )  # fmt: skip
    return (out_BHQK, lse_BHQ) if return_lse else out_BHQK


def _plan(
    q_BHQK: torch.Tensor,
    k_BGSK: torch.Tensor,
    v_BGSK: torch.Tensor,
    *,
    causal: bool = False,
    key_lengths_B: torch.Tensor | None = None,
    window: int | None = None,
    query_starts: torch.Tensor | None = None,
    key_starts: torch.Tensor | None = None,
    soft_cap: float | None = None,
    dropout: float = 0.0,
    seed: torch.Tensor | int | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str = AUTO,
) -> tuple[Choice, Spec, dict[str, torch.Tensor | None]]:
    """(the backend that will run, what it computes, the other tensors in the operator's order)."""
    _check_tensors(q_BHQK, k_BGSK, v_BGSK)
    _check_settings(window, soft_cap, dropout)
    if key_starts is None:
        key_starts = query_starts
    if key_lengths_B is not None or query_starts is not None or key_starts is not None:
        _check_lengths(q_BHQK, key_lengths_B, query_starts, key_starts)
    spec = Spec(
        scale=q_BHQK.shape[-1] ** -0.5 if scale is None else scale,
        causal=causal,
        window=window or 0,
        soft_cap=soft_cap or 0.0,
        dropout=dropout,
    )
    tensors: dict[str, torch.Tensor | None] = {
        "key_lengths_B": key_lengths_B,
        "query_starts": query_starts,
        "key_starts": key_starts,
        "seed": _seed(seed, q_BHQK.device) if dropout else None,
    }

    def refusal(name: str) -> str:
        return _refusal(name, q_BHQK, k_BGSK, v_BGSK, spec, return_lse, tensors, named=backend != AUTO)

    return choose("attention", backend, _order(q_BHQK.device), refusal), spec, tensors


def _order(device: torch.device) -> tuple[str, ...]:
    if device.type != "cuda":
        return ON_CPU
    return ON_HOPPER_AND_LATER if _generation(device) >= 9 else ON_CUDA


@constant_when_compiled
def _generation(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0]


def _refusal(
    backend: str,
    q_BHQK: torch.Tensor,
    k_BGSK: torch.Tensor,
    v_BGSK: torch.Tensor,
    spec: Spec,
    return_lse: bool,
    tensors: dict[str, torch.Tensor | None],
    named: bool,
) -> str:
    """Why this backend cannot do the call, or "". One that was named needs no trial: whoever names it wants it."""
    lengths, documents = tensors["key_lengths_B"] is not None, tensors["query_starts"] is not None
    traits = _traits(spec, lengths, documents)
    if backend not in OURS:
        why_not = attention_sdpa.refusal(
            backend, q_BHQK, k_BGSK, v_BGSK, spec, lengths=lengths, documents=documents, return_lse=return_lse
        )
        if why_not or named or backend not in attention_sdpa.FUSED:
            return why_not
        traits += ("shared keys",) * (q_BHQK.shape[1] != k_BGSK.shape[1])
        return trust(backend, q_BHQK.device, q_BHQK.dtype, q_BHQK.shape[3], traits)
    if q_BHQK.dtype != k_BGSK.dtype or q_BHQK.dtype != v_BGSK.dtype:
        return f"q is {q_BHQK.dtype}, k {k_BGSK.dtype}, v {v_BGSK.dtype}: need one dtype"
    if not q_BHQK.is_floating_point():
        return f"q is {q_BHQK.dtype}: need a floating dtype"
    if backend == "blocked":
        return ""
    if why_not := _triton_refusal(backend, q_BHQK, k_BGSK, v_BGSK, spec, tensors):
        return why_not
    if named or not q_BHQK.is_cuda:
        return ""
    return trust(backend, q_BHQK.device, q_BHQK.dtype, q_BHQK.shape[3], traits)


def _triton_refusal(
    backend: str,
    q_BHQK: torch.Tensor,
    k_BGSK: torch.Tensor,
    v_BGSK: torch.Tensor,
    spec: Spec,
    tensors: dict[str, torch.Tensor | None],
) -> str:
    if why_not := no_triton(q_BHQK.device.type, q_BHQK.dtype):
        return why_not
    from kernels.gpu import attention as attention_triton

    if backend == "gluon":
        from kernels.gpu import attention_gluon

        if why_not := attention_gluon.refusal(q_BHQK, k_BGSK, v_BGSK, spec, **tensors):
            return why_not
    return attention_triton.refusal(q_BHQK, k_BGSK, v_BGSK, spec, **tensors)


def _traits(spec: Spec, lengths: bool, documents: bool) -> tuple[str, ...]:
    """The options that make a kernel of their own."""
    present = {
        "causal": spec.causal, "window": spec.window > 0, "soft cap": spec.soft_cap > 0, "dropout": spec.dropout > 0,
        "key lengths": lengths, "documents": documents,
    }  # fmt: skip
    return tuple(name for name, is_there in present.items() if is_there)


# --- the arguments


def _autocast(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """As autocast does with torch's function: a norm of q and k leaves them in fp32 there, and v in 16 bits."""
    device = tensors[0].device.type
    if device not in ("cpu", "cuda") or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        each.to(dtype) if each.is_floating_point() and each.dtype != torch.float64 else each for each in tensors
    )


def _check_tensors(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    fits = q.ndim == k.ndim == v.ndim == 4 and k.shape == v.shape
    if not fits or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"attention: q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}: need q [B, H, Q, K] and k and v "
            "[B, G, S, K], H a multiple of G"
        )


def _check_settings(window: int | None, soft_cap: float | None, dropout: float) -> None:
    if window is not None and window < 1:
        raise ValueError(f"attention: window is {window}: it must be 1 or more, or None for no limit")
    if soft_cap is not None and not soft_cap > 0:
        raise ValueError(f"attention: soft_cap is {soft_cap}: it must be positive, or None for none")
    if not 0 <= dropout < 1:
        raise ValueError(f"attention: dropout is {dropout}: it must be at least 0 and below 1")


def _check_lengths(
    q_BHQK: torch.Tensor,
    key_lengths_B: torch.Tensor | None,
    query_starts: torch.Tensor | None,
    key_starts: torch.Tensor | None,
) -> None:
    for name, tensor in (("key_lengths_B", key_lengths_B), ("query_starts", query_starts), ("key_starts", key_starts)):
        if tensor is not None and (tensor.ndim != 1 or tensor.dtype not in INTEGERS or tensor.device != q_BHQK.device):
            raise ValueError(
                f"attention: {name} is {tensor.dtype} {list(tensor.shape)} on {tensor.device}: need a vector of int32 "
                f"or int64 on {q_BHQK.device}"
            )
    if key_lengths_B is not None and key_lengths_B.shape[0] != q_BHQK.shape[0]:
        raise ValueError(f"attention: {key_lengths_B.shape[0]} key lengths for a batch of {q_BHQK.shape[0]}")
    if key_starts is None:
        return
    if query_starts is None:
        raise ValueError("attention: key_starts without query_starts: give both, or query_starts alone for both")
    if query_starts.shape[0] != key_starts.shape[0] or query_starts.shape[0] < 2:
        raise ValueError(
            f"attention: {query_starts.shape[0]} query_starts and {key_starts.shape[0]} key_starts: need one more than "
            "there are documents of each"
        )
    if q_BHQK.shape[0] != 1:
        raise ValueError(f"attention: documents lie one behind the other in a batch of 1, and B is {q_BHQK.shape[0]}")
    if key_lengths_B is not None:
        raise ValueError("attention: key_lengths_B with query_starts: let the starts leave the unseen keys out")


def _turned(
    q_BHQK: torch.Tensor, k_BGSK: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    if q_BHQK.shape[2] != k_BGSK.shape[2]:
        raise ValueError(
            f"attention: rotary with {q_BHQK.shape[2]} queries and {k_BGSK.shape[2]} keys: turn each by its own places "
            "with kernels.rotary first"
        )
    from kernels.rotary import rotary as turn

    return turn(q_BHQK, *rotary), turn(k_BGSK, *rotary)


def _seed(seed: torch.Tensor | int | None, device: torch.device) -> torch.Tensor:
    """int64 [], on the device."""
    if seed is None:
        return torch.randint(2**63 - 1, (), device=device)
    if isinstance(seed, int):
        return torch.full((), seed, dtype=torch.int64, device=device)
    if seed.dtype != torch.int64 or seed.numel() != 1:
        raise ValueError(f"attention: seed is {seed.dtype} {list(seed.shape)}: need one int64")
    return seed.reshape(()).to(device)
