"""`attention`: self and cross attention straight from the packed projection, with QK-norm, rotary embedding and key
lengths inside."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checks import check_number
from ..dispatch import Outputs, run
from ..flops import attention_flops
from ..quantized import Quantized
from ..registration import register
from ..stored import check_store_dtype, stored_of
from . import reference
from .layout import empty_output
from .options import (
    OPTIONS_SCHEMA,
    QKNorm,
    Rope,
    check_key_lengths,
    check_qk_norm,
    check_qkv,
    check_rope,
    flatten_qk_norm,
    unflatten_qk_norm,
)

OP = "attention"


class Attention(NamedTuple):
    """A call of `attention`; its outputs are out and what is stored."""

    q: Tensor
    k: Tensor
    v: Tensor
    softmax_scale: float | None = None
    key_lengths: Tensor | None = None
    q_norm: QKNorm | None = None
    k_norm: QKNorm | None = None
    rope: Rope | None = None
    store_dtype: torch.dtype | None = None

    def check(self, op: str) -> None:
        q, k, v, softmax_scale, key_lengths, q_norm, k_norm, rope, store_dtype = self
        check_qkv(op, q, k, v)
        if softmax_scale is not None:
            check_number(op, "softmax_scale", softmax_scale)
        if q_norm is not None:
            check_qk_norm(op, "q_norm", q_norm, q)
        if k_norm is not None:
            check_qk_norm(op, "k_norm", k_norm, k)
        if rope is not None:
            check_rope(op, rope, q)
        if key_lengths is not None:
            check_key_lengths(op, key_lengths, q)
        check_store_dtype(op, store_dtype, q.dtype)

    def flatten(self) -> tuple[Any, ...]:
        q, k, v, softmax_scale, key_lengths, q_norm, k_norm, rope, store_dtype = self
        tables = (None, None, False) if rope is None else (rope.cos, rope.sin, rope.interleaved)
        return (
            q,
            k,
            v,
            key_lengths,
            softmax_scale,
            *flatten_qk_norm(q_norm),
            *flatten_qk_norm(k_norm),
            *tables,
            store_dtype,
        )

    @classmethod
    def unflatten(cls, *flat: Any) -> Attention:
        q, k, v, key_lengths, softmax_scale, *options, cos, sin, interleaved, store_dtype = flat
        rope = None if cos is None else Rope(cos, sin, interleaved)
        norms = unflatten_qk_norm(*options[:5]), unflatten_qk_norm(*options[5:])
        return cls(q, k, v, softmax_scale, key_lengths, *norms, rope, store_dtype)

    def empty(self) -> Outputs:
        q, dtype = self.q, self.store_dtype
        out, stored = empty_output(q, q.dtype), None if dtype is None else empty_output(q, dtype)
        if stored is None or dtype == q.dtype:
            return out, stored
        return out, Quantized(stored, empty_output(q, torch.float32, 1), q.shape[-1])

    def pack(self, tensors: Sequence[Tensor]) -> Outputs:
        return tensors[0], stored_of(*tensors[1:], group=self.q.shape[-1])


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
        3. stored = out, quantised with a scale a head if store_dtype has 8 bits

    A norm and a rotary embedding are float32 inside and each rounds to q's dtype; softmax and products are those of
    `F.scaled_dot_product_attention`; what is stored is quantised from the rounded output. Keys beyond the length are
    not read. Packed `qkv [B, T, S, 3, H, D]` in spatial order is `qkv.select(3, i)`, in temporal order `qkv.select(3,
    i).transpose(1, 2)`. Autograd and compiled graphs: as `broadcast_residual`.

    Args:
        q: `[*batch, N, H, D]`, float, one or two batch dimensions, any strides with a contiguous last dimension; D from
            32 to 128.
        k, v: `[*batch, M, H, D]`, as q.
        softmax_scale: a finite number, or None for D ** -0.5.
        key_lengths: int32 or int64 `[*batch]` or `[first batch dimension]`, or None for all keys. Never read on the
            host: a length below 0 counts as 0, one beyond M as M.
        q_norm, k_norm, rope: see `QKNorm` and `Rope`.
        store_dtype: None to store nothing, q's dtype, torch.int8 or torch.float8_e4m3fn.
        backend: "auto", or one that must serve.

    Returns:
        out `[*batch, N, H, D]`, its dimensions in q's order in memory, so that for temporal order `out.transpose(1,
        2).flatten(-2)` is a view; and what is stored, in the same order and memory of its own: a tensor, a `Quantized`
        with group D, or None.

    Raises:
        TypeError, ValueError: an argument is not of this kind.
        BackendError: `backend` cannot serve.
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
    f"Tensor q, Tensor k, Tensor v, Tensor? key_lengths, {OPTIONS_SCHEMA}, ScalarType? store_dtype",
    reference.compute,
    count_flops,
)
