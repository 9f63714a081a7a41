"""Casts for Triton kernels that round in the interpreter as they do on the device.

Triton's interpreter computes on numpy arrays: arithmetic and `tl.dot` misread bfloat16, a cast from float32 to bfloat16
truncates, and one to float8 drops the carry of the mantissa. Compiled, `operand` is a no-op and `narrow` one
instruction.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .quantized import FORMATS, INT4

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
"""Whether kernels run in Triton's interpreter, read when they are defined, as Triton does."""


SMALLEST_NORMAL = tl.constexpr(2.0**-126)
GROUP_OF_FOUR_BITS = tl.constexpr(FORMATS[INT4].group)


@triton.jit
def operand(x):
    """`x` as an operand of `tl.dot`: unchanged, or float32 in the interpreter, where products of halves are exact."""
    if INTERPRETED:
        x = x.to(tl.float32)
    return x


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """float32 `x` in `dtype` (float32, float16, bfloat16, or float8e4nv up to 448), rounded once, to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = bits + 0x7FFF + ((bits >> 16) & 1)
        rounded = tl.where(x == x, rounded, bits) & 0xFFFF0000
        return rounded.to(tl.float32, bitcast=True).to(tl.bfloat16)
    if INTERPRETED and dtype == tl.float8e4nv:
        bits = x.to(tl.int32, bitcast=True)
        exponent = tl.maximum((bits >> 23) & 0xFF, 127 - 6)
        unit = ((exponent - 3) << 23).to(tl.float32, bitcast=True)  # 3 bits of mantissa
        rounded = (tl.abs(x) / unit + 8388608.0 - 8388608.0) * unit  # 2**23: a sum beyond it has no fraction
        signed = (rounded.to(tl.int32, bitcast=True) | (bits & -2147483648)).to(tl.float32, bitcast=True)
        code = signed.to(tl.float8e4nv).to(tl.int8, bitcast=True)
        return tl.where(x == x, code, 0x7F).to(tl.int8).to(tl.float8e4nv, bitcast=True)
    return x.to(dtype)


@triton.jit
def scale_of(magnitude, dtype: tl.constexpr):
    """The scale of a group of channels with this largest magnitude, in float32, as in `quantize`."""
    return tl.div_rn(magnitude, 448.0 if dtype == tl.float8e4nv else 127.0)


@triton.jit
def quantized(x, scale, dtype: tl.constexpr):
    """float32 `x` in 8 bits, `round(x / scale)` and 0 where scale is 0, as in `quantize`; `scale` broadcasts to `x`."""
    limit: tl.constexpr = 448.0 if dtype == tl.float8e4nv else 127.0
    ratio = _clamped(tl.div_rn(x, tl.where(scale == 0, 1.0, scale)), -limit, limit)  # x / subnormal can exceed it
    if dtype == tl.float8e4nv:
        return narrow(ratio, dtype)
    return _rounded(ratio).to(dtype)


@triton.jit
def four_bits(x, GROUP: tl.constexpr):
    """float32 `x` `[ROWS, W]` in 4 bits, as in `quantize`.

    Returns bytes `[ROWS, W / 2]` and the scales of groups of GROUP channels, `[ROWS, W / GROUP]` in float32.
    """
    ROWS: tl.constexpr = x.shape[0]
    W: tl.constexpr = x.shape[1]
    grouped = tl.reshape(x, [ROWS, W // GROUP, GROUP])
    bits = grouped.to(tl.uint32, bitcast=True)
    # With the sign last, bits have the order of magnitudes, with NaN the largest and, of two alike, the negative one.
    most = tl.max((bits << 1) | (bits >> 31), 2)
    extreme = ((most >> 1) | (most << 31)).to(tl.float32, bitcast=True)
    scale = narrow(extreme * -0.125, tl.bfloat16).to(tl.float32)
    small = tl.abs(scale) < SMALLEST_NORMAL  # not of NaN
    inverse = tl.where(small, 0.0, tl.div_rn(1.0, tl.where(small, 1.0, scale)))
    whole = _rounded(_clamped(grouped * inverse[:, :, None], -8.0, 7.0)).to(tl.int8)
    low, high = tl.split(tl.reshape(whole, [ROWS, W // 2, 2]))
    return (low.to(tl.uint8, bitcast=True) & 15) | (high.to(tl.uint8, bitcast=True) << 4), scale


@triton.jit
def store_four_bits(ptrs, scale_ptrs, x, live, FIRST: tl.constexpr, D: tl.constexpr):
    """Store channels FIRST to FIRST + W of heads of D channels, float32 `x` `[ROWS, W]`, 0 beyond D, in 4 bits.

    Pointers to the bytes and scales of each row are `[ROWS, 1]`; only the `live` rows are stored.
    """
    W: tl.constexpr = x.shape[1]
    group: tl.constexpr = min(W, GROUP_OF_FOUR_BITS)
    pairs, scale = four_bits(x, group)
    at = FIRST // 2 + tl.arange(0, W // 2)
    tl.store(ptrs + at[None, :], pairs, mask=live[:, None] & (at < D // 2)[None, :])
    at = FIRST // GROUP_OF_FOUR_BITS + tl.arange(0, W // group)
    tl.store(scale_ptrs + at[None, :], narrow(scale, scale_ptrs.dtype.element_ty), mask=live[:, None])


@triton.jit
def from_four_bits(pairs):
    """The numbers in bytes `[ROWS, W / 2]`, `[ROWS, W]` in float32; a value is one times its scale."""
    flipped = pairs ^ 0x88  # in two's complement this adds 8
    both = tl.join(flipped & 15, flipped >> 4).to(tl.uint32)  # [ROWS, W / 2, 2]
    numbers = (both | 0x4B000000).to(tl.float32, bitcast=True) - 8388616.0  # 2**23 + 8: cheaper than a conversion
    return tl.reshape(numbers, [pairs.shape[0], 2 * pairs.shape[1]])


@triton.jit
def _clamped(x, least: tl.constexpr, most: tl.constexpr):
    """`x` within these limits; NaN stays."""
    return tl.minimum(tl.maximum(x, least, tl.PropagateNan.ALL), most, tl.PropagateNan.ALL)


@triton.jit
def _rounded(x):
    """float32 `x`, which is small, rounded to a whole number."""
    return x + 12582912.0 - 12582912.0  # 1.5 * 2**23: a sum has no fraction
