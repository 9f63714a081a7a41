"""What an operation stores for later steps: a tensor, a `Quantized`, or nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .checks import check_output
from .quantized import EIGHT_BITS, Quantized, check_quantized

STORED_OUT = "Tensor(b!)? stored_out, Tensor(c!)? stored_scale_out"
"""The schema of a stored output that is written."""


def check_store_dtype(op: str, dtype: Any, own: torch.dtype) -> None:
    """None, the dtype of the activations, or an 8-bit one."""
    if dtype is not None and dtype != own and dtype not in EIGHT_BITS:
        raise TypeError(
            f"{op}: store_dtype is {dtype}; {own}, torch.int8 and torch.float8_e4m3fn are supported: pass one of these "
            "or None"
        )


def check_stored_out(op: str, stored: Any, shape: Sequence[int], group: int, like: Tensor) -> None:
    """A place for an output of this shape, in `like`'s dtype or 8 bits."""
    if isinstance(stored, Quantized):
        check_quantized(op, "stored_out", stored, shape, group, like.device, output=True)
    else:
        check_output(op, "stored_out", stored, shape, like.dtype, like.device)


def dtype_of_stored(stored: Any) -> torch.dtype | None:
    """The 8-bit dtype of a place, or None: it is then in the dtype of the activations, or is refused when it is
    checked."""
    dtype = getattr(stored.data, "dtype", None) if isinstance(stored, Quantized) else None
    return dtype if dtype in EIGHT_BITS else None


def stored_of(tensors: Sequence[Tensor | None], group: int) -> Tensor | Quantized | None:
    """What is stored, from its data and scale, as far as there are any."""
    data, scale = (*tensors, None, None)[:2]
    return data if data is None or scale is None else Quantized(data, scale, group)
