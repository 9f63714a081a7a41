"""The definition of `quantize` in pure torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..registration import not_recorded
from .quantized import LIMITS, Quantized, group_width


def quantize(x: Tensor, dtype: torch.dtype, group: int) -> Quantized:
    limit, channels = LIMITS[dtype], x.shape[-1]
    width = group_width(group, channels)
    groups = -(-channels // width)
    grouped = F.pad(x.float(), (0, groups * width - channels)).unflatten(-1, (groups, width))  # [..., groups, width]
    scale = grouped.abs().amax(-1) / limit
    data = grouped / scale.masked_fill(scale == 0, 1).unsqueeze(-1)
    if dtype == torch.int8:
        data = data.round()
    # Where scale is subnormal the quotient can pass the limit, and a cast to int8 wraps around.
    data = data.clamp(-limit, limit).flatten(-2)[..., :channels]
    return Quantized(data.to(dtype).contiguous(), scale, group)


@not_recorded
def quantize_out(x: Tensor, dtype: torch.dtype, group: int, out: Quantized) -> None:
    q = quantize(x, dtype, group)
    out.data.copy_(q.data)
    out.scale.copy_(q.scale)
