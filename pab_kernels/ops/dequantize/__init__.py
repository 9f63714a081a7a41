"""`dequantize`: the values of a tensor of 8 or 4 bits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checks import FLOATS, check_tensor, none_of, not_a
from ..dispatch import Outputs, run
from ..quantized import Quantized, check_group, check_quantized, group_width
from ..registration import register
from . import reference

OP = "dequantize"


class Dequantize(NamedTuple):
    """A call of `dequantize`; its output is a tensor."""

    q: Quantized
    dtype: torch.dtype

    def check(self, op: str) -> None:
        q, dtype = self
        if not isinstance(q, Quantized):
            raise not_a(op, "q", q, "a Quantized", "make one with quantize")
        if dtype not in FLOATS:
            raise TypeError(none_of(op, "dtype", dtype, FLOATS))
        if not isinstance(q.data, Tensor) or q.data.ndim == 0:
            check_tensor(op, "q.data", q.data)
            raise ValueError(f"{op}: q.data has no dimensions; [..., channels] is supported: reshape it")
        check_group(op, q.group)
        check_quantized(op, "q", q, q.shape, q.group, q.data.device)

    def flatten(self) -> tuple[Any, ...]:
        channels = self.q.shape[-1]
        return self.q.data, self.q.scale, group_width(self.q.group, channels), channels, self.dtype

    @classmethod
    def unflatten(cls, *flat: Any) -> Dequantize:
        return cls(Quantized(*flat[:4]), flat[4])

    def empty(self) -> Outputs:
        return (torch.empty(self.q.shape, dtype=self.dtype, device=self.q.device),)

    def pack(self, tensors: Sequence[Tensor]) -> Outputs:
        return tuple(tensors)


def dequantize(q: Quantized, dtype: torch.dtype, *, backend: str = "auto") -> Tensor:
    """`data * scale` in float32, rounded once to `dtype`.

    In a compiled graph "auto" is plain torch, which the compiler fuses with the code around it.

    Args:
        q: `[..., C]`.
        dtype: a float dtype.
        backend: "auto", or the name of one.

    Returns:
        `[..., C]`, contiguous.

    Raises:
        TypeError, ValueError: an argument is not supported.
        BackendError: the backend cannot serve the call.
    """
    return run(OP, Dequantize(q, dtype), backend)[0]


register(
    OP,
    Dequantize,
    "Tensor data, Tensor scale, int group, SymInt channels, ScalarType dtype",
    reference.compute,
)
