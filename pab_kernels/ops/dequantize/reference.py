"""The definition of `dequantize` in pure torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..dispatch import Outputs
from ..quantized import Quantized, by_channel, group_width

if TYPE_CHECKING:
    from . import Dequantize


def dequantize(q: Quantized, dtype: torch.dtype) -> Tensor:
    channels = q.data.shape[-1]
    return (q.data.float() * by_channel(q.scale, channels, group_width(q.group, channels))).to(dtype)


def compute(call: Dequantize) -> Outputs:
    return (dequantize(*call),)
