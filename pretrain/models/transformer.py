"""The transformer of every tower: Megatron-core's block with our norm and our core attention.

Megatron-core brings the tensor parallel linear layers, the residual structure and recomputation; the two parts where
our kernels run come in through the layer spec. Nothing here knows how many ranks there are.

A block works on [S, B, D], or on [B, S, D] where the build is `batch_first`; `through` takes and gives [S, B, D].
What is said below of [S, B, ...] holds for [B, S, ...] then. A text block that is `batch_first` works on [1, N, D], the
N tokens of the batch without its padding (packing.py).

Axes: S sequence, B batch, H heads of this rank, K size of a head, D width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    checkpoint,
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from kernels.attention import attention
from kernels.norm import layer_norm
from pretrain.models.packing import Packing
from pretrain.models.pieces import Build, Piece
from pretrain.sections import Tower


class Norm(torch.nn.Module):
    """Layer norm over the last axis, through our kernel; built by Megatron-core for every norm of a block."""

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, backend: str = "auto", **_: object
    ) -> None:
        super().__init__()
        self.eps, self.backend = eps, backend
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.bias = torch.nn.Parameter(torch.zeros(hidden_size, dtype=config.params_dtype))
        for parameter in (self.weight, self.bias):  # each tensor parallel rank has seen its piece of the sequence only
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return layer_norm(hidden, self.weight, self.bias, self.eps, backend=self.backend)


class CoreAttention(torch.nn.Module):
    """softmax(q k^T / sqrt(K)) v, through our kernel: [S, B, H, X] -> [S, B, H K].

    Each head has its q, k and v side by side, X = 3 K.
    mask: how many keys [B] to look at, or None; where the build is `batch_first` the places [B, S] of packed tokens, or
    None. pooled: only the last token of each caption asks: [1, N, H, X] -> [B, 1, H K].
    Context parallel ranks hold consecutive pieces of the sequence: each gathers the keys and values of all, and with a
    causal mask looks at those up to the end of its own piece (Llama 3, Dubey et al. 2024, section 3.3.2).
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        backend: str = "auto",
        batch_first: bool = False,
        pooled: bool = False,
        **_: object,
    ) -> None:
        super().__init__()
        self.causal, self.backend = attn_mask_type == AttnMaskType.causal, backend
        self.batch_first, self.pooled = batch_first, pooled
        self.context_group = parallel_state.get_context_parallel_group()

    def forward(self, qkv_SBHX: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        q_SBHK, k_SBHK, v_SBHK = qkv_SBHX.chunk(3, dim=-1)
        if self.context_group.size() > 1:
            seen = len(q_SBHK) * (self.context_group.rank() + 1) if self.causal else None
            k_SBHK, v_SBHK = (
                gather_from_sequence_parallel_region(each, group=self.context_group)[:seen] for each in (k_SBHK, v_SBHK)
            )
        packing = None
        if self.batch_first and mask is not None:
            packing = Packing(mask, q_SBHK.shape[1])
            (q_NHK,), (k_NHK,), (v_NHK,) = q_SBHK, k_SBHK, v_SBHK
            q_SBHK = packing.last(q_NHK).unsqueeze(1) if self.pooled else packing.unpack(q_NHK)
            k_SBHK, v_SBHK = packing.unpack(k_NHK), packing.unpack(v_NHK)
        to_BHSK = (0, 2, 1, 3) if self.batch_first else (1, 2, 0, 3)
        q, k, v = (x.permute(to_BHSK) for x in (q_SBHK, k_SBHK, v_SBHK))
        causal = self.causal and not self.pooled
        lengths_B = packing.lengths_B if packing else mask
        if causal:  # no query sees what lies behind it
            lengths_B = None
        out_BHSK = attention(q, k, v, causal=causal, key_lengths_B=lengths_B, backend=self.backend)
        out_SBHK = out_BHSK.permute((0, 2, 1, 3) if self.batch_first else (2, 0, 1, 3))
        if packing and not self.pooled:
            out_SBHK = packing.pack(out_SBHK).unsqueeze(0)
        return out_SBHK.flatten(2)


class Attention(SelfAttention):
    """Megatron-core's linear layers around our core attention: [S, B, D] -> [S, B, D], and a bias still to be added.

    Its own `forward` has rotary tables, caches and gates beside, whose Python takes time on a CPU.
    """

    def forward(
        self, hidden_SBD: torch.Tensor, mask: torch.Tensor | None = None, **_: object
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        qkv_SBX, _no_bias = self.linear_qkv(hidden_SBD)
        qkv_SBHX = qkv_SBX.unflatten(2, (self.num_attention_heads_per_partition, -1))
        if self.checkpoint_core_attention and self.training:
            attended_SBD = checkpoint(self.core_attention, False, qkv_SBHX, mask)
        else:
            attended_SBD = self.core_attention(qkv_SBHX, mask)
        output_and_bias: tuple[torch.Tensor, torch.Tensor | None] = self.linear_proj(attended_SBD)
        return output_and_bias


class ColumnLinear(ColumnParallelLinear):
    """Megatron-core's linear layer cut by outputs; where it is not cut, one product that brings its bias along."""

    def forward(self, input_: torch.Tensor, *others: Any, **named: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        if self.tp_group.size() > 1:
            return super().forward(input_, *others, **named)
        return F.linear(input_, self.weight, self.bias), None


class RowLinear(RowParallelLinear):
    """Megatron-core's linear layer cut by inputs; where it is not cut, one product that brings its bias along."""

    def forward(self, input_: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        if self.tp_group.size() > 1:
            return super().forward(input_)
        return F.linear(input_, self.weight, self.bias), None


class Layer(TransformerLayer):
    """x + attention(norm(x)), then y + mlp(norm(y)), of Megatron-core's parts.

    Its own `forward` has every other kind of layer beside this one; that takes a fifth of a millisecond of Python a
    layer on a CPU.
    """

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **_: object
    ) -> tuple[torch.Tensor, None]:
        attended = self.self_attention(self.input_layernorm(hidden_states), attention_mask)
        hidden = _added(self.residual(hidden_states, attention_mask), attended)
        return _added(hidden, self.mlp(self.pre_mlp_layernorm(hidden))), None

    def residual(self, hidden: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """What attention is added to."""
        return hidden


def _added(hidden: torch.Tensor, output_and_bias: tuple[torch.Tensor, torch.Tensor | None]) -> torch.Tensor:
    """Linear layers that are cut leave their bias to be added once the ranks' outputs are."""
    output, bias = output_and_bias
    return hidden + (output if bias is None else output + bias)


class PooledLayer(Layer):
    """A layer of which one row a caption is wanted, its last token: [1, N, D] -> [B, 1, D].

    Queries, keys and values come from one product over all tokens; attention, its output and the feed-forward part are
    of that row alone.
    """

    def residual(self, hidden: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        assert attention_mask is not None
        (hidden_ND,) = hidden
        return Packing(attention_mask, len(hidden_ND)).last(hidden_ND).unsqueeze(1)


def build_block(tower: Tower, piece: Piece, build: Build, *, causal: bool, pooled: bool = False) -> TransformerBlock:
    """A chunk of a pre-norm transformer, the last one with its final norm.

    pooled: the last layer is a `PooledLayer`, for packed tokens. Parameters are left for `initialise`.
    """
    config = TransformerConfig(
        num_layers=tower.layers,
        hidden_size=tower.width,
        num_attention_heads=tower.heads,
        ffn_hidden_size=int(tower.width * tower.mlp_ratio),
        activation_func=F.gelu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=build.tp,
        pipeline_model_parallel_size=build.pp,
        virtual_pipeline_model_parallel_size=build.vpp if build.vpp > 1 else None,
        context_parallel_size=build.cp,
        sequence_parallel=build.sequence_parallel,
        pipeline_dtype=build.dtype,
        # with vpp, other settings of these two give wrong gradients without a word
        overlap_p2p_comm=build.vpp > 1,
        batch_p2p_comm=build.vpp == 1,
        recompute_granularity=None if build.recompute == "none" else build.recompute,
        recompute_method="uniform" if build.recompute == "full" else None,
        recompute_num_layers=1 if build.recompute == "full" else None,
        params_dtype=build.dtype,
        bf16=build.dtype == torch.bfloat16,
        perform_initialization=False,
        use_cpu_initialization=True,
        # these fusions would write `main_grad`, which DeepSpeed does not read, or compile on first use
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
    )
    layers = [_layer(build, causal, pooled=False)] * (tower.layers // (build.pp * build.vpp))
    if pooled:
        layers[-1] = _layer(build, causal, pooled=True)
    return TransformerBlock(
        config,
        TransformerBlockSubmodules(layer_specs=layers, layer_norm=_norm(build)),
        pre_process=piece.first,
        post_process=piece.last,
        vp_stage=piece.chunk if build.vpp > 1 else None,
    )


def _norm(build: Build) -> ModuleSpec:
    return ModuleSpec(module=Norm, params={"backend": build.kernels.norm})


def _layer(build: Build, causal: bool, *, pooled: bool) -> ModuleSpec:
    settings = {"backend": build.kernels.attention, "batch_first": build.batch_first, "pooled": pooled}
    return ModuleSpec(
        module=PooledLayer if pooled else Layer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=_norm(build),
            self_attention=ModuleSpec(
                module=Attention,
                params={"attn_mask_type": AttnMaskType.causal if causal else AttnMaskType.no_mask},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=ColumnLinear,
                    core_attention=ModuleSpec(module=CoreAttention, params=settings),
                    linear_proj=RowLinear,
                    q_layernorm=IdentityOp,
                    k_layernorm=IdentityOp,
                ),
            ),
            pre_mlp_layernorm=_norm(build),
            mlp=ModuleSpec(module=MLP, submodules=MLPSubmodules(linear_fc1=ColumnLinear, linear_fc2=RowLinear)),
        ),
    )


def through(
    block: TransformerBlock, hidden_SBD: torch.Tensor | None, build: Build, seen: torch.Tensor | None = None
) -> torch.Tensor:
    """Hidden states after a block; None where the stage before has set them. seen: the mask of `CoreAttention`."""
    if not build.batch_first or hidden_SBD is None:
        after_SBD: torch.Tensor = block(hidden_SBD, attention_mask=seen)
        return after_SBD
    after_BSD: torch.Tensor = block(hidden_SBD.transpose(0, 1).contiguous(), attention_mask=seen)
    return after_BSD.transpose(0, 1)


def cut_sequence(hidden_SBD: torch.Tensor, build: Build) -> torch.Tensor:
    """This rank's piece of the sequence: first over the context parallel ranks, then over the tensor parallel ones."""
    if build.cp > 1:
        hidden_SBD = hidden_SBD.chunk(build.cp)[parallel_state.get_context_parallel_rank()]
    if build.sequence_parallel:
        hidden_SBD = scatter_to_sequence_parallel_region(hidden_SBD)
    return hidden_SBD if build.batch_first else hidden_SBD.contiguous()


def join_sequence(hidden_SBD: torch.Tensor, build: Build, *, context: bool = True) -> torch.Tensor:
    """Undo `cut_sequence`, for what needs the whole sequence; context=False joins tensor parallel pieces only.

    The gradient of a context parallel rank's own piece comes out `cp` times as large: it is one of cp shares of a sum
    that ZeRO will average, while what follows here has its whole gradient on every rank.
    """
    if build.sequence_parallel:
        hidden_SBD = gather_from_sequence_parallel_region(hidden_SBD, tensor_parallel_output_grad=False)
    if context and build.cp > 1:
        group = parallel_state.get_context_parallel_group()
        hidden_SBD = gather_from_sequence_parallel_region(hidden_SBD, group=group)
    return hidden_SBD


def mark_tensor_parallel(model: torch.nn.Module) -> None:
    """Say on each cut weight along which axis it is cut, as Megatron-core does only when it draws the weights itself.

    The initial draw, the gradient norm and checkpoints tell cut parameters from whole ones by these marks.
    """
    axes: tuple[tuple[type[torch.nn.Module], int], ...] = (
        (ColumnParallelLinear, 0),
        (RowParallelLinear, 1),
        (VocabParallelEmbedding, 0),
    )
    for module in model.modules():
        for kind, axis in axes:
            if isinstance(module, kind):
                set_tensor_model_parallel_attributes(module.weight, True, axis, 1)
