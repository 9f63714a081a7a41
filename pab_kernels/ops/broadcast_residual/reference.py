"""The definition of `broadcast_residual` in pure torch."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor

from ..cached_outputs import add_cached_outputs, add_in_float32
from ..dispatch import Outputs
from ..norm import Norm, apply_norm

if TYPE_CHECKING:
    from . import BroadcastResidual


def compute(call: BroadcastResidual) -> Outputs:
    x, cached, norm, shift, scale = call
    x = add_cached_outputs(x, cached).contiguous() if cached else x
    return x if cached else None, None if norm is None else _normed(x, norm, shift, scale).contiguous()


def rounded_once(call: BroadcastResidual) -> Outputs:
    """The outputs as kernels round them: in float32, with x rounded once, and y, computed from the rounded x, once."""
    x, cached, norm, shift, scale = call
    x = add_in_float32(x.float(), cached).to(x.dtype) if cached else x
    if norm is None:
        return x if cached else None, None
    weight, bias, shift, scale = (None if t is None else t.float() for t in (norm.weight, norm.bias, shift, scale))
    y = _normed(x.float(), replace(norm, weight=weight, bias=bias), shift, scale).to(x.dtype)
    return x if cached else None, y


def _normed(x: Tensor, norm: Norm, shift: Tensor | None, scale: Tensor | None) -> Tensor:
    y = apply_norm(x, norm)
    if scale is not None:
        y = y * (1 + scale)
    return y if shift is None else y + shift
