"""Where attention's output lies in memory: dimensions in the order that q has, each token's heads and channels together.

For q in temporal order, a `[B, S, T, H, D]` view of `[B, T, S, 3, H, D]`, the output is the same view of a contiguous `[B, T, S, H, D]`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..quantize import Quantized


def memory_order(q: Tensor) -> list[int]:
    """The dimensions of q `[*batch, N, H, D]` from the slowest to the fastest in its memory; H and D stay last."""
    tokens = q.ndim - 2
    return [*sorted(range(tokens), key=q.stride, reverse=True), tokens, tokens + 1]


def inverse(order: list[int]) -> list[int]:
    return sorted(range(len(order)), key=order.__getitem__)


def empty_output(q: Tensor, dtype: torch.dtype, channels: int) -> Tensor:
    """Uninitialised `[*batch, N, H, channels]` in q's order."""
    order = memory_order(q)
    sizes = [q.shape[dim] for dim in order[:-1]]
    return torch.empty([*sizes, channels], dtype=dtype, device=q.device).permute(inverse(order))


def empty_outputs(q: Tensor, store_dtype: torch.dtype | None) -> tuple[Tensor, Tensor | Quantized | None]:
    """Uninitialised output of attention and what is kept of it, in q's order."""
    head_dim = q.shape[-1]
    out = empty_output(q, q.dtype, head_dim)
    if store_dtype is None:
        return out, None
    stored = empty_output(q, store_dtype, head_dim)
    return out, stored if store_dtype == q.dtype else Quantized(stored, empty_output(q, torch.float32, 1), head_dim)
