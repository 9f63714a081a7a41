"""`quantize`: a tensor in 8 or 4 bits, with a scale for each group of neighbouring channels of a token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checks import check_float
from ..dispatch import Outputs, run
from ..quantized import FORMATS, Quantized, check_group, check_quantized_dtype, empty_quantized, group_width, stored_of
from ..registration import register
from . import reference

OP = "quantize"


class Quantize(NamedTuple):
    """A call of `quantize`; its output is a `Quantized`."""

    x: Tensor
    dtype: torch.dtype
    group: int

    def check(self, op: str) -> None:
        check_float(op, "x", self.x)
        check_quantized_dtype(op, "dtype", self.dtype)
        check_group(op, self.group)

    def flatten(self) -> tuple[Any, ...]:
        return self.x, self.dtype, group_width(self.group, self.x.shape[-1])

    @classmethod
    def unflatten(cls, *flat: Any) -> Quantize:
        return cls(*flat)

    def empty(self) -> Outputs:
        return (empty_quantized(self.x.shape, self.dtype, self.group, self.x.device),)

    def pack(self, tensors: Sequence[Tensor]) -> Outputs:
        return (stored_of(*tensors, channels=self.x.shape[-1], group=self.group),)


def quantize(x: Tensor, dtype: torch.dtype, group: int | None = None, *, backend: str = "auto") -> Quantized:
    """Quantise each group of `group` channels of a token by its largest magnitude.

        1. scale = max |x| / 127 (int8) or / 448 (float8_e4m3fn), over the group; in int4 the value of largest magnitude
           (of two alike, the negative one) / -8
        2. data = round(x / scale), 0 where scale is 0; in int4 round(x (1 / scale)) up to 7, 0 where |scale| < 2^-126;
           two share a byte: see `Quantized`

    Computes in float32 and rounds once, to nearest even; a scale of int4 rounds to bfloat16 before it divides. A group
    that holds an infinity or NaN dequantises to NaN. In a compiled graph "auto" is plain torch, which the compiler
    fuses with the code around it.

    Args:
        x: `[..., C]`, float, any strides.
        dtype: torch.int8, torch.float8_e4m3fn or torch.int4.
        group: channels to a scale, 1 or more; the last group may be shorter, and a group wider than C is all channels.
            Default 128, and 32 for int4.
        backend: "auto", or the name of one.

    Returns:
        Contiguous data and scales, as `Quantized` has them.

    Raises:
        TypeError, ValueError: an argument is not supported.
        BackendError: the backend cannot serve the call.

    Example:
        >>> q = quantize(torch.randn(2, 6, 200), torch.int8)
        >>> q.data.shape, q.scale.shape
        (torch.Size([2, 6, 200]), torch.Size([2, 6, 2]))
    """
    check_quantized_dtype(OP, "dtype", dtype)
    return run(OP, Quantize(x, dtype, FORMATS[dtype].group if group is None else group), backend)[0]


register(
    OP,
    Quantize,
    "Tensor x, ScalarType dtype, int group",
    reference.compute,
)
