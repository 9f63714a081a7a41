"""The definition of `dequantize` in pure torch."""

from __future__ import annotations

import torch
from torch import Tensor

from ..quantize.quantized import Quantized


def dequantize(q: Quantized, dtype: torch.dtype) -> Tensor:
    scale = q.scale.unsqueeze(-1).expand(*q.scale.shape, q.group).flatten(-2)[..., : q.shape[-1]]
    return (q.data.float() * scale).to(dtype)


@torch.no_grad()
def dequantize_out(q: Quantized, dtype: torch.dtype, out: Tensor) -> None:
    out.copy_(dequantize(q, dtype))
