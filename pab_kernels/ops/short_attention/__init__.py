"""`short_attention`: self attention over very many sequences of up to 64 tokens, such as the frames of a video.

It computes `attention` without key lengths. It is a separate operation for its kernels, which are limited by memory
bandwidth: they pack many sequences into a tile, where `attention` would give each a tile of mostly padding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..attention import Attention, count_flops
from ..attention.options import SCHEMA, QKNorm, Rope
from ..attention.reference import compute
from ..dispatch import run
from ..quantized import Quantized
from ..registration import register

OP = "short_attention"
MAX_TOKENS = 64


class ShortAttention(Attention):
    """A call of `short_attention`: one of `attention` that has no key lengths."""

    __slots__ = ()

    def check(self, op: str) -> None:
        super().check(op)
        queries, keys = self.q.shape[-3], self.k.shape[-3]
        if queries > MAX_TOKENS or keys != queries:
            supported = f"equal numbers up to {MAX_TOKENS} are supported"
            raise ValueError(f"{op}: got {queries} queries and {keys} keys; {supported}: call attention")


def short_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    softmax_scale: float | None = None,
    q_norm: QKNorm | None = None,
    k_norm: QKNorm | None = None,
    rope: Rope | None = None,
    store_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | Quantized | None]:
    """`attention` of many short sequences: N tokens, at most 64, each attending to all N.

        1. q = rope(q_norm(q)); k = rope(k_norm(k))
        2. out = softmax(softmax_scale q k^T) v per head
        3. stored = out, quantised as in `attention`

    Memory traffic: 8 bytes a channel and token in bf16. For rounding, memory order and autograd see `attention`.

    Args:
        q, k, v: `[*batch, N, H, D]`, N <= 64; otherwise as `attention`.
        softmax_scale, q_norm, k_norm, rope, store_dtype, backend: as `attention`.

    Returns:
        As `attention`.

    Raises:
        TypeError, ValueError: an argument is not supported.
        BackendError: the backend cannot serve the call.

    Example:
        >>> qkv = torch.randn(1, 5, 12, 3, 4, 32)  # [B, T, S, 3, H, D]: 12 places attend over 5 frames
        >>> out, _ = short_attention(*(qkv.select(3, i).transpose(1, 2) for i in range(3)))
    """
    out, stored = run(OP, ShortAttention(q, k, v, softmax_scale, None, q_norm, k_norm, rope, store_dtype), backend)
    return out, stored


register(
    OP,
    ShortAttention,
    SCHEMA,
    compute,
    count_flops,
)
