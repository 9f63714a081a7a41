"""The four fused operations of pyramid attention broadcast, and the two that make and read slots of 8 and 4 bits.

Each operation is a folder: `__init__.py` (the call object with its checks, the public function, schema and FLOP
formula), `reference.py` (the definition, in plain torch) and a module for each other backend. It returns new tensors.
"""

from __future__ import annotations

from .attention import attention
from .attention.options import QKNorm, Rope
from .backend import BACKENDS, BackendError
from .broadcast_residual import broadcast_residual
from .cached_outputs import Line
from .dequantize import dequantize
from .flops import attention_flops, flop_counter, linear_flops
from .norm import Norm
from .project_residual import project_residual
from .quantize import quantize
from .quantized import Quantized, empty_quantized
from .short_attention import short_attention

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
    "broadcast_residual",
    "dequantize",
    "empty_quantized",
    "flop_counter",
    "linear_flops",
    "project_residual",
    "quantize",
    "short_attention",
]
