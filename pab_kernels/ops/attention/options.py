"""The options of attention, norms and rotary embedding of q and k: their definition, checks and schema."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..checks import check_activation, check_kind, check_operand, check_shape, check_tensor, not_a
from ..norm import NORM_SCHEMA, Norm, apply_norm, check_norm, flatten_norm

MIN_HEAD_DIM, MAX_HEAD_DIM = 32, 128


@dataclass(frozen=True, eq=False)
class QKNorm(Norm):
    """A norm of q or k: over the D channels of a head, or across heads with its reciprocal root given.

    Args:
        kind, weight, bias, eps: as `Norm`, with weight and bias `[D]`.
        rstd: None, or the reciprocal root mean square over all heads, eps included, `[*batch, N]` float32 of any
            strides (kind "rms", weight `[H, D]` or None). It computes `q * rstd * weight` in float32, rounded once.
    """

    kind: Literal["layer", "rms"] = "rms"
    rstd: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Rope:
    """Rotary embedding of the first R <= D channels of a head.

    Args:
        cos, sin: `[N, R / 2]`, float32; one row per position, for all batch rows and heads.
        interleaved: whether channels (2i, 2i + 1) rotate as pairs; otherwise (i, i + R / 2) do.
    """

    cos: Tensor
    sin: Tensor
    interleaved: bool


_QK_NORM_SCHEMA = f"{NORM_SCHEMA}, Tensor? {{0}}_rstd"
SCHEMA = (
    "Tensor q, Tensor k, Tensor v, Tensor? key_lengths, float? softmax_scale, "
    f"{_QK_NORM_SCHEMA.format('q_norm')}, {_QK_NORM_SCHEMA.format('k_norm')}, "
    "Tensor? cos, Tensor? sin, bool interleaved, ScalarType? store_dtype"
)
"""What `attention` and `short_attention` read, as registered with torch."""


def check_qkv(op: str, q: Any, k: Any, v: Any) -> None:
    """q `[*batch, N, H, D]`, k and v `[*batch, M, H, D]`: one or two batch dimensions, at least one key."""
    check_activation(op, "q", q)
    if q.ndim not in (4, 5):
        supported = "[*batch, N, H, D] with one or two batch dimensions is supported"
        raise ValueError(f"{op}: q has shape {tuple(q.shape)}; {supported}: reshape it")
    head_dim = q.shape[-1]
    if not MIN_HEAD_DIM <= head_dim <= MAX_HEAD_DIM:
        supported = f"{MIN_HEAD_DIM} to {MAX_HEAD_DIM} are supported"
        raise ValueError(f"{op}: q has head dimension {head_dim}; {supported}: call F.scaled_dot_product_attention")
    check_activation(op, "k", k)
    keys = k.shape[-3] if k.ndim == q.ndim else q.shape[-3]
    for name, t in (("k", k), ("v", v)):
        check_operand(op, name, t, (*q.shape[:-3], keys, *q.shape[-2:]), q.dtype, q.device)
    if keys == 0:
        raise ValueError(f"{op}: k has no keys; at least one is supported: give rows without keys a key_lengths of 0")


def check_qk_norm(op: str, name: str, norm: Any, t: Tensor) -> None:
    """A norm that fits q or k."""
    if type(norm) is not QKNorm:
        raise not_a(op, name, norm, "pab_kernels.ops.QKNorm", "pass one or None")
    check_norm(op, name, norm, t.shape[-1:] if norm.rstd is None else t.shape[-2:], t.dtype, t.device)
    if norm.rstd is not None:
        if norm.kind != "rms":
            raise ValueError(f"{op}: {name}.rstd is given with kind {norm.kind!r}; 'rms' is supported: pass kind='rms'")
        check_shape(op, f"{name}.rstd", norm.rstd, t.shape[:-2], torch.float32, t.device)


def check_rope(op: str, rope: Any, q: Tensor) -> None:
    """Tables that fit q."""
    if not isinstance(rope, Rope):
        raise not_a(op, "rope", rope, "pab_kernels.ops.Rope", "pass one or None")
    if not isinstance(rope.interleaved, bool):
        raise not_a(op, "rope.interleaved", rope.interleaved, "a bool", "pass True or False")
    check_activation(op, "rope.cos", rope.cos)
    half = rope.cos.shape[-1]
    for name, table in (("cos", rope.cos), ("sin", rope.sin)):
        check_operand(op, f"rope.{name}", table, (q.shape[-3], half), torch.float32, q.device)
    if 2 * half > q.shape[-1]:
        supported = f"up to the head dimension {q.shape[-1]} are supported"
        raise ValueError(f"{op}: rope rotates {2 * half} channels; {supported}: pass [N, R / 2] tables")


def check_key_lengths(op: str, key_lengths: Any, q: Tensor) -> None:
    """Lengths of q's batch rows."""
    check_tensor(op, "key_lengths", key_lengths)
    if key_lengths.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{op}: key_lengths has dtype {key_lengths.dtype}; int32 and int64 are supported: convert it")
    check_kind(op, "key_lengths", key_lengths, key_lengths.dtype, q.device)
    shape, batch = tuple(key_lengths.shape), tuple(q.shape[:-3])
    if shape not in (batch, batch[:1]):
        raise ValueError(f"{op}: key_lengths has shape {shape}; {batch} or {batch[:1]} is supported here: reshape it")


def refuse_heads(q: Tensor) -> str | None:
    """Why a kernel for half precision and channels in multiples of 8 cannot serve q; None where it can."""
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"q is {q.dtype}; float16 and bfloat16 are supported"
    if q.shape[-1] % 8:
        return f"the head dimension is {q.shape[-1]}; multiples of 8 are supported"
    return None


def flatten_qk_norm(norm: QKNorm | None) -> tuple[Any, ...]:
    return *flatten_norm(norm), None if norm is None else norm.rstd


def unflatten_qk_norm(kind: Any, *flat: Any) -> QKNorm | None:
    return None if kind is None else QKNorm(kind, *flat)


def normalise(x: Tensor, norm: QKNorm) -> Tensor:
    """The norm of q or k; rounds once to x's dtype."""
    if norm.rstd is None:
        return apply_norm(x, norm)
    y = x.to(torch.promote_types(x.dtype, torch.float32)) * norm.rstd[..., None, None]
    return (y if norm.weight is None else y * norm.weight).to(x.dtype)


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """The rotary embedding, `(a cos - b sin, b cos + a sin)` for every pair (a, b), in float32, rounded once.

    RoFormer (arXiv 2104.09864), section 3.4.2.
    """
    channels = 2 * rope.cos.shape[-1]
    rotary = x[..., :channels].to(torch.promote_types(x.dtype, torch.float32))
    a, b = (rotary[..., 0::2], rotary[..., 1::2]) if rope.interleaved else rotary.chunk(2, -1)
    cos, sin = rope.cos.unsqueeze(1), rope.sin.unsqueeze(1)  # [N, 1, R / 2]
    pair = (a * cos - b * sin, b * cos + a * sin)
    rotated = torch.stack(pair, -1).flatten(-2) if rope.interleaved else torch.cat(pair, -1)
    return torch.cat((rotated.to(x.dtype), x[..., channels:]), -1)
