"""`project_residual` in Triton: a persistent GEMM whose epilogue stores, gates and adds the projection from registers.

    1. p = a weight^T + bias
    2. x' = x + gate * p + sum_i gate_i * c_i;  c_i as in `broadcast_residual`
    3. stored = p or gate * p, quantised with a scale for its 128 channels if it has 8 bits, or for 32 if it has 4

A program computes tiles of tokens and 128 channels one after the other: 128 channels are one group of an 8-bit slot and
four of a 4-bit one, and C = 1152 is 9 tiles. Where it compiles without spills, the loops over tiles and over K are one
pipeline: the first loads of a tile are in flight during the epilogue of the previous one. Tiles go down a band of rows
before they go on to the next 128 channels, so that tiles that run at the same time share rows of `a` and of the weight
in the L2 cache.

Operands are read through pointers, not tensor descriptors, which allows any strides of any leading dimensions and any
K. Operands that are aligned to 16 bytes, with strides in multiples of 8, still go to shared memory asynchronously;
others are read element by element.

The epilogue takes 32 channels of a tile at a time, a group of a 4-bit slot, because the registers do not hold all
operands of a whole tile. A gate is loaded like any operand, with stride 0 where it is broadcast.

Everything is float32, except for these roundings:
    1. p rounds to x's dtype: a slot in that dtype, when reused, adds exactly what was added here
    2. x' is computed from the rounded p and rounds once, to x's dtype, whether p is stored or not
    3. gate * p, from the rounded p, rounds to x's dtype where it is stored
    4. a slot is quantised from the rounded values: a scale rounds to its dtype, a quotient to 8 or 4 bits
`reference.rounded_once` rounds in the same places. Products of float32 are exact float32, without tensor cores.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl

from ..addresses import addresses, index_of, layout, offset_of
from ..backend import refuse_device, refuse_float8, refuse_stream
from ..cached_outputs import flatten_cached, holds
from ..dispatch import Outputs
from ..quantized import GROUP, data_and_scale
from ..rounding import INTERPRETED, four_bits, from_four_bits, narrow, operand, quantized, scale_of
from ..strides import UNIT
from . import ProjectResidual

MAX_TOKENS = 2**31 - 2**10
"""Tokens are counted in 32 bits, with the rows of the last tile."""

BAND = tl.constexpr(8)
"""Tiles of rows that are taken before the next channels."""


@dataclass(frozen=True)
class Tile:
    """How a program computes its tiles.

    Args:
        rows: tokens of a tile.
        depth: input channels of a step.
        warps, stages: of a program; steps in flight.
        programs: that a multiprocessor runs at once.
        flat: whether the loops over tiles and over K are one pipeline.
        registers: that a lane may have; None lets the compiler choose.
    """

    rows: int
    depth: int
    warps: int
    stages: int
    programs: int
    flat: bool
    registers: int | None = None


def tile(tokens: int, channels: int, itemsize: int, capability: tuple[int, int], multiprocessors: int) -> Tile:
    """The tile for a call on a device of this compute capability and size."""
    if itemsize == 4:
        return Tile(64, 16, 8, 3, 2, True)
    tiles = -(-tokens // 128) * -(-channels // GROUP)
    rows = 128 if tiles >= multiprocessors else 64
    if capability[0] == 10:  # sums lie in tensor memory: registers hold two programs, but not one flat pipeline
        return Tile(rows, 64, 8, 3, 2, False, 255)
    depth, stages = (64, 3) if capability[0] == 9 else (32, 4)
    return Tile(rows, depth, rows // 16, stages, 1, True)


@triton.jit
def _halves(x):
    """The left and the right half of the columns."""
    return tl.split(tl.permute(tl.reshape(x, [x.shape[0], 2, x.shape[1] // 2]), [0, 2, 1]))


@triton.jit
def _pointers(ptr, index, strides, channels, UNIT: tl.constexpr):
    """Pointers to these channels of the tokens at `index`, `[ROWS, channels]`."""
    return ptr + (offset_of(index, strides) * UNIT)[:, None] + channels[None, :]


@triton.jit
def _load(ptr, index, strides, channels, mask, UNIT: tl.constexpr):
    """These channels in float32, 0 where the mask is false."""
    return tl.load(_pointers(ptr, index, strides, channels, UNIT), mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store(ptr, index, strides, channels, mask, value, UNIT: tl.constexpr):
    tl.store(_pointers(ptr, index, strides, channels, UNIT), value, mask=mask)


@triton.jit
def _mask(live, channels, C: tl.constexpr, COLUMNS: tl.constexpr):
    """Which of these channels of the live tokens there are."""
    mask = live[:, None]
    if C % COLUMNS != 0:
        mask = mask & (channels < C)[None, :]
    return mask


@triton.jit
def _load_cached(
    ptrs, scale_ptrs, index, strides, scale_strides, group, part, channels, live, mask, SLOT: tl.constexpr,
    WIDTH: tl.constexpr, C: tl.constexpr, UNIT: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """These channels, a `part` of a group of COLUMNS, of one of the slots in float32, dequantised where it has scales.

    The scale is that of the group, or of the part if the slot has 4 bits.
    """
    ptr = ptrs[SLOT]
    if ptr.dtype.element_ty == tl.uint8:
        pairs, pairs_mask, number, scale_mask = _pairs(live, group, part, WIDTH, C, COLUMNS)
        there = tl.load(_pointers(ptr, index, strides[SLOT], pairs, UNIT), mask=pairs_mask, other=0)
        scale = _load(scale_ptrs[SLOT], index, scale_strides[SLOT], number, scale_mask, 1)  # [ROWS, 1]
        return from_four_bits(there) * scale
    slot = _load(ptr, index, strides[SLOT], channels, mask, UNIT)
    if scale_ptrs[SLOT] is not None:
        slot *= tl.load(scale_ptrs[SLOT] + offset_of(index, scale_strides[SLOT]) + group, mask=live, other=0.0)[:, None]
    return slot


@triton.jit
def _pairs(live, group, part, WIDTH: tl.constexpr, C: tl.constexpr, COLUMNS: tl.constexpr):
    """Of the WIDTH channels of a part: their bytes of 4 bits and the scale, each with the mask of what there is."""
    number = group * (COLUMNS // WIDTH) + part
    pairs, scale = number * (WIDTH // 2) + tl.arange(0, WIDTH // 2), number + tl.arange(0, 1)
    pairs_mask = _mask(live, pairs, (C + 1) // 2, COLUMNS // 2)
    return pairs, pairs_mask, scale, _mask(live, scale, (C + WIDTH - 1) // WIDTH, COLUMNS // WIDTH)


@triton.jit(do_not_specialize=["tokens"])
def _project_residual_kernel(
    a_ptr, weight_ptr, bias_ptr, x_ptr, gate_ptr, x_out_ptr, stored_ptr, stored_scale_ptr,
    slot_ptrs, slot_gate_ptrs, slot_scale_ptrs, slot_weight_ptrs,
    a_strides, x_strides, gate_strides, x_out_strides, stored_strides, stored_scale_strides,
    slot_strides, slot_gate_strides, slot_scale_strides, weight_stride, sizes, tokens,
    POST_GATE: tl.constexpr, K: tl.constexpr, C: tl.constexpr, UNIT: tl.constexpr, WEIGHT_UNIT: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, FLAT: tl.constexpr,
):  # fmt: skip
    """A program: one tile in as many as there are programs.

    Leading dimensions have these `sizes`; strides over them are in UNITs, those of scales in elements. Slots are as in
    `_broadcast_residual_kernel`.
    """
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    if stored_ptr is not None:
        stored_dtype: tl.constexpr = stored_ptr.dtype.element_ty
    slot_weights: tl.tuple = ()
    for i in tl.static_range(len(slot_gate_ptrs)):
        slot_weights += (1.0 if slot_weight_ptrs[i] is None else tl.load(slot_weight_ptrs[i]),)
    row_tiles, column_tiles = tl.cdiv(tokens, ROWS), tl.cdiv(C, COLUMNS)
    for number in tl.range(tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0), flatten=FLAT):
        number = tl.cast(number, tl.int32)
        above = number // (BAND * column_tiles) * BAND
        height = tl.minimum(row_tiles - above, BAND)
        inside = number % (BAND * column_tiles)
        group = inside // height
        token = (above + inside % height) * ROWS + tl.arange(0, ROWS)
        live = token < tokens
        # Beyond the last token and channel the last is read once more: the loop needs no mask.
        index = index_of(tl.minimum(token, tokens - 1), sizes)
        channel = tl.minimum(group * COLUMNS + tl.arange(0, COLUMNS), C - 1)
        depth = tl.arange(0, DEPTH)
        a_ptrs = _pointers(a_ptr, index, a_strides, depth, UNIT)  # [ROWS, DEPTH]
        row = (channel.to(tl.int64),)
        weight_ptrs = _pointers(weight_ptr, row, (weight_stride,), depth, WEIGHT_UNIT)  # [COLUMNS, DEPTH]
        sums = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
        for first in tl.range(0, K, DEPTH):
            if K % DEPTH == 0:
                a, weight = tl.load(a_ptrs + first), tl.load(weight_ptrs + first)
            else:
                there = (first + depth < K)[None, :]
                a = tl.load(a_ptrs + first, mask=there, other=0.0)
                weight = tl.load(weight_ptrs + first, mask=there, other=0.0)
            sums = tl.dot(operand(a), operand(weight).T, sums, input_precision="ieee")

        index = index_of(token, sizes)  # again: kept through the loop it would cost registers
        halves = _halves(sums)
        parts = _halves(halves[0]) + _halves(halves[1])
        WIDTH: tl.constexpr = COLUMNS // 4
        kept: tl.tuple = ()
        magnitude = tl.zeros([ROWS], dtype=tl.int32)  # as integers, magnitudes have their order, NaN the largest
        for part in tl.static_range(4):
            channels = group * COLUMNS + part * WIDTH + tl.arange(0, WIDTH)
            mask = _mask(live, channels, C, COLUMNS)  # [ROWS, WIDTH]
            p = parts[part]
            if bias_ptr is not None:
                p += tl.load(bias_ptr + channels, mask=channels < C, other=0.0).to(tl.float32)[None, :]
            stored = narrow(p, dtype)
            gated = stored.to(tl.float32)
            if gate_ptr is not None:
                gated *= _load(gate_ptr, index, gate_strides, channels, mask, UNIT)
            new = gated + _load(x_ptr, index, x_strides, channels, mask, UNIT)
            for i in tl.static_range(len(slot_gate_ptrs)):
                slot = _load_cached(
                    slot_ptrs, slot_scale_ptrs, index, slot_strides, slot_scale_strides, group, part, channels, live,
                    mask, i, WIDTH, C, UNIT, COLUMNS,
                )  # fmt: skip
                if slot_weight_ptrs[i] is not None:
                    before = _load_cached(
                        slot_ptrs, slot_scale_ptrs, index, slot_strides, slot_scale_strides, group, part, channels,
                        live, mask, len(slot_gate_ptrs) + i, WIDTH, C, UNIT, COLUMNS,
                    )  # fmt: skip
                    slot += slot_weights[i] * (slot - before)
                if slot_gate_ptrs[i] is not None:
                    slot *= _load(slot_gate_ptrs[i], index, slot_gate_strides[i], channels, mask, UNIT)
                new += slot
            _store(x_out_ptr, index, x_out_strides, channels, mask, narrow(new, dtype), UNIT)
            if stored_ptr is not None:
                if POST_GATE:
                    stored = narrow(gated, dtype)
                if stored_scale_ptr is None:
                    _store(stored_ptr, index, stored_strides, channels, mask, stored, UNIT)
                elif stored_dtype == tl.uint8:
                    value, scale = four_bits(tl.where(mask, stored.to(tl.float32), 0.0), WIDTH)
                    pairs, pairs_mask, number, scale_mask = _pairs(live, group, part, WIDTH, C, COLUMNS)
                    _store(stored_ptr, index, stored_strides, pairs, pairs_mask, value, UNIT)
                    scale = narrow(scale, stored_scale_ptr.dtype.element_ty)
                    _store(stored_scale_ptr, index, stored_scale_strides, number, scale_mask, scale, 1)
                else:
                    kept += (stored,)
                    bits = stored.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF
                    magnitude = tl.maximum(magnitude, tl.max(tl.where(mask, bits, 0), 1))
        if len(kept) != 0:
            scale = scale_of(magnitude.to(tl.float32, bitcast=True), stored_dtype)
            tl.store(stored_scale_ptr + offset_of(index, stored_scale_strides) + group, scale, mask=live)
            for part in tl.static_range(4):
                channels = group * COLUMNS + part * WIDTH + tl.arange(0, WIDTH)
                value = quantized(kept[part].to(tl.float32), scale[:, None], stored_dtype)
                _store(stored_ptr, index, stored_strides, channels, _mask(live, channels, C, COLUMNS), value, UNIT)


def refusal(call: ProjectResidual) -> str | None:
    """Why this kernel cannot serve; None where it can."""
    x = call.x
    unsupported = refuse_device(x, bool(INTERPRETED.value)) or refuse_stream(x, MAX_TOKENS)
    if unsupported is not None:
        return unsupported
    if call.a.shape[-1] == 0:
        return "a has no channels; one or more are supported"
    if holds(call.cached, torch.float8_e4m3fn):
        return refuse_float8(x, "a slot")
    return refuse_float8(x, "store_dtype", call.quantised)


def launch(call: ProjectResidual, outputs: Outputs) -> None:
    """Write the outputs."""
    x = call.x
    if x.numel() == 0:
        return
    capability, multiprocessors = _device(x.device)
    chosen = tile(x.numel() // x.shape[-1], x.shape[-1], x.element_size(), capability, multiprocessors)
    project_in_tiles(call, outputs, chosen, multiprocessors)


@cache
def _device(device: torch.device) -> tuple[tuple[int, int], int]:
    """Compute capability and multiprocessors; without a device two, so that programs have several tiles there too."""
    if device.type != "cuda":
        return (9, 0), 2
    properties = torch.cuda.get_device_properties(device)
    return (properties.major, properties.minor), properties.multi_processor_count


def project_in_tiles(call: ProjectResidual, outputs: Outputs, chosen: Tile, multiprocessors: int) -> None:
    """The launch of a call, with this tile."""
    (a, weight, bias, x, gate, store, _, cached), (x_out, stored_out) = call, outputs
    *leading, channels = x.shape
    tokens = x.numel() // channels
    slots, slot_scales, gates, weights = flatten_cached(cached)
    stored, stored_scale = data_and_scale(stored_out)
    operands, scales = (a, x, gate, x_out, stored, *slots, *gates), (stored_scale, *slot_scales)
    at = addresses(tuple(leading), tuple(map(layout, operands)), tuple(map(layout, scales)))
    weight_unit = 1 if weight.stride(0) % UNIT else UNIT
    tiles = -(-tokens // chosen.rows) * -(-channels // GROUP)
    with torch.cuda.device_of(x):  # Triton launches on the current device
        _project_residual_kernel[(min(tiles, multiprocessors * chosen.programs),)](
            a, weight, bias, x, gate, x_out, stored, stored_scale, slots, gates, slot_scales, weights,
            *at.strides[:5], at.slot_scale_strides[0], at.strides[5 : 5 + len(slots)], at.strides[5 + len(slots) :],
            at.slot_scale_strides[1:], weight.stride(0) // weight_unit, at.sizes, tokens,
            POST_GATE=store == "post_gate", K=a.shape[-1], C=channels, UNIT=at.unit, WEIGHT_UNIT=weight_unit,
            ROWS=chosen.rows, COLUMNS=GROUP, DEPTH=chosen.depth, FLAT=chosen.flat,
            num_warps=chosen.warps, num_stages=chosen.stages, maxnreg=chosen.registers, enable_fp_fusion=True,
        )  # fmt: skip
