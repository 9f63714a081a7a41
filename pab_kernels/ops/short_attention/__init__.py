"""`short_attention`: self attention over sequences of up to 64 tokens by the hundred thousand, as temporal attention has them.

What it computes is `attention` without key lengths. It is an operation of its own for its kernel, which is bound by bytes, not by FLOPs:
it packs many sequences into a tile, where `attention` gives every sequence and head a tile, mostly of padding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..attention import count_flops, fake_attention, pack_stored
from ..attention.options import OPTIONS_SCHEMA, QKNorm, Rope, check_options, check_qkv, flatten_options, unflatten_options
from ..backend import implementation
from ..checks import check_output
from ..overlap import check_apart
from ..quantize import Quantized
from ..registration import register
from ..stored import STORED_OUTPUTS, check_store_dtype, check_stored_out, flatten_stored, named_stored, unflatten_stored

OP = "short_attention"
MAX_TOKENS = 64

_READ = ("q", "k", "v", "softmax_scale", "q_norm", "k_norm", "rope", "store_dtype")


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
    _check(q, k, v, softmax_scale, q_norm, k_norm, rope)
    check_store_dtype(OP, store_dtype, q.dtype)
    if torch.compiler.is_compiling():
        options = flatten_options(softmax_scale, q_norm, k_norm, rope)
        outputs = torch.ops.pab_kernels.short_attention(q, k, v, *options, store_dtype, backend)
        return outputs[0], pack_stored(outputs, q)
    arguments = (q, k, v, softmax_scale, q_norm, k_norm, rope, store_dtype)
    return implementation(OP, backend, arguments)(*arguments)


def short_attention_out(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    out: Tensor,
    stored_out: Tensor | Quantized | None = None,
    softmax_scale: float | None = None,
    q_norm: QKNorm | None = None,
    k_norm: QKNorm | None = None,
    rope: Rope | None = None,
    backend: str = "auto",
) -> None:
    """`short_attention` into out and, if given, stored_out; both as in `attention_out`."""
    _check(q, k, v, softmax_scale, q_norm, k_norm, rope)
    check_output(OP, "out", out, q.shape, q.dtype, q.device)
    dtype = None if stored_out is None else check_stored_out(OP, stored_out, q.shape, q.shape[-1], q)
    if torch.compiler.is_compiling():
        options = flatten_options(softmax_scale, q_norm, k_norm, rope)
        torch.ops.pab_kernels.short_attention_out(q, k, v, *options, dtype, backend, out, *flatten_stored(stored_out))
    else:
        _write((q, k, v, softmax_scale, q_norm, k_norm, rope, dtype), backend, out, stored_out)


def _check(q: Any, k: Any, v: Any, softmax_scale: Any, q_norm: Any, k_norm: Any, rope: Any) -> None:
    check_qkv(OP, q, k, v)
    if q.shape[-3] > MAX_TOKENS or k.shape[-3] != q.shape[-3]:
        raise ValueError(
            f"{OP}: {q.shape[-3]} queries and {k.shape[-3]} keys came; equal numbers up to {MAX_TOKENS} are supported: call attention"
        )
    check_options(OP, q, k, softmax_scale, q_norm, k_norm, rope)


def _functional(q: Tensor, k: Tensor, v: Tensor, *args: Any) -> list[Tensor]:
    *options, store_dtype, backend = args
    arguments = (q, k, v, *unflatten_options(*options), store_dtype)
    out, stored = implementation(OP, backend, arguments)(*arguments)
    return [t for t in (out, *flatten_stored(stored)) if t is not None]


def _out(q: Tensor, k: Tensor, v: Tensor, *args: Any) -> None:
    *options, store_dtype, backend, out, stored_out, stored_scale_out = args
    stored = unflatten_stored(stored_out, stored_scale_out, q.shape[-1])
    arguments = (q, k, v, *unflatten_options(*options), store_dtype)
    _write(arguments, backend, out, stored)


def _write(arguments: tuple[Any, ...], backend: str, out: Tensor, stored_out: Tensor | Quantized | None) -> None:
    check_apart(OP, (("out", out), *named_stored(stored_out)), zip(_READ, arguments, strict=True))
    implementation(OP, backend, arguments, "_out")(*arguments, out, stored_out)


register(
    OP,
    f"Tensor q, Tensor k, Tensor v, {OPTIONS_SCHEMA}, ScalarType? store_dtype",
    ("Tensor(a!) out", *STORED_OUTPUTS),
    _functional,
    _out,
    fake_attention,
    count_flops,
)
