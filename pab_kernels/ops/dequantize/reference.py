"""The definition of `dequantize` in pure torch."""

from __future__ import annotations

import torch
from torch import Tensor

from ..quantize.quantized import Quantized, group_width
from ..registration import not_recorded


def dequantize(q: Quantized, dtype: torch.dtype) -> Tensor:
    width = group_width(q.group, q.shape[-1])
    scale = q.scale.unsqueeze(-1).expand(*q.scale.shape, width).flatten(-2)[..., : q.shape[-1]]
    return (q.data.float() * scale).to(dtype)


@not_recorded
def dequantize_out(q: Quantized, dtype: torch.dtype, out: Tensor) -> None:
    out.copy_(dequantize(q, dtype))
