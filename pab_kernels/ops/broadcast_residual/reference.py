"""The definition of `broadcast_residual` in pure torch."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from ..cached_outputs import add_cached_outputs, add_in_float32
from ..dispatch import Outputs
from ..norm import apply_norm

if TYPE_CHECKING:
    from . import BroadcastResidual


def compute(call: BroadcastResidual) -> Outputs:
    x, cached, norm, shift, scale = call
    if cached:
        x = add_cached_outputs(x, cached).contiguous()
    x_new = x if cached else None
    if norm is None:
        return x_new, None
    y = apply_norm(x, norm)
    if scale is not None:
        y = y * (1 + scale)
    if shift is not None:
        y = y + shift
    return x_new, y.contiguous()


def rounded_once(call: BroadcastResidual) -> Outputs:
    """The outputs as the kernels round them: everything in float32, the new x rounded once, and y, computed from it,
    rounded once."""
    x, cached, norm, shift, scale = call
    if cached:
        x = add_in_float32(x.float(), cached).to(x.dtype)
    x_new = x if cached else None
    if norm is None:
        return x_new, None
    weight, bias = (None if t is None else t.float() for t in (norm.weight, norm.bias))
    y = apply_norm(x.float(), replace(norm, weight=weight, bias=bias))
    if scale is not None:
        y = y * (1 + scale.float())
    if shift is not None:
        y = y + shift.float()
    return x_new, y.to(x.dtype)
