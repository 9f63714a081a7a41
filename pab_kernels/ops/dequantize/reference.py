"""The definition of `dequantize` in pure torch."""

from __future__ import annotations

import torch
from torch import Tensor

from ..quantize.quantized import Quantized, by_channel, group_width
from ..registration import not_recorded


def dequantize(q: Quantized, dtype: torch.dtype) -> Tensor:
    channels = q.data.shape[-1]
    return (q.data.float() * by_channel(q.scale, channels, group_width(q.group, channels))).to(dtype)


@not_recorded
def dequantize_out(q: Quantized, dtype: torch.dtype, out: Tensor) -> None:
    out.copy_(dequantize(q, dtype))
