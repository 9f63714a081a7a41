"""The definition of `dequantize` in pure torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..dispatch import Outputs
from ..quantized import PACKED, Quantized, by_channel, group_width, unpacked

if TYPE_CHECKING:
    from . import Dequantize


def dequantize(q: Quantized, dtype: torch.dtype) -> Tensor:
    channels = q.shape[-1]
    values = unpacked(q.data, channels) if q.data.dtype == PACKED else q.data.float()
    return (values * by_channel(q.scale.float(), channels, group_width(q.group, channels))).to(dtype)


def compute(call: Dequantize) -> Outputs:
    return (dequantize(*call),)
