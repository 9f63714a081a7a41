"""What an operation stores for later steps: a tensor, a `Quantized`, or nothing; flattened to tensors for torch's schemas."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .checks import check_output
from .quantize import EIGHT_BITS, Quantized, check_quantized

STORED_OUTPUTS = ("Tensor(b!)? stored_out", "Tensor(c!)? stored_scale_out")
"""The schema of a stored output that is written."""


def check_store_dtype(op: str, dtype: Any, own: torch.dtype) -> None:
    """None, the dtype of the activations, or an 8-bit one."""
    if dtype is not None and dtype != own and dtype not in EIGHT_BITS:
        raise TypeError(f"{op}: store_dtype is {dtype}; {own}, torch.int8 and torch.float8_e4m3fn are supported: pass one of these or None")


def check_stored_out(op: str, stored: Any, shape: Sequence[int], group: int, like: Tensor) -> torch.dtype:
    """A place for an output of this shape, in `like`'s dtype or 8 bits; returns which."""
    if isinstance(stored, Quantized):
        check_quantized(op, "stored_out", stored, shape, group, like.device, output=True)
        return stored.data.dtype
    check_output(op, "stored_out", stored, shape, like.dtype, like.device)
    return like.dtype


def flatten_stored(stored: Tensor | Quantized | None) -> tuple[Tensor | None, Tensor | None]:
    """Data and scale."""
    return (stored.data, stored.scale) if isinstance(stored, Quantized) else (stored, None)


def named_stored(stored: Tensor | Quantized | None) -> tuple[tuple[str, Tensor | None], ...]:
    """What is written of a stored output, by name."""
    if isinstance(stored, Quantized):
        return ("stored_out.data", stored.data), ("stored_out.scale", stored.scale)
    return (("stored_out", stored),)


def unflatten_stored(data: Tensor | None, scale: Tensor | None, group: int) -> Tensor | Quantized | None:
    return data if data is None or scale is None else Quantized(data, scale, group)


def copy_stored(source: Tensor | Quantized | None, target: Tensor | Quantized | None) -> None:
    """Write one over the other; both are of one kind."""
    for read, written in zip(flatten_stored(source), flatten_stored(target), strict=True):
        if read is not None and written is not None:
            written.copy_(read)
