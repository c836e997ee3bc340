"""Fused operations of the training stack: one op a file, formula and source in its docstring.

Ground floor: torch only (and Triton, when a kernel of it runs); imports nothing else of weft.
"""

from kernels.activation import bias_gelu, swiglu
from kernels.attention import attention
from kernels.contrastive import contrastive_loss, sigmoid_loss
from kernels.dispatch import why
from kernels.linear_cross_entropy import linear_cross_entropy
from kernels.norm import layer_norm, rms_norm
from kernels.patch_dropout import patch_dropout
from kernels.rotary import rotary

__all__ = [
    "attention",
    "bias_gelu",
    "contrastive_loss",
    "layer_norm",
    "linear_cross_entropy",
    "patch_dropout",
    "rms_norm",
    "rotary",
    "sigmoid_loss",
    "swiglu",
    "why",
]
