"""`short_attention`: self attention over sequences of up to 64 tokens by the hundred thousand, as temporal attention
has them.

What it computes is `attention` without key lengths. It is an operation of its own for its kernel, which is bound by
bytes, not by FLOPs: it packs many sequences into a tile, where `attention` gives every sequence and head a tile, mostly
of padding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..attention import Attention, count_flops
from ..attention.options import OPTIONS_SCHEMA, QKNorm, Rope
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
            raise ValueError(
                f"{op}: {queries} queries and {keys} keys came; equal numbers up to {MAX_TOKENS} are supported: call "
                "attention"
            )

    def flatten(self) -> tuple[Any, ...]:
        q, k, v, _, *options = super().flatten()
        return q, k, v, *options

    @classmethod
    def unflatten(cls, *flat: Any) -> Attention:
        return super().unflatten(*flat[:3], None, *flat[3:])


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
        3. stored = out, quantised with a scale a head if store_dtype has 8 bits

    Memory: 8 bytes a channel and token in bf16. Rounding, memory order and autograd are those of `attention`.

    Args:
        q, k, v: `[*batch, N, H, D]`, N <= 64; otherwise as `attention`.
        softmax_scale, q_norm, k_norm, rope, store_dtype, backend: as `attention`.

    Returns:
        As `attention`.

    Raises:
        TypeError, ValueError: an argument is not of this kind.
        BackendError: `backend` cannot serve.
    """
    out, stored = run(OP, ShortAttention(q, k, v, softmax_scale, None, q_norm, k_norm, rope, store_dtype), backend)
    return out, stored


register(
    OP,
    ShortAttention,
    f"Tensor q, Tensor k, Tensor v, {OPTIONS_SCHEMA}, ScalarType? store_dtype",
    compute,
    count_flops,
)
