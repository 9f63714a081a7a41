"""FLOPs: `2 M N K` for a GEMM, `4 B H N M D` for attention, 0 for everything else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode


def linear_flops(tokens: int, c_in: int, c_out: int) -> int:
    """FLOPs of a linear layer `[tokens, c_in] -> [tokens, c_out]`.

    Args:
        tokens: of all batch rows.
        c_in, c_out: channels.

    Returns:
        2 tokens c_in c_out.
    """
    return 2 * tokens * c_in * c_out


def attention_flops(batch: int, heads: int, queries: int, keys: int, head_dim: int) -> int:
    """FLOPs of the two GEMMs of attention, over all keys, masked or not.

    Args:
        batch, heads, queries, keys, head_dim: B, H, N, M and D.

    Returns:
        4 B H N M D.
    """
    return 4 * batch * heads * queries * keys * head_dim


def _cpu_sdpa_flops(query: Sequence[int], key: Sequence[int], *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    batch, heads, queries, head_dim = query
    return attention_flops(batch, heads, queries, key[2], head_dim)


def flop_counter() -> FlopCounterMode:
    """A silent `FlopCounterMode` that counts the operations of this package and, unlike torch's, SDPA on CPUs.

    The totals are the same on the CPU and on the meta device, for public functions in eager mode and for registered
    operations.

    Returns:
        The counter, a context manager.

    Example:
        >>> from pab_kernels.ops import attention
        >>> with flop_counter() as counter:
        ...     _ = attention(*torch.randn(3, 1, 5, 2, 32))
        >>> counter.get_total_flops() == attention_flops(1, 2, 5, 5, 32)
        True
    """
    return FlopCounterMode(
        display=False, custom_mapping={torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _cpu_sdpa_flops}
    )
