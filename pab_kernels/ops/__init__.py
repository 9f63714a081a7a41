"""The four fused operations of pyramid attention broadcast, and the 8-bit slots that they read and write.

Each operation is a folder: `__init__.py` (public function, checks, schema, fake, FLOP formula) and `reference.py` (pure torch: the
definition). Each has a form that returns new tensors and a form, `<op>_out`, that writes to the tensors it is given.
"""

from __future__ import annotations

from .attention import attention, attention_out
from .attention.options import QKNorm, Rope
from .backend import BACKENDS, BackendError
from .broadcast_residual import broadcast_residual, broadcast_residual_out
from .flops import attention_flops, flop_counter, linear_flops
from .norm import Norm
from .project_residual import project_residual, project_residual_out
from .quantize import Quantized, dequantize, empty_quantized, quantize
from .short_attention import short_attention, short_attention_out

__all__ = [
    "BACKENDS",
    "BackendError",
    "Norm",
    "QKNorm",
    "Quantized",
    "Rope",
    "attention",
    "attention_flops",
    "attention_out",
    "broadcast_residual",
    "broadcast_residual_out",
    "dequantize",
    "empty_quantized",
    "flop_counter",
    "linear_flops",
    "project_residual",
    "project_residual_out",
    "quantize",
    "short_attention",
    "short_attention_out",
]
