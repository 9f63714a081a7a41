"""Triton's pre-pass of `attention`: the per-head norm and rotary embedding of q or k, once for all tiles of queries.

    1. y = norm(x) per head:
       weight (x - mean) / sqrt(var + eps) + bias; weight x / sqrt(mean square + eps); or weight x rstd
    2. a pair (a, b) of y's first R channels becomes (a cos - b sin, b cos + a sin)

float32 inside; the norm rounds to x's dtype, then the rotation does, as `normalise` and `rotate` do, which define it.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

from math import prod
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..rounding import narrow
from ..strides import head_strides, unit_of
from .options import QKNorm, Rope

TOKENS, HEADS, WARPS = 16, 4, 4
"""Of a program: tokens, heads that it takes one by one with the same rows of the tables, and warps (16 channels a
lane)."""


@triton.jit
def _channels(ptr, channels, a_channels, b_channels, D: tl.constexpr, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The [1, PAIRS] firsts and seconds of a float32 copy of D channels."""
    if INTERLEAVED:
        both = tl.load(ptr + channels, mask=channels < D, other=0.0).to(tl.float32)
        a, b = tl.split(tl.reshape(both, [PAIRS, 2]))
    else:
        valid = tl.arange(0, PAIRS) < D // 2
        a = tl.load(ptr + a_channels, mask=valid, other=0.0).to(tl.float32)
        b = tl.load(ptr + b_channels, mask=valid, other=0.0).to(tl.float32)
    return a[None, :], b[None, :]


@triton.jit(do_not_specialize=["tokens", "heads", "batch"])
def _prepare_kernel(
    x_ptr, y_ptr, weight_ptr, bias_ptr, rstd_ptr, cos_ptr, sin_ptr,
    x_strides, rstd_strides, eps, tokens, heads, batch,
    D: tl.constexpr, PAIRS: tl.constexpr, R: tl.constexpr, INTERLEAVED: tl.constexpr, NORM: tl.constexpr,
    UNIT: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """A program: TOKENS tokens of a batch row, HEADS heads; x strided as in the attention kernel, y `[batch, H, N, D]`.

    Channels lie in two tensors, firsts and seconds of D / 2 <= PAIRS pairs: those that rotate first, then the rest.
    """
    groups, tiles = tl.cdiv(heads, HEADS), tl.cdiv(tokens, TOKENS)
    group, rest = tl.program_id(0) % groups, tl.program_id(0) // groups
    tile, row = rest % tiles, (rest // tiles).to(tl.int64)
    first, second = row // batch, row % batch
    rows = (tile * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    pairs = tl.arange(0, PAIRS)
    valid = pairs < D // 2
    if INTERLEAVED:
        a_channels, b_channels = 2 * pairs, 2 * pairs + 1
    elif R == D or R == 0:
        a_channels, b_channels = pairs, pairs + D // 2
    else:
        a_channels = tl.where(pairs < R // 2, pairs, pairs + R // 2)
        b_channels = tl.where(pairs < R // 2, pairs + R // 2, pairs + D // 2)
    here = rows < tokens
    mask = here[:, None] & valid[None, :]  # [TOKENS, PAIRS]
    channels = tl.arange(0, 2 * PAIRS)
    if INTERLEAVED:
        both = here[:, None] & (channels < D)[None, :]  # [TOKENS, 2 PAIRS]
    if R > 0:
        turning = here[:, None] & (pairs < R // 2)[None, :]
        cos = tl.load(cos_ptr + rows[:, None] * (R // 2) + pairs[None, :], mask=turning, other=1.0)
        sin = tl.load(sin_ptr + rows[:, None] * (R // 2) + pairs[None, :], mask=turning, other=0.0)
    if NORM == "across":
        at = rstd_ptr + first * rstd_strides[0] + second * rstd_strides[1] + rows * rstd_strides[2]
        rstd = tl.load(at, mask=here, other=0.0)[:, None]
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    for head in range(group * HEADS, tl.minimum(group * HEADS + HEADS, heads)):
        x_head = x_ptr + (first * x_strides[0] + second * x_strides[1] + tl.cast(head, tl.int64) * x_strides[3]) * UNIT
        x_rows = x_head + rows[:, None] * x_strides[2] * UNIT  # [TOKENS, 1]
        if INTERLEAVED:
            x = tl.load(x_rows + channels[None, :], mask=both, other=0.0).to(tl.float32)
            a, b = tl.split(tl.reshape(x, [TOKENS, PAIRS, 2]))
        else:
            a = tl.load(x_rows + a_channels[None, :], mask=mask, other=0.0).to(tl.float32)
            b = tl.load(x_rows + b_channels[None, :], mask=mask, other=0.0).to(tl.float32)
        if NORM != "":
            if NORM == "layer":
                mean = (tl.sum(a + b, 1) / D)[:, None]
                a, b = tl.where(valid[None, :], a - mean, 0.0), tl.where(valid[None, :], b - mean, 0.0)
            if NORM != "across":
                rstd = (1.0 / tl.sqrt_rn(tl.sum(a * a + b * b, 1) / D + eps))[:, None]
            a, b = a * rstd, b * rstd
            if weight_ptr is not None:
                at_head = weight_ptr + head * D if NORM == "across" else weight_ptr
                a_weight, b_weight = _channels(at_head, channels, a_channels, b_channels, D, PAIRS, INTERLEAVED)
                a, b = a * a_weight, b * b_weight
            if bias_ptr is not None:
                a_bias, b_bias = _channels(bias_ptr, channels, a_channels, b_channels, D, PAIRS, INTERLEAVED)
                a, b = a + a_bias, b + b_bias
            a, b = narrow(a, dtype).to(tl.float32), narrow(b, dtype).to(tl.float32)
        if R > 0:
            turned_a, turned_b = a * cos - b * sin, b * cos + a * sin
            a, b = tl.where(turning, turned_a, a), tl.where(turning, turned_b, b)
        y_rows = y_ptr + ((row * heads + head) * tokens + rows[:, None]) * D
        if INTERLEAVED:
            y = tl.reshape(tl.join(a, b), [TOKENS, 2 * PAIRS])
            tl.store(y_rows + channels[None, :], narrow(y, dtype), mask=both)
        else:
            tl.store(y_rows + a_channels[None, :], narrow(a, dtype), mask=mask)
            tl.store(y_rows + b_channels[None, :], narrow(b, dtype), mask=mask)


def norm_arguments(norm: QKNorm | None) -> tuple[Any, ...]:
    """A norm as kernels take it: kind, weight, bias, rstd, its strides (first batch dimension, second, token), eps."""
    if norm is None:
        return "", None, None, None, (0, 0, 0), 0.0
    weight = None if norm.weight is None else norm.weight.contiguous()
    if norm.rstd is None:
        return norm.kind, weight, norm.bias, None, (0, 0, 0), norm.eps
    return "across", weight, norm.bias, norm.rstd, head_strides(norm.rstd[..., None, None])[:3], norm.eps


def rope_arguments(rope: Rope | None) -> tuple[int, Tensor | None, Tensor | None]:
    """A rotary embedding as kernels take it: how many channels rotate, and the tables if any do."""
    if rope is None or rope.cos.shape[-1] == 0:
        return 0, None, None
    return 2 * rope.cos.shape[-1], rope.cos.contiguous(), rope.sin.contiguous()


def prepare(x: Tensor, norm: QKNorm | None, rope: Rope | None) -> Tensor:
    """q or k with its norm and rotation, `[*batch, N, H, D]`, each head's tokens together in memory.

    Args:
        x: `[*batch, N, H, D]`, float16, bfloat16 or float32, of any strides with a contiguous last dimension; D even.
        norm, rope: as in `attention`; None to leave it out.
    """
    *batch, tokens, heads, head_dim = x.shape
    y = torch.empty((*batch, heads, tokens, head_dim), dtype=x.dtype, device=x.device)
    rotary, cos, sin = rope_arguments(rope)
    kind, weight, bias, rstd, rstd_strides, eps = norm_arguments(norm)
    unit = unit_of(x)
    programs = prod(batch) * -(-tokens // TOKENS) * -(-heads // HEADS)
    if programs:
        _prepare_kernel[(programs,)](
            x, y, weight, bias, rstd, cos, sin,
            head_strides(x, unit), rstd_strides, eps, tokens, heads, batch[-1],
            D=head_dim, PAIRS=triton.next_power_of_2(head_dim // 2), R=rotary,
            INTERLEAVED=rotary == 0 or (rope is not None and rope.interleaved),
            NORM=kind, UNIT=unit, TOKENS=TOKENS, HEADS=HEADS,
            num_warps=WARPS, enable_fp_fusion=True,
        )  # fmt: skip
    return y.transpose(-3, -2)
