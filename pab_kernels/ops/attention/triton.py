"""`attention` in Triton: one pass over the keys with a running maximum (Algorithm 1 of FlashAttention-2, arXiv
2307.08691), from packed views, into the output and the stored copy.

    1. q', k' = prepare(q), prepare(k), where they have a norm or a rotary embedding: once, not for every tile of
       queries; the same kernel copies operands that cannot be read 16 bytes at a time
    2. for each tile of keys:  s = softmax_scale log2(e) q' k'^T;  m' = max(m, max s);  p = 2^(s - m')
                               l = 2^(m - m') l + sum p;  o = 2^(m - m') o + p v;  m = m'
    3. out = o / l, 0 where there are no keys or all scores are -inf
    4. stored = out, quantised with a scale a head if it has 8 bits, or one per 32 channels if it has 4

A head is never padded to a power of two: D = 72 is 64 + 16 channels, two products a tile, of which 8 channels are
masked.

Everything is float32, except for these roundings:
    1. a norm rounds to q's dtype, then the rotary embedding does
    2. p rounds to q's dtype for the product with v; l sums it unrounded
    3. out rounds once
    4. the stored copy is quantised from the rounded out: a scale rounds to its dtype, a quotient to 8 or 4 bits
`reference.online_attention` rounds in the same places.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from math import prod

import torch
import triton
import triton.language as tl

from ..backend import capability, refuse_device, refuse_float8
from ..dispatch import Outputs
from ..quantized import data_and_scale
from ..rounding import INTERPRETED, narrow, operand, quantized, scale_of, store_four_bits
from ..strides import UNIT, aligned, head_strides, stored_unit
from . import Attention
from .options import refuse_heads
from .prepare import prepare

MAX_HEADS = 2**31 - 2**10
"""(Token, head) pairs are counted in 32 bits with the rows of a last tile; the grid's first axis ends there too."""

LOWEST = tl.constexpr(torch.finfo(torch.float32).min)
"""The maximum of no scores: -inf would give NaN where all the first scores are -inf."""


@dataclass(frozen=True)
class Tiles:
    """Queries of a program, keys of a step of its loop, warps, steps in flight, and registers that a lane may have."""

    queries: int
    keys: int
    warps: int
    stages: int
    registers: int | None = None


def tiles(queries: int, head_dim: int, capability: tuple[int, int]) -> Tiles:
    """The tile sizes for a call on a device of this compute capability."""
    # Tensor cores that take q from registers; sm_86, sm_89 and sm_120 also have only 99 KB of shared memory a block.
    in_registers = capability[0] not in (9, 10, 11)
    if in_registers and head_dim > 80 and queries <= 64:  # 64 keys would spill, and 4 warps from 120 on
        return Tiles(64, 32, 4 if head_dim <= 112 else 8, 2)
    if in_registers and head_dim > 96:
        return Tiles(128, 32, 8, 3)
    if queries <= 64:
        return Tiles(64, 64, 4, 2)
    if capability[0] == 9 and head_dim <= 72:  # 128 registers let two programs run at once; 80 channels would spill
        return Tiles(128, 64, 8, 3, 128)
    if capability[0] == 10 and head_dim == 80:  # Triton 3.6.0 would take 128, and spill where an 8-bit copy is stored
        return Tiles(128, 64, 8, 3, 168)
    return Tiles(128, 64, 8, 3)


@cache
def parts(head_dim: int) -> tuple[tuple[int, int], ...]:
    """First channel and width of the parts of a head, powers of two that sum to the next multiple of 16, the least
    depth of a product."""
    widths = [width for width in (128, 64, 32, 16) if -(-head_dim // 16) * 16 & width]
    return tuple((sum(widths[:i]), width) for i, width in enumerate(widths))


@triton.jit
def _tile(ptr, rows, count, stride, FIRST: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr):
    """Channels FIRST to FIRST + WIDTH of these rows, 0 beyond D and, if MASKED, in rows from `count` on, unread."""
    channels = FIRST + tl.arange(0, WIDTH)
    ptrs = ptr + rows.to(tl.int64)[:, None] * stride + channels[None, :]  # [ROWS, WIDTH]
    if MASKED:
        if FIRST + WIDTH > D:
            return tl.load(ptrs, mask=(rows < count)[:, None] & (channels < D)[None, :], other=0.0)
        return tl.load(ptrs, mask=(rows < count)[:, None], other=0.0)
    if FIRST + WIDTH > D:
        return tl.load(ptrs, mask=(channels < D)[None, :], other=0.0)
    return tl.load(ptrs)


@triton.jit
def _stride(units, UNIT: tl.constexpr, WIDE: tl.constexpr):
    """A stride in elements, in 64 bits if WIDE: a stride that fits 32 bits in units may not in elements."""
    if WIDE:
        units = tl.cast(units, tl.int64)
    return units * UNIT


@triton.jit
def _head(first, second, head, strides):
    """The offset of a head's first token."""
    return first * strides[0] + second * strides[1] + head * strides[3]


@triton.jit
def _zeros(ROWS: tl.constexpr, WIDTH: tl.constexpr):
    # Triton 3.6 wants constexprs in a shape, and an element of a tuple is none.
    return tl.zeros([ROWS, WIDTH], dtype=tl.float32)


@triton.jit
def _attend(
    q, out, peak, total, k_ptr, v_ptr, k_stride, v_stride, count, scale,
    PARTS: tl.constexpr, D: tl.constexpr, KEYS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """A step of the loop: KEYS keys from k_ptr and v_ptr on; if MASKED, only the first `count` of them."""
    keys = tl.arange(0, KEYS)
    scores = tl.zeros([q[0].shape[0], KEYS], dtype=tl.float32)
    for i in tl.static_range(len(PARTS)):
        k = _tile(k_ptr, keys, count, k_stride, PARTS[i][0], PARTS[i][1], D, MASKED)  # [KEYS, WIDTH]
        scores = tl.dot(operand(q[i]), operand(k).T, scores)  # [QUERIES, KEYS]
    if MASKED:
        scores = tl.where((keys < count)[None, :], scores * scale, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        p = tl.exp2(scores - new_peak[:, None])
    else:
        new_peak = tl.maximum(peak, tl.max(scores, 1) * scale)
        p = tl.exp2(scores * scale - new_peak[:, None])
    decay = tl.exp2(peak - new_peak)
    total = total * decay + tl.sum(p, 1)
    rounded = narrow(p, k_ptr.dtype.element_ty)
    new_out: tl.tuple = ()
    for i in tl.static_range(len(PARTS)):
        v = _tile(v_ptr, keys, count, v_stride, PARTS[i][0], PARTS[i][1], D, MASKED)
        new_out += (tl.dot(operand(rounded), operand(v), out[i] * decay[:, None]),)  # [QUERIES, WIDTH]
    return new_out, new_peak, total


@triton.jit(do_not_specialize=["queries", "keys", "heads", "batch"])
def _attention_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, stored_ptr, stored_scale_ptr, lengths_ptr,
    q_strides, k_strides, v_strides, out_strides, stored_strides, stored_scale_strides, lengths_strides,
    scale, queries, keys, heads, batch,
    D: tl.constexpr, PARTS: tl.constexpr, UNIT: tl.constexpr, STORED_UNIT: tl.constexpr, WIDE: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """A program: QUERIES queries of one head of one batch row.

    Strides are (first batch dimension, second, token, head) in UNITs of elements, those of the stored copy in
    STORED_UNITs, those of scales in elements; `batch` is the size of the second.
    """
    tile, row = tl.program_id(0) % tl.cdiv(queries, QUERIES), tl.program_id(0) // tl.cdiv(queries, QUERIES)
    head = (row % heads).to(tl.int64)
    first, second = (row // heads // batch).to(tl.int64), (row // heads % batch).to(tl.int64)
    q_ptr += _head(first, second, head, q_strides) * UNIT
    k_ptr += _head(first, second, head, k_strides) * UNIT
    v_ptr += _head(first, second, head, v_strides) * UNIT
    q_stride, k_stride = _stride(q_strides[2], UNIT, WIDE), _stride(k_strides[2], UNIT, WIDE)
    v_stride = _stride(v_strides[2], UNIT, WIDE)
    if lengths_ptr is not None:
        length = tl.load(lengths_ptr + first * lengths_strides[0] + second * lengths_strides[1])
        keys = tl.minimum(tl.maximum(length, 0), keys).to(tl.int32)

    rows = tile * QUERIES + tl.arange(0, QUERIES)
    q: tl.tuple = ()
    out: tl.tuple = ()
    for i in tl.static_range(len(PARTS)):
        q += (_tile(q_ptr, rows, queries, q_stride, PARTS[i][0], PARTS[i][1], D, True),)  # [QUERIES, WIDTH]
        out += (_zeros(QUERIES, PARTS[i][1]),)
    peak = tl.full([QUERIES], LOWEST, dtype=tl.float32)
    total = tl.zeros([QUERIES], dtype=tl.float32)
    whole = keys // KEYS * KEYS
    for start in range(0, whole, KEYS):
        k_start, v_start = k_ptr + tl.cast(start, tl.int64) * k_stride, v_ptr + tl.cast(start, tl.int64) * v_stride
        out, peak, total = _attend(
            q, out, peak, total, k_start, v_start, k_stride, v_stride, KEYS, scale, PARTS, D, KEYS, False
        )
    if whole < keys:
        k_start, v_start = k_ptr + tl.cast(whole, tl.int64) * k_stride, v_ptr + tl.cast(whole, tl.int64) * v_stride
        out, peak, total = _attend(
            q, out, peak, total, k_start, v_start, k_stride, v_stride, keys - whole, scale, PARTS, D, KEYS, True
        )

    out_ptr += _head(first, second, head, out_strides) * UNIT
    out_rows = rows.to(tl.int64)[:, None] * _stride(out_strides[2], UNIT, WIDE)
    total = tl.where(total == 0, 1.0, total)  # no keys, or none with a score above -inf
    magnitude = tl.zeros([QUERIES], dtype=tl.float32)
    result: tl.tuple = ()
    for i in tl.static_range(len(PARTS)):
        channels = PARTS[i][0] + tl.arange(0, PARTS[i][1])
        mask = (rows < queries)[:, None] & (channels < D)[None, :]
        y = narrow(out[i] / total[:, None], out_ptr.dtype.element_ty)
        tl.store(out_ptr + out_rows + channels[None, :], y, mask=mask)
        result += (y.to(tl.float32),)
        # As integers, magnitudes have their order, NaN the largest.
        bits = tl.max(result[i].to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1)
        magnitude = tl.maximum(magnitude, bits.to(tl.float32, bitcast=True), tl.PropagateNan.ALL)
    if stored_ptr is not None:
        stored_ptr += _head(first, second, head, stored_strides) * STORED_UNIT
        stored_rows = rows.to(tl.int64)[:, None] * _stride(stored_strides[2], STORED_UNIT, WIDE)
        dtype: tl.constexpr = stored_ptr.dtype.element_ty
        if stored_scale_ptr is not None:
            stored_scale_ptr += _head(first, second, head, stored_scale_strides)
            scale_rows = rows.to(tl.int64) * stored_scale_strides[2]
            if dtype != tl.uint8:
                group_scale = scale_of(magnitude, dtype)
                tl.store(stored_scale_ptr + scale_rows, group_scale, mask=rows < queries)
        for i in tl.static_range(len(PARTS)):
            channels = PARTS[i][0] + tl.arange(0, PARTS[i][1])
            mask = (rows < queries)[:, None] & (channels < D)[None, :]
            if dtype == tl.uint8:
                store_four_bits(
                    stored_ptr + stored_rows, stored_scale_ptr + scale_rows[:, None], result[i], rows < queries,
                    PARTS[i][0], D,
                )  # fmt: skip
            elif stored_scale_ptr is not None:
                kept = quantized(result[i], group_scale[:, None], dtype)
                tl.store(stored_ptr + stored_rows + channels[None, :], kept, mask=mask)
            else:
                kept = narrow(result[i], dtype)
                tl.store(stored_ptr + stored_rows + channels[None, :], kept, mask=mask)


def refusal(call: Attention) -> str | None:
    """Why this kernel cannot serve; None where it can."""
    q, softmax_scale = call.q, call.softmax_scale
    unsupported = refuse_device(q, bool(INTERPRETED.value)) or refuse_heads(q)
    if unsupported is not None:
        return unsupported
    if softmax_scale is not None and not 0 <= softmax_scale < float("inf"):
        return f"softmax_scale is {softmax_scale}; 0 or more is supported"
    heads = max(q.numel(), call.k.numel()) // q.shape[-1]
    if heads > MAX_HEADS:
        return f"there are {heads} (token, head) pairs; at most {MAX_HEADS} are supported"
    return refuse_float8(q, "store_dtype", call.store_dtype)


def launch(call: Attention, outputs: Outputs) -> None:
    """Write the outputs."""
    q = call.q
    chosen = tiles(q.shape[-3], q.shape[-1], capability(q.device) if q.is_cuda else (9, 0))
    with torch.cuda.device_of(q):  # Triton launches on the current device
        attend_in_tiles(call, outputs, chosen)


def attend_in_tiles(call: Attention, outputs: Outputs, chosen: Tiles) -> None:
    """The launches of a call, with these tile sizes."""
    (q, k, v, _, key_lengths, q_norm, k_norm, rope, _), (out, stored_out) = call, outputs
    *batch, queries, heads, head_dim = q.shape
    keys = k.shape[-3]
    programs = prod(batch) * heads * -(-queries // chosen.queries)
    if programs == 0:
        return
    key_rope = rope if keys == queries else None
    if q_norm is not None or rope is not None or not aligned(q):
        q = prepare(q, q_norm, rope)
    if k_norm is not None or key_rope is not None or not aligned(k):
        k = prepare(k, k_norm, key_rope)
    if not aligned(v):
        v = prepare(v, None, None)
    stored, stored_scale = data_and_scale(stored_out)
    unit = stored_unit(stored)
    wide = any(t is not None and t.stride(-3) >= 2**31 for t in (q, k, v, out, stored))
    lengths_strides: tuple[int, ...] = (0, 0)
    if key_lengths is not None:
        by_row = key_lengths[:, None] if key_lengths.ndim < len(batch) else key_lengths
        lengths_strides = head_strides(by_row.expand(batch)[..., None, None, None])[:2]
    _attention_kernel[(programs,)](
        q, k, v, out, stored, stored_scale, key_lengths,
        head_strides(q, UNIT), head_strides(k, UNIT), head_strides(v, UNIT),
        head_strides(out, UNIT), head_strides(stored, unit), head_strides(stored_scale), lengths_strides,
        call.log2_scale, queries, keys, heads, batch[-1],
        D=head_dim, PARTS=parts(head_dim), UNIT=UNIT, STORED_UNIT=unit, WIDE=wide,
        QUERIES=chosen.queries, KEYS=chosen.keys,
        num_warps=chosen.warps, num_stages=chosen.stages, maxnreg=chosen.registers, enable_fp_fusion=True,
    )  # fmt: skip
