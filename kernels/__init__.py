"""Fused operations of the training stack: one op a file, formula and source in its docstring.

Ground floor: torch only (and Triton, where a kernel is written in it); imports nothing else of weft.
"""

from kernels.attention import attention
from kernels.contrastive import contrastive_loss, sigmoid_loss
from kernels.norm import layer_norm

__all__ = ["attention", "contrastive_loss", "layer_norm", "sigmoid_loss"]
