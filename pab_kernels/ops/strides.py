"""Strides as kernels take them: in units that keep accesses of 16 bytes possible."""

from __future__ import annotations

import torch
from torch import Tensor

UNIT = 8
"""Elements in which strides are counted where all are multiples of it.

The compiler knows of a number only whether 16 divides it: strides of 72 or 136 elements as such would cost the
alignment of 16-byte accesses.
"""


def unit_of(*tensors: Tensor) -> int:
    """`UNIT` where all strides of the tensors but their last are multiples of it, else 1."""
    return 1 if any(stride % UNIT for t in tensors for stride in _strides(t)) else UNIT


def stored_unit(stored: Tensor | None) -> int:
    """In which strides of a slot of heads in multiples of 8 channels are counted: two values of 4 bits share a byte."""
    return UNIT // 2 if stored is not None and stored.dtype == torch.uint8 else UNIT


def aligned(t: Tensor) -> bool:
    """Whether each head of each token of a tensor in half precision begins at a multiple of 16 bytes."""
    return unit_of(t) == UNIT and t.data_ptr() % (UNIT * t.element_size()) == 0


def head_strides(t: Tensor | None, unit: int = 1) -> tuple[int, ...]:
    """Strides of `[*batch, N, H, D]` in units: first batch dimension (0 if missing), second, tokens, heads."""
    if t is None:
        return (0, 0, 0, 0)
    strides = [stride // unit for stride in _strides(t)]
    return (*(0,) * (4 - len(strides)), *strides)


def _strides(t: Tensor) -> list[int]:
    """All strides but the last, 0 in dimensions of size 1, where they mean nothing."""
    return [0 if size == 1 else stride for size, stride in zip(t.shape[:-1], t.stride()[:-1], strict=True)]
