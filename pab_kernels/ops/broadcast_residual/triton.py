"""`broadcast_residual` in Triton: one kernel, one pass over memory, a token's channels in the registers of its warps.

    1. x' = x + sum_i gate_i * c_i;  c_i = slot_i or, on a line, slot_i + weight_i * (slot_i - before_i);
        a slot of 8 or 4 bits is data * scale
    2. layer: z = (x' - m) / sqrt(mean (x' - m)^2 + eps), m = mean x';  rms: z = x' / sqrt(mean x'^2 + eps)
    3. y = (norm_weight * z + norm_bias) * (1 + scale) + shift

The C channels are chunks of a power of two, of which only the last may be ragged: C = 1152 is 4.5 chunks of 256, not
half of 2048. A thread has 16 bytes of each chunk. Sums are elementwise over the chunks first and across threads once.
All loads come before the first store, because the compiler moves none ahead of a store.

Everything is float32, except for these roundings:
    1. x' rounds once, to x's dtype
    2. y is computed from the rounded x' and rounds once, to x's dtype
`reference.rounded_once` rounds in the same places.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ..addresses import addresses, index_of, layout, offset_of
from ..backend import refuse_device, refuse_float8, refuse_stream
from ..cached_outputs import flatten_cached, holds
from ..dispatch import Outputs
from ..norm import flatten_norm
from ..quantized import GROUP
from ..rounding import GROUP_OF_FOUR_BITS, INTERPRETED, from_four_bits, narrow
from . import BroadcastResidual

MAX_CHANNELS = 8192
"""As many as the widest chunks hold in registers."""

MAX_TOKENS = 2**31 - 2**10
"""Tokens are counted in 32 bits, with the rows of the last program."""

EIGHT_BIT_GROUP = tl.constexpr(GROUP)


@dataclass(frozen=True)
class Tile:
    """Tokens of a program, channels of a chunk (a power of two, at least 128), and warps."""

    rows: int
    width: int
    warps: int


def tile(channels: int, itemsize: int) -> Tile:
    """The tile for this many channels: a thread has 16 bytes of at most 5 chunks, so that operands fit registers."""
    width = next(width for width in (128, 256, 512, 1024, 2048) if channels <= 5 * width)
    at_once = 32 * 16 // itemsize  # channels of a warp
    warps = max(4, width // at_once)
    return Tile(warps * at_once // width, width, warps)


@triton.jit
def _pointers(ptr, index, strides, live, FIRST: tl.constexpr, W: tl.constexpr, C: tl.constexpr, UNIT: tl.constexpr):
    """Pointers to W channels from FIRST on of the tokens at `index`, `[ROWS, W]`, and the mask of those that exist."""
    offset = offset_of(index, strides)
    channels = FIRST + tl.arange(0, W)
    mask = live[:, None]
    if FIRST + W > C:
        mask = mask & (channels < C)[None, :]
    return ptr + (offset * UNIT)[:, None] + channels[None, :], mask


@triton.jit
def _load(ptr, index, strides, live, FIRST: tl.constexpr, W: tl.constexpr, C: tl.constexpr, UNIT: tl.constexpr):
    """These channels, 0 where there is none."""
    ptrs, mask = _pointers(ptr, index, strides, live, FIRST, W, C, UNIT)
    return tl.load(ptrs, mask=mask, other=0.0)


@triton.jit
def _store(ptr, index, strides, live, value, FIRST: tl.constexpr, W: tl.constexpr, C: tl.constexpr, UNIT: tl.constexpr):
    ptrs, mask = _pointers(ptr, index, strides, live, FIRST, W, C, UNIT)
    tl.store(ptrs, value, mask=mask)


@triton.jit
def _load_slot_scale(
    ptr, index, strides, live, FIRST: tl.constexpr, W: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """The scale of each of these channels, `[ROWS, W]`; that of a group of WIDTH is loaded once."""
    groups: tl.constexpr = W // WIDTH
    all_groups: tl.constexpr = (C + WIDTH - 1) // WIDTH
    scales = _load(ptr, index, strides, live, FIRST // WIDTH, groups, all_groups, 1).to(tl.float32)  # [ROWS, groups]
    return tl.reshape(tl.broadcast_to(scales[:, :, None], [ROWS, groups, WIDTH]), [ROWS, W])


@triton.jit
def _load_cached(
    ptrs, scale_ptrs, index, strides, scale_strides, live,
    SLOT: tl.constexpr, FIRST: tl.constexpr, W: tl.constexpr, C: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """These channels of one of the slots in float32, dequantised where it has scales."""
    ptr, strides = ptrs[SLOT], strides[SLOT]
    packed: tl.constexpr = ptr.dtype.element_ty == tl.uint8
    if packed:
        slot = from_four_bits(_load(ptr, index, strides, live, FIRST // 2, W // 2, (C + 1) // 2, UNIT))
    else:
        slot = _load(ptr, index, strides, live, FIRST, W, C, UNIT).to(tl.float32)
    if scale_ptrs[SLOT] is not None:
        group: tl.constexpr = GROUP_OF_FOUR_BITS if packed else EIGHT_BIT_GROUP
        slot *= _load_slot_scale(scale_ptrs[SLOT], index, scale_strides[SLOT], live, FIRST, W, C, ROWS, group)
    return slot


@triton.jit(do_not_specialize=["tokens"])
def _broadcast_residual_kernel(
    x_ptr, scale_ptr, shift_ptr, x_out_ptr, y_out_ptr, slot_ptrs, gate_ptrs, slot_scale_ptrs, weight_ptrs,
    norm_weight_ptr, norm_bias_ptr,
    x_strides, scale_strides, shift_strides, x_out_strides, y_out_strides, slot_strides, gate_strides,
    slot_scale_strides,
    sizes, tokens, eps,
    NORM: tl.constexpr, C: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """A program: ROWS tokens.

    Strides over the leading dimensions, of these `sizes`, are in UNITs, those of slot scales in elements. There is a
    slot for each gate and, where there are lines, after all of these the previous output of each.
    """
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    live = token < tokens
    index = index_of(token, sizes)

    weights: tl.tuple = ()
    for i in tl.static_range(len(gate_ptrs)):
        weights += (1.0 if weight_ptrs[i] is None else tl.load(weight_ptrs[i]),)
    x: tl.tuple = ()
    for first in tl.static_range(0, C, W):
        new = _load(x_ptr, index, x_strides, live, first, W, C, UNIT).to(tl.float32)  # [ROWS, W]
        for i in tl.static_range(len(gate_ptrs)):
            slot = _load_cached(
                slot_ptrs, slot_scale_ptrs, index, slot_strides, slot_scale_strides, live, i, first, W, C, UNIT, ROWS
            )
            if weight_ptrs[i] is not None:
                before = _load_cached(
                    slot_ptrs, slot_scale_ptrs, index, slot_strides, slot_scale_strides, live,
                    len(gate_ptrs) + i, first, W, C, UNIT, ROWS,
                )  # fmt: skip
                slot += weights[i] * (slot - before)
            if gate_ptrs[i] is not None:
                slot *= _load(gate_ptrs[i], index, gate_strides[i], live, first, W, C, UNIT).to(tl.float32)
            new += slot
        x += (narrow(new, x_ptr.dtype.element_ty),)

    y: tl.tuple = ()
    if NORM is not None:
        norm_weights: tl.tuple = ()
        norm_biases: tl.tuple = ()
        scales: tl.tuple = ()
        shifts: tl.tuple = ()
        for first in tl.static_range(0, C, W):
            if norm_weight_ptr is not None:
                norm_weights += (_load(norm_weight_ptr, index, (0,), live, first, W, C, UNIT),)
            if norm_bias_ptr is not None:
                norm_biases += (_load(norm_bias_ptr, index, (0,), live, first, W, C, UNIT),)
            if scale_ptr is not None:
                scales += (_load(scale_ptr, index, scale_strides, live, first, W, C, UNIT),)
            if shift_ptr is not None:
                shifts += (_load(shift_ptr, index, shift_strides, live, first, W, C, UNIT),)
        mean = tl.zeros([ROWS, 1], dtype=tl.float32)
        if NORM == "layer":
            total = tl.zeros([ROWS, W], dtype=tl.float32)
            for i in tl.static_range(len(x)):
                total += x[i].to(tl.float32)
            mean = tl.sum(total, 1)[:, None] / C
        squares = tl.zeros([ROWS, W], dtype=tl.float32)
        for i in tl.static_range(len(x)):
            centred = x[i].to(tl.float32) - mean
            if (i + 1) * W > C:
                centred = tl.where((i * W + tl.arange(0, W) < C)[None, :], centred, 0.0)
            squares += centred * centred
        inverse = tl.rsqrt(tl.sum(squares, 1)[:, None] / C + eps)
        for i in tl.static_range(len(x)):
            new = (x[i].to(tl.float32) - mean) * inverse
            if norm_weight_ptr is not None:
                new *= norm_weights[i].to(tl.float32)
            if norm_bias_ptr is not None:
                new += norm_biases[i].to(tl.float32)
            if scale_ptr is not None:
                new *= 1.0 + scales[i].to(tl.float32)
            if shift_ptr is not None:
                new += shifts[i].to(tl.float32)
            y += (narrow(new, x_ptr.dtype.element_ty),)

    if x_out_ptr is not None:
        for i in tl.static_range(len(x)):
            _store(x_out_ptr, index, x_out_strides, live, x[i], i * W, W, C, UNIT)
    if y_out_ptr is not None:
        for i in tl.static_range(len(y)):
            _store(y_out_ptr, index, y_out_strides, live, y[i], i * W, W, C, UNIT)


def refusal(call: BroadcastResidual) -> str | None:
    """Why this kernel cannot serve; None where it can."""
    x = call.x
    unsupported = refuse_device(x, bool(INTERPRETED.value)) or refuse_stream(x, MAX_TOKENS, MAX_CHANNELS)
    return unsupported or (refuse_float8(x, "a slot") if holds(call.cached, torch.float8_e4m3fn) else None)


def launch(call: BroadcastResidual, outputs: Outputs) -> None:
    """Write the outputs."""
    (x, cached, norm, shift, scale), (x_out, y_out) = call, outputs
    if x.numel() == 0:
        return
    *leading, channels = x.shape
    slots, slot_scales, gates, weights = flatten_cached(cached)
    kind, norm_weight, norm_bias, eps = flatten_norm(norm)
    at = addresses(
        tuple(leading),
        tuple(map(layout, (x, scale, shift, x_out, y_out, *slots, *gates))),
        tuple(map(layout, slot_scales)),
    )
    chosen, tokens = tile(channels, x.element_size()), x.numel() // channels
    with torch.cuda.device_of(x):  # Triton launches on the current device
        _broadcast_residual_kernel[(-(-tokens // chosen.rows),)](
            x, scale, shift, x_out, y_out, slots, gates, slot_scales, weights, norm_weight, norm_bias,
            *at.strides[:5], at.strides[5 : 5 + len(slots)], at.strides[5 + len(slots) :], at.slot_scale_strides,
            at.sizes, tokens, eps,
            NORM=kind, C=channels, UNIT=at.unit, ROWS=chosen.rows, W=chosen.width,
            num_warps=chosen.warps, num_stages=1, enable_fp_fusion=True,
        )  # fmt: skip
