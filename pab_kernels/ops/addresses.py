"""Where the tokens of operands lie, whose leading dimensions may be strided and broadcast in any way: for Triton
kernels over tokens.

On the host the leading dimensions that all operands walk through alike are joined. In the kernel a token's number
becomes an index into those that are left, and the index an offset into each operand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import triton
import triton.language as tl
from torch import Tensor

UNIT = 8
"""Elements that strides are counted in where all are multiples of it: then accesses of 16 bytes are possible, whatever
the strides are.

The compiler knows of a number that it is divisible by 16, or nothing: a row stride of 136 elements as such would cost
the alignment.
"""

Layout = tuple[tuple[int, ...], tuple[int, ...]]
"""Shape and strides of a tensor; `ABSENT` of None."""

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
    """The offset of the tokens at `index`, in what the strides count."""
    offset = index[0] * strides[0]
    for dim in tl.static_range(1, len(strides)):
        offset += index[dim] * strides[dim]
    return offset


def layout(t: Tensor | None) -> Layout:
    return ABSENT if t is None else (t.shape, t.stride())


def broadcast(dims: int, operand: Layout) -> tuple[int, ...]:
    """Strides of an operand broadcast to so many leading dimensions: 0 along those that it lacks or has once."""
    own = tuple(0 if size == 1 else stride for size, stride in zip(operand[0][:-1], operand[1][:-1], strict=True))
    return (0,) * (dims - len(own)) + own


def collapsed(
    sizes: Sequence[int], operands: Sequence[tuple[int, ...]]
) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
    """The fewest leading dimensions, at least one, that serve operands with these strides: their sizes, and each
    operand's strides."""
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
    """Sizes of the collapsed leading dimensions, and strides over them: of operands in units, of 8-bit slots' scales in
    elements."""

    sizes: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]
    slot_scale_strides: tuple[tuple[int, ...], ...]
    unit: int


@lru_cache(maxsize=4096)  # a model's blocks repeat them
def addresses(sizes: tuple[int, ...], operands: tuple[Layout, ...], slot_scales: tuple[Layout, ...]) -> Addresses:
    """Where the operands of a call are."""
    fewest, strides = collapsed(sizes, [broadcast(len(sizes), operand) for operand in operands + slot_scales])
    counted, slot_scale_strides = strides[: len(operands)], tuple(strides[len(operands) :])
    unit = 1 if any(stride % UNIT for t in counted for stride in t) else UNIT
    return Addresses(fewest, tuple(tuple(stride // unit for stride in t) for t in counted), slot_scale_strides, unit)
