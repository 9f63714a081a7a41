"""`dequantize`: the values of an 8-bit tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backend import implementation
from ..checks import FLOATS, check_activation, check_output, check_tensor
from ..overlap import check_apart
from ..quantize.quantized import Quantized, check_group, check_quantized, group_width
from ..registration import register
from . import reference

OP = "dequantize"


def dequantize(q: Quantized, dtype: torch.dtype, *, backend: str = "auto") -> Tensor:
    """`data * scale` in float32, rounded once to `dtype`.

    Compiled, "auto" is plain torch, which the compiler fuses with what is around it.

    Args:
        q: data and scales `[..., C]`.
        dtype: a float dtype.
        backend: "auto", or one that must serve.

    Returns:
        `[..., C]`, contiguous.

    Raises:
        TypeError, ValueError: an argument is not of this kind.
        BackendError: `backend` cannot serve.
    """
    _check(q, dtype)
    if torch.compiler.is_compiling():
        if backend in ("auto", "reference"):
            return reference.dequantize(q, dtype)
        return torch.ops.pab_kernels.dequantize(q.data, q.scale, group_width(q.group, q.shape[-1]), dtype, backend)[0]
    return implementation(OP, backend, (q, dtype))(q, dtype)


def dequantize_out(q: Quantized, out: Tensor, *, backend: str = "auto") -> None:
    """`dequantize` into `out`, `[..., C]`, in its dtype, which may not overlap q. Not recorded by autograd."""
    check_activation(OP, "out", out)
    _check(q, out.dtype)
    check_output(OP, "out", out, q.shape, out.dtype, q.device)
    if torch.compiler.is_compiling():
        torch.ops.pab_kernels.dequantize_out(q.data, q.scale, group_width(q.group, q.shape[-1]), out.dtype, backend, out)
    else:
        _write(q, backend, out)


def _check(q: Any, dtype: Any) -> None:
    if not isinstance(q, Quantized):
        raise TypeError(f"{OP}: q is a {type(q).__name__}; a Quantized is supported: make one with quantize")
    if dtype not in FLOATS:
        raise TypeError(f"{OP}: dtype is {dtype}; float16, bfloat16, float32 and float64 are supported: pass one of these")
    if not isinstance(q.data, Tensor) or q.data.ndim == 0:
        check_tensor(OP, "q.data", q.data)
        raise ValueError(f"{OP}: q.data has no dimensions; [..., channels] is supported: reshape it")
    check_group(OP, q.group)
    check_quantized(OP, "q", q, q.shape, q.group, q.device)


def _functional(data: Tensor, scale: Tensor, group: int, dtype: torch.dtype, backend: str) -> list[Tensor]:
    arguments = (Quantized(data, scale, group), dtype)
    return [implementation(OP, backend, arguments)(*arguments)]


def _out(data: Tensor, scale: Tensor, group: int, dtype: torch.dtype, backend: str, out: Tensor) -> None:
    _write(Quantized(data, scale, group), backend, out)


def _write(q: Quantized, backend: str, out: Tensor) -> None:
    check_apart(OP, (("out", out),), (("q", q),))
    implementation(OP, backend, (q, out.dtype), "_out")(q, out.dtype, out)


def _fake(data: Tensor, scale: Tensor, group: int, dtype: torch.dtype, backend: str) -> list[Tensor]:
    return [torch.empty(data.shape, dtype=dtype, device=data.device)]


def _flops(*args: Any, **kwargs: Any) -> int:
    return 0


register(OP, "Tensor data, Tensor scale, int group, ScalarType dtype", ("Tensor(a!) out",), _functional, _out, _fake, _flops)
