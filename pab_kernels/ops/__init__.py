"""The four fused operations of pyramid attention broadcast, and the two that make and read 8-bit slots.

Each operation is a folder: `__init__.py` (the object that holds a call, with its checks; the public functions; schema
and FLOP formula) and `reference.py` (pure torch: the definition). Each has a form that returns new tensors and a form,
`<op>_out`, that writes to the tensors it is given.
"""

from __future__ import annotations

from .attention import attention, attention_out
from .attention.options import QKNorm, Rope
from .backend import BACKENDS, BackendError
from .broadcast_residual import broadcast_residual, broadcast_residual_out
from .cached_outputs import Line
from .dequantize import dequantize, dequantize_out
from .flops import attention_flops, flop_counter, linear_flops
from .norm import Norm
from .project_residual import project_residual, project_residual_out
from .quantize import quantize, quantize_out
from .quantized import Quantized, empty_quantized
from .short_attention import short_attention, short_attention_out

__all__ = [
    "BACKENDS",
    "BackendError",
    "Line",
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
    "dequantize_out",
    "empty_quantized",
    "flop_counter",
    "linear_flops",
    "project_residual",
    "project_residual_out",
    "quantize",
    "quantize_out",
    "short_attention",
    "short_attention_out",
]
