"""`attention`: self and cross attention from the packed projection, with QK-norm, rotary embedding and key lengths."""

from __future__ import annotations

from collections.abc import Sequence
from math import log, prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checks import check_number
from ..dispatch import Outputs, run
from ..flops import attention_flops
from ..quantized import FORMATS, Quantized, check_store_dtype, head_group, stored_of, width_of
from ..registration import register
from . import options, reference
from .layout import empty_output
from .options import QKNorm, Rope

OP = "attention"


class Attention(NamedTuple):
    """A call of `attention`; its outputs are out and the stored copy."""

    q: Tensor
    k: Tensor
    v: Tensor
    softmax_scale: float | None = None
    key_lengths: Tensor | None = None
    q_norm: QKNorm | None = None
    k_norm: QKNorm | None = None
    rope: Rope | None = None
    store_dtype: torch.dtype | None = None

    @property
    def log2_scale(self) -> float:
        """The scale of scores whose softmax is in powers of two: `softmax_scale log2(e)`."""
        return (self.q.shape[-1] ** -0.5 if self.softmax_scale is None else self.softmax_scale) / log(2)

    def check(self, op: str) -> None:
        q, k, v, softmax_scale, key_lengths, q_norm, k_norm, rope, store_dtype = self
        options.check_qkv(op, q, k, v)
        if softmax_scale is not None:
            check_number(op, "softmax_scale", softmax_scale)
        if q_norm is not None:
            options.check_qk_norm(op, "q_norm", q_norm, q)
        if k_norm is not None:
            options.check_qk_norm(op, "k_norm", k_norm, k)
        if rope is not None:
            options.check_rope(op, rope, q)
        if key_lengths is not None:
            options.check_key_lengths(op, key_lengths, q)
        check_store_dtype(op, store_dtype, q.dtype)

    def flatten(self) -> tuple[Any, ...]:
        q, k, v, softmax_scale, key_lengths, q_norm, k_norm, rope, store_dtype = self
        tables = (None, None, False) if rope is None else (rope.cos, rope.sin, rope.interleaved)
        norms = *options.flatten_qk_norm(q_norm), *options.flatten_qk_norm(k_norm)
        return q, k, v, key_lengths, softmax_scale, *norms, *tables, store_dtype

    @classmethod
    def unflatten(cls, *flat: Any) -> Attention:
        q, k, v, key_lengths, softmax_scale, *norm_arguments, cos, sin, interleaved, store_dtype = flat
        rope = None if cos is None else Rope(cos, sin, interleaved)
        norms = options.unflatten_qk_norm(*norm_arguments[:5]), options.unflatten_qk_norm(*norm_arguments[5:])
        return cls(q, k, v, softmax_scale, key_lengths, *norms, rope, store_dtype)

    def empty(self) -> Outputs:
        q, dtype = self.q, self.store_dtype
        out, head_dim = empty_output(q, q.dtype), q.shape[-1]
        if dtype is None or dtype == q.dtype:
            return out, None if dtype is None else empty_output(q, dtype)
        used, group = FORMATS[dtype], head_group(dtype, head_dim)
        data = empty_output(q, used.data, width_of(dtype, head_dim))
        scale = empty_output(q, used.scale, -(-head_dim // group))
        return out, Quantized(data, scale, group, head_dim)

    def pack(self, tensors: Sequence[Tensor]) -> Outputs:
        channels, dtype = self.q.shape[-1], self.store_dtype
        group = None if dtype in (None, self.q.dtype) else head_group(dtype, channels)
        return tensors[0], stored_of(*tensors[1:], channels=channels, group=group)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    softmax_scale: float | None = None,
    key_lengths: Tensor | None = None,
    q_norm: QKNorm | None = None,
    k_norm: QKNorm | None = None,
    rope: Rope | None = None,
    store_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | Quantized | None]:
    """Attention without a causal mask, from views of the packed projection, and a stored copy of its output.

        1. q = rope(q_norm(q)); k = rope(k_norm(k)), k rotated only where M = N
        2. out = softmax(softmax_scale q k^T) v per head, over the first key_lengths keys; 0 where there are none
        3. stored = out, quantised with a scale a head if store_dtype has 8 bits, or for 32 of its channels if it has 4

    Norms and rotary embedding compute in float32, and each rounds to q's dtype; softmax and products are those of
    `F.scaled_dot_product_attention`; the stored copy is quantised from the rounded output. Keys beyond the length are
    not read. Views of a packed `qkv [B, T, S, 3, H, D]` are `qkv.select(3, i)` in spatial order and
    `qkv.select(3, i).transpose(1, 2)` in temporal order. For autograd and compiled graphs see `broadcast_residual`.

    Args:
        q: `[*batch, N, H, D]`, float, one or two batch dimensions, any strides with a contiguous last dimension; D from
            32 to 128.
        k, v: `[*batch, M, H, D]`, as q.
        softmax_scale: a finite number, or None for D ** -0.5.
        key_lengths: int32 or int64 `[*batch]` or `[first batch dimension]`, or None for all keys. Not read on the host:
            a length below 0 counts as 0, one beyond M as M.
        q_norm, k_norm, rope: see `QKNorm` and `Rope`.
        store_dtype: None to store nothing, q's dtype, torch.int8, torch.float8_e4m3fn or torch.int4.
        backend: "auto", or the name of one.

    Returns:
        out `[*batch, N, H, D]`, its dimensions in q's order in memory (for temporal order,
        `out.transpose(1, 2).flatten(-2)` is a view), and the stored copy in the same order and separate memory: a
        tensor, a `Quantized` with group D (32 for int4), or None.

    Raises:
        TypeError, ValueError: an argument is not supported.
        BackendError: the backend cannot serve the call.

    Example:
        >>> qkv = torch.randn(2, 5, 12, 3, 4, 32)  # [B, T, S, 3, H, D]
        >>> out, stored = attention(*(qkv.select(3, i).transpose(1, 2) for i in range(3)), store_dtype=torch.int8)
        >>> out.shape, stored.scale.shape  # over 5 frames at each of 12 places
        (torch.Size([2, 12, 5, 4, 32]), torch.Size([2, 12, 5, 4, 1]))
    """
    out, stored = run(OP, Attention(q, k, v, softmax_scale, key_lengths, q_norm, k_norm, rope, store_dtype), backend)
    return out, stored


def count_flops(q: Sequence[int], k: Sequence[int], *args: Any, **kwargs: Any) -> int:
    """The FLOP formula of `attention` and `short_attention`."""
    *batch, queries, heads, head_dim = q
    return attention_flops(prod(batch), heads, queries, k[-3], head_dim)


register(
    OP,
    Attention,
    options.SCHEMA,
    reference.compute,
    count_flops,
)
