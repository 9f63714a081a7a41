"""What an operation stores for later steps: a tensor, a `Quantized`, or nothing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .quantized import EIGHT_BITS, Quantized


def check_store_dtype(op: str, dtype: Any, own: torch.dtype) -> None:
    """None, the dtype of the activations, or an 8-bit one."""
    if dtype is not None and dtype != own and dtype not in EIGHT_BITS:
        raise TypeError(
            f"{op}: store_dtype is {dtype}; {own}, torch.int8 and torch.float8_e4m3fn are supported: pass one or None"
        )


def stored_of(data: Tensor | None = None, scale: Tensor | None = None, *, group: int) -> Tensor | Quantized | None:
    """What is stored, from its tensors."""
    return data if data is None or scale is None else Quantized(data, scale, group)
