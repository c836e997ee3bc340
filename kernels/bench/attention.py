"""Attention: what is checked and measured.

Operations are those of the definition: 4 B H Q S K forward, 2.5 times that backward (five products for two), counted
over the pairs of query and key that see each other. Bytes: q, k, v and the output once, backward also their gradients.

Axes: B batch, H heads, Q queries, S keys, K size of a head, T tokens of all documents.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels.attention_sdpa import WITH_MASK
from kernels.bench.case import (
    COMPILED,
    Case,
    Check,
    Draw,
    Implementation,
    Layout,
    Operation,
    Outputs,
    Tensors,
    normal_draw,
    plain,
)
from kernels.bench.measure import BACKWARD, FORWARD
from kernels.bench.peers import imported, needs_cuda

OPERATION = Operation(
    "kernels.attention", "attention", own=frozenset({"triton", "gluon", "blocked"}), last=frozenset({"gluon"})
)
SDPA_KERNELS = {
    "SDPA flash": SDPBackend.FLASH_ATTENTION,
    "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION,
    "SDPA efficient": SDPBackend.EFFICIENT_ATTENTION,
    "SDPA math": SDPBackend.MATH,
}
SAME = {"flash": "SDPA flash", "cudnn": "SDPA cuDNN", "efficient": "SDPA efficient"}
MOST_FOR_MATH = 2048  # tokens; it stores all scores in fp32
FLASH = {"FlashAttention 2": "flash_attn", "FlashAttention 3": "flash_attn_interface"}
DOCUMENT = 1024  # the longest; they fill half of it on average
LONG_DOCUMENTS = [1023, 129, 677, 1, 310]  # tiles are chosen by their mean: the same as for the table's
Options = Mapping[str, Any]


def cases(device: torch.device, quick: bool) -> list[Case]:
    """The rows of the table, the most telling first."""
    if device.type != "cuda":
        size = 2 if quick else 4
        return [
            _dense("full", (1, size, 256, 64), torch.float32),
            _dense("causal", (1, size, 256, 64), torch.float32, {"causal": True}),
            _dense("ViT-L", (size, 4, 257, 64), torch.float32),
            _dense("So400m", (1, size, 729, 72), torch.float32),
            _packed(2, 512 if quick else 1024, 64, torch.float32, longest=128),
            _dense("window 64", (1, size, 512, 64), torch.float32, {"causal": True, "window": 64}),
            _dense("soft cap 30", (1, size, 256, 64), torch.float32, {"causal": True, "soft_cap": 30.0}),
        ]
    half = torch.bfloat16
    hopper = {FORWARD: {"triton": 1.45, "gluon": 1.10}, BACKWARD: {"triton": 1.7, "gluon": 1.25}}
    rows = [
        _dense("ViT-L", (256, 16, 257, 64), half, targets={FORWARD: {"": 0.9}, BACKWARD: {"": 1.0}}),
        _dense("full 4k", (16, 16, 4096, 128), half, targets=hopper),
        _dense("So400m", (64, 16, 729, 72), half, targets={FORWARD: {"": 0.95}, BACKWARD: {"": 1.1}}),
        _packed(16, 65536, 64, half),
        _dense("causal 4k", (16, 16, 4096, 128), half, {"causal": True}, hopper),
        _packed(16, 65536, 72, half),
    ]
    if quick:
        return rows
    other = {FORWARD: {"": 1.0}, BACKWARD: {"": 1.1}}
    return [
        *rows,
        _dense("window 1024, 16k", (1, 16, 16384, 128), half, {"causal": True, "window": 1024}, other),
        _dense("soft cap 30, 16k", (1, 16, 16384, 128), half, {"causal": True, "soft_cap": 30.0}, other),
        _dense("ViT-B", (256, 12, 197, 64), half),
        _dense("text 77", (1024, 8, 77, 64), half, {"causal": True}),
    ]


def checks(device: torch.device) -> list[Check]:
    """Small odd shapes, every feature; in fp32 and bf16. On a GPU also, in bf16, every tile that a row of the table
    takes, with so many turns of its loop that what is fetched ahead goes round more than once."""
    shapes: list[tuple[str, tuple[int, int, int, int], Options]] = [
        ("full", (2, 3, 67, 64), {}),
        ("causal", (1, 2, 129, 80), {"causal": True}),
        ("head of 72", (1, 2, 65, 72), {}),
        ("ViT 257", (1, 2, 257, 64), {}),
        ("ViT 197", (1, 2, 197, 64), {}),
        ("text 77", (1, 2, 77, 64), {"causal": True}),
        ("head of 128", (1, 2, 131, 128), {"causal": True}),
        ("window", (1, 2, 131, 64), {"causal": True, "window": 17}),
        ("soft cap", (1, 2, 67, 64), {"soft_cap": 5.0}),
    ]
    dtypes = (torch.float32, torch.bfloat16)
    found = [_check(name, shape, dtype, options) for dtype in dtypes for name, shape, options in shapes]
    for dtype in dtypes:
        found.append(_packed_check("packed", [1, 67, 30, 128, 5], 72, dtype))
        found.append(_low_check(dtype))
    if device.type != "cuda":
        return found
    half = torch.bfloat16
    long: list[tuple[str, int, int, Options]] = [  # the most telling last
        *((f"head of {size}", 131, size, {}) for size in (32, 96, 256)),
        ("long soft cap", 1153, 128, {"causal": True, "soft_cap": 30.0}),
        ("long window", 1153, 128, {"causal": True, "window": 500}),
        *((f"long causal, head of {size}", 1153, size, {"causal": True}) for size in (72, 64, 128)),
        ("So400m", 729, 72, {}),
        *((f"long, head of {size}", 1153, size, {}) for size in (72, 128, 64)),
    ]
    found += [_packed_check(f"long packed {size}", LONG_DOCUMENTS, size, half) for size in (72, 64)]
    return found + [_check(name, (1, 2, tokens, size), half, options) for name, tokens, size, options in long]


def _check(name: str, shape: tuple[int, int, int, int], dtype: torch.dtype, options: Options) -> Check:
    definition = partial(_defined, options)
    return Check(OPERATION, name, dtype, _draw(shape, dtype), _call(options), definition, definition)


def _low_check(dtype: torch.dtype) -> Check:
    """Key lengths, and log-sum-exps of about -115, whose opposite's exponential is no number in fp32: cuDNN's backward
    has given nan for them, with a mask and 64 keys in the last 128 (pytorch #196678)."""
    shape, lengths = (2, 2, 192, 64), (192, 77)

    def draw(device: torch.device) -> Tensors:
        tensors = _draw(shape, dtype)(device)
        with torch.no_grad():
            tensors["q"][..., 0], tensors["k"][..., 0] = -480.0, shape[-1] ** 0.5 / 4  # scores of -120 and noise
        return {**tensors, "lengths": torch.tensor(lengths, device=device)}

    return Check(OPERATION, "low, key lengths", dtype, draw, _call({}), partial(_defined, {}), partial(_defined, {}))


def _draw(shape: tuple[int, int, int, int], dtype: torch.dtype) -> Draw:
    return normal_draw(dict.fromkeys("qkv", shape), dtype)


def _call(options: Options) -> Callable[[Callable[..., Any], Tensors], Outputs]:
    """Calls with what a case asks for, and nothing that stands at its default."""

    def call(function: Callable[..., Any], tensors: Tensors) -> Outputs:
        names = {"query_starts": "starts", "key_lengths_B": "lengths"}
        places = {name: tensors[own] for name, own in names.items() if own in tensors}
        return function(tensors["q"], tensors["k"], tensors["v"], **options, **places)  # type: ignore[no-any-return]

    return call


def seen(options: Options, queries: int, keys: int, device: torch.device) -> torch.Tensor | None:
    """Which key a query sees, bool [Q, S]; None: all."""
    if not options.get("causal") and not options.get("window"):
        return None
    place = torch.arange(queries, device=device)[:, None] + keys - queries
    key = torch.arange(keys, device=device)
    window = options.get("window") or keys
    return (key <= place) & (key > place - window) if options.get("causal") else (key - place).abs() < window


def pairs(options: Options, tokens: int) -> int:
    """How many pairs of query and key see each other; both have `tokens`."""
    if not options.get("causal"):
        return tokens**2
    window = min(options.get("window") or tokens, tokens)
    return window * (window + 1) // 2 + (tokens - window) * window


def _defined(options: Options, tensors: Tensors) -> torch.Tensor:
    """The definition, in the inputs' dtype."""
    q, k, v = tensors["q"], tensors["k"], tensors["v"]
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if cap := options.get("soft_cap"):
        scores = cap * torch.tanh(scores / cap)
    mask = seen(options, q.shape[2], k.shape[2], q.device)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    if "starts" in tensors:
        document_T = documents_of(tensors["starts"], q.shape[2])
        scores = scores.masked_fill(document_T[:, None] != document_T, -torch.inf)
    if "lengths" in tensors:
        place_S = torch.arange(k.shape[2], device=k.device)
        scores = scores.masked_fill((place_S >= tensors["lengths"][:, None])[:, None, None], -torch.inf)
    return scores.softmax(-1) @ v


def documents_of(starts: torch.Tensor, tokens: int) -> torch.Tensor:
    """The number of its document, for each token."""
    return torch.searchsorted(starts, torch.arange(tokens, device=starts.device), right=True)


def _dense(
    name: str,
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    options: Options | None = None,
    targets: Mapping[str, Mapping[str, float]] | None = None,
) -> Case:
    options = options or {}
    batch, heads, tokens, size = shape
    flops = 4.0 * batch * heads * pairs(options, tokens) * size
    tensor_bytes = float(batch * heads * tokens * size * dtype.itemsize)
    peers = _dense_peers(options, tokens, dtype)
    return Case(
        OPERATION,
        name,
        f"B{batch} H{heads} S{tokens} K{size}",
        (FORWARD, BACKWARD),
        _draw(shape, dtype),
        _call(options),
        peers,
        {FORWARD: flops, BACKWARD: 2.5 * flops},
        {FORWARD: 4 * tensor_bytes, BACKWARD: 8 * tensor_bytes},
        targets or {},
        {name: peer for name, peer in SAME.items() if peer in peers},
        {"SDPA math": f"it stores all scores in fp32: more than {MOST_FOR_MATH} tokens"}
        if tokens > MOST_FOR_MATH
        else {},
    )


def _dense_peers(options: Options, tokens: int, dtype: torch.dtype) -> dict[str, Implementation]:
    simple, causal = not options.get("window") and not options.get("soft_cap"), bool(options.get("causal"))
    peers: dict[str, Implementation] = {}
    if dtype == torch.float32:
        peers["SDPA" if simple else "plain"] = plain(partial(_sdpa, causal) if simple else partial(_defined, options))
        return peers
    if simple:
        peers |= {name: plain(partial(_sdpa_by, kernel, causal)) for name, kernel in SDPA_KERNELS.items()}
    for name, module in FLASH.items():
        peers[name] = Implementation(partial(_flash, module, options), HEADS_SECOND)
    peers["FlexAttention"] = Implementation(needs_cuda(partial(_flex, options, tokens)), round=COMPILED)
    return peers


def _sdpa(causal: bool, tensors: Tensors) -> torch.Tensor:
    return F.scaled_dot_product_attention(tensors["q"], tensors["k"], tensors["v"], is_causal=causal)


def _sdpa_by(kernel: SDPBackend, causal: bool, tensors: Tensors) -> torch.Tensor:
    with sdpa_kernel(kernel):
        return _sdpa(causal, tensors)


def _copied(each: torch.Tensor) -> torch.Tensor:
    """With dense rows of its own; clone() alone would keep the order in memory."""
    return each.clone(memory_format=torch.contiguous_format)


# [B, S, H, K], as FlashAttention takes it
HEADS_SECOND = Layout(lambda each: _copied(each.transpose(1, 2)), lambda each: each.transpose(1, 2))


def _flash(module: str, options: Options) -> Callable[[Tensors], torch.Tensor]:
    function = imported(module).flash_attn_func
    named: dict[str, Any] = {"causal": bool(options.get("causal"))}
    if window := options.get("window"):
        named["window_size"] = (window - 1, 0)
    if cap := options.get("soft_cap"):
        named["softcap"] = cap

    def call(tensors: Tensors) -> torch.Tensor:
        out = function(tensors["q"], tensors["k"], tensors["v"], **named)
        return out[0] if isinstance(out, tuple) else out  # type: ignore[no-any-return]  # some versions add the lse

    return call


def _flex(options: Options, tokens: int) -> Callable[[Tensors], torch.Tensor]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    causal, window, cap = bool(options.get("causal")), options.get("window") or tokens, options.get("soft_cap") or 0.0

    def sees(b: Any, h: Any, query: Any, key: Any) -> Any:
        return (query >= key) & (query - key < window)

    def capped(score: Any, b: Any, h: Any, query: Any, key: Any) -> Any:
        return cap * torch.tanh(score / cap)

    mask = create_block_mask(sees, None, None, tokens, tokens, device="cuda") if causal else None
    function = torch.compile(flex_attention, fullgraph=True, dynamic=False)
    return lambda tensors: function(
        tensors["q"], tensors["k"], tensors["v"], block_mask=mask, score_mod=capped if cap else None
    )


# --- packed documents


def lengths_of(tokens: int, longest: int, seed: int = 0) -> list[int]:
    """Lengths of documents, uniform from 1 to longest - 1, that add up to `tokens`."""
    generator = torch.Generator().manual_seed(seed)
    lengths: list[int] = []
    while sum(lengths) < tokens:
        drawn = int(torch.randint(1, longest, (), generator=generator))
        lengths.append(min(drawn, tokens - sum(lengths)))
    return lengths


def _packed_draw(heads: int, lengths: list[int], size: int, dtype: torch.dtype) -> Draw:
    def draw(device: torch.device) -> Tensors:
        tensors = _draw((1, heads, sum(lengths), size), dtype)(device)
        starts = torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)
        return {**tensors, "starts": starts}

    return draw


def _packed_check(name: str, lengths: list[int], size: int, dtype: torch.dtype) -> Check:
    draw = _packed_draw(2, lengths, size, dtype)
    return Check(OPERATION, name, dtype, draw, _call({}), partial(_defined, {}), partial(_defined, {}))


def _packed(heads: int, tokens: int, size: int, dtype: torch.dtype, longest: int = DOCUMENT) -> Case:
    lengths = lengths_of(tokens, longest)
    flops = 4.0 * heads * size * sum(length**2 for length in lengths)
    tensor_bytes = float(heads * tokens * size * dtype.itemsize)
    peers = {"padded SDPA": plain(_padded_sdpa, padded(lengths, longest))}
    if dtype != torch.float32:
        peers["FlexAttention"] = Implementation(needs_cuda(partial(_flex_packed, lengths)), round=COMPILED)
        for name, module in FLASH.items():
            peers[name] = Implementation(partial(_flash_packed, module, max(lengths)), TOKENS_FIRST)
    return Case(
        OPERATION,
        f"packed {size}",
        f"{len(lengths)} documents, T{tokens} H{heads} K{size}",
        (FORWARD, BACKWARD),
        _packed_draw(heads, lengths, size, dtype),
        _call({}),
        peers,
        {FORWARD: flops, BACKWARD: 2.5 * flops},
        {FORWARD: 4 * tensor_bytes, BACKWARD: 8 * tensor_bytes},
        {FORWARD: {"": 0.9}, BACKWARD: {"": 0.9}},
    )


def padded(lengths: list[int], longest: int) -> Layout:
    """[documents, H, longest, K] with zeros behind the end, and which keys are there ("seen")."""

    def own(each_1HTK: torch.Tensor) -> torch.Tensor:
        parts_THK = each_1HTK[0].transpose(0, 1).split(lengths)
        batch = torch.nn.utils.rnn.pad_sequence(list(parts_THK), batch_first=True)
        batch = F.pad(batch, (0, 0, 0, 0, 0, longest - batch.shape[1]))
        return batch.transpose(1, 2).contiguous()

    def usual(each_DHSK: torch.Tensor) -> torch.Tensor:
        return torch.cat([each_DHSK[place, :, :length] for place, length in enumerate(lengths)], 1)[None]

    def extra(tensors: Tensors) -> Tensors:
        place_S = torch.arange(longest, device=tensors["q"].device)
        ends_D = torch.tensor(lengths, device=place_S.device)
        return {"seen": (place_S < ends_D[:, None])[:, None, None]}

    return Layout(own, usual, extra)


def _padded_sdpa(tensors: Tensors) -> torch.Tensor:
    with sdpa_kernel(WITH_MASK):  # cuDNN's backward has given nan with a mask
        return F.scaled_dot_product_attention(tensors["q"], tensors["k"], tensors["v"], attn_mask=tensors["seen"])


def _flex_packed(lengths: list[int]) -> Callable[[Tensors], torch.Tensor]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    starts = torch.tensor([0, *lengths], device="cuda").cumsum(0)
    document_T = documents_of(starts, sum(lengths))

    def same(b: Any, h: Any, query: Any, key: Any) -> Any:
        return document_T[query] == document_T[key]

    # compiled: the whole [T, T] matrix would be 4 GiB
    mask = torch.compile(create_block_mask)(same, None, None, sum(lengths), sum(lengths), device="cuda")
    function = torch.compile(flex_attention, fullgraph=True, dynamic=False)
    return lambda tensors: function(tensors["q"], tensors["k"], tensors["v"], block_mask=mask)


# [T, H, K], as FlashAttention takes packed documents
TOKENS_FIRST = Layout(
    lambda each_1HTK: _copied(each_1HTK[0].transpose(0, 1)),
    lambda each_THK: each_THK.transpose(0, 1)[None],
    lambda tensors: {"starts": tensors["starts"]},
)


def _flash_packed(module: str, longest: int) -> Callable[[Tensors], torch.Tensor]:
    function = imported(module).flash_attn_varlen_func

    def call(tensors: Tensors) -> torch.Tensor:
        q, k, v, starts = (tensors[name] for name in ("q", "k", "v", "starts"))
        out = function(
            q, k, v, cu_seqlens_q=starts, cu_seqlens_k=starts, max_seqlen_q=longest, max_seqlen_k=longest
        )  # fmt: skip
        return out[0] if isinstance(out, tuple) else out  # type: ignore[no-any-return]

    return call
