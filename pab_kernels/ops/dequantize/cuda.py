"""`dequantize` in CUDA: csrc/quantize.cu, bit for bit the reference."""

from __future__ import annotations

import torch
from torch import Tensor

from ..cuda_library import kernel, refuse, rows
from ..quantize.quantized import Quantized, group_width

_kernel = kernel("dequantize", "Tensor data, Tensor scale, int group, Tensor(a!) out")


def refusal(q: Quantized, dtype: torch.dtype) -> str | None:
    """Why this kernel cannot serve; None where it can."""
    if dtype == torch.float64:
        return "dtype is torch.float64; float16, bfloat16 and float32 are supported"
    return refuse(q.data)


def dequantize(q: Quantized, dtype: torch.dtype) -> Tensor:
    out = torch.empty(q.shape, dtype=dtype, device=q.device)
    dequantize_out(q, dtype, out)
    return out


def dequantize_out(q: Quantized, dtype: torch.dtype, out: Tensor) -> None:
    if out.numel() == 0:
        return
    written = rows(out)
    _kernel(rows(q.data), rows(q.scale), group_width(q.group, q.shape[-1]), written)
    if written is not out and written.data_ptr() != out.data_ptr():  # its rows have no common stride
        out.copy_(written.view(out.shape))
