"""Strides of q, k, v and what is written, `[*batch, N, H, D]`, as attention's kernels take them."""

from __future__ import annotations

from torch import Tensor

UNIT = 8
"""Elements that strides are counted in where all are multiples of it: then accesses of 16 bytes are possible, whatever
the strides are.

The compiler knows of a number that it is divisible by 16, or nothing: a head stride of 72 elements as such would cost
the alignment.
"""


def unit_of(*tensors: Tensor | None) -> int:
    """`UNIT` where the strides of all the tensors but their last are multiples of it, else 1."""
    strides = [stride for t in tensors if t is not None for stride in _real(t)[:-1]]
    return 1 if any(stride % UNIT for stride in strides) else UNIT


def aligned(t: Tensor) -> bool:
    """Whether each head of each token begins at a multiple of 16 bytes; t has a half dtype."""
    return unit_of(t) == UNIT and t.data_ptr() % (UNIT * t.element_size()) == 0


def head_strides(t: Tensor | None, unit: int = 1) -> tuple[int, ...]:
    """Strides over the first batch dimension (0 if there is one only), the second, tokens and heads of `[*batch, N, H,
    D]`, in units."""
    if t is None:
        return (0, 0, 0, 0)
    strides = [stride // unit for stride in _real(t)[:-1]]
    return (*(0,) * (4 - len(strides)), *strides)


def _real(t: Tensor) -> list[int]:
    """Its strides, 0 in dimensions of size 1, where they mean nothing."""
    return [0 if size == 1 else stride for size, stride in zip(t.shape, t.stride(), strict=True)]
