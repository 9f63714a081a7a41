"""`short_attention` in Triton: many sequences to a tile, read and written once in the order of the packed projection.

A tile is 64 rows: all N tokens of floor(64 / N) heads, in the order of heads within a sequence. The heads of a token,
neighbours in memory, are neighbouring rows, so that accesses cover whole sectors of memory, although a head of 72
channels begins or ends within one. Both products are of the whole tile, 64 x 64 scores, of which those between two
heads are masked: that wastes FLOPs, but no memory bandwidth, which limits this operation.

    1. q' = rope(q_norm(q));  k' = rope(k_norm(k)), in registers
    2. s = softmax_scale log2(e) q' k'^T, -inf between two heads;  p = 2^(s - max s);  l = sum p
    3. out = p v / l;  stored = out, quantised with a scale a head if it has 8 bits, or one per 32 channels if it has 4

A head is never padded to a power of two: D = 72 is parts of 64 + 16 channels, two products a tile, of which 8 channels
are masked. The order of channels does not matter to q' k'^T: where a rotary embedding turns channel i with i + R / 2,
q and k are split into the parts of each half.

Everything is float32, except for these roundings:
    1. a norm rounds to q's dtype, then the rotary embedding does
    2. p rounds to q's dtype for the product with v; l sums it unrounded
    3. out rounds once
    4. the stored copy is quantised from the rounded out: a scale rounds to its dtype, a quotient to 8 or 4 bits
`attention.reference.online_attention`, with all keys in one step, rounds in the same places.

Heads of sequences do not mix. An infinity or NaN in v makes its head of its sequence NaN, in all channels if N <= 32
(0 times it would otherwise spoil the other heads of the tile), and only in its own channel if N > 32.
"""

from __future__ import annotations

from functools import cache
from math import prod

import torch
import triton
import triton.language as tl

from ..addresses import offset_of
from ..attention import Attention
from ..attention.options import refuse_heads
from ..attention.prepare import norm_arguments, rope_arguments
from ..attention.triton import parts
from ..backend import refuse_device, refuse_float8
from ..dispatch import Outputs
from ..quantized import data_and_scale
from ..rounding import INTERPRETED, narrow, operand, quantized, scale_of, store_four_bits
from ..strides import UNIT, head_strides, stored_unit, unit_of

MAX_HEADS = 2**31 - 64
"""Heads of sequences are counted in 32 bits, and a tile may begin with the last; the grid's first axis ends there."""


ROWS = 64
"""Rows of a tile."""

OUT_UNIT = tl.constexpr(UNIT)
"""In which strides of outputs are counted: D is a multiple of it, and outputs are allocated without gaps."""


def warps(head_dim: int) -> int:
    """Warps of a program: the registers of 4 do not hold larger heads with their norm and rotary embedding."""
    return 4 if head_dim <= 80 else 8


@cache
def sections(head_dim: int, rotary: int, interleaved: bool) -> tuple[tuple[tuple[int, int, int], ...], int]:
    """First channel, width and number of channels of the parts of q and k, and how many of them, the first, rotate.

    Where pairs are not interleaved, every second part holds the partners of the previous one.
    """
    halves = 1 if interleaved else 2
    turning = [
        (first + half * rotary // halves, width, min(width, rotary // halves - first))
        for first, width in parts(rotary // halves)
        for half in range(halves)
    ]
    still = [
        (rotary + first, width, min(width, head_dim - rotary - first)) for first, width in parts(head_dim - rotary)
    ]
    return (*turning, *still), len(turning)


@triton.jit
def _tile(ptr, offsets, valid, FIRST: tl.constexpr, WIDTH: tl.constexpr, COUNT: tl.constexpr):
    """[ROWS, WIDTH]: channels from FIRST on of the valid rows, 0 in others and beyond the COUNT-th channel."""
    channels = tl.arange(0, WIDTH)
    ptrs = ptr + offsets[:, None] + (FIRST + channels)[None, :]
    if COUNT < WIDTH:
        return tl.load(ptrs, mask=valid[:, None] & (channels < COUNT)[None, :], other=0.0)
    return tl.load(ptrs, mask=valid[:, None], other=0.0)


@triton.jit
def _tiles(ptr, offsets, valid, PARTS: tl.constexpr):
    """The parts of a tile."""
    loaded = ()
    for i in tl.static_range(len(PARTS)):
        loaded += (_tile(ptr, offsets, valid, PARTS[i][0], PARTS[i][1], PARTS[i][2]),)
    return loaded


@triton.jit
def _row(ptr, FIRST: tl.constexpr, WIDTH: tl.constexpr, COUNT: tl.constexpr):
    """[1, WIDTH] in float32: channels from FIRST on, 0 beyond the COUNT-th."""
    channels = tl.arange(0, WIDTH)
    return tl.load(ptr + FIRST + channels, mask=channels < COUNT, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _padded(x, COUNT: tl.constexpr):
    """x, but 0 beyond its COUNT-th channel."""
    return tl.where((tl.arange(0, x.shape[1]) < COUNT)[None, :], x, 0.0)


@triton.jit
def _normed(
    x, rstd_ptrs, weight_ptr, bias_ptr, eps, weight_offsets, valid, dtype: tl.constexpr,
    D: tl.constexpr, PARTS: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """The parts x of q or k with their norm, 0 beyond their channels; rstd_ptrs is given for NORM "across" alone."""
    mean = tl.zeros([x[0].shape[0]], dtype=tl.float32)
    if NORM == "layer":
        for i in tl.static_range(len(PARTS)):
            mean += tl.sum(x[i].to(tl.float32), 1) / D
    if NORM == "across":
        rstd = tl.load(rstd_ptrs, mask=valid, other=0.0)
    else:
        squares = tl.zeros_like(mean)
        for i in tl.static_range(len(PARTS)):
            y = x[i].to(tl.float32)
            if NORM == "layer":
                y = _padded(y - mean[:, None], PARTS[i][2])
            squares += tl.sum(y * y, 1)
        rstd = tl.rsqrt(squares / D + eps)
    normed = ()
    for i in tl.static_range(len(PARTS)):
        y = x[i].to(tl.float32)
        if NORM == "layer":
            y = _padded(y - mean[:, None], PARTS[i][2])
        y *= rstd[:, None]
        if weight_ptr is not None:
            if NORM == "across":
                y *= _tile(weight_ptr, weight_offsets, valid, PARTS[i][0], PARTS[i][1], PARTS[i][2]).to(tl.float32)
            else:
                y *= _row(weight_ptr, PARTS[i][0], PARTS[i][1], PARTS[i][2])
        if bias_ptr is not None:
            y += _row(bias_ptr, PARTS[i][0], PARTS[i][1], PARTS[i][2])
        normed += (narrow(y, dtype),)
    return normed


@triton.jit
def _rotated(
    x, token, valid, cos_ptr, sin_ptr, dtype: tl.constexpr,
    R: tl.constexpr, PARTS: tl.constexpr, TURNING: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """The parts x of q or k, the first TURNING of which rotate by the tables [N, R / 2].

    Elements beyond their channels are 0 already. `_padded` repeats it for the compiler, which would otherwise rotate in
    the layout of the product's operand, pass the float32 tables through shared memory, and spill.
    """
    rotated = ()
    at = token * (R // 2)
    if INTERLEAVED:
        for i in tl.static_range(TURNING):
            cos = _tile(cos_ptr, at, valid, PARTS[i][0] // 2, PARTS[i][1] // 2, PARTS[i][2] // 2)  # [ROWS, WIDTH / 2]
            sin = _tile(sin_ptr, at, valid, PARTS[i][0] // 2, PARTS[i][1] // 2, PARTS[i][2] // 2)
            a, b = tl.split(tl.reshape(x[i].to(tl.float32), [x[i].shape[0], PARTS[i][1] // 2, 2]))
            both = tl.reshape(tl.join(a * cos - b * sin, b * cos + a * sin), x[i].shape)
            rotated += (narrow(_padded(both, PARTS[i][2]), dtype),)
    else:
        for i in tl.static_range(0, TURNING, 2):
            cos = _tile(cos_ptr, at, valid, PARTS[i][0], PARTS[i][1], PARTS[i][2])  # [ROWS, WIDTH]
            sin = _tile(sin_ptr, at, valid, PARTS[i][0], PARTS[i][1], PARTS[i][2])
            a, b = x[i].to(tl.float32), x[i + 1].to(tl.float32)
            rotated += (narrow(_padded(a * cos - b * sin, PARTS[i][2]), dtype),)
            rotated += (narrow(_padded(b * cos + a * sin, PARTS[i][2]), dtype),)
    for i in tl.static_range(TURNING, len(PARTS)):
        rotated += (x[i],)
    return rotated


@triton.jit(do_not_specialize=["sequences", "batch", "heads"])
def _short_attention_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, stored_ptr, stored_scale_ptr,
    q_strides, k_strides, v_strides, out_strides, stored_strides, stored_scale_strides,
    q_weight_ptr, q_bias_ptr, q_rstd_ptr, q_rstd_strides, q_eps,
    k_weight_ptr, k_bias_ptr, k_rstd_ptr, k_rstd_strides, k_eps,
    cos_ptr, sin_ptr, scale, sequences, batch, heads,
    N: tl.constexpr, D: tl.constexpr, R: tl.constexpr, Q_NORM: tl.constexpr, K_NORM: tl.constexpr,
    INTERLEAVED: tl.constexpr, PARTS: tl.constexpr, QK_PARTS: tl.constexpr, TURNING: tl.constexpr,
    UNIT: tl.constexpr, STORED_UNIT: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """A program: a tile.

    Strides are (first batch dimension, second, token, head): inputs' in UNITs of elements, the output's in OUT_UNITs,
    those of the stored copy in STORED_UNITs, of scales and roots in elements. `batch` is the size of the second. PARTS
    are first channel, width and number of channels of the parts of v and out, QK_PARTS those of q and k.
    """
    PACKED: tl.constexpr = ROWS // N
    rows = tl.arange(0, ROWS)
    place, token = rows % PACKED, (rows // PACKED).to(tl.int64)
    number = tl.program_id(0) * PACKED + place
    valid = (token < N) & (number < sequences * heads)
    head, sequence = (number % heads).to(tl.int64), number // heads
    first, second = (sequence // batch).to(tl.int64), (sequence % batch).to(tl.int64)
    dtype: tl.constexpr = q_ptr.dtype.element_ty

    index = (first, second, token, head)
    q = _tiles(q_ptr, offset_of(index, q_strides) * UNIT, valid, QK_PARTS)
    k = _tiles(k_ptr, offset_of(index, k_strides) * UNIT, valid, QK_PARTS)
    v = _tiles(v_ptr, offset_of(index, v_strides) * UNIT, valid, PARTS)

    if Q_NORM != "":
        rstd = q_rstd_ptr if q_rstd_ptr is None else q_rstd_ptr + offset_of(index, q_rstd_strides)
        q = _normed(q, rstd, q_weight_ptr, q_bias_ptr, q_eps, head * D, valid, dtype, D, QK_PARTS, Q_NORM)
    if R > 0:
        q = _rotated(q, token, valid, cos_ptr, sin_ptr, dtype, R, QK_PARTS, TURNING, INTERLEAVED)
    if K_NORM != "":
        rstd = k_rstd_ptr if k_rstd_ptr is None else k_rstd_ptr + offset_of(index, k_rstd_strides)
        k = _normed(k, rstd, k_weight_ptr, k_bias_ptr, k_eps, head * D, valid, dtype, D, QK_PARTS, K_NORM)
    if R > 0:
        k = _rotated(k, token, valid, cos_ptr, sin_ptr, dtype, R, QK_PARTS, TURNING, INTERLEAVED)

    scores = tl.zeros([ROWS, ROWS], dtype=tl.float32)
    for i in tl.static_range(len(QK_PARTS)):
        scores = tl.dot(operand(q[i]), operand(k[i]).T, scores)
    scores *= scale
    if PACKED > 1:
        spoiled = tl.zeros([ROWS], dtype=tl.float32)
        finite = ()
        for i in tl.static_range(len(PARTS)):
            nothing = tl.sum(v[i].to(tl.float32) * 0.0, 1)  # [ROWS], NaN where there is an infinity or NaN
            finite += (tl.where((nothing == 0)[:, None], v[i], 0.0),)
            spoiled += nothing
        v = finite
        scores += spoiled[None, :]
    if N < ROWS:
        attended = (place[:, None] == place[None, :]) & (rows < N * PACKED)[None, :]  # [ROWS, ROWS]
        scores = tl.where(attended, scores, float("-inf"))
    p = tl.exp2(scores - tl.max(scores, 1)[:, None])
    share = (1.0 / tl.sum(p, 1))[:, None]
    p = narrow(p, dtype)

    at = offset_of(index, out_strides) * OUT_UNIT
    out = ()
    for i in tl.static_range(len(PARTS)):
        channels = tl.arange(0, PARTS[i][1])
        out += (narrow(tl.dot(operand(p), operand(v[i])) * share, dtype),)  # [ROWS, WIDTH]
        mask = valid[:, None] & (channels < PARTS[i][2])[None, :]
        tl.store(out_ptr + at[:, None] + (PARTS[i][0] + channels)[None, :], out[i], mask=mask)
    if stored_ptr is not None:
        stored_dtype: tl.constexpr = stored_ptr.dtype.element_ty
        if stored_scale_ptr is not None and stored_dtype != tl.uint8:
            magnitude = tl.zeros([ROWS], dtype=tl.int32)
            for i in tl.static_range(len(PARTS)):  # as integers, magnitudes have their order, and NaN is the largest
                bits = out[i].to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF
                magnitude = tl.maximum(magnitude, tl.max(bits, 1))
            group_scale = scale_of(magnitude.to(tl.float32, bitcast=True), stored_dtype)
            tl.store(stored_scale_ptr + offset_of(index, stored_scale_strides), group_scale, mask=valid)
        at = offset_of(index, stored_strides) * STORED_UNIT
        for i in tl.static_range(len(PARTS)):
            if stored_dtype == tl.uint8:
                scale_ptrs = stored_scale_ptr + offset_of(index, stored_scale_strides)
                store_four_bits(
                    stored_ptr + at[:, None], scale_ptrs[:, None], out[i].to(tl.float32), valid, PARTS[i][0], D
                )
            else:
                kept = out[i]
                if stored_scale_ptr is not None:
                    kept = quantized(kept.to(tl.float32), group_scale[:, None], stored_dtype)
                channels = tl.arange(0, PARTS[i][1])
                mask = valid[:, None] & (channels < PARTS[i][2])[None, :]
                tl.store(stored_ptr + at[:, None] + (PARTS[i][0] + channels)[None, :], kept, mask=mask)


def refusal(call: Attention) -> str | None:
    """Why this kernel cannot serve; None where it can."""
    q = call.q
    unsupported = refuse_device(q, bool(INTERPRETED.value)) or refuse_heads(q)
    if unsupported is not None:
        return unsupported
    if (heads := prod(q.shape[:-3]) * q.shape[-2]) > MAX_HEADS:
        return f"there are {heads} heads of sequences; at most {MAX_HEADS} are supported"
    return refuse_float8(q, "store_dtype", call.store_dtype)


def launch(call: Attention, outputs: Outputs) -> None:
    """Write the outputs."""
    (q, k, v, _, _, q_norm, k_norm, rope, _), (out, stored_out) = call, outputs
    *batch, tokens, heads, head_dim = q.shape
    sequences = prod(batch)
    if sequences * tokens * heads == 0:
        return
    stored, stored_scale = data_and_scale(stored_out)
    unit, unit_of_stored = unit_of(q, k, v), stored_unit(stored)
    rotary, cos, sin = rope_arguments(rope)
    (q_kind, *q_norm_arguments), (k_kind, *k_norm_arguments) = norm_arguments(q_norm), norm_arguments(k_norm)
    interleaved = rope is None or rope.interleaved
    qk_parts, turning = sections(head_dim, rotary, interleaved)
    programs = -(-sequences * heads // (ROWS // tokens))
    with torch.cuda.device_of(q):  # Triton launches on the current device
        _short_attention_kernel[(programs,)](
            q, k, v, out, stored, stored_scale,
            head_strides(q, unit), head_strides(k, unit), head_strides(v, unit),
            head_strides(out, UNIT), head_strides(stored, unit_of_stored), head_strides(stored_scale),
            *q_norm_arguments, *k_norm_arguments,
            cos, sin, call.log2_scale, sequences, batch[-1], heads,
            N=tokens, D=head_dim, R=rotary, Q_NORM=q_kind, K_NORM=k_kind, INTERLEAVED=interleaved,
            PARTS=sections(head_dim, 0, True)[0], QK_PARTS=qk_parts, TURNING=turning, UNIT=unit,
            STORED_UNIT=unit_of_stored, ROWS=ROWS,
            num_warps=warps(head_dim), num_stages=1, enable_fp_fusion=True,
        )  # fmt: skip
