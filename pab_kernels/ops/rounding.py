"""Casts for Triton kernels that round in the interpreter as they do on the device.

Triton's interpreter computes on numpy arrays: arithmetic and `tl.dot` misread bfloat16, a cast from float32 to bfloat16
truncates, and one to float8 drops the carry of the mantissa. Compiled, `operand` is a no-op and `narrow` one
instruction.
"""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
"""Whether kernels run in Triton's interpreter, read when they are defined, as Triton does."""


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
    ratio = tl.div_rn(x, tl.where(scale == 0, 1.0, scale))
    ratio = tl.maximum(ratio, -limit, tl.PropagateNan.ALL)  # x / subnormal can exceed it
    ratio = tl.minimum(ratio, limit, tl.PropagateNan.ALL)
    if dtype == tl.float8e4nv:
        return narrow(ratio, dtype)
    return (ratio + 12582912.0 - 12582912.0).to(dtype)  # 1.5 * 2**23: a sum has no fraction
