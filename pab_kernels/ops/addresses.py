"""Addresses of tokens, for Triton kernels over operands whose leading dimensions are strided and broadcast in any way.

On the host, leading dimensions that all operands traverse alike are merged. In the kernel, a token's number becomes an
index into the remaining dimensions, and the index an offset into each operand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import triton
import triton.language as tl
from torch import Tensor

from .strides import UNIT

Layout = tuple[tuple[int, ...], tuple[int, ...]]
"""Shape and strides of a tensor; `ABSENT` for None."""

ABSENT: Layout = ((1,), (1,))


@triton.jit
def index_of(token, sizes):
    """The index of these tokens in leading dimensions of these sizes, in 64 bits."""
    index: tl.tuple = ()
    for dim in tl.static_range(len(sizes) - 1, 0, -1):
        index = ((token % sizes[dim]).to(tl.int64),) + index
        token = token // sizes[dim]
    return (token.to(tl.int64),) + index


@triton.jit
def offset_of(index, strides):
    """The offset at `index`, in the unit of the strides."""
    offset = index[0] * strides[0]
    for dim in tl.static_range(1, len(strides)):
        offset += index[dim] * strides[dim]
    return offset


def layout(t: Tensor | None) -> Layout:
    return ABSENT if t is None else (t.shape, t.stride())


def broadcast(dims: int, operand: Layout) -> tuple[int, ...]:
    """Strides of an operand broadcast to this many leading dimensions: 0 where it has none or one element."""
    own = tuple(0 if size == 1 else stride for size, stride in zip(operand[0][:-1], operand[1][:-1], strict=True))
    return (0,) * (dims - len(own)) + own


def collapsed(
    sizes: Sequence[int], operands: Sequence[tuple[int, ...]]
) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
    """The fewest leading dimensions, at least one, for operands with these strides: sizes, and strides by operand."""
    dims: list[tuple[int, tuple[int, ...]]] = []
    for size, strides in zip(sizes, zip(*operands, strict=True), strict=True):
        if dims and all(outer == size * inner for outer, inner in zip(dims[-1][1], strides, strict=True)):
            dims[-1] = (dims[-1][0] * size, strides)
        elif size != 1:
            dims.append((size, strides))
    if not dims:
        dims.append((1, (0,) * len(operands)))
    return tuple(size for size, _ in dims), list(zip(*(strides for _, strides in dims), strict=True))


@dataclass(frozen=True)
class Addresses:
    """Sizes of the merged leading dimensions and strides over them: operands' in units, slot scales' in elements."""

    sizes: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]
    slot_scale_strides: tuple[tuple[int, ...], ...]
    unit: int


@lru_cache(maxsize=4096)  # the blocks of a model repeat them
def addresses(sizes: tuple[int, ...], operands: tuple[Layout, ...], slot_scales: tuple[Layout, ...]) -> Addresses:
    """Where the operands of a call are."""
    fewest, strides = collapsed(sizes, [broadcast(len(sizes), operand) for operand in operands + slot_scales])
    counted, slot_scale_strides = strides[: len(operands)], tuple(strides[len(operands) :])
    unit = 1 if any(stride % UNIT for t in counted for stride in t) else UNIT
    return Addresses(fewest, tuple(tuple(stride // unit for stride in t) for t in counted), slot_scale_strides, unit)
