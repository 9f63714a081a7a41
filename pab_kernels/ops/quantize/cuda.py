"""`quantize` in CUDA: csrc/quantize.cu, bit for bit the reference."""

from __future__ import annotations

import torch

from ..cuda_library import kernel, refuse, rows
from ..dispatch import Outputs
from ..quantized import group_width, refuse_four_bits
from . import Quantize

MAX_GROUP = 128
"""Channels that a team of 16 lanes holds in registers."""

_kernel = kernel("quantize", "Tensor x, int group, Tensor(a!) data, Tensor(b!) scale")


def refusal(call: Quantize) -> str | None:
    """Why this kernel cannot serve; None where it can."""
    if call.x.dtype == torch.float64:
        return "x is torch.float64; float16, bfloat16 and float32 are supported"
    if (width := group_width(call.group, call.x.shape[-1])) > MAX_GROUP:
        return f"a group has {width} channels; up to {MAX_GROUP} are supported"
    return refuse_four_bits("dtype", call.dtype) or refuse(call.x)


def launch(call: Quantize, outputs: Outputs) -> None:
    """Write the output."""
    x, (out,) = call.x, outputs
    if x.numel():
        _kernel(rows(x), group_width(call.group, x.shape[-1]), out.data, out.scale)
