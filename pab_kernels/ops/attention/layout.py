"""The memory layout of attention's output: dimensions in the order of q, each token's heads and channels together.

For q in temporal order, a `[B, S, T, H, D]` view of `[B, T, S, 3, H, D]`, the output is the same view of a contiguous
`[B, T, S, H, D]`.
"""

from __future__ import annotations

import torch
from torch import Tensor


def memory_order(q: Tensor) -> list[int]:
    """The dimensions of q `[*batch, N, H, D]` from the slowest to the fastest in its memory; H and D stay last."""
    order, tokens, strides = [0], q.ndim - 2, q.stride()
    for dim in range(1, tokens):  # by insertion: in a compiled graph strides may be symbols, which cannot be sorted
        at = len(order)
        while at and strides[order[at - 1]] < strides[dim]:
            at -= 1
        order.insert(at, dim)
    return [*order, tokens, tokens + 1]


def inverse(order: list[int]) -> list[int]:
    return sorted(range(len(order)), key=order.__getitem__)


def empty_output(q: Tensor, dtype: torch.dtype, channels: int | None = None) -> Tensor:
    """Uninitialised `[*batch, N, H, channels]` in q's order, by default with q's channels."""
    order = memory_order(q)
    sizes = [*(q.shape[dim] for dim in order[:-1]), q.shape[-1] if channels is None else channels]
    return torch.empty(sizes, dtype=dtype, device=q.device).permute(inverse(order))
