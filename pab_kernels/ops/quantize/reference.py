"""The definition of `quantize` in pure torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch import Outputs
from ..quantized import FORMATS, INT4, Quantized, by_channel, group_width, packed

if TYPE_CHECKING:
    from . import Quantize


def quantize(x: Tensor, dtype: torch.dtype, group: int) -> Quantized:
    used, channels = FORMATS[dtype], x.shape[-1]
    width = group_width(group, channels)
    groups, ragged = -(-channels // width), channels % width != 0
    x = x.float().contiguous()
    padded = F.pad(x, (0, groups * width - channels)) if ragged else x
    grouped = padded.unflatten(-1, (groups, width))  # [..., groups, width]
    if dtype == INT4:
        low, high = torch.aminmax(grouped, dim=-1)
        scale = (torch.where(high > -low, high, low) / used.least).to(used.scale)
        factor = (1 / scale.float()).masked_fill(scale.float().abs() < torch.finfo(torch.float32).tiny, 0)
        apply: Callable[..., Tensor] = torch.mul
    else:
        scale = grouped.abs().amax(-1) / used.most
        factor, apply = scale.masked_fill(scale == 0, 1), torch.div
    if ragged and torch.compiler.is_compiling():  # see by_channel
        data = apply(x, by_channel(factor, channels, width))
    else:
        data = apply(grouped, factor.unsqueeze(-1)).flatten(-2)
    if not dtype.is_floating_point:
        data = data.round()
    # Where the scale is subnormal, the quotient can exceed the limit, and a cast to int8 wraps around.
    data = data.clamp(used.least, used.most)[..., :channels]
    if dtype == INT4:
        return Quantized(packed(data.to(torch.int8)), scale, group, channels)
    return Quantized(data.to(dtype).contiguous(), scale, group, channels)


def compute(call: Quantize) -> Outputs:
    return (quantize(*call),)
