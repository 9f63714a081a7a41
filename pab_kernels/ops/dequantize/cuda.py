"""`dequantize` in CUDA: csrc/quantize.cu, bit for bit the reference."""

from __future__ import annotations

import torch

from ..cuda_library import kernel, refuse, rows
from ..dispatch import Outputs
from ..quantized import group_width, refuse_four_bits
from . import Dequantize

_kernel = kernel("dequantize", "Tensor data, Tensor scale, int group, Tensor(a!) out")


def refusal(call: Dequantize) -> str | None:
    """Why this kernel cannot serve; None where it can."""
    if call.dtype == torch.float64:
        return "dtype is torch.float64; float16, bfloat16 and float32 are supported"
    return refuse_four_bits("q", call.q.dtype) or refuse(call.q.data)


def launch(call: Dequantize, outputs: Outputs) -> None:
    """Write the output."""
    q, (out,) = call.q, outputs
    if out.numel() == 0:
        return
    _kernel(rows(q.data), rows(q.scale), group_width(q.group, q.shape[-1]), out)
