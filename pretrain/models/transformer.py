"""The transformer of every tower: Megatron-core's block with our norm and our core attention.

Megatron-core brings the tensor parallel linear layers, the residual structure and recomputation; the two parts where
our kernels run come in through the layer spec. Nothing here knows how many ranks there are.

Axes: S sequence, B batch, H heads of this rank, K size of a head, D width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
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
from pretrain.config import Tower


class Norm(torch.nn.Module):
    """Layer norm over the last axis, through our kernel; built by Megatron-core for every norm of a block."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.bias = torch.nn.Parameter(torch.zeros(hidden_size, dtype=config.params_dtype))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return layer_norm(hidden, self.weight, self.bias, self.eps)


class CoreAttention(torch.nn.Module):
    """softmax(q k^T / sqrt(K)) v, through our kernel. `attention_mask`: how many keys [B] to look at, or None."""

    def __init__(self, config: TransformerConfig, layer_number: int, attn_mask_type: AttnMaskType, **_: object) -> None:
        super().__init__()
        self.causal = attn_mask_type == AttnMaskType.causal

    def forward(
        self,
        q_SBHK: torch.Tensor,
        k_SBHK: torch.Tensor,
        v_SBHK: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **_: object,
    ) -> torch.Tensor:
        q, k, v = (x.permute(1, 2, 0, 3) for x in (q_SBHK, k_SBHK, v_SBHK))
        out_BHSK = attention(q, k, v, causal=self.causal, key_lengths_B=attention_mask)
        return out_BHSK.permute(2, 0, 1, 3).flatten(2)


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


def build_block(tower: Tower, *, causal: bool, tp: int, dtype: torch.dtype) -> TransformerBlock:
    """A pre-norm transformer with a final norm: [S, B, D] -> [S, B, D]. Parameters are left for `initialise`."""
    config = TransformerConfig(
        num_layers=tower.layers,
        hidden_size=tower.width,
        num_attention_heads=tower.heads,
        ffn_hidden_size=int(tower.width * tower.mlp_ratio),
        activation_func=F.gelu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=tp,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        perform_initialization=False,
        use_cpu_initialization=True,
        # these fusions would write `main_grad`, which DeepSpeed does not read, or compile on first use
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
    )
    layer = ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=Norm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal if causal else AttnMaskType.no_mask},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=ColumnLinear,
                    core_attention=CoreAttention,
                    linear_proj=RowLinear,
                    q_layernorm=IdentityOp,
                    k_layernorm=IdentityOp,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=Norm,
            mlp=ModuleSpec(module=MLP, submodules=MLPSubmodules(linear_fc1=ColumnLinear, linear_fc2=RowLinear)),
            mlp_bda=get_bias_dropout_add,
        ),
    )
    return TransformerBlock(
        config, TransformerBlockSubmodules(layer_specs=[layer] * tower.layers, layer_norm=Norm), post_layer_norm=True
    )


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
