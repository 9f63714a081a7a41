"""`quantize`: the 8-bit form of a tensor, with one float32 scale for each group of neighbouring channels of a token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backend import implementation
from ..checks import check_float, check_tensor
from ..overlap import check_apart
from ..registration import register
from . import reference
from .quantized import (
    EIGHT_BITS,
    GROUP,
    LIMITS,
    Quantized,
    check_group,
    check_quantized,
    check_quantized_dtype,
    empty_quantized,
    group_width,
)

__all__ = [
    "EIGHT_BITS",
    "GROUP",
    "LIMITS",
    "Quantized",
    "check_group",
    "check_quantized",
    "check_quantized_dtype",
    "empty_quantized",
    "group_width",
    "quantize",
    "quantize_out",
]

OP = "quantize"


def quantize(x: Tensor, dtype: torch.dtype, group: int = GROUP, *, backend: str = "auto") -> Quantized:
    """Quantise each group of `group` channels of a token by its largest magnitude.

        1. scale = max |x| / 127 (int8) or / 448 (float8_e4m3fn), over the group
        2. data = round(x / scale), 0 where scale is 0

    In float32; rounds once, to nearest even. A group that holds an infinity or NaN dequantises to NaN. Compiled, "auto" is plain torch,
    which the compiler fuses with what is around it.

    Args:
        x: `[..., C]`, float, any strides.
        dtype: torch.int8 or torch.float8_e4m3fn.
        group: channels to a scale, 1 or more; the last group may be shorter, and one wider than C is one group.
        backend: "auto", or one that must serve.

    Returns:
        Contiguous data `[..., C]` and scale `[..., ceil(C / group)]`.

    Raises:
        TypeError, ValueError: an argument is not of this kind.
        BackendError: `backend` cannot serve.
    """
    _check(x, dtype, group)
    if torch.compiler.is_compiling():
        if backend in ("auto", "reference"):
            return reference.quantize(x, dtype, group)
        data, scale = torch.ops.pab_kernels.quantize(x, dtype, group_width(group, x.shape[-1]), backend)
        return Quantized(data, scale, group)
    return implementation(OP, backend, (x, dtype, group))(x, dtype, group)


def quantize_out(x: Tensor, out: Quantized, *, backend: str = "auto") -> None:
    """`quantize` into `out`, in its dtype and groups. Its data and scales may not overlap each other or x. Not recorded by autograd."""
    if not isinstance(out, Quantized):
        raise TypeError(f"{OP}: out is a {type(out).__name__}; a Quantized is supported: make one with empty_quantized")
    check_tensor(OP, "out.data", out.data)
    dtype, group = out.data.dtype, out.group
    _check(x, dtype, group)
    check_quantized(OP, "out", out, x.shape, group, x.device, output=True)
    if torch.compiler.is_compiling():
        torch.ops.pab_kernels.quantize_out(x, dtype, group_width(group, x.shape[-1]), backend, out.data, out.scale)
    else:
        _write(x, dtype, group, backend, out)


def _check(x: Any, dtype: Any, group: Any) -> None:
    check_float(OP, "x", x)
    check_quantized_dtype(OP, "dtype", dtype)
    check_group(OP, group)


def _functional(x: Tensor, dtype: torch.dtype, group: int, backend: str) -> list[Tensor]:
    q = implementation(OP, backend, (x, dtype, group))(x, dtype, group)
    return [q.data, q.scale]


def _out(x: Tensor, dtype: torch.dtype, group: int, backend: str, data_out: Tensor, scale_out: Tensor) -> None:
    _write(x, dtype, group, backend, Quantized(data_out, scale_out, group))


def _write(x: Tensor, dtype: torch.dtype, group: int, backend: str, out: Quantized) -> None:
    check_apart(OP, (("out.data", out.data), ("out.scale", out.scale)), (("x", x),))
    implementation(OP, backend, (x, dtype, group), "_out")(x, dtype, group, out)


def _fake(x: Tensor, dtype: torch.dtype, group: int, backend: str) -> list[Tensor]:
    q = empty_quantized(x.shape, dtype, group, x.device)
    return [q.data, q.scale]


def _flops(*args: Any, **kwargs: Any) -> int:
    return 0


register(OP, "Tensor x, ScalarType dtype, int group", ("Tensor(a!) data_out", "Tensor(b!) scale_out"), _functional, _out, _fake, _flops)
