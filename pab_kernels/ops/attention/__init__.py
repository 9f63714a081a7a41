"""`attention`: self and cross attention straight from the packed projection, with QK-norm, rotary embedding and key lengths inside."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..backend import implementation
from ..checks import check_output, check_tensor
from ..flops import attention_flops
from ..overlap import check_apart
from ..quantize import Quantized
from ..registration import register
from ..stored import STORED_OUTPUTS, check_store_dtype, check_stored_out, flatten_stored, named_stored, unflatten_stored
from .layout import empty_output
from .options import OPTIONS_SCHEMA, QKNorm, Rope, check_options, check_qkv, flatten_options, unflatten_options

OP = "attention"

_READ = ("q", "k", "v", "softmax_scale", "key_lengths", "q_norm", "k_norm", "rope", "store_dtype")


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
    `F.scaled_dot_product_attention`; what is stored is quantised from the rounded output. Keys beyond the length are not read.
    Packed `qkv [B, T, S, 3, H, D]` in spatial order is `qkv.select(3, i)`, in temporal order `qkv.select(3, i).transpose(1, 2)`.
    In eager the reference is plain torch and so differentiable; compiled, it is for inference.

    Args:
        q: `[*batch, N, H, D]`, float, one or two batch dimensions, any strides with a contiguous last dimension; D from
            32 to 128.
        k, v: `[*batch, M, H, D]`, as q.
        softmax_scale: a finite number, or None for D ** -0.5.
        key_lengths: int32 or int64 `[*batch]` or `[first batch dimension]`, or None for all keys. Never read on the host: a length below
            0 counts as 0, one beyond M as M.
        q_norm, k_norm, rope: see `QKNorm` and `Rope`.
        store_dtype: None to store nothing, q's dtype, torch.int8 or torch.float8_e4m3fn.
        backend: "auto", or one that must serve.

    Returns:
        out `[*batch, N, H, D]`, its dimensions in q's order in memory, so that for temporal order `out.transpose(1, 2).flatten(-2)` is a
        view; and what is stored, in the same order and memory of its own: a tensor, a `Quantized` with group D, or None.

    Raises:
        TypeError, ValueError: an argument is not of this kind.
        BackendError: `backend` cannot serve.
    """
    _check(q, k, v, softmax_scale, key_lengths, q_norm, k_norm, rope)
    check_store_dtype(OP, store_dtype, q.dtype)
    if torch.compiler.is_compiling():
        options = flatten_options(softmax_scale, q_norm, k_norm, rope)
        outputs = torch.ops.pab_kernels.attention(q, k, v, key_lengths, *options, store_dtype, backend)
        return outputs[0], pack_stored(outputs, q)
    arguments = (q, k, v, softmax_scale, key_lengths, q_norm, k_norm, rope, store_dtype)
    return implementation(OP, backend, arguments)(*arguments)


def attention_out(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    out: Tensor,
    stored_out: Tensor | Quantized | None = None,
    softmax_scale: float | None = None,
    key_lengths: Tensor | None = None,
    q_norm: QKNorm | None = None,
    k_norm: QKNorm | None = None,
    rope: Rope | None = None,
    backend: str = "auto",
) -> None:
    """`attention` into out, of q's shape and dtype and any strides with a contiguous last dimension, and into stored_out if given.

    stored_out is a tensor as out or a `Quantized` with group D. Outputs may not overlap themselves, each other or what is read. Not
    recorded by autograd.
    """
    _check(q, k, v, softmax_scale, key_lengths, q_norm, k_norm, rope)
    check_output(OP, "out", out, q.shape, q.dtype, q.device)
    dtype = None if stored_out is None else check_stored_out(OP, stored_out, q.shape, q.shape[-1], q)
    if torch.compiler.is_compiling():
        options = flatten_options(softmax_scale, q_norm, k_norm, rope)
        torch.ops.pab_kernels.attention_out(q, k, v, key_lengths, *options, dtype, backend, out, *flatten_stored(stored_out))
    else:
        _write((q, k, v, softmax_scale, key_lengths, q_norm, k_norm, rope, dtype), backend, out, stored_out)


def pack_stored(outputs: Sequence[Tensor], q: Tensor) -> Tensor | Quantized | None:
    """What is stored, from the tensors that a registered operation returns after its output."""
    data, scale = (*outputs[1:], None, None)[:2]
    return unflatten_stored(data, scale, q.shape[-1])


def _check(q: Any, k: Any, v: Any, softmax_scale: Any, key_lengths: Any, q_norm: Any, k_norm: Any, rope: Any) -> None:
    check_qkv(OP, q, k, v)
    check_options(OP, q, k, softmax_scale, q_norm, k_norm, rope)
    if key_lengths is None:
        return
    check_tensor(OP, "key_lengths", key_lengths)
    if key_lengths.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{OP}: key_lengths has dtype {key_lengths.dtype}; int32 and int64 are supported: convert it")
    if key_lengths.device != q.device:
        raise ValueError(f"{OP}: key_lengths is on {key_lengths.device}; the operation runs on {q.device}: move it there")
    batch = q.shape[:-3]
    if key_lengths.shape not in (batch, batch[:1]):
        raise ValueError(
            f"{OP}: key_lengths has shape {tuple(key_lengths.shape)}; {tuple(batch)} or {tuple(batch[:1])} is supported here: reshape it"
        )


def _functional(q: Tensor, k: Tensor, v: Tensor, key_lengths: Tensor | None, *args: Any) -> list[Tensor]:
    *options, store_dtype, backend = args
    softmax_scale, *rest = unflatten_options(*options)
    arguments = (q, k, v, softmax_scale, key_lengths, *rest, store_dtype)
    out, stored = implementation(OP, backend, arguments)(*arguments)
    return [t for t in (out, *flatten_stored(stored)) if t is not None]


def _out(q: Tensor, k: Tensor, v: Tensor, key_lengths: Tensor | None, *args: Any) -> None:
    *options, store_dtype, backend, out, stored_out, stored_scale_out = args
    softmax_scale, *rest = unflatten_options(*options)
    stored = unflatten_stored(stored_out, stored_scale_out, q.shape[-1])
    arguments = (q, k, v, softmax_scale, key_lengths, *rest, store_dtype)
    _write(arguments, backend, out, stored)


def _write(arguments: tuple[Any, ...], backend: str, out: Tensor, stored_out: Tensor | Quantized | None) -> None:
    check_apart(OP, (("out", out), *named_stored(stored_out)), zip(_READ, arguments, strict=True))
    implementation(OP, backend, arguments, "_out")(*arguments, out, stored_out)


def fake_attention(q: Tensor, *args: Any) -> list[Tensor]:
    """The fake of `attention` and `short_attention`."""
    store_dtype, head_dim = args[-2], q.shape[-1]
    out = empty_output(q, q.dtype, head_dim)
    if store_dtype is None:
        return [out]
    stored = empty_output(q, store_dtype, head_dim)
    return [out, stored] if store_dtype == q.dtype else [out, stored, empty_output(q, torch.float32, 1)]


def count_flops(q: Sequence[int], k: Sequence[int], *args: Any, **kwargs: Any) -> int:
    """The FLOP formula of `attention` and `short_attention`."""
    *batch, queries, heads, head_dim = q
    return attention_flops(prod(batch), heads, queries, k[-3], head_dim)


register(
    OP,
    f"Tensor q, Tensor k, Tensor v, Tensor? key_lengths, {OPTIONS_SCHEMA}, ScalarType? store_dtype",
    ("Tensor(a!) out", *STORED_OUTPUTS),
    _functional,
    _out,
    fake_attention,
    count_flops,
)
